// The activations, on vectors in fp32. For cpu_kernels.cpp alone, like cpu_vector.h.
//
// Measured against double over all magnitudes (tests/cpp/test_cpu_engine.cpp states and checks the bounds).
// At minus infinity silu and both gelus are NaN, as torch's are: an overflow must not pass for a quiet unit.
#pragma once

#include "engine/cpu_vector.h"
#include "protocol/config.h"

namespace flashmoe::FLASHMOE_ISA_NAMESPACE {
namespace {

FLASHMOE_INLINE Vector magnitude(Vector x) { return floats(bits(x) & 0x7fffffff); }

// e^x for x <= 0 (NaN stays NaN): 2^n e^r with |r| <= ln 2 / 2.
FLASHMOE_INLINE Vector exp_nonpositive(Vector x) {
  x = x < -105.0f ? splat(-105.0f) : x;  // 0 after rounding
  const Vector magic = splat(0x1.8p23f);  // its addition leaves the nearest integer in the low bits
  const Vector shifted = x * 1.44269504f + magic;
  const Vector n = shifted - magic;
  Vector r = x - n * 0.693145752f;  // ln 2 in two parts; the first has few bits, so n times it is exact
  r = r - n * 1.42860677e-6f;
  Vector p = splat(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  // 2^n in two factors, since 2^-150 is no float.
  const IntVector exponent = (IntVector)bits(shifted) - 0x4b400000;
  const IntVector half = exponent >> 1;
  const Vector first = floats((BitsVector)(half + 127) << 23);
  const Vector second = floats((BitsVector)(exponent - half + 127) << 23);
  return p * first * second;
}

// x / (1 + e^-v), without overflow for any v.
FLASHMOE_INLINE Vector times_sigmoid(Vector x, Vector v) {
  const Vector e = exp_nonpositive(-magnitude(v));
  return x * ((v < 0.0f ? e : splat(1.0f)) / (1.0f + e));
}

// Φ(x) = erfc(-x / √2) / 2. The erfc is Numerical Recipes' erfcc (Chebyshev, 1.2e-7 relative), whose
// relative error stays small in the tail, where 1 + erf cancels.
FLASHMOE_INLINE Vector normal_distribution(Vector x) {
  const Vector t = 1.0f / (1.0f + magnitude(x) * 0.353553391f);
  Vector p = splat(0.17087277f);
  p = p * t - 0.82215223f;
  p = p * t + 1.48851587f;
  p = p * t - 1.13520398f;
  p = p * t + 0.27886807f;
  p = p * t - 0.18628806f;
  p = p * t + 0.09678418f;
  p = p * t + 0.37409196f;
  p = p * t + 1.00002368f;
  p = p * t - 1.26551223f;
  const Vector clamped = magnitude(x) > 15.0f ? splat(15.0f) : x;  // x² must not overflow; Φ(-15) is 0
  const Vector exponent = p - clamped * clamped * 0.5f;
  const Vector tail = 0.5f * t * exp_nonpositive(exponent > 0.0f ? Vector{} : exponent);
  return x < 0.0f ? tail : 1.0f - tail;
}

template <Activation kActivation>
FLASHMOE_INLINE Vector activate(Vector x) {
  if constexpr (kActivation == Activation::kRelu) {
    return x < 0.0f ? Vector{} : x;
  } else {
    if constexpr (kActivation == Activation::kSilu) return times_sigmoid(x, x);
    if constexpr (kActivation == Activation::kGelu) return x * normal_distribution(x);
    if constexpr (kActivation == Activation::kGeluTanh)
      return times_sigmoid(x, x * (1.59576912f + 0.0713548163f * (x * x)));  // 2 √(2/π) (x + 0.044715 x³)
  }
}

}  // namespace
}  // namespace flashmoe::FLASHMOE_ISA_NAMESPACE
