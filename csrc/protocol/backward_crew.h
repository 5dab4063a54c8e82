// The host's crew in a backward call: one thread that performs what an agent decided, with the products of a
// BackwardEngine.
#pragma once

#include <algorithm>
#include <cstring>

#include "protocol/backward.h"
#include "protocol/crew.h"

namespace flashmoe {

template <BackwardEngine E>
TileShape backward_tile_shape(const Call& call, const typename E::Problem& problem) {
  TileShape tiles = tile_shape<E>(call, problem);
  tiles.grad_tiles = std::max(1u, GradTiles(call, E::kGradRows, E::kGradCols).count());
  return tiles;
}

// What a forward call's does, and its own tiles.
template <Platform P, BackwardEngine E>
class BackwardCrewOfOne : public CrewOfOne<P, E> {
  using Forward = CrewOfOne<P, E>;
  using Forward::c_, Forward::engine_, Forward::problem_, Forward::scratch_, Forward::tiles_;

 public:
  BackwardCrewOfOne(const Context<P>& context, const E& engine, const typename E::Problem& problem, void* scratch)
      : Forward(context, engine, problem, scratch, backward_tile_shape<E>(context.call, problem)) {}

  void perform(const Work& work) {
    switch (work.kind) {
      case WorkKind::kUpTile: return compute_up(work);
      case WorkKind::kDownTile: return compute_down(work);
      case WorkKind::kGradTile: return compute_gradient(work);
      default: Forward::perform(work);  // a combine sums rows of gradients as it sums results
    }
    if (work.kind == WorkKind::kCombine) take_weight_gradients(work);
  }

 private:
  struct Gathered {
    const void *x[kBlockM], *dy[kBlockM];
    float weight[kBlockM];
  };
  GradientRows gather(uint32_t ring_slot, Gathered& g) const {
    const uint32_t num_rows = c_.ws.ring[ring_slot].num_rows;
    const auto take = [&](uint32_t r, const std::byte* x, const std::byte* dy, float weight) {
      g.x[r] = x, g.dy[r] = dy, g.weight[r] = weight;
    };
    for_each_gradient_row(c_, ring_slot, 0, num_rows, take);
    return {g.x, g.dy, g.weight, int(num_rows), backward_rows(c_, ring_slot), kept_sums(c_, ring_slot)};
  }

  void compute_up(const Work& work) {
    const UpTile up = up_tile(c_, tiles_, work);
    const DownTile down = down_tile(c_, tiles_, work);
    Gathered gathered;
    engine_.up_backward(problem_, gather(uint32_t(work.index), gathered), {up.gate_up, up.bias, down.down, down.bias},
                        work.part, up.begin, up.end, scratch_);
  }

  void compute_down(const Work& work) {
    const DownTile t = down_tile(c_, tiles_, work);
    const BackwardRows made = backward_rows(c_, uint32_t(work.index));
    void* rows[kBlockM];
    for_each_result_row(c_, uint32_t(work.index), 0, uint32_t(t.num_rows),
                        [&](uint32_t r, std::byte* row) { rows[r] = row; });
    engine_.down_backward(problem_, made, t.num_rows, up_tile(c_, tiles_, work).gate_up, t.begin, t.end, rows, scratch_);
    if (work.part != 0) return;
    for (int r = 0; r < t.num_rows; ++r) {
      float sum = 0;
      for (uint32_t part = 0; part < tiles_.up_tiles; ++part) sum += made.dot[r * made.stride + part];
      std::memcpy(static_cast<std::byte*>(rows[r]) + weight_gradient_at(c_.call), &sum, sizeof sum);
    }
  }

  void compute_gradient(const Work& work) {
    const Call& call = c_.call;
    const GradTiles tiles(call, E::kGradRows, E::kGradCols);
    if (tiles.count() == 0) return;
    const GradTile tile = tiles.at(uint32_t(work.part));
    engine_.begin_gradient(tile, scratch_);
    for_each_block_of(c_, uint32_t(work.index), [&](uint32_t ring_slot) {
      Gathered gathered;
      engine_.add_to_gradient(problem_, tile, gather(ring_slot, gathered), scratch_);
    });
    const size_t expert = work.index, matrix = size_t(call.up_rows()) * call.row_bytes();
    const size_t element = dtype_bytes(call.dtype);
    const auto of_expert = [&](std::byte* all, size_t bytes) { return all ? all + expert * bytes : nullptr; };
    if (tile.down)
      engine_.end_gradient(problem_, tile, of_expert(call.grad.down_proj, call.row_bytes() * call.intermediate_size),
                           of_expert(call.grad.down_bias, call.row_bytes()), scratch_);
    else
      engine_.end_gradient(problem_, tile, of_expert(call.grad.gate_up_proj, matrix),
                           of_expert(call.grad.gate_up_bias, call.up_rows() * element), scratch_);
  }

  void take_weight_gradients(const Work& work) {
    const Call& call = c_.call;
    const TokenRange tokens = combine_tokens(call, work.index);
    for (int pair = tokens.begin * call.top_k; pair < tokens.end * call.top_k; ++pair) {
      const std::byte* row = returned_row(c_, pair);
      float& grad = call.grad.topk_weights[pair];
      grad = 0;  // of a dropped pair
      if (row) std::memcpy(&grad, row + weight_gradient_at(call), sizeof grad);
    }
  }
};

}  // namespace flashmoe
