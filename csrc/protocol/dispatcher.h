// Dispatcher: plans where my tokens go, tells every rank with a header, and sends each token's row once to
// every rank that owns one of its experts.
#pragma once

#include "protocol/plan.h"
#include "protocol/platform.h"
#include "protocol/signal.h"
#include "protocol/work.h"

namespace flashmoe {

template <Platform P>
class Dispatcher {
 public:
  FLASHMOE_ROLE explicit Dispatcher(const Context<P>& context) : c_(context) {}

  template <LaneGroup Lanes>
  FLASHMOE_ROLE bool next(const Lanes& lanes, Work& work) {
    if (lanes.rank() == 0) work = next_alone();
    work = lanes.broadcast(work);
    return work.kind != WorkKind::kNone;
  }

  template <ThreadGroup Group>
  FLASHMOE_ROLE void perform(const Group& group, const Work& work) {
    if (work.kind == WorkKind::kPlan)
      plan(group);
    else
      write_chunk(group, chunk_of(work));
  }

  // Tells the others that `work` is done; by one thread, once all who performed it have met.
  FLASHMOE_ROLE void finish(const Work& work) {
    Counters& n = *c_.ws.counters;
    if (work.kind == WorkKind::kPlan) {
      n.send_tasks = most_chunks() * uint32_t(c_.call.ep_size - 1);
      P::store_release(&n.plan_ready, 1);
      return;
    }
    if (const Chunk chunk = chunk_of(work); chunk.num_rows)
      c_.platform.commit(work.index, chunk.offset, chunk.rows, chunk.num_rows * c_.slot_bytes(),
                         c_.layout.chunk_signal_at(c_.call.ep_rank, uint32_t(work.part)), make_signal(c_.call.epoch, 0),
                         Traffic::kRows);
    P::fetch_add(&n.sends_done, 1);
  }

  // Everything that this rank has to send is on its way.
  FLASHMOE_ROLE bool done() const {
    const Counters& n = *c_.ws.counters;
    return P::load_acquire(&n.plan_ready) && P::load_acquire(&n.sends_done) == n.send_tasks;
  }

 private:
  FLASHMOE_ROLE Work next_alone() {
    if (all_sent_) return {};
    Counters& n = *c_.ws.counters;
    if (!P::load_acquire(&n.plan_ready)) {
      const bool mine = !P::load_acquire(&n.plan_claimed) && P::compare_exchange(&n.plan_claimed, 0, 1);
      return {mine ? WorkKind::kPlan : WorkKind::kNone, 0, 0};
    }
    // Some of these tickets name a chunk that a shorter packet does not have: they cost nothing.
    const uint32_t ticket = n.send_tasks ? P::fetch_add_relaxed(&n.send_head, 1) : 0;
    all_sent_ = ticket >= n.send_tasks;
    if (all_sent_) return {};
    // Chunk-major, so that every destination has work to start on early.
    const int peers = c_.call.ep_size - 1;
    return {WorkKind::kSendChunk, c_.call.canonical_source(1 + int(ticket) % peers), int(ticket) / peers};
  }

  template <ThreadGroup Group>
  FLASHMOE_ROLE void plan(const Group& group) {
    plan_segments(group, c_.call, c_.ws);
    plan_slots(group, c_.call, c_.ws);
    if (c_.backward()) plan_weights(group, c_.call, c_.ws);
    // Headers are tiny and leave first: destinations form row blocks while the rows travel.
    const int ep_size = c_.call.ep_size;
    for (int i = 1; i < ep_size; ++i) write_header(group, c_.call.canonical_source(i));
    group.sync();
    for (int i = 1 + group.rank(); i < ep_size; i += group.size()) commit_header(c_.call.canonical_source(i));
  }

  FLASHMOE_ROLE uint32_t most_chunks() const {
    uint32_t most = 0;
    for (int d = 0; d < c_.call.ep_size; ++d) {
      const uint32_t chunks = ceil_div<uint32_t>(packet_slots(c_.ws, d), kChunkRows);
      most = chunks > most ? chunks : most;
    }
    return most;
  }

  FLASHMOE_ROLE std::byte* header_window(int d) const {
    return c_.platform.window(d, c_.layout.header_at(d, c_.call.ep_rank), c_.header_stage(d));
  }

  template <ThreadGroup Group>
  FLASHMOE_ROLE void write_header(const Group& group, int d) {
    const Call& call = c_.call;
    const Workspace& ws = c_.ws;
    const uint32_t entries = packet_entries(call, ws, d);
    if (entries == 0) return;
    const int begin = call.rank_begin[d], experts = call.rank_begin[d + 1] - begin;
    std::byte* header = header_window(d);
    const uint32_t first = ws.segment_row[begin];
    if (group.rank() == 0)
      *reinterpret_cast<PacketHeader*>(header) = {call.tag, packet_slots(ws, d), entries, first, ws.segment_signal[begin]};
    uint32_t* entry_begin = header_entry_begin(header);
    for (int e = group.rank(); e <= experts; e += group.size()) entry_begin[e] = ws.segment_row[begin + e] - first;
    P::copy(group, header_entry_slot(header, experts), ws.row_slot + first, entries * sizeof(uint32_t));
    if (c_.backward())
      P::copy(group, header_entry_weight(header, experts, entries), c_.backward_tables().row_weight + first, entries * sizeof(float));
  }

  FLASHMOE_ROLE void commit_header(int d) {
    const Call& call = c_.call;
    const uint32_t entries = packet_entries(call, c_.ws, d);
    const int experts = call.rank_begin[d + 1] - call.rank_begin[d];
    // Nothing of an empty packet but its word is sent. No reply will say that this was read, so the end of the call
    // waits until it has landed (design D5).
    const bool rows = entries != 0;
    c_.platform.commit(d, rows ? c_.layout.header_at(d, call.ep_rank) : 0, rows ? header_window(d) : nullptr,
                       rows ? header_bytes(experts, entries, c_.backward()) : 0, c_.layout.header_signal_at(call.ep_rank),
                       header_signal(call.epoch, call.tag, rows), Traffic::kHeader);
  }

  struct Chunk {
    uint32_t num_rows;      // 0: the packet is shorter
    const uint32_t* token;  // of each row
    size_t offset;          // of its first row in the destination's heap
    std::byte* rows;        // where to write them
  };
  FLASHMOE_ROLE Chunk chunk_of(const Work& work) const {
    const int d = work.index;
    const uint32_t slots = packet_slots(c_.ws, d), begin = uint32_t(work.part) * kChunkRows;
    if (begin >= slots) return {};
    const size_t offset = c_.layout.inbox_at(d, c_.call.ep_rank, begin, c_.slot_bytes());
    return {begin + kChunkRows < slots ? kChunkRows : slots - begin, c_.ws.slot_token + c_.ws.slot_begin[d] + begin,
            offset, c_.platform.window(d, offset, c_.inbox_stage(d, begin))};
  }

  template <ThreadGroup Group>
  FLASHMOE_ROLE void write_chunk(const Group& group, const Chunk& chunk) {
    const size_t row_bytes = c_.call.row_bytes();
    for (uint32_t r = group.warp(); r < chunk.num_rows; r += group.num_warps()) {
      std::byte* slot = chunk.rows + r * c_.slot_bytes();
      P::copy(group.lanes(), slot, c_.call.x + chunk.token[r] * row_bytes, row_bytes);
      if (c_.backward()) P::copy(group.lanes(), slot + row_bytes, c_.call.grad.y + chunk.token[r] * row_bytes, row_bytes);
    }
  }

  Context<P> c_;
  bool all_sent_ = false;  // or taken to be sent, by whomever: from then on this worker looks no more
};

}  // namespace flashmoe
