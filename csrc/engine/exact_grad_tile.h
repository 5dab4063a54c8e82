// Grad tiles of the exact engine: a part of the gradient of one of an expert's two matrices, and of its bias, summed
// over the expert's row blocks in their order.
#pragma once

#include "engine/exact_product.h"
#include "protocol/backward.h"

namespace flashmoe {

// The sums of two products at a time leave no registers for more loads.
template <int kWarps>
using ExactBackwardProduct = ExactProduct<kWarps, 2>;

// Of all its backward tiles. Rows of a row block: of an up tile x and dy, of a down tile the gradients of gate and up,
// of a grad tile both factors.
template <int kWarps>
struct ExactBackwardShared {
  const std::byte* left[kBlockM];
  const std::byte* right[kBlockM];
  std::byte* result[kBlockM];
  float weight[kBlockM];
  typename ExactBackwardProduct<kWarps>::Staged staged;

  FLASHMOE_DEVICE void init() {}
};

template <int kWarps>
class ExactGradTile {
  using Product = ExactBackwardProduct<kWarps>;
  using Shared = ExactBackwardShared<kWarps>;

 public:
  static constexpr int kRows = kBlockM, kCols = Product::kMostCols;

  // Once all row blocks of the expert have gone through their up tiles.
  template <class Group, class P>
  FLASHMOE_DEVICE static void compute(const Group& group, const Context<P>& c, const Work& work, Shared& shared) {
    const Call& call = c.call;
    const GradTiles tiles(call, kRows, kCols);
    if (tiles.count() == 0) return;
    const GradTile t = tiles.at(uint32_t(work.part));
    const int num_rows = t.row_end - t.row_begin, cols = t.col_end - t.col_begin;
    const bool whole_pieces = has_whole_gradient_pieces(call);
    const DType left = t.down ? call.dtype : DType::kFloat32, right = t.down ? DType::kFloat32 : call.dtype;
    const auto left_row = [&](int k) { return shared.left[k]; };
    const auto right_row = [&](int k) { return shared.right[k]; };
    const auto weight = [&](int k) { return shared.weight[k]; };
    const typename Product::Unscaled unscaled;
    typename Product::template Sums<kCols> sums = {};
    float bias[kBiasesOfThread] = {};
    for_each_block_of(c, uint32_t(work.index), [&](uint32_t ring_slot) {
      const int K = int(c.ws.ring[ring_slot].num_rows);
      gather_factors(group, c, t.down, ring_slot, K, shared);
      group.sync();
      Product::multiply(
          group, shared.staged, K,
          [&](int k) {
            Product::template stage_columns<kRows>(group, left, whole_pieces, left_row, weight, k, K, t.row_begin,
                                                   num_rows, shared.staged.a);
          },
          [&](int k) {
            Product::template stage_columns<kCols>(group, right, whole_pieces, right_row, unscaled, k, K, t.col_begin,
                                                   cols, shared.staged.b);
          },
          sums, [&] { if (t.col_begin == 0) add_bias(group, shared, bias); });
    });

    const size_t expert = work.index, element = dtype_bytes(call.dtype);
    const size_t rows_of_matrix = t.down ? call.hidden_size : call.up_rows();
    const size_t width = (t.down ? call.intermediate_size : call.hidden_size) * element;
    std::byte* matrix = (t.down ? call.grad.down_proj : call.grad.gate_up_proj) + expert * rows_of_matrix * width;
    Product::for_each_output(sums, num_rows, cols, [&](int m, int n, float sum) {
      store_element(call.dtype, matrix + size_t(t.row_begin + m) * width, t.col_begin + n, sum);
    });
    std::byte* biases = t.down ? call.grad.down_bias : call.grad.gate_up_bias;
    if (!biases || t.col_begin != 0) return;
    FLASHMOE_UNROLL
    for (int i = 0; i < kBiasesOfThread; ++i)
      if (const int m = group.rank() + i * group.size(); m < num_rows)
        store_element(call.dtype, biases + expert * rows_of_matrix * element, t.row_begin + m, bias[i]);
  }

 private:
  static constexpr int kBiasesOfThread = ceil_div(kRows, 32 * kWarps);

  // The rows that one row block adds to a gradient, and their top-k weights.
  template <class Group, class P>
  FLASHMOE_DEVICE static void gather_factors(const Group& group, const Context<P>& c, bool down, uint32_t ring_slot,
                                             int num_rows, Shared& shared) {
    const BackwardRows made = backward_rows(c, ring_slot);
    for (int r = group.rank(); r < num_rows; r += group.size()) {
      const auto row_of = [&](const float* first) { return reinterpret_cast<const std::byte*>(first + r * made.stride); };
      const auto take = [&](uint32_t, const std::byte* x, const std::byte* dy, float weight) {
        shared.left[r] = down ? dy : row_of(made.gate_up_grad);
        shared.right[r] = down ? row_of(made.hidden) : x;
        shared.weight[r] = weight;
      };
      for_each_gradient_row(c, ring_slot, uint32_t(r), 1, take);
    }
  }

  // A bias' gradient is the sum of the left factor.
  template <class Group>
  FLASHMOE_DEVICE static void add_bias(const Group& group, const Shared& shared, float (&bias)[kBiasesOfThread]) {
    FLASHMOE_UNROLL
    for (int i = 0; i < kBiasesOfThread; ++i)
      if (const int m = group.rank() + i * group.size(); m < kRows)
        for (int k = 0; k < Product::kStep; ++k) bias[i] += shared.staged.a[k][m];
  }
};

}  // namespace flashmoe
