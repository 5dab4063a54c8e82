// Programs for the GPU's kernel on fibers: small, since every thread is a fiber.
#pragma once

#include "simt_team.h"

namespace flashmoe::test {

inline const Layer& tiny_layer() {
  static const Layer layer({.hidden_size = 24, .intermediate_size = 40, .num_experts = 6, .top_k = 2}, 1);
  return layer;
}

// num_tokens[call][rank]
inline Program program_of(const Layer& layer, const std::vector<std::vector<int>>& num_tokens, uint64_t seed,
                          Skew skew = Skew::kUniform) {
  Program program;
  for (const auto& ranks : num_tokens) {
    program.push_back({&layer, {}, equal_blocks(layer.num_experts, int(ranks.size()))});
    for (int n : ranks) program.back().tokens.push_back(draw_tokens(layer, n, seed++, skew));
  }
  return program;
}

// Of the tiny layer, with as many tokens on every rank: num_tokens[call]
inline Program program_of(int ep_size, const std::vector<int>& num_tokens, uint64_t seed, Skew skew = Skew::kUniform) {
  std::vector<std::vector<int>> of_ranks;
  for (int n : num_tokens) of_ranks.emplace_back(ep_size, n);
  return program_of(tiny_layer(), of_ranks, seed, skew);
}

}  // namespace flashmoe::test
