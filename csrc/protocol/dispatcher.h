// Dispatcher: plans where my tokens go, tells every rank with a header, and sends each token's row once to
// every rank that owns one of its experts.
#pragma once

#include "protocol/plan.h"
#include "protocol/platform.h"
#include "protocol/signal.h"

namespace flashmoe {

template <Platform P>
class Dispatcher {
 public:
  FLASHMOE_HD explicit Dispatcher(const Context<P>& context) : c_(context) {}

  FLASHMOE_HD Step step() {
    Counters& n = *c_.ws.counters;
    if (!P::load_acquire(&n.plan_ready)) {
      if (!P::compare_exchange(&n.plan_claimed, 0, 1)) return Step::kIdle;
      plan_segments(c_.call, c_.ws);
      plan_slots(c_.call, c_.ws);
      // Headers are tiny and leave first: destinations form row blocks while the rows travel.
      for (int i = 1; i < c_.call.ep_size; ++i) send_header(c_.call.canonical_source(i));
      P::store_release(&n.plan_ready, 1);
      return Step::kProgress;
    }
    const uint32_t tasks = num_send_tasks();
    if (P::load_acquire(&n.send_head) >= tasks) return Step::kDone;
    const uint32_t ticket = P::fetch_add(&n.send_head, 1);
    if (ticket >= tasks) return Step::kDone;
    // Chunk-major, so that every destination has work to start on early.
    const int peers = c_.call.ep_size - 1;
    send_chunk(c_.call.canonical_source(1 + int(ticket) % peers), ticket / peers);
    P::fetch_add(&n.sends_done, 1);
    return Step::kProgress;
  }

  // Everything that this rank has to send is on its way.
  FLASHMOE_HD bool done() const {
    const Counters& n = *c_.ws.counters;
    return P::load_acquire(&n.plan_ready) && P::load_acquire(&n.sends_done) == num_send_tasks();
  }

 private:
  // Some of these tickets name a chunk that a shorter packet does not have: they cost nothing.
  FLASHMOE_HD uint32_t num_send_tasks() const {
    uint32_t most = 0;
    for (int d = 0; d < c_.call.ep_size; ++d) {
      const uint32_t chunks = ceil_div<uint32_t>(packet_slots(c_.ws, d), kChunkRows);
      most = chunks > most ? chunks : most;
    }
    return most * uint32_t(c_.call.ep_size - 1);
  }

  FLASHMOE_HD void send_header(int d) {
    const Call& call = c_.call;
    const Workspace& ws = c_.ws;
    const uint32_t entries = packet_entries(call, ws, d);
    const uint64_t word = header_signal(call.epoch, call.tag, entries != 0);
    const size_t signal = c_.layout.header_signal_at(call.ep_rank);
    if (entries == 0) {
      // No reply will say that this was read, so the end of the call waits until it has landed (design D5).
      c_.platform.commit(d, 0, nullptr, 0, signal, word, Traffic::kHeader);
      return;
    }
    const int begin = call.rank_begin[d], experts = call.rank_begin[d + 1] - begin;
    const size_t offset = c_.layout.header_at(d, call.ep_rank);
    std::byte* header = c_.platform.window(d, offset, c_.header_stage(d));
    const uint32_t first = ws.segment_row[begin];
    *reinterpret_cast<PacketHeader*>(header) = {call.tag, packet_slots(ws, d), entries, first, ws.segment_signal[begin]};
    uint32_t* entry_begin = header_entry_begin(header);
    for (int e = 0; e <= experts; ++e) entry_begin[e] = ws.segment_row[begin + e] - first;
    P::copy(header_entry_slot(header, experts), ws.row_slot + first, entries * sizeof(uint32_t));
    c_.platform.commit(d, offset, header, header_bytes(experts, entries), signal, word, Traffic::kHeader);
  }

  FLASHMOE_HD void send_chunk(int d, uint32_t chunk) {
    const Call& call = c_.call;
    const uint32_t slots = packet_slots(c_.ws, d), begin = chunk * kChunkRows;
    if (begin >= slots) return;
    const uint32_t end = begin + kChunkRows < slots ? begin + kChunkRows : slots;
    const size_t row_bytes = call.row_bytes(), offset = c_.layout.inbox_at(d, call.ep_rank, begin, row_bytes);
    std::byte* rows = c_.platform.window(d, offset, c_.inbox_stage(d, begin));
    const uint32_t* token = c_.ws.slot_token + c_.ws.slot_begin[d];
    for (uint32_t s = begin; s < end; ++s) P::copy(rows + (s - begin) * row_bytes, call.x + token[s] * row_bytes, row_bytes);
    c_.platform.commit(d, offset, rows, (end - begin) * row_bytes, c_.layout.chunk_signal_at(call.ep_rank, int(chunk)),
                       make_signal(call.epoch, 0), Traffic::kRows);
  }

  Context<P> c_;
};

}  // namespace flashmoe
