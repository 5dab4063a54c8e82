// The activations' derivatives on a GPU, beside exact_element.h's activations.
#pragma once

#include "engine/exact_element.h"

namespace flashmoe {

FLASHMOE_DEVICE float slope_of(Activation activation, float x) {
  if (activation == Activation::kRelu) return x > 0.0f ? 1.0f : x == x ? 0.0f : x;
  // Where |x| is large the slope is 0 or 1, and must not become infinity times 0 on the way there: e^-110 is 0.
  const float near = x > 110.0f ? 110.0f : x < -110.0f ? -110.0f : x, square = near * near;
  if (activation == Activation::kGelu)
    return 0.5f * erfcf(-0.707106781f * near) + near * (0.398942280f * expf(-0.5f * square));
  const bool tanh = activation == Activation::kGeluTanh;
  const float inner = tanh ? near * (1.59576912f + 0.0713548163f * square) : near;
  const float inner_slope = tanh ? 1.59576912f + 0.214064449f * square : 1.0f;
  // Two quotients, since 1 - sigmoid would cancel.
  const float sigmoid = 1.0f / (1.0f + expf(-inner)), opposite = 1.0f / (1.0f + expf(inner));
  return sigmoid + near * inner_slope * (sigmoid * opposite);
}

}  // namespace flashmoe
