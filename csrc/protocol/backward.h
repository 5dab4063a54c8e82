// What the tiles of a backward call read and write.
//
// A packet brings x and the gradient of y, dy; what the forward call made of x is kept (protocol/kept.h) or computed
// again. With the pair's top-k weight w, an expert's output o = down · h, h = act(gate) · up, and g = down^T · dy:
//
//   up tile      gate and up of x; g; h, and the gradients of gate and up; a part of g · h
//   down tile    the row's gradient gate_up^T · d(gate, up), which returns as the forward call's results do, and w's
//                gradient g · h + bias · dy = o · dy, which returns with it
//   combine      the gradient of a token: Σ w · row, in the order of its routing, exactly as y
//   grad tile    weight gradients: Σ w · d(gate, up) x^T and Σ w · dy h^T over all rows of an expert, in the order of
//                its canonical list
//
// So what a row block keeps is not scaled by w, and stays in `hidden` until the call ends. An engine whose rows are
// scaled already (ScaledBackwardRows) returns rows that are, and its combine and grad tiles do not scale them again.
#pragma once

#include "engine/backward_engine.h"
#include "protocol/row_block.h"

namespace flashmoe {

// Of one row block, in `hidden`. Where elements are smaller than floats, widths are such that the floats are aligned.
template <class Element = float, class P>
FLASHMOE_ROLE BackwardRowsOf<Element> backward_rows(const Context<P>& c, uint32_t ring_slot) {
  float* block = c.ws.hidden + size_t(ring_slot) * kBlockM * c.ws.hidden_stride;
  Element *first = reinterpret_cast<Element*>(block), *hidden = first + c.call.up_rows();
  return {first, hidden, reinterpret_cast<float*>(hidden + c.call.intermediate_size), ptrdiff_t(c.ws.hidden_stride)};
}

// Where in a result row the gradient of its top-k weight lies.
FLASHMOE_HD inline size_t weight_gradient_at(const Call& call) { return round_up(call.row_bytes(), 16); }

// Calls f(row in block, x, dy, w) for rows [begin, begin + num) of the block in ring slot `ring_slot`.
template <class P, class F>
FLASHMOE_ROLE void for_each_gradient_row(const Context<P>& c, uint32_t ring_slot, uint32_t begin, uint32_t num, F&& f) {
  const Call& call = c.call;
  const size_t row_bytes = call.row_bytes();
  for_each_run(call, c.ws, c.ws.ring[ring_slot], begin, num, [&](const Run& run) {
    const bool mine = run.source_index == 0;
    const int source = call.canonical_source(run.source_index);
    const std::byte* x = mine ? call.x : c.platform.heap() + c.layout.inbox_at(call.ep_rank, source, 0, 0);
    const std::byte* dy = mine ? call.grad.y : x + row_bytes;
    const size_t stride = mine ? row_bytes : c.slot_bytes();
    const uint32_t* slot = packet_slots_of(c, run.source_index) + run.entry;
    const float* weight = packet_weights_of(c, run.source_index) + run.entry;
    for (uint32_t r = 0; r < run.num_rows; ++r)
      f(run.row_in_block + r, x + slot[r] * stride, dy + slot[r] * stride, weight[r]);
  });
}

// Rows of all sources, once all headers are known.
template <class P>
FLASHMOE_ROLE uint32_t rows_of_expert(const Context<P>& c, uint32_t expert) {
  return c.ws.row_offset[c.call.ep_size * c.call.num_local_experts() + expert];
}

// Calls f(ring slot) for the row blocks of an expert in the order of its canonical list, once all are published.
template <class P, class F>
FLASHMOE_ROLE void for_each_block_of(const Context<P>& c, uint32_t expert, F&& f) {
  const BackwardTables tables = c.backward_tables();
  uint32_t slot = tables.first_block[expert];
  for (uint32_t left = ceil_div<uint32_t>(rows_of_expert(c, expert), kBlockM); left > 0; --left) {
    f(slot);
    if (left > 1) slot = tables.following[slot];
  }
}

// The tiles of one expert's weight gradients that are asked for, at most `rows` x `cols` each.
class GradTiles {
 public:
  FLASHMOE_HD GradTiles(const Call& call, int rows, int cols)
      : rows_(rows), cols_(cols), gate_up_{call.up_rows(), call.hidden_size}, down_{call.hidden_size, call.intermediate_size},
        gate_up_tiles_(call.grad.gate_up_proj ? count(gate_up_) : 0), down_tiles_(call.grad.down_proj ? count(down_) : 0) {}

  FLASHMOE_HD uint32_t count() const { return gate_up_tiles_ + down_tiles_; }
  FLASHMOE_HD GradTile at(uint32_t tile) const {
    const bool down = tile >= gate_up_tiles_;
    const Matrix m = down ? down_ : gate_up_;
    if (down) tile -= gate_up_tiles_;
    const int across = ceil_div(m.cols, cols_), row = int(tile) / across * rows_, col = int(tile) % across * cols_;
    return {down, row, row + rows_ < m.rows ? row + rows_ : m.rows, col, col + cols_ < m.cols ? col + cols_ : m.cols};
  }

 private:
  struct Matrix {
    int rows, cols;
  };
  FLASHMOE_HD uint32_t count(const Matrix& m) const { return uint32_t(ceil_div(m.rows, rows_)) * ceil_div(m.cols, cols_); }

  int rows_, cols_;
  Matrix gate_up_, down_;
  uint32_t gate_up_tiles_, down_tiles_;
};

}  // namespace flashmoe
