// The activations and their derivatives together, on a GPU's fast units: they share what is expensive.
#pragma once

#include "engine/fast_activation.h"

namespace flashmoe {

struct Differential {
  float value, slope;
};

// Where |x| is large the slope is 0 or 1, and must not become infinity times 0 on the way there: e^-110 is 0, and so is
// the value at minus infinity. NaN stays NaN.
template <Activation activation>
FLASHMOE_DEVICE Differential fast_differential(float x) {
  if constexpr (activation == Activation::kRelu) {
    return {x < 0.0f ? 0.0f : x, x > 0.0f ? 1.0f : x == x ? 0.0f : x};
  } else {
    const bool below = x < 0.0f;
    const float near = x > 110.0f ? 110.0f : x < -110.0f ? -110.0f : x, square = near * near;
    if constexpr (activation == Activation::kGelu) {
      // Φ(x) + x φ(x); the tail Φ(-|x|) as fast_activate has it, in which φ is at hand.
      const float z = 0.707106781f * fabsf(near), t = fast_quotient(1.0f, 1.0f + 0.3275911f * z);
      const float p = 1.421413741f + t * (-1.453152027f + t * 1.061405429f), density = fast_exp(-z * z);
      const float tail = 0.5f * t * (0.254829592f + t * (-0.284496736f + t * p)) * density;
      const float whole = below ? tail : 1.0f - tail;
      return {(below ? near : x) * whole, whole + near * (0.398942280f * density)};
    } else {
      // x σ(y), with y = x or 2 √(2/π) (x + 0.044715 x³). Both σ(y) and σ(-y), since 1 - σ would cancel.
      constexpr bool kTanh = activation == Activation::kGeluTanh;
      const float y = kTanh ? near * (1.59576912f + 0.0713548163f * square) : near;
      const float y_slope = kTanh ? 1.59576912f + 0.214064449f * square : 1.0f;
      const float e = fast_exp(-fabsf(y)), large = fast_quotient(1.0f, 1.0f + e), small = e * large;
      const float sigmoid = below ? small : large;
      return {(below ? near : x) * sigmoid, sigmoid + near * y_slope * (small * large)};
    }
  }
}

}  // namespace flashmoe
