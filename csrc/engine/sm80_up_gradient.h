// Up tiles of backward calls on Ampere's tensor cores: 64 columns of gate and up once more, and of the gradient of h;
// of both together, in registers, the gradients of gate and up.
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
    const typename Parts::Rows made = Parts::rows_of(c, work.index);
    for (int r = group.rank(); r < num_rows; r += group.size())
      for_each_gradient_row(c, uint32_t(work.index), uint32_t(r), 1,
                            [&](uint32_t, const std::byte* x, const std::byte* dy, float weight) {
                              shared.left[r] = x, shared.right[r] = dy, shared.weight[r] = weight;
                              if (work.part == 0) *Parts::origin_of(c, made, r) = {x, dy, weight};
                            });
    group.sync();
    add_bias_of_down(group, c, tiles, work, shared);
    multiply_of_hidden(group, c, tiles, work, shared);
    group.sync();  // all are done with the stages
    c.call.gated ? multiply_gate_up<true>(group, c, tiles, work, shared)
                 : multiply_gate_up<false>(group, c, tiles, work, shared);
  }

 private:
  // Each up tile takes every so manieth stretch of dy · bias: one alone would be the last to end. Several rows at a
  // time, since each load is a walk to memory.
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

  // dy · down: columns of down as they lie, in the tile's first half. There are no registers for these sums beside
  // those of gate and up.
  template <class Group, class P>
  FLASHMOE_DEVICE static void multiply_of_hidden(const Group& group, const Context<P>& c, const TileShape& tiles,
                                                 const Work& work, Shared& shared) {
    const UpTile t = flashmoe::up_tile(c, tiles, work);
    const std::byte* down = flashmoe::down_tile(c, tiles, work).down + 2 * t.begin;
    WarpSums sums;
    Parts::template multiply<AlongK, AcrossK, 1>(
        group, shared,
        Sm80RowCopies<Stage, Parts::kThreads>(group.rank(), t.num_rows, int(c.call.row_bytes()), shared.right),
        MatrixCopies<Stage, Parts::kThreads>(group.rank(), down, 2 * c.call.intermediate_size,
                                             c.call.hidden_size, t.end - t.begin),
        t.num_rows, c.call.hidden_size, sums);
    const Place place(group, c, tiles, work);
    place.for_each_row(group, [&](int i, int r, int row) {
      if (row >= place.num_rows) return;
      FLASHMOE_UNROLL
      for (int w = 0; w < 4; ++w)
        if (8 * w < place.cols) *place.parked(row, w) = {sums[i][4 * w + 2 * r], sums[i][4 * w + 2 * r + 1]};
    });
  }

  template <bool kGated, class Group, class P>
  FLASHMOE_DEVICE static void multiply_gate_up(const Group& group, const Context<P>& c, const TileShape& tiles,
                                               const Work& work, Shared& shared) {
    const Tile tile = Tile::up(c, tiles, work, c.call.gate_up_proj);
    const int row_bytes = int(c.call.row_bytes());
    WarpSums sums;
    Parts::template multiply<AlongK, AlongK, kGated ? 2 : 1>(
        group, shared, Sm80RowCopies<Stage, Parts::kThreads>(group.rank(), tile.num_rows, row_bytes, shared.left),
        Sm80WeightCopies<Stage, Parts::kThreads>(group.rank(), tile, row_bytes), tile.num_rows, tile.depth, sums);
    finish<kGated>(group, c, tiles, work, shared, sums);
  }

  // Where the warp's part of the tile goes, in rows that a thread shares with three others.
  struct Place {
    typename Parts::Rows made;
    int num_rows, begin, cols, inner;

    template <class Group, class P>
    FLASHMOE_DEVICE Place(const Group& group, const Context<P>& c, const TileShape& tiles, const Work& work)
        : made(Parts::rows_of(c, work.index)), inner(c.call.intermediate_size) {
      const UpTile t = flashmoe::up_tile(c, tiles, work);
      num_rows = t.num_rows, begin = t.begin + Parts::first_column_of(group), cols = t.end - begin;
    }

    // f(i, r, row): the thread's row number r of the warp's 16 rows number i.
    template <class Group, class F>
    FLASHMOE_DEVICE void for_each_row(const Group& group, const F& f) const {
      Parts::for_each_16_rows(group, num_rows, [&](int i, int row0, int row1) { f(i, 0, row0), f(i, 1, row1); });
    }

    FLASHMOE_DEVICE std::byte* gate_grad(int row) const { return Parts::row_at(made, made.gate_up_grad + begin, row); }
    FLASHMOE_DEVICE std::byte* up_grad(int row) const { return gate_grad(row) + 2 * inner; }
    FLASHMOE_DEVICE std::byte* hidden(int row) const { return Parts::row_at(made, made.hidden + begin, row); }
    // Until they are overwritten by what they are for, gate_grad and hidden together have room for the row's gradient
    // of h in fp32: for eight columns 16 bytes in each. This is the thread's pair of the eight columns number w.
    FLASHMOE_DEVICE gpu::FloatPair* parked(int row, int w) const {
      std::byte* half = gpu::lane() % 4 < 2 ? gate_grad(row) : hidden(row);
      return reinterpret_cast<gpu::FloatPair*>(half + 16 * w + gpu::lane() % 2 * 8);
    }
  };

  template <bool kGated, class Group, class P>
  FLASHMOE_DEVICE static void finish(const Group& group, const Context<P>& c, const TileShape& tiles, const Work& work,
                                     const Shared& shared, WarpSums& sums) {
    const Place place(group, c, tiles, work);
    if (place.cols <= 0) return;
    if (const std::byte* bias = flashmoe::up_tile(c, tiles, work).bias) {
      FLASHMOE_UNROLL
      for (int i = 0; i < Parts::kWarpRows / 16; ++i) {
        Sums::template add_bias<0>(sums[i], bias, place.begin, place.cols);
        if constexpr (kGated) Sums::template add_bias<1>(sums[i], bias, place.inner + place.begin, place.cols);
      }
    }
    const bool has_of_bias = c.call.down_bias && Parts::first_column_of(group) == 0;
    place.for_each_row(group, [&](int i, int r, int row) {
      const bool has = row < place.num_rows;
      const float weight = has ? shared.weight[row] : 0.0f;
      gpu::FloatPair of_hidden[4] = {};
      FLASHMOE_UNROLL
      for (int w = 0; w < 4; ++w)
        if (has && 8 * w < place.cols) of_hidden[w] = load_pair(place.parked(row, w));
      RowGradients made;
      float dot = differentiate<kGated>(c.call.activation, sums[i], r, of_hidden, weight, place.cols, made);
      Sums::store_pairs(made.gate, has ? place.gate_grad(row) : nullptr, place.cols);
      if constexpr (kGated) Sums::store_pairs(made.up, has ? place.up_grad(row) : nullptr, place.cols);
      Sums::store_pairs(made.hidden, has ? place.hidden(row) : nullptr, place.cols);
      FLASHMOE_UNROLL
      for (int mask = 1; mask < 4; mask *= 2) dot += gpu::shuffle_xor(dot, mask);  // the four lanes of a row
      if (has && gpu::lane() % 4 == 0)
        place.made.dot[row * place.made.stride + place.begin / Parts::kWarpHalf] =
            has_of_bias ? dot + shared.of_bias[row] : dot;
    });
  }

  FLASHMOE_DEVICE static gpu::FloatPair load_pair(const gpu::FloatPair* from) {
    const uint64_t bits = gpu::load_coherent(reinterpret_cast<const uint64_t*>(from));
    gpu::FloatPair pair;
    memcpy(&pair, &bits, 8);
    return pair;
  }

  // Of the 32 columns of a row, the thread's pairs.
  struct RowGradients {
    gpu::Words4 gate, up, hidden;
  };

  // The choice is made once for a row, outside of the loop over registers. Returns the sum of g · h.
  template <bool kGated>
  FLASHMOE_DEVICE static float differentiate(Activation activation, const RowSums& sums, int r,
                                             const gpu::FloatPair (&of_hidden)[4], float weight, int cols,
                                             RowGradients& made) {
    switch (activation) {
      case Activation::kSilu: return by<kGated, Activation::kSilu>(sums, r, of_hidden, weight, cols, made);
      case Activation::kGelu: return by<kGated, Activation::kGelu>(sums, r, of_hidden, weight, cols, made);
      case Activation::kGeluTanh: return by<kGated, Activation::kGeluTanh>(sums, r, of_hidden, weight, cols, made);
      default: return by<kGated, Activation::kRelu>(sums, r, of_hidden, weight, cols, made);
    }
  }

  template <bool kGated, Activation activation>
  FLASHMOE_DEVICE static float by(const RowSums& sums, int r, const gpu::FloatPair (&of_hidden)[4], float weight,
                                  int cols, RowGradients& made) {
    float dot = 0;
    FLASHMOE_UNROLL
    for (int w = 0; w < 4; ++w) {
      float gate[2], up[2], hidden[2];
      FLASHMOE_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int at = 4 * w + 2 * r + i;
        const float g = i ? of_hidden[w].second : of_hidden[w].first;
        auto [h, slope] = fast_differential<activation>(sums[at]);
        if constexpr (kGated) {
          up[i] = weight * (g * h);
          h *= sums[Sums::kSums + at], slope *= sums[Sums::kSums + at];
        }
        gate[i] = weight * (g * slope), hidden[i] = weight * h;
        if (8 * w < cols) dot = fmaf(g, h, dot);  // beyond, the sums are of no weights
      }
      made.gate.word[w] = gpu::pack_pair<dtype>(gate[0], gate[1]);
      if constexpr (kGated) made.up.word[w] = gpu::pack_pair<dtype>(up[0], up[1]);
      made.hidden.word[w] = gpu::pack_pair<dtype>(hidden[0], hidden[1]);
    }
    return dot;
  }
};

}  // namespace flashmoe
