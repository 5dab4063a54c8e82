// Processor: issues the tiles of row blocks, passes on what a finished tile completes, and says which tokens have all
// their rows back. What lies between the issue and the end of a tile is the engine's.
//
// Down tiles go before up tiles: results leave early, the weights' neighbours are still in cache, and a ring
// slot comes free soon. Weight gradients come last: they fill the time in which rows and results travel.
#pragma once

#include "protocol/backward.h"
#include "protocol/signal.h"
#include "protocol/tile.h"

namespace flashmoe {

template <Platform P>
class Processor {
 public:
  FLASHMOE_ROLE Processor(const Context<P>& context, const TileShape& tiles) : c_(context), tiles_(tiles) {}

  template <LaneGroup Lanes>
  FLASHMOE_ROLE bool next(const Lanes& lanes, Work& work) {
    if (lanes.rank() == 0) work = next_tile();
    work = lanes.broadcast(work);
    if (work.kind != WorkKind::kNone || next_combine(lanes, work)) return true;
    if (!c_.backward()) return false;
    work = lanes.broadcast(lanes.rank() == 0 ? next_gradient() : Work{});
    return work.kind != WorkKind::kNone;
  }

  // Tells the others that `work` is done; by one thread, once all who wrote its results have met.
  FLASHMOE_ROLE void finish(const Work& work) {
    if (work.kind == WorkKind::kGradTile) {
      if (P::fetch_add(&c_.backward_tables().grads_done[work.index], 1) + 1 == tiles_.grad_tiles) release_expert(work.index);
      return;
    }
    RowBlock& block = c_.ws.ring[work.index];
    // Each tile releases its columns into the counter; the last arriver acquires them all and hands them on.
    if (work.kind == WorkKind::kUpTile) {
      if (P::fetch_sub(&block.up_tiles_left, 1) == 1) {
        push_down<P>(c_.ws.counters->down, c_.ws.down_entries, num_down_places(c_.ws.ring_blocks),
                     uint32_t(work.index));
        if (c_.backward()) P::fetch_add(&c_.backward_tables().blocks_ready[block.local_expert], 1);
      }
    } else if (work.kind == WorkKind::kDownTile) {
      if (P::fetch_sub(&block.down_tiles_left, 1) == 1) return_rows(block, uint32_t(work.index));
    } else {
      P::fetch_add(&c_.ws.counters->combine_done, 1);
    }
  }

  FLASHMOE_ROLE bool all_combined() const {
    return P::load_acquire(&c_.ws.counters->combine_done) == uint32_t(c_.call.num_combine_tasks());
  }

  // My weight gradients are there, and nobody reads my packets any more. Once the plan is there.
  FLASHMOE_ROLE bool all_released() const {
    if (!c_.backward()) return true;
    if (P::load_acquire(&c_.ws.counters->experts_released) != uint32_t(c_.call.num_local_experts())) return false;
    for (int position = 0; position < c_.call.num_experts; ++position)
      if (awaits_release(position)) return false;
    return true;
  }

  // Runs of my results that have come so far, and releases, from all ranks. They come in the order of their experts, not
  // of my tokens, so a combine may wait for the last of them while all others arrive.
  template <LaneGroup Lanes>
  FLASHMOE_ROLE uint32_t runs_here(const Lanes& lanes) const {
    if (!lanes.broadcast(P::load_acquire(&c_.ws.counters->plan_ready))) return 0;
    uint32_t here = 0, all = 0;
    for (int position = lanes.rank(); position < c_.call.num_experts; position += lanes.size())
      here += runs_here_of(position);
    lanes.exclusive_sum(here, all);
    return all;
  }

  // What I wait for from `peer`, if anything: for the report of a deadline. Of results the first of my pairs' to come.
  template <LaneGroup Lanes>
  FLASHMOE_ROLE bool waits_for(const Lanes& lanes, int peer, Phase& phase, int& expert, uint64_t& seen) const {
    const Call& call = c_.call;
    if (!lanes.broadcast(uint32_t(lanes.rank() == 0 && P::load_acquire(&c_.ws.counters->plan_ready)))) return false;
    for (int first = 0; first < call.num_tokens * call.top_k; first += lanes.size()) {
      const int pair = first + lanes.rank();
      const int before = lanes.leading(!is_missed(pair, peer));
      if (before == lanes.size()) continue;
      const int position = call.expert_position[call.topk_ids[first + before]];
      phase = Phase::kResults, expert = position - call.rank_begin[peer];
      seen = c_.platform.test_signal(c_.layout.result_signal_at(c_.ws.segment_signal[position]));
      return true;
    }
    if (!c_.backward()) return false;
    // A word is looked at by one lane alone: it may change between two looks, and lanes must not part over it.
    const int end = call.rank_begin[peer + 1];
    for (int first = call.rank_begin[peer]; first < end; first += lanes.size()) {
      const int position = first + lanes.rank();
      const int before = lanes.leading(position >= end || !awaits_release(position));
      if (before == lanes.size()) continue;
      phase = Phase::kRelease, expert = first + before - call.rank_begin[peer];
      seen = c_.platform.test_signal(c_.layout.release_signal_at(first + before));
      return true;
    }
    return false;
  }

 private:
  FLASHMOE_ROLE Work next_tile() {
    Workspace& ws = c_.ws;
    TileTask task;
    DownQueue& down = ws.counters->down;
    UpQueue& up = ws.counters->up;
    const uint32_t down_head = P::load_relaxed(&down.head), up_head = P::load_relaxed(&up.head);
    if (take_down<P>(down, down_head, ws.down_entries, num_down_places(ws.ring_blocks), tiles_.down_tiles,
                     down_ticket_, task))
      return {WorkKind::kDownTile, int32_t(task.ring_slot), task.tile};
    if (take_up<P>(up, up_head, ws.bundles, ws.ring_blocks, tiles_.up_tiles, up_ticket_, task))
      return {WorkKind::kUpTile, int32_t(task.ring_slot), task.tile};
    return {};
  }

  // Weight gradients of the experts in turn, each once its rows have all gone through their up tiles.
  FLASHMOE_ROLE Work next_gradient() {
    Counters& n = *c_.ws.counters;
    if (P::load_acquire(&n.headers_known) != uint32_t(c_.call.ep_size)) return {};
    const uint32_t tiles = tiles_.grad_tiles, all = tiles * uint32_t(c_.call.num_local_experts());
    if (grad_ticket_ == kNoTicket) {
      const uint32_t head = P::load_relaxed(&n.grad_head);
      if (head >= all || !expert_is_ready(head / tiles)) return {};
      grad_ticket_ = P::fetch_add_relaxed(&n.grad_head, 1);
    }
    if (grad_ticket_ >= all || !expert_is_ready(grad_ticket_ / tiles)) return {};
    const Work work{WorkKind::kGradTile, int32_t(grad_ticket_ / tiles), int32_t(grad_ticket_ % tiles)};
    grad_ticket_ = kNoTicket;
    return work;
  }

  FLASHMOE_ROLE bool expert_is_ready(uint32_t expert) const {
    return P::load_acquire(&c_.backward_tables().blocks_ready[expert]) == ceil_div<uint32_t>(rows_of_expert(c_, expert), kBlockM);
  }

  // In a backward call a reply does not mean consumed: weight gradients are sums over rows that were replied to long ago.
  // So a source hears of each of its segments when it is read no more, and its call does not end before.
  FLASHMOE_ROLE void release_expert(int expert) {
    const Call& call = c_.call;
    const int experts = call.num_local_experts();
    const size_t signal = c_.layout.release_signal_at(call.rank_begin[call.ep_rank] + expert);
    for (int i = 1; i < call.ep_size; ++i)
      if (c_.ws.row_offset[(i + 1) * experts + expert] != c_.ws.row_offset[i * experts + expert])
        c_.platform.commit(call.canonical_source(i), 0, nullptr, 0, signal, make_signal(call.epoch, 0), Traffic::kSignal);
    P::fetch_add(&c_.ws.counters->experts_released, 1);
  }
  // My rows went to that expert, of another rank, and are still read there.
  FLASHMOE_ROLE bool awaits_release(int position) const {
    const Call& call = c_.call;
    const bool mine = call.rank_begin[call.ep_rank] <= position && position < call.rank_begin[call.ep_rank + 1];
    const bool sent = !mine && c_.ws.segment_row[position + 1] != c_.ws.segment_row[position];
    return sent && !is_of_this_call(c_.layout.release_signal_at(position));
  }

  // In a forward call a reply means consumed: after the last run of a packet nothing of it is read here (design D5).
  FLASHMOE_ROLE void return_rows(const RowBlock& block, uint32_t ring_slot) {
    const Call& call = c_.call;
    const int experts = call.num_local_experts(), expert = block.local_expert;
    for_each_run(call, c_.ws, block, 0, block.num_rows, [&](const Run& run) {
      const int i = run.source_index;
      const uint32_t offset = c_.ws.row_offset[i * experts + expert];
      const uint32_t rows = c_.ws.row_offset[(i + 1) * experts + expert] - offset;
      const uint32_t first = first_run_rows(offset, rows);
      const uint32_t signal = c_.ws.run_signal[i * experts + expert] + run_of_row(run.row_in_segment, first);
      c_.platform.commit(call.canonical_source(i), result_offset(c_, run), result_window(c_, run, ring_slot),
                         run.num_rows * c_.result_bytes(), c_.layout.result_signal_at(signal),
                         make_signal(call.epoch, first), Traffic::kResults);
    });
    // Staged rows must lie still until they have landed; mapped peers have them already.
    const uint32_t in_flight = c_.blocks_in_flight();
    c_.platform.release_when_landed(&c_.ws.ring_free[block.sequence % in_flight], block.sequence + in_flight);
    P::fetch_add(&c_.ws.counters->blocks_done, 1);
  }

  FLASHMOE_ROLE bool is_missed(int pair, int peer) const {
    const Call& call = c_.call;
    if (pair >= call.num_tokens * call.top_k || call.topk_ids[pair] < 0) return false;
    const int position = call.expert_position[call.topk_ids[pair]];
    return position >= call.rank_begin[peer] && position < call.rank_begin[peer + 1] && !result_is_here(pair);
  }

  FLASHMOE_ROLE bool result_is_here(int pair) const {
    const int32_t row = c_.ws.result_row[pair];
    if (row < 0) return true;
    const int position = c_.call.expert_position[c_.call.topk_ids[pair]];
    const uint32_t signal = c_.ws.segment_signal[position];
    const uint64_t first = c_.platform.test_signal(c_.layout.result_signal_at(signal));
    if (signal_epoch(first) != c_.call.epoch) return false;
    const uint32_t run = run_of_row(uint32_t(row) - c_.ws.segment_row[position], signal_payload(first));
    return run == 0 || run_is_here(signal + run);
  }
  FLASHMOE_ROLE uint32_t runs_here_of(int position) const {
    const uint32_t rows = c_.ws.segment_row[position + 1] - c_.ws.segment_row[position];
    const uint32_t signal = c_.ws.segment_signal[position];
    if (rows == 0 || !run_is_here(signal)) return 0;
    const uint64_t first = c_.platform.test_signal(c_.layout.result_signal_at(signal));
    uint32_t here = 1 + (c_.backward() && !awaits_release(position));
    for (uint32_t run = run_of_row(rows - 1, signal_payload(first)); run > 0; --run) here += run_is_here(signal + run);
    return here;
  }
  FLASHMOE_ROLE bool run_is_here(uint32_t signal) const { return is_of_this_call(c_.layout.result_signal_at(signal)); }
  FLASHMOE_ROLE bool is_of_this_call(size_t signal) const {
    return signal_epoch(c_.platform.test_signal(signal)) == c_.call.epoch;
  }

  // Each worker holds one combine task at a time and looks at it whenever it has no tile to issue.
  template <LaneGroup Lanes>
  FLASHMOE_ROLE bool next_combine(const Lanes& lanes, Work& work) {
    if (combine_task_ < 0) {
      if (lanes.rank() == 0) combine_task_ = take_combine_task();
      combine_task_ = int(lanes.broadcast(uint32_t(combine_task_)));
      if (combine_task_ < 0) return false;
      combine_pair_ = combine_task_ * kCombineTokens * c_.call.top_k;
    }
    const int end = combine_tokens(c_.call, combine_task_).end * c_.call.top_k;
    while (combine_pair_ < end) {
      const int pair = combine_pair_ + lanes.rank(), here = lanes.leading(pair >= end || result_is_here(pair));
      combine_pair_ += here;
      if (here < lanes.size()) return false;
    }
    work = {WorkKind::kCombine, combine_task_, 0};
    combine_task_ = -1;
    return true;
  }

  FLASHMOE_ROLE int take_combine_task() {
    Counters& n = *c_.ws.counters;
    const uint32_t tasks = uint32_t(c_.call.num_combine_tasks());
    if (!P::load_acquire(&n.plan_ready) || P::load_acquire(&n.combine_head) >= tasks) return -1;
    const uint32_t ticket = P::fetch_add(&n.combine_head, 1);
    return ticket < tasks ? int(ticket) : -1;
  }

  Context<P> c_;
  TileShape tiles_;
  uint32_t up_ticket_ = kNoTicket, down_ticket_ = kNoTicket, grad_ticket_ = kNoTicket;
  int combine_task_ = -1, combine_pair_ = 0;
};

}  // namespace flashmoe
