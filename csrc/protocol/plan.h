// The source's plan: from the routing of its own tokens alone it fixes where every row lands, in the inboxes
// of the destinations on the way out and among its own results on the way back (design D4).
#pragma once

#include "protocol/group.h"
#include "protocol/workspace.h"

namespace flashmoe {

// Items that a thread looks up at a time: on a GPU each look is a walk to memory, and these walk together.
inline constexpr int kPlanAtOnce = 4;

// Calls store(i, load(i)) for each i in [begin, end), the loads ahead of the stores.
template <ThreadGroup Group, class Load, class Store>
FLASHMOE_ROLE void load_and_store(const Group& group, uint32_t begin, uint32_t end, const Load& load,
                                  const Store& store) {
  for (uint32_t first = begin + group.rank(); first < end; first += kPlanAtOnce * group.size()) {
    decltype(load(begin)) loaded[kPlanAtOnce];
    for (int i = 0; i < kPlanAtOnce; ++i) {
      const uint32_t item = first + i * group.size();
      loaded[i] = load(item < end ? item : first);
    }
    for (int i = 0; i < kPlanAtOnce; ++i) {
      const uint32_t item = first + i * group.size();
      if (item < end) store(item, loaded[i]);
    }
  }
}

// A warp's share of `items`: whole steps of its lanes, so that few items keep few warps busy.
struct Stretch {
  uint32_t begin, end, warps;  // how many have a share

  template <ThreadGroup Group>
  FLASHMOE_ROLE Stretch(const Group& group, uint32_t items, uint32_t step) {
    const uint32_t size = uint32_t(round_up(ceil_div<uint32_t>(items, group.num_warps()), step));
    warps = size ? ceil_div(items, size) : 0;
    begin = uint32_t(group.warp()) * size, end = begin + size;
    begin = begin < items ? begin : items, end = end < items ? end : items;
  }
};

// Counting sort of the (token, expert) pairs by expert position. Tokens stay in order inside a segment: each warp
// sorts a stretch of the pairs, in order, and a position's rows are dealt to the warps in turn.
template <ThreadGroup Group>
FLASHMOE_ROLE void plan_segments(const Group& group, const Call& call, Workspace& ws) {
  const auto lanes = group.lanes();
  const uint32_t pairs = uint32_t(call.num_tokens) * call.top_k, step = lanes.size();
  const int experts = call.num_experts;
  const Stretch mine(group, pairs, step);
  uint32_t* dealt = ws.dealt + size_t(group.warp()) * experts;

  if (mine.begin < mine.end)
    for (int p = lanes.rank(); p < experts; p += lanes.size()) dealt[p] = 0;
  lanes.sync();
  for (uint32_t first = mine.begin; first < mine.end; first += kPlanAtOnce * step) {
    int32_t position[kPlanAtOnce];
    for (int i = 0; i < kPlanAtOnce; ++i) {
      const uint32_t pair = first + i * step + lanes.rank();
      position[i] = pair < mine.end ? call.topk_ids[pair] : -1;
    }
    for (int32_t& p : position) p = p < 0 ? -1 : call.expert_position[p];
    for (int i = 0; i < kPlanAtOnce && first + i * step < mine.end; ++i) {
      const uint32_t pair = first + i * step + lanes.rank();
      if (pair < mine.end) ws.result_row[pair] = position[i];  // for now
      const Equals same = lanes.equals(uint32_t(position[i]));
      if (position[i] >= 0 && same.before == 0) dealt[position[i]] += same.all;
      lanes.sync();
    }
  }
  group.sync();

  // From each warp's count to the rows of the warps before it; their sum is the segment's rows.
  for (int p = group.rank(); p < experts; p += group.size()) {
    uint32_t rows = 0;
    for (uint32_t w = 0; w < mine.warps; w += kPlanAtOnce) {
      uint32_t count[kPlanAtOnce];
      for (uint32_t i = 0; i < kPlanAtOnce; ++i) count[i] = w + i < mine.warps ? ws.dealt[size_t(w + i) * experts + p] : 0;
      for (uint32_t i = 0; i < kPlanAtOnce && w + i < mine.warps; ++i) {
        ws.dealt[size_t(w + i) * experts + p] = rows;
        rows += count[i];
      }
    }
    ws.segment_row[p] = rows;
  }
  group.sync();
  if (group.warp() == 0) {
    uint32_t rows = 0, signals = 0;
    for (int first = 0; first < experts; first += lanes.size()) {
      const int p = first + lanes.rank();
      const uint32_t count = p < experts ? ws.segment_row[p] : 0;
      uint32_t all_rows, all_signals;
      const uint32_t row = rows + lanes.exclusive_sum(count, all_rows);
      const uint32_t signal = signals + lanes.exclusive_sum(max_runs(count), all_signals);
      if (p < experts) ws.segment_row[p] = row, ws.segment_signal[p] = signal;
      rows += all_rows, signals += all_signals;
    }
    if (lanes.rank() == 0) ws.segment_row[experts] = rows, ws.segment_signal[experts] = signals;
  }
  group.sync();

  for (uint32_t first = mine.begin; first < mine.end; first += kPlanAtOnce * step) {
    int32_t position[kPlanAtOnce];
    uint32_t row[kPlanAtOnce];
    for (int i = 0; i < kPlanAtOnce; ++i) {
      const uint32_t pair = first + i * step + lanes.rank();
      position[i] = pair < mine.end ? ws.result_row[pair] : -1;
    }
    for (int i = 0; i < kPlanAtOnce; ++i) row[i] = position[i] < 0 ? 0 : ws.segment_row[position[i]];
    for (int i = 0; i < kPlanAtOnce && first + i * step < mine.end; ++i) {
      const uint32_t pair = first + i * step + lanes.rank();
      const Equals same = lanes.equals(uint32_t(position[i]));
      const uint32_t before = position[i] < 0 ? 0 : dealt[position[i]];
      lanes.sync();
      if (position[i] >= 0) {
        row[i] += before + same.before;
        if (same.before == 0) dealt[position[i]] = before + same.all;
        ws.result_row[pair] = int32_t(row[i]), ws.row_token[row[i]] = pair / uint32_t(call.top_k);
      }
      lanes.sync();
    }
  }
  group.sync();
}

FLASHMOE_HD inline uint32_t packet_slots(const Workspace& ws, int destination) { return ws.num_slots[destination]; }
FLASHMOE_HD inline uint32_t packet_entries(const Call& call, const Workspace& ws, int destination) {
  return ws.segment_row[call.rank_begin[destination + 1]] - ws.segment_row[call.rank_begin[destination]];
}

// row_slot[row], for now: the first row of the same token, of the rows of one destination.
template <ThreadGroup Group>
FLASHMOE_ROLE void find_first_rows(const Group& group, const Call& call, Workspace& ws, uint32_t begin, uint32_t end) {
  const uint32_t step = group.size();
  for (uint32_t row = begin + group.rank(); row < end; row += kPlanAtOnce * step) {
    const int32_t* of_token[kPlanAtOnce];
    uint32_t first[kPlanAtOnce];
    for (int i = 0; i < kPlanAtOnce; ++i) {
      first[i] = row + i * step < end ? row + i * step : row;
      of_token[i] = ws.result_row + size_t(ws.row_token[first[i]]) * call.top_k;
    }
    for (int k = 0; k < call.top_k; ++k)
      for (int i = 0; i < kPlanAtOnce; ++i) {
        const uint32_t other = uint32_t(of_token[i][k]);  // huge where the pair was dropped
        if (other >= begin && other < first[i]) first[i] = other;
      }
    for (int i = 0; i < kPlanAtOnce; ++i)
      if (row + i * step < end) ws.row_slot[row + i * step] = first[i];
  }
}

// slots_before[row] of every row, and of their end: how many rows before it are the first of their token at another
// rank. `self`: my own rows, begin to end. Each warp counts a stretch, and then adds what the warps before it counted.
template <ThreadGroup Group>
FLASHMOE_ROLE void count_slots(const Group& group, const Call& call, Workspace& ws, const uint32_t (&self)[2]) {
  const auto lanes = group.lanes();
  const uint32_t rows = ws.segment_row[call.num_experts];
  const Stretch mine(group, rows, kPlanAtOnce * lanes.size());
  const auto is_first = [&](uint32_t row) {
    return uint32_t(row < mine.end && (row < self[0] || row >= self[1]) && ws.row_slot[row] == row);
  };
  const auto counted_by = [&](int warp) -> uint32_t& { return ws.dealt[size_t(warp) * call.num_experts]; };
  uint32_t count = 0, slots = 0;
  for (uint32_t row = mine.begin + lanes.rank(); row < mine.end; row += lanes.size()) count += is_first(row);
  lanes.exclusive_sum(count, slots);
  uint32_t& counted = counted_by(group.warp());  // by all lanes: on a GPU they answer for their warp together
  if (lanes.rank() == 0) counted = slots;
  group.sync();

  slots = 0;
  for (int w = 0; w < group.warp(); ++w) slots += counted_by(w);
  for (uint32_t first = mine.begin; first < mine.end; first += kPlanAtOnce * lanes.size()) {
    const uint32_t row = first + kPlanAtOnce * lanes.rank();
    uint32_t firsts[kPlanAtOnce], all;
    count = 0;
    for (int i = 0; i < kPlanAtOnce; ++i) count += firsts[i] = is_first(row + i);
    uint32_t before = slots + lanes.exclusive_sum(count, all);
    for (int i = 0; i < kPlanAtOnce && row + i < mine.end; ++i) ws.slots_before[row + i] = before, before += firsts[i];
    slots += all;
  }
  if (group.warp() == group.num_warps() - 1 && lanes.rank() == 0) ws.slots_before[rows] = slots;
  group.sync();
}

// After plan_segments. Gives each token that goes to a rank one slot there, in the order in which that rank's experts
// need it, so that early experts can start while late rows travel: where its first row there stands among all first
// rows. Rows of my own experts are read where they lie, in x.
template <ThreadGroup Group>
FLASHMOE_ROLE void plan_slots(const Group& group, const Call& call, Workspace& ws) {
  const auto begin_of = [&](int d) { return ws.segment_row[call.rank_begin[d]]; };
  const uint32_t self[2] = {begin_of(call.ep_rank), begin_of(call.ep_rank + 1)};
  load_and_store(
      group, self[0], self[1], [&](uint32_t row) { return ws.row_token[row]; },
      [&](uint32_t row, uint32_t token) { ws.row_slot[row] = token; });
  if (call.ep_size == 1) {
    if (group.rank() == 0) ws.slot_begin[0] = ws.num_slots[0] = 0;
    return group.sync();
  }

  for (int d = 0; d < call.ep_size; ++d)
    if (d != call.ep_rank) find_first_rows(group, call, ws, begin_of(d), begin_of(d + 1));
  group.sync();
  count_slots(group, call, ws, self);

  for (int d = 0; d < call.ep_size; ++d) {
    const uint32_t begin = begin_of(d), end = begin_of(d + 1), slots = ws.slots_before[begin];
    if (group.rank() == 0) ws.slot_begin[d] = slots, ws.num_slots[d] = ws.slots_before[end] - slots;
    if (d == call.ep_rank) continue;
    struct Found {
      uint32_t first, slot, token;
    };
    load_and_store(
        group, begin, end,
        [&](uint32_t row) {
          const uint32_t first = ws.row_slot[row];
          return Found{first, ws.slots_before[first], ws.row_token[row]};
        },
        [&](uint32_t row, const Found& found) {
          ws.row_slot[row] = found.slot - slots;
          if (found.first == row) ws.slot_token[found.slot] = found.token;
        });
  }
  group.sync();
}

// After plan_segments, in a backward call: the gradients of an expert's weights need those of its rows.
template <ThreadGroup Group>
FLASHMOE_ROLE void plan_weights(const Group& group, const Call& call, Workspace& ws) {
  float* row_weight = ws.of_backward(call).row_weight;
  for (int pair = group.rank(); pair < call.num_tokens * call.top_k; pair += group.size())
    if (ws.result_row[pair] >= 0) row_weight[ws.result_row[pair]] = call.topk_weights[pair];
  group.sync();
}

}  // namespace flashmoe
