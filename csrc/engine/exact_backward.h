// The exact engine of backward calls, which have kernels of their own: what protocol/backward.h says, with the products
// of engine/exact_product.h. Of any dtype and any width.
#pragma once

#include <string>

#include "engine/combine_gradients.h"
#include "engine/combine_rows.h"
#include "engine/exact_grad_tile.h"
#include "engine/exact_slope.h"

namespace flashmoe {

template <int kWarps = 8>
class ExactBackwardEngine {
  using Product = ExactBackwardProduct<kWarps>;

 public:
  static constexpr int kCrewWarps = kWarps, kLoaderWarps = 0;
  static constexpr int kHiddenBytes = 4;
  static constexpr int kUpCols = 32;  // of gate, and as many of up and of h: one thread holds all that an output needs
  static constexpr int kDownCols = Product::kMostCols;
  static constexpr int kGradRows = ExactGradTile<kWarps>::kRows, kGradCols = ExactGradTile<kWarps>::kCols;

  using Shared = ExactBackwardShared<kWarps>;
  struct Operands {};
  static std::string make_operands(Operands*, const Call&) { return {}; }

  FLASHMOE_HD static constexpr int up_cols(bool) { return kUpCols; }
  FLASHMOE_HD static constexpr int down_cols(bool) { return kDownCols; }

  template <class Group, class P>
  FLASHMOE_DEVICE static void tile(const Group& group, const Context<P>& c, const TileShape& tiles, const Work& work,
                                   Shared& shared) {
    switch (work.kind) {
      case WorkKind::kUpTile: return up_tile(group, c, tiles, work, shared);
      case WorkKind::kDownTile: return down_tile(group, c, tiles, work, shared);
      default: ExactGradTile<kWarps>::compute(group, c, work, shared);
    }
  }

  template <class Group, class P>
  FLASHMOE_DEVICE static void up_tile(const Group& group, const Context<P>& c, const TileShape& tiles, const Work& work,
                                      Shared& shared) {
    const Call& call = c.call;
    const UpTile t = flashmoe::up_tile(c, tiles, work);
    const DownTile down = flashmoe::down_tile(c, tiles, work);
    const BackwardRows made = backward_rows(c, uint32_t(work.index));
    const int H = call.hidden_size, I = call.intermediate_size, cols = t.end - t.begin;
    const bool whole_pieces = has_whole_gradient_pieces(call);
    for (int r = group.rank(); r < t.num_rows; r += group.size())
      for_each_gradient_row(
          c, uint32_t(work.index), uint32_t(r), 1,
          [&](uint32_t, const std::byte* x, const std::byte* dy, float) { shared.left[r] = x, shared.right[r] = dy; });
    group.sync();

    // Gate and up of x. The second half of the columns is up's, if there is one.
    const auto weight_row = [&](int n) { return t.begin + n % kUpCols + (n >= kUpCols ? I : 0); };
    const auto weights = [&](int n) -> const std::byte* {
      const bool inside = n % kUpCols < cols && (call.gated || n < kUpCols);
      return inside ? t.gate_up + size_t(weight_row(n)) * call.row_bytes() : nullptr;
    };
    typename Product::template Sums<2 * kUpCols> gate_up = {};
    Product::multiply(
        group, shared.staged, H,
        [&](int k) { stage_block(group, call.dtype, whole_pieces, shared.left, t.num_rows, k, H, shared); },
        [&](int k) {
          Product::template stage_rows<2 * kUpCols>(group, call.dtype, whole_pieces, weights, k, H, shared.staged.b);
        },
        gate_up);
    // The gradient of h: dy · down.
    const size_t down_row_bytes = size_t(I) * dtype_bytes(call.dtype);
    const auto down_row = [&](int k) { return down.down + size_t(k) * down_row_bytes; };
    typename Product::template Sums<kUpCols> of_hidden = {};
    Product::multiply(
        group, shared.staged, H,
        [&](int k) { stage_block(group, call.dtype, whole_pieces, shared.right, t.num_rows, k, H, shared); },
        [&](int k) {
          Product::template stage_columns<kUpCols>(group, call.dtype, whole_pieces, down_row, Unscaled{}, k, H, t.begin,
                                                   cols, shared.staged.b);
        },
        of_hidden);

    constexpr int kColumns = kUpCols / Product::kThreadColumns;
    static_assert(kUpCols <= Product::kStep);
    FLASHMOE_UNROLL
    for (int i = 0; i < Product::kRows; ++i) {
      const int r = Product::row_of(i);
      if (r >= t.num_rows) break;
      float *grad = made.gate_up_grad + r * made.stride + t.begin, *hidden = made.hidden + r * made.stride + t.begin;
      FLASHMOE_UNROLL  // so that the sums stay in registers
      for (int j = 0; j < kColumns; ++j) {
        const int n = Product::column_of(j);
        if (n >= cols) break;
        const auto sum = [&](int column, int at) {
          return gate_up[i][column] + (t.bias ? load_element(call.dtype, t.bias, weight_row(at)) : 0.0f);
        };
        const float gate = sum(j, n), g = of_hidden[i][j];
        float h = activate(call.activation, gate), slope = slope_of(call.activation, gate);
        if (call.gated) {
          const float up = sum(j + kColumns, n + kUpCols);
          grad[I + n] = g * h;
          h *= up, slope *= up;
        }
        grad[n] = g * slope;
        hidden[n] = h;
        shared.staged.a[n][r] = g * h;
      }
    }
    group.sync();
    add_dot(group, call, shared, work.part == 0 ? down.bias : nullptr, t.num_rows, cols, made.dot + work.part,
            made.stride);
  }

  template <class Group, class P>
  FLASHMOE_DEVICE static void down_tile(const Group& group, const Context<P>& c, const TileShape& tiles, const Work& work,
                                        Shared& shared) {
    const Call& call = c.call;
    const DownTile t = flashmoe::down_tile(c, tiles, work);
    const BackwardRows made = backward_rows(c, uint32_t(work.index));
    const std::byte* gate_up = flashmoe::up_tile(c, tiles, work).gate_up;
    const int K = call.up_rows(), cols = t.end - t.begin;
    const bool whole_pieces = has_whole_gradient_pieces(call);
    for (int r = group.rank(); r < t.num_rows; r += group.size()) {
      shared.left[r] = reinterpret_cast<const std::byte*>(made.gate_up_grad + r * made.stride);
      shared.result[r] = result_row(c, uint32_t(work.index), uint32_t(r));
      if (work.part == 0) {
        const float* dot = made.dot + r * made.stride;
        float sum = 0;
        for (uint32_t part = 0; part < tiles.up_tiles; ++part) sum += gpu::load_coherent(dot + part);
        *reinterpret_cast<float*>(shared.result[r] + weight_gradient_at(call)) = sum;
      }
    }
    group.sync();

    const auto row = [&](int k) { return gate_up + size_t(k) * call.row_bytes(); };
    typename Product::template Sums<kDownCols> sums = {};
    Product::multiply(
        group, shared.staged, K,
        [&](int k) { stage_block(group, DType::kFloat32, whole_pieces, shared.left, t.num_rows, k, K, shared); },
        [&](int k) {
          Product::template stage_columns<kDownCols>(group, call.dtype, whole_pieces, row, Unscaled{}, k, K, t.begin, cols,
                                                     shared.staged.b);
        },
        sums);
    Product::for_each_output(sums, t.num_rows, cols, [&](int r, int n, float sum) {
      store_element(call.dtype, shared.result[r], t.begin + n, sum);
    });
  }

  template <class Group, class P>
  FLASHMOE_DEVICE static void combine(const Group& group, const Context<P>& c, const Work& work) {
    with_dtype(c.call.dtype, [&]<DType dtype>() { combine_rows<dtype>(group, c, work); });
    take_weight_gradients(group, c, work);
  }

 private:
  using Unscaled = typename Product::Unscaled;

  template <class Group>
  FLASHMOE_DEVICE static void stage_block(const Group& group, DType dtype, bool whole_pieces,
                                          const std::byte* const (&rows)[kBlockM], int num_rows, int begin, int K,
                                          Shared& shared) {
    const auto row = [&](int r) { return r < num_rows ? rows[r] : nullptr; };
    Product::template stage_rows<kBlockM>(group, dtype, whole_pieces, row, begin, K, shared.staged.a);
  }

  // One up tile's part of dy · o: the sum of staged.a's columns, with dy · bias in one of them. A warp sums a row, each
  // lane a column of it, whatever the number of warps.
  template <class Group>
  FLASHMOE_DEVICE static void add_dot(const Group& group, const Call& call, const Shared& shared, const std::byte* bias,
                                      int num_rows, int cols, float* dot, ptrdiff_t stride) {
    static_assert(kUpCols <= 32);
    for (int r = group.warp(); r < num_rows; r += group.num_warps()) {
      const int lane = gpu::lane();
      float sum = lane < cols ? shared.staged.a[lane][r] : 0.0f;
      for (int n = lane; bias && n < call.hidden_size; n += 32)
        sum = fmaf(load_element(call.dtype, shared.right[r], n), load_element(call.dtype, bias, n), sum);
      FLASHMOE_UNROLL
      for (int mask = 16; mask; mask /= 2) sum += gpu::shuffle_xor(sum, mask);
      if (lane == 0) dot[r * stride] = sum;
    }
  }
};

}  // namespace flashmoe
