// Addresses and sizes as Python passes them, for the calls of all machines.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "runtime/moe.h"

namespace flashmoe {

template <class T = void>
const T* address(uintptr_t a) {
  return reinterpret_cast<const T*>(a);
}

inline ForwardArgs forward_args(uintptr_t x, int num_tokens, uintptr_t topk_ids, int topk_ids_bytes, uintptr_t topk_weights,
                                int top_k, uintptr_t gate_up_proj, uintptr_t gate_up_bias, uintptr_t down_proj,
                                uintptr_t down_bias, uintptr_t y, int hidden_size, int intermediate_size, int num_experts,
                                int num_local_experts, int dtype, int activation, bool gated, uintptr_t expert_map, int layer) {
  if (dtype < 0 || dtype > 2) throw std::invalid_argument("dtype must be 0, 1 or 2, got " + std::to_string(dtype));
  if (activation < 0 || activation > 3)
    throw std::invalid_argument("activation must lie in [0, 3], got " + std::to_string(activation));
  return {address(x), address(topk_ids), topk_ids_bytes, address<float>(topk_weights),
          address(gate_up_proj), address(gate_up_bias), address(down_proj), address(down_bias),
          reinterpret_cast<void*>(y), address<int32_t>(expert_map),
          num_tokens, top_k, hidden_size, intermediate_size, num_experts, num_local_experts, layer,
          DType(dtype), Activation(activation), gated};
}

// A null address is a gradient that is not asked for.
inline Gradients gradients(uintptr_t y, uintptr_t topk_weights, uintptr_t gate_up_proj, uintptr_t gate_up_bias,
                           uintptr_t down_proj, uintptr_t down_bias) {
  const auto out = [](uintptr_t a) { return reinterpret_cast<std::byte*>(a); };
  return {address<std::byte>(y), reinterpret_cast<float*>(topk_weights), out(gate_up_proj), out(gate_up_bias),
          out(down_proj), out(down_bias)};
}

inline pybind11::dict dict_of(const GroupStats& s) {
  pybind11::dict bytes;
  bytes["header"] = s.header, bytes["rows"] = s.rows, bytes["results"] = s.results, bytes["signals"] = s.signals;
  pybind11::dict d;
  d["tokens_per_expert"] = s.tokens_per_expert, d["bytes_per_peer"] = bytes;
  return d;
}

inline pybind11::bytes bytes_of(const std::vector<TraceEvent>& events) {
  return pybind11::bytes(reinterpret_cast<const char*>(events.data()), events.size() * sizeof(TraceEvent));
}

}  // namespace flashmoe
