// Processor: computes the tiles of row blocks, returns finished rows to their sources, and combines the rows
// that came back for its own tokens.
//
// Down tiles go before up tiles: results leave early, the weights' neighbours are still in cache, and a ring
// slot comes free soon.
#pragma once

#include "engine/tile_engine.h"
#include "protocol/platform.h"
#include "protocol/row_block.h"
#include "protocol/signal.h"

namespace flashmoe {

template <Platform P, TileEngine E>
class Processor {
 public:
  FLASHMOE_HD Processor(const Context<P>& context, const E& engine, const typename E::Problem& problem, void* scratch)
      : c_(context), engine_(engine), problem_(problem), scratch_(scratch) {}

  FLASHMOE_HD static uint32_t up_tiles(const typename E::Problem& p) {
    return ceil_div(p.intermediate_size, E::up_tile_cols(p));
  }
  FLASHMOE_HD static uint32_t down_tiles(const typename E::Problem& p) {
    return ceil_div(p.hidden_size, E::down_tile_cols(p));
  }

  FLASHMOE_HD Step step() {
    Workspace& ws = c_.ws;
    TileTask task;
    if (take_down<P>(ws.counters->down, ws.down_entries, ws.ring_blocks, down_tiles(problem_), task)) {
      run_down(ws.ring[task.ring_slot], task);
      return Step::kProgress;
    }
    if (take_up<P>(ws.counters->up, ws.ring_blocks, up_tiles(problem_), task)) {
      run_up(ws.ring[task.ring_slot], task);
      return Step::kProgress;
    }
    return combine_next();
  }

  FLASHMOE_HD bool all_combined() const {
    return P::load_acquire(&c_.ws.counters->combine_done) == uint32_t(c_.call.num_combine_tasks());
  }

  // Runs of my results that have come so far, from all ranks. They come in the order of their experts, not of my
  // tokens, so a combine may wait for the last of them while all others arrive.
  FLASHMOE_HD uint32_t runs_here() const {
    if (!P::load_acquire(&c_.ws.counters->plan_ready)) return 0;
    uint32_t here = 0;
    for (int position = 0; position < c_.call.num_experts; ++position) {
      const uint32_t rows = c_.ws.segment_row[position + 1] - c_.ws.segment_row[position];
      if (rows == 0) continue;
      const uint32_t signal = c_.ws.segment_signal[position];
      const uint64_t first = c_.platform.test_signal(c_.layout.result_signal_at(signal));
      if (signal_epoch(first) != c_.call.epoch) continue;
      const uint32_t last = run_of_row(rows - 1, signal_payload(first));
      for (uint32_t run = 0; run <= last; ++run) here += run_is_here(signal + run);
    }
    return here;
  }

  // The first of my pairs whose result is still to come from `peer`, if any: for the report of a deadline.
  FLASHMOE_HD bool waits_for(int peer, Phase& phase, int& expert, uint64_t& seen) const {
    const Call& call = c_.call;
    if (!P::load_acquire(&c_.ws.counters->plan_ready)) return false;
    for (int pair = 0; pair < call.num_tokens * call.top_k; ++pair) {
      if (call.topk_ids[pair] < 0) continue;
      const int position = call.expert_position[call.topk_ids[pair]];
      if (position < call.rank_begin[peer] || position >= call.rank_begin[peer + 1] || result_is_here(pair)) continue;
      phase = Phase::kResults, expert = position - call.rank_begin[peer];
      seen = c_.platform.test_signal(c_.layout.result_signal_at(c_.ws.segment_signal[position]));
      return true;
    }
    return false;
  }

 private:
  FLASHMOE_HD float* hidden(uint32_t ring_slot) const {
    return c_.ws.hidden + size_t(ring_slot) * kBlockM * c_.ws.hidden_stride;
  }

  // Canonical rows are read where they lie: my own in x, the others' in their inboxes. Nobody merges lists.
  FLASHMOE_HD void run_up(RowBlock& block, const TileTask& task) {
    const Call& call = c_.call;
    const size_t row_bytes = call.row_bytes();
    const void* rows[kBlockM];
    for_each_run(call, c_.ws, block.local_expert, block.row_begin, block.num_rows, known_sources(), [&](const Run& run) {
      const int source = call.canonical_source(run.source_index);
      const std::byte* base = run.source_index == 0
                                  ? call.x
                                  : c_.platform.heap() + c_.layout.inbox_at(call.ep_rank, source, 0, row_bytes);
      const uint32_t* slot = packet_slots_of(c_, run.source_index) + run.entry;
      for (uint32_t r = 0; r < run.num_rows; ++r) rows[run.row_in_block + r] = base + slot[r] * row_bytes;
    });
    const size_t expert = block.local_expert, bytes = dtype_bytes(call.dtype);
    const int columns = E::up_tile_cols(problem_), begin = task.tile * columns;
    const int end = begin + columns < call.intermediate_size ? begin + columns : call.intermediate_size;
    engine_.up_tile(problem_, rows, int(block.num_rows), call.gate_up_proj + expert * call.up_rows() * row_bytes,
                    call.gate_up_bias ? call.gate_up_bias + expert * call.up_rows() * bytes : nullptr, begin, end,
                    hidden(task.ring_slot), ptrdiff_t(c_.ws.hidden_stride), scratch_);
    // Each tile releases its columns into the counter; the last arriver acquires them all and hands them on.
    if (P::fetch_sub(&block.up_tiles_left, 1) == 1)
      push_down<P>(c_.ws.counters->down, c_.ws.down_entries, c_.ws.ring_blocks, task.ring_slot);
  }

  FLASHMOE_HD void run_down(RowBlock& block, const TileTask& task) {
    const Call& call = c_.call;
    const size_t row_bytes = call.row_bytes(), bytes = dtype_bytes(call.dtype);
    void* rows[kBlockM];
    for_each_run(call, c_.ws, block.local_expert, block.row_begin, block.num_rows, known_sources(), [&](const Run& run) {
      std::byte* to = result_window(run, task.ring_slot);
      for (uint32_t r = 0; r < run.num_rows; ++r) rows[run.row_in_block + r] = to + r * row_bytes;
    });
    const size_t expert = block.local_expert;
    const int columns = E::down_tile_cols(problem_), begin = task.tile * columns;
    const int end = begin + columns < call.hidden_size ? begin + columns : call.hidden_size;
    engine_.down_tile(problem_, hidden(task.ring_slot), ptrdiff_t(c_.ws.hidden_stride), int(block.num_rows),
                      call.down_proj + expert * call.hidden_size * call.intermediate_size * bytes,
                      call.down_bias ? call.down_bias + expert * row_bytes : nullptr, begin, end, rows, scratch_);
    if (P::fetch_sub(&block.down_tiles_left, 1) == 1) return_rows(block, task.ring_slot);
  }

  FLASHMOE_HD size_t result_offset(const Run& run) const {
    return c_.layout.result_at(c_.ws.packet_row[run.source_index] + run.entry, c_.call.row_bytes());
  }
  FLASHMOE_HD std::byte* result_window(const Run& run, uint32_t ring_slot) const {
    const size_t row = size_t(ring_slot) * kBlockM + run.row_in_block;
    std::byte* stage = c_.ws.result_stage ? c_.ws.result_stage + row * c_.call.row_bytes() : nullptr;
    return c_.platform.window(c_.call.canonical_source(run.source_index), result_offset(run), stage);
  }

  // A reply means consumed: after the last run of a packet nothing of it is read here any more (design D5).
  FLASHMOE_HD void return_rows(const RowBlock& block, uint32_t ring_slot) {
    const Call& call = c_.call;
    const int experts = call.num_local_experts(), expert = block.local_expert;
    for_each_run(call, c_.ws, expert, block.row_begin, block.num_rows, known_sources(), [&](const Run& run) {
      const int i = run.source_index;
      const uint32_t offset = c_.ws.row_offset[i * experts + expert];
      const uint32_t rows = c_.ws.row_offset[(i + 1) * experts + expert] - offset;
      const uint32_t first = first_run_rows(offset, rows);
      const uint32_t signal = c_.ws.run_signal[i * experts + expert] + run_of_row(run.row_in_segment, first);
      c_.platform.commit(call.canonical_source(i), result_offset(run), result_window(run, ring_slot),
                         run.num_rows * call.row_bytes(), c_.layout.result_signal_at(signal),
                         make_signal(call.epoch, first), Traffic::kResults);
    });
    // Staged rows must lie still until they have landed; mapped peers have them already.
    c_.platform.release_when_landed(&c_.ws.ring_free[ring_slot], block.sequence + c_.ws.ring_blocks);
    P::fetch_add(&c_.ws.counters->blocks_done, 1);
  }

  // Blocks are formed from decided sources only, and a decided source's tables never change.
  FLASHMOE_HD int known_sources() const { return int(P::load_acquire(&c_.ws.counters->headers_known)); }

  FLASHMOE_HD bool result_is_here(int pair) const {
    const int32_t row = c_.ws.result_row[pair];
    if (row < 0) return true;
    const int position = c_.call.expert_position[c_.call.topk_ids[pair]];
    const uint32_t signal = c_.ws.segment_signal[position];
    const uint64_t first = c_.platform.test_signal(c_.layout.result_signal_at(signal));
    if (signal_epoch(first) != c_.call.epoch) return false;
    const uint32_t run = run_of_row(uint32_t(row) - c_.ws.segment_row[position], signal_payload(first));
    return run == 0 || run_is_here(signal + run);
  }
  FLASHMOE_HD bool run_is_here(uint32_t signal) const {
    return signal_epoch(c_.platform.test_signal(c_.layout.result_signal_at(signal))) == c_.call.epoch;
  }

  // Each worker holds one combine task at a time and looks at it whenever it has no tile to compute.
  FLASHMOE_HD Step combine_next() {
    Counters& n = *c_.ws.counters;
    const int tasks = c_.call.num_combine_tasks(), top_k = c_.call.top_k;
    if (!P::load_acquire(&n.plan_ready)) return Step::kIdle;
    if (combine_task_ < 0) {
      if (P::load_acquire(&n.combine_head) >= uint32_t(tasks)) return Step::kDone;
      const uint32_t ticket = P::fetch_add(&n.combine_head, 1);
      if (ticket >= uint32_t(tasks)) return Step::kDone;
      combine_task_ = int(ticket), combine_pair_ = combine_task_ * kCombineTokens * top_k;
    }
    const int begin = combine_task_ * kCombineTokens;
    const int end = begin + kCombineTokens < c_.call.num_tokens ? begin + kCombineTokens : c_.call.num_tokens;
    while (combine_pair_ < end * top_k && result_is_here(combine_pair_)) ++combine_pair_;
    if (combine_pair_ < end * top_k) return Step::kIdle;
    for (int token = begin; token < end; ++token) combine(token);
    combine_task_ = -1;
    P::fetch_add(&n.combine_done, 1);
    return Step::kProgress;
  }

  // A token's rows are summed in the order of its routing, whatever the order of their arrival.
  FLASHMOE_HD void combine(int token) {
    const Call& call = c_.call;
    const size_t row_bytes = call.row_bytes();
    const void* rows[kMaxTopK];
    float weights[kMaxTopK];
    int num = 0;
    for (int pair = token * call.top_k; pair < (token + 1) * call.top_k; ++pair) {
      if (c_.ws.result_row[pair] < 0) continue;
      rows[num] = c_.platform.heap() + c_.layout.result_at(size_t(c_.ws.result_row[pair]), row_bytes);
      weights[num++] = call.topk_weights[pair];
    }
    engine_.combine(problem_, rows, weights, num, call.y + token * row_bytes);
  }

  Context<P> c_;
  const E& engine_;
  const typename E::Problem& problem_;
  void* scratch_;
  int combine_task_ = -1, combine_pair_ = 0;
};

}  // namespace flashmoe
