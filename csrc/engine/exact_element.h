// Elements of the three dtypes as fp32, singly and 16 bytes at a time, and activations: for exact.h and combine_rows.h.
#pragma once

#include <cmath>
#include <cstring>

#include "gpu/verbs.h"
#include "protocol/config.h"

namespace flashmoe {

template <DType dtype>
inline constexpr int kPerPiece = 16 / dtype_bytes(dtype);

// Rows may have been written by a peer, or by this kernel.
template <DType dtype>
FLASHMOE_DEVICE void load_piece(const std::byte* from, float (&value)[kPerPiece<dtype>]) {
  const gpu::Words4 words = gpu::load_coherent(reinterpret_cast<const gpu::Words4*>(from));
  FLASHMOE_UNROLL
  for (int w = 0; w < 4; ++w) {
    if constexpr (dtype == DType::kFloat32) {
      memcpy(&value[w], &words.word[w], 4);
    } else {
      const gpu::FloatPair pair = gpu::unpack_pair<dtype>(words.word[w]);
      value[2 * w] = pair.first, value[2 * w + 1] = pair.second;
    }
  }
}

template <DType dtype>
FLASHMOE_DEVICE void store_piece(std::byte* to, const float (&value)[kPerPiece<dtype>]) {
  gpu::Words4 words;
  FLASHMOE_UNROLL
  for (int w = 0; w < 4; ++w) {
    if constexpr (dtype == DType::kFloat32)
      memcpy(&words.word[w], &value[w], 4);
    else
      words.word[w] = gpu::pack_pair<dtype>(value[2 * w], value[2 * w + 1]);
  }
  *reinterpret_cast<gpu::Words4*>(to) = words;
}

// f<dtype>() of a dtype that is known at run time.
template <class F>
FLASHMOE_DEVICE decltype(auto) with_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kBFloat16: return f.template operator()<DType::kBFloat16>();
    case DType::kFloat16: return f.template operator()<DType::kFloat16>();
    default: return f.template operator()<DType::kFloat32>();
  }
}

// Whether every row begins and ends at a multiple of 16 bytes. Rows of the heap begin where their width says.
FLASHMOE_DEVICE bool has_whole_pieces(const Call& call) {
  uintptr_t bits = call.row_bytes() | size_t(call.intermediate_size) * dtype_bytes(call.dtype);
  for (const std::byte* rows : {call.x, static_cast<const std::byte*>(call.y), call.gate_up_proj, call.down_proj})
    bits |= reinterpret_cast<uintptr_t>(rows);
  return bits % 16 == 0;
}

// The same of a backward call.
FLASHMOE_DEVICE bool has_whole_gradient_pieces(const Call& call) {
  return has_whole_pieces(call) && reinterpret_cast<uintptr_t>(call.grad.y) % 16 == 0;
}

template <DType dtype>
FLASHMOE_DEVICE float load_element(const std::byte* from, int index) {
  if constexpr (dtype == DType::kFloat32)
    return reinterpret_cast<const float*>(from)[index];
  else
    return gpu::unpack_pair<dtype>(reinterpret_cast<const uint16_t*>(from)[index]).first;
}

template <DType dtype>
FLASHMOE_DEVICE void store_element(std::byte* to, int index, float value) {
  if constexpr (dtype == DType::kFloat32)
    reinterpret_cast<float*>(to)[index] = value;
  else
    reinterpret_cast<uint16_t*>(to)[index] = uint16_t(gpu::pack_pair<dtype>(value, 0.0f));
}

FLASHMOE_DEVICE float load_element(DType dtype, const std::byte* from, int index) {
  return with_dtype(dtype, [&]<DType type>() { return load_element<type>(from, index); });
}
FLASHMOE_DEVICE void store_element(DType dtype, std::byte* to, int index, float value) {
  with_dtype(dtype, [&]<DType type>() { store_element<type>(to, index, value); });
}

// One element, or as many as lie in 16 bytes, which must then be aligned to that.
template <DType dtype, int kElements>
FLASHMOE_DEVICE void load_elements(const std::byte* row, int first, float (&value)[kElements]) {
  static_assert(kElements == 1 || kElements == kPerPiece<dtype>);
  if constexpr (kElements == 1)
    value[0] = load_element<dtype>(row, first);
  else
    load_piece<dtype>(row + size_t(first) * dtype_bytes(dtype), value);
}

template <DType dtype, int kElements>
FLASHMOE_DEVICE void store_elements(std::byte* row, int first, const float (&value)[kElements]) {
  static_assert(kElements == 1 || kElements == kPerPiece<dtype>);
  if constexpr (kElements == 1)
    store_element<dtype>(row, first, value[0]);
  else
    store_piece<dtype>(row + size_t(first) * dtype_bytes(dtype), value);
}

// At minus infinity silu and both gelus are their limit, 0. NaN stays NaN.
FLASHMOE_DEVICE float activate(Activation activation, float x) {
  if (activation == Activation::kRelu) return x < 0.0f ? 0.0f : x;
  if (x == -INFINITY) return 0.0f;
  if (activation == Activation::kSilu) return x / (1.0f + expf(-x));
  if (activation == Activation::kGelu) return 0.5f * x * erfcf(-0.707106781f * x);
  // x / (1 + e^-2u), u = √(2/π) (x + 0.044715 x³): as 0.5 x (1 + tanh u), without cancellation in the tail.
  return x / (1.0f + expf(-x * (1.59576912f + 0.0713548163f * (x * x))));
}

}  // namespace flashmoe
