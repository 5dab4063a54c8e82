// The source's plan: from the routing of its own tokens alone it fixes where every row lands, in the inboxes
// of the destinations on the way out and among its own results on the way back (design D4).
#pragma once

#include "protocol/workspace.h"

namespace flashmoe {

// Counting sort of the (token, expert) pairs by expert position. Tokens stay in order inside a segment.
FLASHMOE_HD inline void plan_segments(const Call& call, Workspace& ws) {
  const int pairs = call.num_tokens * call.top_k, experts = call.num_experts;
  for (int p = 0; p <= experts; ++p) ws.segment_row[p] = 0;
  for (int i = 0; i < pairs; ++i)
    if (call.topk_ids[i] >= 0) ++ws.segment_row[call.expert_position[call.topk_ids[i]] + 1];

  uint32_t signals = 0;
  for (int p = 0; p < experts; ++p) {
    ws.segment_signal[p] = signals;
    signals += max_runs(ws.segment_row[p + 1]);
    ws.segment_row[p + 1] += ws.segment_row[p];
  }
  ws.segment_signal[experts] = signals;

  // segment_row[p] walks to the end of its segment while the rows are dealt out, and is put back after.
  for (int i = 0; i < pairs; ++i) {
    if (call.topk_ids[i] < 0) {
      ws.result_row[i] = -1;
      continue;
    }
    const uint32_t row = ws.segment_row[call.expert_position[call.topk_ids[i]]]++;
    ws.result_row[i] = int32_t(row);
    ws.row_token[row] = uint32_t(i / call.top_k);
  }
  for (int p = experts; p > 0; --p) ws.segment_row[p] = ws.segment_row[p - 1];
  ws.segment_row[0] = 0;
}

// Gives each token one slot per destination, in the order in which the destination's experts need it, so that
// early experts can start while late rows travel. Rows of my own experts are read where they lie, in x.
FLASHMOE_HD inline void plan_slots(const Call& call, Workspace& ws) {
  uint32_t slots = 0;
  for (int d = 0; d < call.ep_size; ++d) {
    ws.slot_begin[d] = slots;
    const uint32_t begin = ws.segment_row[call.rank_begin[d]], end = ws.segment_row[call.rank_begin[d + 1]];
    if (d == call.ep_rank) {
      for (uint32_t row = begin; row < end; ++row) ws.row_slot[row] = ws.row_token[row];
      continue;
    }
    if (begin != end)
      for (int t = 0; t < call.num_tokens; ++t) ws.token_slot[t] = -1;
    for (uint32_t row = begin; row < end; ++row) {
      const uint32_t token = ws.row_token[row];
      if (ws.token_slot[token] < 0) {
        ws.token_slot[token] = int32_t(slots - ws.slot_begin[d]);
        ws.slot_token[slots++] = token;
      }
      ws.row_slot[row] = uint32_t(ws.token_slot[token]);
    }
  }
  ws.slot_begin[call.ep_size] = slots;
}

FLASHMOE_HD inline uint32_t packet_slots(const Workspace& ws, int destination) {
  return ws.slot_begin[destination + 1] - ws.slot_begin[destination];
}
FLASHMOE_HD inline uint32_t packet_entries(const Call& call, const Workspace& ws, int destination) {
  return ws.segment_row[call.rank_begin[destination + 1]] - ws.segment_row[call.rank_begin[destination]];
}

}  // namespace flashmoe
