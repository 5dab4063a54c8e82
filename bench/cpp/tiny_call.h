// A call of a layer so small that the protocol is all it costs.
#pragma once

#include <vector>

#include "runtime/moe.h"

namespace flashmoe {

inline constexpr int kHidden = 64, kIntermediate = 64, kExperts = 4, kTopK = 2;

// A tiny layer of float32; `to` is the first of the two experts that every token is sent to.
struct TinyCall {
  std::vector<float> x, y, weights, gate_up, down;
  std::vector<int32_t> ids;
  ForwardArgs args;

  TinyCall(int num_tokens, int ep_size, int to)
      : x(num_tokens * kHidden, 0.5f), y(x.size()), weights(num_tokens * kTopK, 0.5f),
        gate_up(kExperts / ep_size * 2 * kIntermediate * kHidden, 0.01f), down(kExperts / ep_size * kHidden * kIntermediate, 0.01f) {
    for (int i = 0; i < num_tokens * kTopK; ++i) ids.push_back(to + i % kTopK);
    args = {x.data(), ids.data(), 4, weights.data(), gate_up.data(), nullptr, down.data(), nullptr, y.data(), nullptr,
            num_tokens, kTopK, kHidden, kIntermediate, kExperts, kExperts / ep_size, 0, DType::kFloat32, Activation::kSilu, true};
  }
};

inline constexpr Limits kTwo{2, 8, kHidden * 4, kTopK, kExperts};

// Each rank sends its tokens to the other's experts.
inline int other(int rank) { return rank == 0 ? kExperts / 2 : 0; }

}  // namespace flashmoe
