// Activations on a GPU's fast units: within a few units in the last place of fp32, far below a 16-bit result's.
#pragma once

#include <cmath>

#include "gpu/verbs.h"

namespace flashmoe {

#if defined(__CUDACC__)
FLASHMOE_DEVICE float fast_exp(float x) { return __expf(x); }
FLASHMOE_DEVICE float fast_quotient(float a, float b) { return __fdividef(a, b); }
#else
FLASHMOE_DEVICE float fast_exp(float x) { return expf(x); }
FLASHMOE_DEVICE float fast_quotient(float a, float b) { return a / b; }
#endif

// x · e^y / (1 + e^y) for y of x's sign, in a form that does not overflow to a NaN: minus infinity gives 0.
FLASHMOE_DEVICE float times_logistic(float x, float y) {
  const float e = fast_exp(-fabsf(y));
  return fast_quotient(x < 0.0f ? fmaxf(x, -3e38f) * e : x, 1.0f + e);
}

template <Activation activation>
FLASHMOE_DEVICE float fast_activate(float x) {
  if constexpr (activation == Activation::kRelu) return x < 0.0f ? 0.0f : x;
  if constexpr (activation == Activation::kSilu) return times_logistic(x, x);
  if constexpr (activation == Activation::kGeluTanh)
    return times_logistic(x, x * (1.59576912f + 0.0713548163f * (x * x)));
  if constexpr (activation == Activation::kGelu) {
    // x Φ(x); the tail Φ(-|x|) = erfc(z) / 2, z = |x| / √2, by Abramowitz and Stegun 7.1.26, within 1.5e-7.
    const float z = 0.707106781f * fabsf(x), t = fast_quotient(1.0f, 1.0f + 0.3275911f * z);
    const float p = 1.421413741f + t * (-1.453152027f + t * 1.061405429f);
    const float tail = 0.5f * t * (0.254829592f + t * (-0.284496736f + t * p)) * fast_exp(-z * z);
    return x < 0.0f ? fmaxf(x, -3e38f) * tail : x * (1.0f - tail);
  }
}

}  // namespace flashmoe
