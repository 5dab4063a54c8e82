// The source's plan: from the routing of its own tokens alone it fixes where every row lands, in the inboxes
// of the destinations on the way out and among its own results on the way back (design D4).
#pragma once

#include "protocol/group.h"
#include "protocol/workspace.h"

namespace flashmoe {

// Counting sort of the (token, expert) pairs by expert position. Tokens stay in order inside a segment: each warp
// sorts a stretch of the pairs, in order, and a position's rows are dealt to the warps in turn.
template <ThreadGroup Group>
FLASHMOE_ROLE void plan_segments(const Group& group, const Call& call, Workspace& ws) {
  const auto lanes = group.lanes();
  const int pairs = call.num_tokens * call.top_k, experts = call.num_experts;
  const int stretch = ceil_div(pairs, group.num_warps());
  const int begin = group.warp() * stretch, end = begin + stretch < pairs ? begin + stretch : pairs;
  uint32_t* dealt = ws.dealt + size_t(group.warp()) * experts;
  auto position_of = [&](int pair) {
    const int expert = pair < end ? call.topk_ids[pair] : -1;
    return expert < 0 ? -1 : call.expert_position[expert];
  };

  for (int p = lanes.rank(); p < experts; p += lanes.size()) dealt[p] = 0;
  lanes.sync();
  for (int first = begin; first < end; first += lanes.size()) {
    const int position = position_of(first + lanes.rank());
    const Equals same = lanes.equals(uint32_t(position));
    if (position >= 0 && same.before == 0) dealt[position] += same.all;
    lanes.sync();
  }
  group.sync();

  // From each warp's count to the rows of the warps before it; their sum is the segment's rows.
  for (int p = group.rank(); p < experts; p += group.size()) {
    uint32_t rows = 0;
    for (int w = 0; w < group.num_warps(); ++w) {
      uint32_t& count = ws.dealt[size_t(w) * experts + p];
      const uint32_t before = rows;
      rows += count, count = before;
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

  for (int first = begin; first < end; first += lanes.size()) {
    const int pair = first + lanes.rank(), position = position_of(pair);
    const Equals same = lanes.equals(uint32_t(position));
    if (position >= 0) {
      const uint32_t row = ws.segment_row[position] + dealt[position] + same.before;
      ws.result_row[pair] = int32_t(row);
      ws.row_token[row] = uint32_t(pair / call.top_k);
    } else if (pair < end) {
      ws.result_row[pair] = -1;
    }
    lanes.sync();
    if (position >= 0 && same.before == 0) dealt[position] += same.all;
    lanes.sync();
  }
  group.sync();
}

FLASHMOE_HD inline uint32_t packet_slots(const Workspace& ws, int destination) { return ws.num_slots[destination]; }
FLASHMOE_HD inline uint32_t packet_entries(const Call& call, const Workspace& ws, int destination) {
  return ws.segment_row[call.rank_begin[destination + 1]] - ws.segment_row[call.rank_begin[destination]];
}

// Gives each token that goes to `d` one slot there, in the order in which d's experts need it, so that early experts
// can start while late rows travel. One warp; `token_slot` is its scratch.
template <LaneGroup Lanes>
FLASHMOE_ROLE void plan_packet_slots(const Lanes& lanes, const Call& call, Workspace& ws, int d, int32_t* token_slot) {
  const uint32_t begin = ws.segment_row[call.rank_begin[d]], end = ws.segment_row[call.rank_begin[d + 1]];
  uint32_t slots = 0;
  if (begin != end)
    for (int t = lanes.rank(); t < call.num_tokens; t += lanes.size()) token_slot[t] = -1;
  lanes.sync();
  for (uint32_t first = begin; first < end; first += lanes.size()) {
    const uint32_t row = first + lanes.rank();
    const uint32_t token = row < end ? ws.row_token[row] : ~0u;
    const bool is_new = lanes.equals(token).before == 0 && row < end && token_slot[token] < 0;
    uint32_t all_new;
    const uint32_t slot = slots + lanes.exclusive_sum(is_new, all_new);
    if (is_new) token_slot[token] = int32_t(slot), ws.slot_token[ws.slot_begin[d] + slot] = token;
    slots += all_new;
    lanes.sync();
    if (row < end) ws.row_slot[row] = uint32_t(token_slot[token]);
  }
  if (lanes.rank() == 0) ws.num_slots[d] = slots;
  lanes.sync();  // the next destination clears the scratch
}

// After plan_segments. Rows of my own experts are read where they lie, in x.
template <ThreadGroup Group>
FLASHMOE_ROLE void plan_slots(const Group& group, const Call& call, Workspace& ws) {
  const int self = call.ep_rank;
  if (group.rank() == 0)
    for (uint32_t d = 0, slots = 0; int(d) < call.ep_size; ++d) {
      ws.slot_begin[d] = slots;
      const uint32_t entries = int(d) == self ? 0 : packet_entries(call, ws, int(d));
      slots += entries < uint32_t(call.num_tokens) ? entries : call.num_tokens;  // as many as it may need
    }
  group.sync();
  const uint32_t end = ws.segment_row[call.rank_begin[self + 1]];
  for (uint32_t row = ws.segment_row[call.rank_begin[self]] + group.rank(); row < end; row += group.size())
    ws.row_slot[row] = ws.row_token[row];
  if (group.rank() == 0) ws.num_slots[self] = 0;
  int32_t* token_slot = ws.token_slot + size_t(group.warp()) * call.num_tokens;
  for (int d = group.warp(); d < call.ep_size; d += group.num_warps())
    if (d != self) plan_packet_slots(group.lanes(), call, ws, d, token_slot);
  group.sync();
}

}  // namespace flashmoe
