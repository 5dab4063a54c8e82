// Subscriber: the one decider. It reads each source's header signal once per epoch, takes the packet's counts
// over into local tables, and follows the chunks as they land.
//
// Sources are decided in canonical order: the offset of a source's rows in an expert's canonical list needs
// the counts of all sources before it, and of no other.
#pragma once

#include "protocol/group.h"
#include "protocol/platform.h"
#include "protocol/signal.h"
#include "protocol/workspace.h"

namespace flashmoe {

template <Platform P>
class Subscriber {
 public:
  FLASHMOE_ROLE explicit Subscriber(const Context<P>& context) : c_(context) {}

  // One look at what has arrived. True if something has.
  template <LaneGroup Lanes>
  FLASHMOE_ROLE bool step(const Lanes& lanes) {
    Counters& n = *c_.ws.counters;
    // Workers take turns in this role; two deciders for one word would be unsound (design D5).
    const bool mine = lanes.rank() == 0 && !done() && P::compare_exchange(&n.subscriber_lock, 0, 1);
    if (!lanes.broadcast(uint32_t(mine))) return false;
    bool progress = false;
    while (decide_next_source(lanes)) progress = true;
    if (follow_chunks(lanes)) progress = true;
    lanes.sync();
    if (lanes.rank() == 0) P::store_release(&n.subscriber_lock, 0);
    return progress;
  }

  FLASHMOE_ROLE bool done() const { return P::load_acquire(&c_.ws.counters->subscriber_done); }

  // What is being waited for from `source`, if anything: for the report of a deadline.
  FLASHMOE_ROLE bool waits_for(int source, Phase& phase, uint64_t& seen) const {
    const int known = int(P::load_acquire(&c_.ws.counters->headers_known));
    const int i = (source - c_.call.ep_rank + c_.call.ep_size) % c_.call.ep_size;
    if (i == 0) return false;
    if (i >= known) {
      phase = Phase::kHeader, seen = c_.platform.test_signal(c_.layout.header_signal_at(source));
      return decide_header(seen, c_.call.epoch, c_.call.tag) == HeaderVerdict::kNotYet;
    }
    const uint32_t ready = P::load_acquire(&c_.ws.chunks_ready[i]);
    if (ready == c_.ws.num_chunks[i]) return false;
    phase = Phase::kChunk, seen = c_.platform.test_signal(c_.layout.chunk_signal_at(source, ready));
    return true;
  }

 private:
  template <LaneGroup Lanes>
  FLASHMOE_ROLE bool decide_next_source(const Lanes& lanes) {
    Counters& n = *c_.ws.counters;
    const int i = int(n.headers_known);
    if (i == c_.call.ep_size) return false;
    if (i == 0) {
      if (!lanes.broadcast(uint32_t(lanes.rank() == 0 && P::load_acquire(&n.plan_ready)))) return false;
      take_own_plan(lanes);
    } else {
      const int source = c_.call.canonical_source(i);
      // Read once, by one: all lanes must come to the same verdict.
      const uint64_t word =
          lanes.broadcast(lanes.rank() == 0 ? c_.platform.test_signal(c_.layout.header_signal_at(source)) : uint64_t(0));
      switch (decide_header(word, c_.call.epoch, c_.call.tag)) {
        case HeaderVerdict::kNotYet: return false;
        case HeaderVerdict::kNoRows: take_nothing(lanes, i); break;
        case HeaderVerdict::kRows:
          if (!take_packet(lanes, i, source, word)) return false;
          break;
        case HeaderVerdict::kOtherCall:
          // Only a packet with rows has a header to read; of an empty one the digest must do.
          if (lanes.rank() == 0) refuse(source, word, signal_payload(word) & 1 ? &header_of(source).tag : nullptr);
          return false;
      }
    }
    lanes.sync();
    if (lanes.rank() == 0) P::store_release(&n.headers_known, uint32_t(i + 1));
    lanes.sync();
    return true;
  }

  template <LaneGroup Lanes>
  FLASHMOE_ROLE void take_own_plan(const Lanes& lanes) {
    const Call& call = c_.call;
    const uint32_t* rows = c_.ws.segment_row + call.rank_begin[call.ep_rank];
    for (int e = lanes.rank(); e <= call.num_local_experts(); e += lanes.size()) c_.ws.entry_begin[e] = rows[e] - rows[0];
    if (lanes.rank() == 0) c_.ws.packet_row[0] = rows[0];
    take_segments(lanes, 0, c_.ws.segment_signal[call.rank_begin[call.ep_rank]]);
  }

  template <LaneGroup Lanes>
  FLASHMOE_ROLE void take_nothing(const Lanes& lanes, int i) {
    const int experts = c_.call.num_local_experts();
    for (int e = lanes.rank(); e <= experts; e += lanes.size()) c_.ws.entry_begin[i * (experts + 1) + e] = 0;
    take_segments(lanes, i, 0);
  }

  FLASHMOE_ROLE const PacketHeader& header_of(int source) const {
    return *reinterpret_cast<const PacketHeader*>(c_.platform.heap() + c_.layout.header_at(c_.call.ep_rank, source));
  }

  template <LaneGroup Lanes>
  FLASHMOE_ROLE bool take_packet(const Lanes& lanes, int i, int source, uint64_t word) {
    const int experts = c_.call.num_local_experts();
    const PacketHeader& packet = header_of(source);
    if (!(packet.tag == c_.call.tag)) {
      if (lanes.rank() == 0) refuse(source, word, &packet.tag);
      return false;
    }
    const uint32_t* entry_begin = header_entry_begin(reinterpret_cast<const std::byte*>(&packet));
    for (int e = lanes.rank(); e <= experts; e += lanes.size()) c_.ws.entry_begin[i * (experts + 1) + e] = entry_begin[e];
    if (lanes.rank() == 0) {
      c_.ws.packet_row[i] = packet.result_row;
      c_.ws.num_chunks[i] = ceil_div<uint32_t>(packet.num_slots, kChunkRows);
    }
    take_segments(lanes, i, packet.result_signal);
    return true;
  }

  template <LaneGroup Lanes>
  FLASHMOE_ROLE void take_segments(const Lanes& lanes, int i, uint32_t signal) {
    const int experts = c_.call.num_local_experts();
    const uint32_t* entry_begin = c_.ws.entry_begin + i * (experts + 1);
    lanes.sync();
    for (int first = 0; first < experts; first += lanes.size()) {
      const int e = first + lanes.rank();
      const uint32_t rows = e < experts ? entry_begin[e + 1] - entry_begin[e] : 0;
      uint32_t all_signals;
      const uint32_t before = lanes.exclusive_sum(max_runs(rows), all_signals);
      if (e < experts) {
        c_.ws.row_offset[(i + 1) * experts + e] = c_.ws.row_offset[i * experts + e] + rows;
        c_.ws.run_signal[i * experts + e] = signal + before;
      }
      signal += all_signals;
    }
  }

  // Each lane follows sources of its own.
  template <LaneGroup Lanes>
  FLASHMOE_ROLE bool follow_chunks(const Lanes& lanes) {
    Counters& n = *c_.ws.counters;
    const int known = int(n.headers_known);
    const uint64_t here = make_signal(c_.call.epoch, 0);
    bool progress = false, all = known == c_.call.ep_size;
    for (int i = 1 + lanes.rank(); i < known; i += lanes.size()) {
      const int source = c_.call.canonical_source(i);
      const uint32_t before = c_.ws.chunks_ready[i];
      uint32_t ready = before;
      while (ready < c_.ws.num_chunks[i] &&
             c_.platform.test_signal(c_.layout.chunk_signal_at(source, ready)) == here)
        ++ready;
      if (ready != before) P::store_release(&c_.ws.chunks_ready[i], ready), progress = true;
      all = all && ready == c_.ws.num_chunks[i];
    }
    progress = !lanes.all(!progress), all = lanes.all(all);
    if (all && lanes.rank() == 0) P::store_release(&n.subscriber_done, 1);
    return progress || all;
  }

  FLASHMOE_ROLE void refuse(int source, uint64_t word, const CallTag* tag) {
    fail_call(c_, Failure::kOtherCall, [&](Status& status) {
      status.phase = uint32_t(Phase::kHeader), status.peer = source, status.expert = -1, status.seen = word;
      if (tag) status.peer_tag = *tag, status.has_peer_tag = 1;
    });
  }

  Context<P> c_;
};

}  // namespace flashmoe
