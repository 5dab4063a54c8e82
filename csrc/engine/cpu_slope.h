// The activations and their derivatives, on vectors in fp32. For cpu_backward_kernels.cpp alone, like cpu_vector.h.
#pragma once

#include "engine/cpu_activation.h"

namespace flashmoe::FLASHMOE_ISA_NAMESPACE {
namespace {

struct ValueAndSlope {
  Vector value, slope;
};

template <Activation kActivation>
FLASHMOE_INLINE ValueAndSlope differentiate(Vector x) {
  const Vector value = activate<kActivation>(x);
  if constexpr (kActivation == Activation::kRelu) {
    return {value, x > 0.0f ? splat(1.0f) : x == x ? Vector{} : x};
  } else {
    // Where |x| is large the slope is 0 or 1, and must not become infinity times 0 on the way there.
    const Vector near = x > 110.0f ? splat(110.0f) : x < -110.0f ? splat(-110.0f) : x;  // e^-110 is 0
    if constexpr (kActivation == Activation::kGelu) {
      const Vector density = exp_nonpositive(near * near * -0.5f) * 0.398942280f;
      return {value, normal_distribution(near) + near * density};
    }
    const bool tanh = kActivation == Activation::kGeluTanh;
    const Vector inner = tanh ? near * (1.59576912f + 0.0713548163f * (near * near)) : near;
    const Vector inner_slope = tanh ? 1.59576912f + 0.214064449f * (near * near) : splat(1.0f);
    const Vector sigmoid = times_sigmoid(splat(1.0f), inner), opposite = times_sigmoid(splat(1.0f), -inner);
    return {value, sigmoid + near * inner_slope * (sigmoid * opposite)};
  }
}

}  // namespace
}  // namespace flashmoe::FLASHMOE_ISA_NAMESPACE
