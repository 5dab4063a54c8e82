// What an engine must offer: the tile products of one row block, and the weighted sum of a token's rows.
//
// A row's bits must depend on that row and its expert alone, never on the tile's other rows, its height or its
// columns: that is what makes results repeat, run after run and for every ep_size (design D6).
#pragma once

#include <concepts>

#include "protocol/config.h"

namespace flashmoe {

template <class E>
concept TileEngine = requires(const E& engine, const typename E::Problem& problem, const void* const* rows, int n,
                              const void* weights, float* hidden, const float* weight, ptrdiff_t stride,
                              void* const* out_rows, void* out, void* scratch) {
  { E::up_tile_cols(problem) } -> std::same_as<int>;
  { E::down_tile_cols(problem) } -> std::same_as<int>;
  // hidden[:, columns] = activation(rows · up^T + bias), gated or not; rows by index, in the call's dtype.
  engine.up_tile(problem, rows, n, weights, weights, n, n, hidden, stride, scratch);
  // out_rows[:, columns] = hidden · down^T + bias, in the call's dtype.
  engine.down_tile(problem, hidden, stride, n, weights, weights, n, n, out_rows, scratch);
  // out = Σ weight[j] · rows[j], accumulated in fp32 in the order of j.
  engine.combine(problem, rows, weight, n, out);
};

}  // namespace flashmoe
