// Up tiles of backward calls on Ampere's tensor cores: 64 columns of gate and up once more, and of the gradient of h; of
// both together, in registers, the gradients of gate and up.
#pragma once

#include "engine/exact_element.h"
#include "engine/fast_slope.h"
#include "engine/halved_tile.h"
#include "engine/sm80_backward_parts.h"

namespace flashmoe {

template <class Parts>
class Sm80UpGradient {
  using Shared = typename Parts::Shared;
  using Stage = typename Parts::Stage;
  using WarpSums = typename Parts::WarpSums;
  using RowSums = typename Parts::RowSums;
  using Sums = typename Parts::Sums;
  using Tile = HalvedTile<Stage::kTileN, const std::byte*>;
  static constexpr DType dtype = Parts::dtype;

 public:
  static constexpr int kCols = Parts::kHalf;  // gate's and up's are the halves of a tile; the second may be empty

  template <class Group, class P>
  FLASHMOE_DEVICE static void compute(const Group& group, const Context<P>& c, const TileShape& tiles, const Work& work,
                                      Shared& shared) {
    const int num_rows = flashmoe::up_tile(c, tiles, work).num_rows;
    for (int r = group.rank(); r < num_rows; r += group.size())
      for_each_gradient_row(c, uint32_t(work.index), uint32_t(r), 1,
                            [&](uint32_t, const std::byte* x, const std::byte* dy, float weight) {
                              shared.left[r] = x, shared.right[r] = dy, shared.weight[r] = weight;
                            });
    group.sync();
    add_bias_of_down(group, c, tiles, work, shared);
    WarpSums gate_up, of_hidden;
    c.call.gated ? multiply_and_finish<true>(group, c, tiles, work, shared, gate_up, of_hidden)
                 : multiply_and_finish<false>(group, c, tiles, work, shared, gate_up, of_hidden);
  }

 private:
  // Each up tile takes every so manieth stretch of dy · bias: one alone would be the last to end. Several rows at a time,
  // since each load is a walk to memory.
  template <class Group, class P>
  FLASHMOE_DEVICE static void add_bias_of_down(const Group& group, const Context<P>& c, const TileShape& tiles,
                                               const Work& work, Shared& shared) {
    const DownTile t = flashmoe::down_tile(c, tiles, work);
    if (!t.bias) return;
    constexpr int kPer = kPerPiece<dtype>, kStretch = 32 * kPer, kAtOnce = 4;
    const int H = c.call.hidden_size, begin = work.part * kStretch + gpu::lane() * kPer;
    for (int first = group.warp(); first < t.num_rows; first += kAtOnce * group.num_warps()) {
      float sum[kAtOnce] = {};
      for (int n = begin; n < H; n += int(tiles.up_tiles) * kStretch) {
        float bias[kPer], dy[kAtOnce][kPer];
        load_elements<dtype>(t.bias, n, bias);
        FLASHMOE_UNROLL
        for (int i = 0; i < kAtOnce; ++i) {
          const int row = first + i * group.num_warps();
          load_elements<dtype>(shared.right[row < t.num_rows ? row : first], n, dy[i]);
        }
        FLASHMOE_UNROLL
        for (int i = 0; i < kAtOnce * kPer; ++i)
          sum[i / kPer] = fmaf(dy[i / kPer][i % kPer], bias[i % kPer], sum[i / kPer]);
      }
      FLASHMOE_UNROLL
      for (int i = 0; i < kAtOnce; ++i) {
        FLASHMOE_UNROLL
        for (int mask = 16; mask; mask /= 2) sum[i] += gpu::shuffle_xor(sum[i], mask);
        const int row = first + i * group.num_warps();
        if (row < t.num_rows && gpu::lane() == 0) shared.of_bias[row] = sum[i];
      }
    }
  }

  template <bool kGated, class Group, class P>
  FLASHMOE_DEVICE static void multiply_and_finish(const Group& group, const Context<P>& c, const TileShape& tiles,
                                                  const Work& work, Shared& shared, WarpSums& gate_up,
                                                  WarpSums& of_hidden) {
    multiply_gate_up<kGated>(group, c, tiles, work, shared, gate_up);
    group.sync();  // all are done with the stages
    multiply_of_hidden(group, c, tiles, work, shared, of_hidden);
    finish<kGated>(group, c, tiles, work, shared, gate_up, of_hidden);
  }

  // The tiles are not kept in registers beyond these: all there are, are the sums' and the operands'.
  template <bool kGated, class Group, class P>
  FLASHMOE_DEVICE static void multiply_gate_up(const Group& group, const Context<P>& c, const TileShape& tiles,
                                               const Work& work, Shared& shared, WarpSums& sums) {
    const Tile tile = Tile::up(c, tiles, work, c.call.gate_up_proj);
    const int row_bytes = int(c.call.row_bytes());
    Parts::template multiply<AlongK, AlongK, kGated ? 2 : 1>(
        group, shared, Sm80RowCopies<Stage, Parts::kThreads>(group.rank(), tile.num_rows, row_bytes, shared.left),
        Sm80WeightCopies<Stage, Parts::kThreads>(group.rank(), tile, row_bytes), tile.num_rows, tile.depth, sums);
  }

  // dy · down: columns of down as they lie, in the tile's first half.
  template <class Group, class P>
  FLASHMOE_DEVICE static void multiply_of_hidden(const Group& group, const Context<P>& c, const TileShape& tiles,
                                                 const Work& work, Shared& shared, WarpSums& sums) {
    const UpTile t = flashmoe::up_tile(c, tiles, work);
    const std::byte* down = flashmoe::down_tile(c, tiles, work).down + 2 * t.begin;
    Parts::template multiply<AlongK, AcrossK, 1>(
        group, shared,
        Sm80RowCopies<Stage, Parts::kThreads>(group.rank(), t.num_rows, int(c.call.row_bytes()), shared.right),
        MatrixCopies<Stage, Parts::kThreads>(group.rank(), down, 2 * size_t(c.call.intermediate_size),
                                             c.call.hidden_size, t.end - t.begin),
        t.num_rows, c.call.hidden_size, sums);
  }

  template <bool kGated, class Group, class P>
  FLASHMOE_DEVICE static void finish(const Group& group, const Context<P>& c, const TileShape& tiles, const Work& work,
                                     const Shared& shared, WarpSums& gate_up, WarpSums& of_hidden) {
    const UpTile t = flashmoe::up_tile(c, tiles, work);
    const typename Parts::Rows made = Parts::rows_of(c, work);
    const bool has_down_bias = c.call.down_bias && Parts::first_column_of(group) == 0;
    const int begin = t.begin + Parts::first_column_of(group), cols = t.end - begin, I = c.call.intermediate_size;
    if (cols <= 0) return;
    Parts::for_each_16_rows(group, t.num_rows, [&](int i, int row0, int row1) {
      const int row[2] = {row0, row1};
      std::byte *grad[2], *up_grad[2], *hidden[2];
      float weight[2], dot[2] = {};
      FLASHMOE_UNROLL
      for (int r = 0; r < 2; ++r) {
        const bool has = row[r] < t.num_rows;
        grad[r] = has ? Parts::row_at(made, made.gate_up_grad + begin, row[r]) : nullptr;
        up_grad[r] = has ? grad[r] + 2 * I : nullptr;
        hidden[r] = has ? Parts::row_at(made, made.hidden + begin, row[r]) : nullptr;
        weight[r] = has ? shared.weight[row[r]] : 0.0f;
      }
      if (t.bias) {
        Sums::template add_bias<0>(gate_up[i], t.bias, begin, cols);
        if constexpr (kGated) Sums::template add_bias<1>(gate_up[i], t.bias, I + begin, cols);
      }
      differentiate<kGated>(c.call.activation, gate_up[i], of_hidden[i], weight, cols, dot);
      Sums::template store<0>(gate_up[i], grad, cols);
      if constexpr (kGated) Sums::template store<1>(gate_up[i], up_grad, cols);
      Sums::template store<0>(of_hidden[i], hidden, cols);
      FLASHMOE_UNROLL
      for (int r = 0; r < 2; ++r) {  // the four lanes of a row
        FLASHMOE_UNROLL
        for (int mask = 1; mask < 4; mask *= 2) dot[r] += gpu::shuffle_xor(dot[r], mask);
        if (row[r] < t.num_rows && gpu::lane() % 4 == 0)
          made.dot[row[r] * made.stride + begin / Parts::kWarpHalf] =
              has_down_bias ? dot[r] + shared.of_bias[row[r]] : dot[r];
      }
    });
  }

  // The choice is made once, outside of the loop over registers.
  template <bool kGated>
  FLASHMOE_DEVICE static void differentiate(Activation activation, RowSums& gate_up, RowSums& of_hidden,
                                            const float (&weight)[2], int cols, float (&dot)[2]) {
    switch (activation) {
      case Activation::kSilu: return by<kGated, Activation::kSilu>(gate_up, of_hidden, weight, cols, dot);
      case Activation::kGelu: return by<kGated, Activation::kGelu>(gate_up, of_hidden, weight, cols, dot);
      case Activation::kGeluTanh: return by<kGated, Activation::kGeluTanh>(gate_up, of_hidden, weight, cols, dot);
      case Activation::kRelu: return by<kGated, Activation::kRelu>(gate_up, of_hidden, weight, cols, dot);
    }
  }

  // Gate and up become their gradients and the gradient of h becomes h, all of them times w. To dot its sum with h is
  // added: of the first `cols` columns, beyond which the sums are of no weights.
  template <bool kGated, Activation activation>
  FLASHMOE_DEVICE static void by(RowSums& gate_up, RowSums& of_hidden, const float (&weight)[2], int cols,
                                 float (&dot)[2]) {
    FLASHMOE_UNROLL
    for (int i = 0; i < Sums::kSums; ++i) {
      const float w = weight[i / 2 % 2], g = of_hidden[i];
      auto [h, slope] = fast_differential<activation>(gate_up[i]);
      if constexpr (kGated) {
        float& up = gate_up[Sums::kSums + i];
        const float act = h;
        h *= up, slope *= up;
        up = w * (g * act);
      }
      gate_up[i] = w * (g * slope);
      of_hidden[i] = w * h;
      if (i / 4 * 8 < cols) dot[i / 2 % 2] = fmaf(g, h, dot[i / 2 % 2]);
    }
  }
};

}  // namespace flashmoe
