// 16-bit floats and tf32 on the host: fp32 in, fp32 out, rounded to nearest even.
#pragma once

#include <bit>
#include <cmath>

#include "gpu/verbs.h"

namespace flashmoe::gpu {

namespace simt {

inline float from_half_bits(uint32_t half) {
  const uint32_t sign = (half & 0x8000) << 16, magnitude = half & 0x7fff;
  if (magnitude >= 0x7c00) return std::bit_cast<float>(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  // A half as an fp32 of the same fields is too small by the difference of the exponents' biases.
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude << 13) * 0x1p112f));
}

inline uint32_t to_half_bits(float value) {
  const uint32_t sign = std::bit_cast<uint32_t>(value) >> 16 & 0x8000;
  const float magnitude = std::fabs(value);
  if (std::isnan(value)) return sign | 0x7fff;
  if (magnitude >= 65520.0f) return sign | 0x7c00;
  if (magnitude < 0x1p-14f) return sign | uint32_t(std::nearbyint(magnitude * 0x1p24f));
  const uint32_t bits = std::bit_cast<uint32_t>(magnitude);
  return sign | ((bits + 0xfff + (bits >> 13 & 1) - (112u << 23)) >> 13);
}

inline float from_bfloat16_bits(uint32_t bits) { return std::bit_cast<float>(bits << 16); }

inline uint32_t to_bfloat16_bits(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if (std::isnan(value)) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline float to_tf32(float value) { return std::bit_cast<float>(std::bit_cast<uint32_t>(value) & ~0x1fffu); }

}  // namespace simt

template <DType dtype>
FLASHMOE_DEVICE uint32_t pack_pair(float first, float second) {
  static_assert(dtype != DType::kFloat32);
  if constexpr (dtype == DType::kBFloat16)
    return simt::to_bfloat16_bits(first) | simt::to_bfloat16_bits(second) << 16;
  else
    return simt::to_half_bits(first) | simt::to_half_bits(second) << 16;
}

template <DType dtype>
FLASHMOE_DEVICE FloatPair unpack_pair(uint32_t pair) {
  static_assert(dtype != DType::kFloat32);
  if constexpr (dtype == DType::kBFloat16)
    return {simt::from_bfloat16_bits(pair & 0xffff), simt::from_bfloat16_bits(pair >> 16)};
  else
    return {simt::from_half_bits(pair & 0xffff), simt::from_half_bits(pair >> 16)};
}

}  // namespace flashmoe::gpu
