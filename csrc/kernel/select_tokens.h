// A router's selection on a GPU: a warp for each token.
#pragma once

#include "kernel/thread_groups.h"
#include "router/select_experts.h"

namespace flashmoe::gpu {

// Shared memory that a warp needs.
FLASHMOE_HD constexpr size_t selection_bytes(const Selection& s) {
  return size_t(s.num_experts + s.num_groups) * sizeof(uint64_t);
}

FLASHMOE_DEVICE void select_tokens(const SelectCall& call) {
  const Selection& s = call.selection;
  const int warps = block_threads() / 32, token = block() * warps + warp_in_block();
  if (token >= call.num_tokens) return;
  uint64_t* ranks = reinterpret_cast<uint64_t*>(shared_memory() + warp_in_block() * selection_bytes(s));
  const size_t first = size_t(token) * s.top_k;
  select_experts(Warp{}, s, call.scores + size_t(token) * s.num_experts, call.bias, ranks, call.ids + first,
                 call.weights + first);
}

}  // namespace flashmoe::gpu
