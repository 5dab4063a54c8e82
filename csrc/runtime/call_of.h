// A rank's arguments as the protocol's call: all that a host's call and a GPU's have in common.
#pragma once

#include "runtime/moe.h"

namespace flashmoe {

// `grad`: of a backward call, else null. `placement`: a digest. The caller adds the epoch, and where the ids and the
// tables of the placement lie.
inline Call call_of(const ForwardArgs& a, const Gradients* grad, int ep_size, int ep_rank, uint32_t placement) {
  const auto bytes = [](const void* address) { return static_cast<const std::byte*>(address); };
  Call c{};
  c.ep_size = ep_size, c.ep_rank = ep_rank;
  c.tag = {a.layer, a.hidden_size, a.intermediate_size, a.num_experts, placement, uint8_t(a.dtype), uint8_t(a.activation),
           uint8_t(a.gated | (grad ? 2 : 0)), uint8_t((a.gate_up_bias ? 1 : 0) | (a.down_bias ? 2 : 0))};
  c.num_tokens = a.num_tokens, c.top_k = a.top_k, c.num_experts = a.num_experts;
  c.hidden_size = a.hidden_size, c.intermediate_size = a.intermediate_size;
  c.dtype = a.dtype, c.activation = a.activation, c.gated = a.gated;
  c.x = bytes(a.x), c.y = static_cast<std::byte*>(a.y), c.topk_weights = a.topk_weights;
  c.gate_up_proj = bytes(a.gate_up_proj), c.gate_up_bias = bytes(a.gate_up_bias);
  c.down_proj = bytes(a.down_proj), c.down_bias = bytes(a.down_bias);
  if (grad) c.grad = *grad;
  return c;
}

}  // namespace flashmoe
