// The products of the exact engines, on a block's plain fp32 units. Every output owns one accumulator, to which the
// products of K are added in order by fused multiply-add, so a row's bits depend on that row and its weights alone:
// not on the tile's height, its columns, or the number of threads.
//
// Operands are of any dtype and of any width. They are read 16 bytes at a time where all of them allow it, else element
// by element. One kernel serves all dtypes: they differ where operands are staged and results stored, and nowhere in
// the products.
#pragma once

#include "engine/exact_element.h"

namespace flashmoe {

// kLoads: pieces that a thread has on their way to shared memory at one time.
template <int kWarps, int kLoads = 4>
class ExactProduct {
 public:
  static constexpr int kMostCols = 64;  // of a tile, whose rows are those of a row block
  static constexpr int kStep = 32;      // elements of K that are staged at a time

  struct Staged {
    float a[kStep][kBlockM + 1];  // K first: the threads of a warp read along rows
    float b[kStep][kMostCols + 1];
  };

  // The crew as a grid over the tile: a thread has kRows rows of outputs, the same distance apart, and its columns.
  static constexpr int kThreadColumns = 16, kThreadRows = 32 * kWarps / kThreadColumns;
  static constexpr int kRows = kBlockM / kThreadRows;
  static_assert(kRows * kThreadRows == kBlockM, "the crew's rows must divide a row block");
  template <int kCols>
  using Sums = float[kRows][kCols / kThreadColumns];

  FLASHMOE_DEVICE static int row_of(int i) { return gpu::thread_in_block() / kThreadColumns + i * kThreadRows; }
  FLASHMOE_DEVICE static int column_of(int j) { return gpu::thread_in_block() % kThreadColumns + j * kThreadColumns; }

  // f(row, column, sum) for this thread's outputs in a tile of that size.
  template <int kColumns, class F>
  FLASHMOE_DEVICE static void for_each_output(const float (&sums)[kRows][kColumns], int num_rows, int cols, F&& f) {
    FLASHMOE_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const int r = row_of(i);
      if (r >= num_rows) break;
      FLASHMOE_UNROLL  // so that the sums stay in registers
      for (int j = 0; j < kColumns; ++j) {
        const int n = column_of(j);
        if (n >= cols) break;
        f(r, n, sums[i][j]);
      }
    }
  }

  struct Nothing {
    FLASHMOE_DEVICE void operator()() const {}
  };
  struct Unscaled {
    FLASHMOE_DEVICE float operator()(int) const { return 1.0f; }
  };

  // sums += Σ a[k][row] · b[k][column] over K, of which stage_a(begin) and stage_b(begin) bring a step from `begin` on.
  // Then all call with_step(), before the next.
  template <class Group, class StageA, class StageB, int kColumns, class WithStep = Nothing>
  FLASHMOE_DEVICE static void multiply(const Group& group, const Staged& staged, int K, const StageA& stage_a,
                                       const StageB& stage_b, float (&sums)[kRows][kColumns],
                                       const WithStep& with_step = {}) {
    for (int begin = 0; begin < K; begin += kStep) {
      stage_a(begin);
      stage_b(begin);
      group.sync();
      for (int k = 0; k < kStep; ++k) {
        float b[kColumns];
        FLASHMOE_UNROLL
        for (int j = 0; j < kColumns; ++j) b[j] = staged.b[k][column_of(j)];
        FLASHMOE_UNROLL
        for (int i = 0; i < kRows; ++i) {
          const float a = staged.a[k][row_of(i)];
          FLASHMOE_UNROLL
          for (int j = 0; j < kColumns; ++j) sums[i][j] = fmaf(a, b[j], sums[i][j]);
        }
      }
      with_step();
      group.sync();
    }
  }

  // to[k][r] = row(r)[begin + k] for r < kNum, zeros past K and where there is no row: K runs along the rows.
  template <int kNum, class Group, class Row, int kNumAndPad>
  FLASHMOE_DEVICE static void stage_rows(const Group& group, DType dtype, bool whole_pieces, const Row& row, int begin,
                                         int K, float (&to)[kStep][kNumAndPad]) {
    static_assert(kNum < kNumAndPad);
    with_dtype(dtype, [&]<DType type>() {
      whole_pieces ? stage_rows_by<type, kPerPiece<type>, kNum>(group, row, begin, K, to)
                   : stage_rows_by<type, 1, kNum>(group, row, begin, K, to);
    });
  }

  // to[k][c] = scale(begin + k) · row(begin + k)[first + c] for c < kNum, zeros past K and from c = `cols` on: K counts
  // the rows.
  template <int kNum, class Group, class Row, class Scale, int kNumAndPad>
  FLASHMOE_DEVICE static void stage_columns(const Group& group, DType dtype, bool whole_pieces, const Row& row,
                                            const Scale& scale, int begin, int K, int first, int cols,
                                            float (&to)[kStep][kNumAndPad]) {
    static_assert(kNum < kNumAndPad);
    with_dtype(dtype, [&]<DType type>() {
      whole_pieces ? stage_columns_by<type, kPerPiece<type>, kNum>(group, row, scale, begin, K, first, cols, to)
                   : stage_columns_by<type, 1, kNum>(group, row, scale, begin, K, first, cols, to);
    });
  }

 private:
  // kPer elements at a time.
  template <DType type, int kPer, int kNum, class Group, class Row, int kNumAndPad>
  FLASHMOE_DEVICE static void stage_rows_by(const Group& group, const Row& row, int begin, int K,
                                            float (&to)[kStep][kNumAndPad]) {
    constexpr int kPieces = kStep / kPer;
    FLASHMOE_UNROLL_BY(kPer == 1 ? 1 : kLoads)
    for (int piece = group.rank(); piece < kNum * kPieces; piece += group.size()) {
      const int r = piece / kPieces, k = piece % kPieces * kPer;
      const std::byte* from = row(r);
      float value[kPer] = {};
      if (from && begin + k < K) load_elements<type>(from, begin + k, value);
      FLASHMOE_UNROLL
      for (int e = 0; e < kPer; ++e) to[k + e][r] = value[e];
    }
  }

  template <DType type, int kPer, int kNum, class Group, class Row, class Scale, int kNumAndPad>
  FLASHMOE_DEVICE static void stage_columns_by(const Group& group, const Row& row, const Scale& scale, int begin, int K,
                                               int first, int cols, float (&to)[kStep][kNumAndPad]) {
    constexpr int kPieces = kNum / kPer;
    FLASHMOE_UNROLL_BY(kPer == 1 ? 1 : kLoads)
    for (int piece = group.rank(); piece < kStep * kPieces; piece += group.size()) {
      const int k = piece / kPieces, column = piece % kPieces * kPer;
      float value[kPer] = {};
      if (begin + k < K && column < cols) {
        load_elements<type>(row(begin + k), first + column, value);
        FLASHMOE_UNROLL
        for (int e = 0; e < kPer; ++e) value[e] *= scale(begin + k);
      }
      FLASHMOE_UNROLL
      for (int e = 0; e < kPer; ++e) to[k][column + e] = value[e];
    }
  }
};

}  // namespace flashmoe
