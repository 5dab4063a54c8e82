// What an engine must offer for backward calls besides a TileEngine's (protocol/backward.h says what they compute).
//
// The same promise: a row's bits depend on that row and its expert alone, those of a weight's gradient on the expert's
// rows in their order, never on how they are divided among row blocks and tiles.
#pragma once

#include "engine/tile_engine.h"

namespace flashmoe {

// Of one row block, rows `stride` floats apart, whatever the elements.
template <class Element>
struct BackwardRowsOf {
  Element* gate_up_grad;  // [up_rows] gradients of what the up product gives, gate first
  Element* hidden;        // [intermediate_size] h
  float* dot;             // parts of dy · o, one for each up tile or, where elements are smaller, for each 32 columns
  ptrdiff_t stride;
};

// In fp32, before they are scaled by w.
using BackwardRows = BackwardRowsOf<float>;
// In 16 bits, scaled by w, so that nothing has to scale what tensor cores multiply. The parts of dy · o are not.
using ScaledBackwardRows = BackwardRowsOf<uint16_t>;

// Rows of a row block as they came, and what was made of them.
struct GradientRows {
  const void* const* x;
  const void* const* dy;
  const float* weight;  // w
  int num_rows;
  BackwardRows made;
  const float* up_sums = nullptr;  // [num_rows, up_rows] gate_up · x without bias; null: to be made again
};

struct ExpertWeights {
  const void* gate_up;  // [up_rows, hidden_size]
  const void* gate_up_bias;
  const void* down;  // [hidden_size, intermediate_size]
  const void* down_bias;
};

// A rectangle of the gradient of one of an expert's two matrices.
struct GradTile {
  bool down;  // else of gate_up_proj
  int row_begin, row_end, col_begin, col_end;
};

template <class E>
concept BackwardEngine =
    TileEngine<E> && requires(const E& engine, const typename E::Problem& problem, const GradientRows& rows,
                              const ExpertWeights& weights, const GradTile& tile, int n, const void* matrix, void* out,
                              void* const* out_rows, void* scratch) {
      { E::kGradRows } -> std::convertible_to<int>;  // of a grad tile, at most
      { E::kGradCols } -> std::convertible_to<int>;
      // An up tile that also leaves its sums, without bias, in rows of up_rows.
      engine.up_tile_keeping(problem, rows.x, n, matrix, matrix, n, n, rows.made.hidden, rows.made.stride,
                             rows.made.hidden, scratch);
      // rows.made for columns [begin, end) of the intermediate size, which are up tile `part`.
      engine.up_backward(problem, rows, weights, n, n, n, scratch);
      // out_rows[:, begin:end) = gate_up_grad · gate_up, in the call's dtype.
      engine.down_backward(problem, rows.made, n, matrix, n, n, out_rows, scratch);
      // A grad tile is begun, given the expert's row blocks in their order, and written with its bias' gradient, if one
      // is wanted and the tile is of the first columns. All in the same scratch.
      engine.begin_gradient(tile, scratch);
      engine.add_to_gradient(problem, tile, rows, scratch);
      engine.end_gradient(problem, tile, out, out, scratch);
    };

}  // namespace flashmoe
