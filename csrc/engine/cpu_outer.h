// The product of a backward tile: sums of outer products, of operands whose rows follow K. For
// cpu_backward_kernels.cpp alone, like cpu_vector.h.
//
// Both operands of a K block are copied, widened: the left one as it lies, rows of M or rows of K, since its elements are
// broadcast one by one; the right one as panels of columns. Each output owns one lane of one accumulator. So the order of
// an output's sum is that of K, one product after the other, however K comes in blocks.
#pragma once

#include "engine/cpu_backward.h"
#include "engine/cpu_vector.h"

namespace flashmoe::FLASHMOE_ISA_NAMESPACE {
namespace {

// kGroupRows x kPanelVectors accumulators, the panel's vectors and one broadcast must fit the registers (16 or, with
// AVX-512, 32).
constexpr int kGroupRows = kLanes == 16 ? 12 : 6;
constexpr int kPanelVectors = 2;
constexpr int kPanelCols = kPanelVectors * kLanes;

// How the left operand lies: element (m, i of K) at m · kOuterBlock + i, or at i · kGradRows + m.
enum class Left { kRows, kColumns };
static_assert(cpu::kOuterBlock == cpu::kGradRows, "both have the same pitch");

// sums[0:kRows, 0:kPanelCols) += the outer products of k columns of the left operand with k rows of a panel.
template <int kRows, Left kLeft>
__attribute__((noinline)) void outer_tile(const float* left, const float* panel, int k, float* sums) {
  constexpr int kNextRow = kLeft == Left::kRows ? cpu::kOuterBlock : 1;
  constexpr int kNextColumn = kLeft == Left::kRows ? 1 : cpu::kGradRows;
  Vector sum[kRows][kPanelVectors];
#pragma GCC unroll 12
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 2
    for (int v = 0; v < kPanelVectors; ++v) sum[m][v] = widen(sums + m * cpu::kGradCols + v * kLanes);
  for (int i = 0; i < k; ++i, left += kNextColumn, panel += kPanelCols) {
    const Vector first = widen(panel), second = widen(panel + kLanes);
#pragma GCC unroll 12
    for (int m = 0; m < kRows; ++m) {
      sum[m][0] += left[m * kNextRow] * first;
      sum[m][1] += left[m * kNextRow] * second;
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 2
    for (int v = 0; v < kPanelVectors; ++v) narrow(sum[m][v], sums + m * cpu::kGradCols + v * kLanes);
}

template <Left kLeft>
FLASHMOE_INLINE void outer_tile_of(int rows, const float* left, const float* panel, int k, float* sums) {
  switch (rows) {
    case 1: return outer_tile<1, kLeft>(left, panel, k, sums);
    case 2: return outer_tile<2, kLeft>(left, panel, k, sums);
    case 3: return outer_tile<3, kLeft>(left, panel, k, sums);
    case 4: return outer_tile<4, kLeft>(left, panel, k, sums);
    case 5: return outer_tile<5, kLeft>(left, panel, k, sums);
    case 6: return outer_tile<6, kLeft>(left, panel, k, sums);
#if FLASHMOE_LANES == 16
    case 7: return outer_tile<7, kLeft>(left, panel, k, sums);
    case 8: return outer_tile<8, kLeft>(left, panel, k, sums);
    case 9: return outer_tile<9, kLeft>(left, panel, k, sums);
    case 10: return outer_tile<10, kLeft>(left, panel, k, sums);
    case 11: return outer_tile<11, kLeft>(left, panel, k, sums);
    case 12: return outer_tile<12, kLeft>(left, panel, k, sums);
#endif
  }
}

// The left operand from rows of M: row(m)[k0:k0+k). What is written beyond k is not read.
template <class Row>
void copy_rows(const Row& row, int rows, int k0, int k, float* left) {
  for (int m = 0; m < rows; ++m) {
    const auto* from = row(m) + k0;
    for (int i = 0; i < k; i += kLanes) narrow(widen_upto(from + i, k - i), left + m * cpu::kOuterBlock + i);
  }
}

// The left operand from rows of K, each scaled: scale(i) · row(i)[m0:m0+rows).
template <class Row, class Scale>
void copy_columns(const Row& row, const Scale& scale, int m0, int rows, int k, float* left) {
  for (int i = 0; i < k; ++i) {
    const auto* from = row(i) + m0;
    for (int m = 0; m < rows; m += kLanes)
      narrow(scale(i) * widen_upto(from + m, rows - m), left + i * cpu::kGradRows + m);
  }
}

// The right operand: row(i)[c0:c0+cols) for i in [0, k), the last panel filled up with zeros.
template <class Row>
void pack_right(const Row& row, int c0, int cols, int k, float* packed) {
  for (int i = 0; i < k; ++i) {
    const auto* from = row(i) + c0;
    for (int c = 0; c < cols; c += kPanelCols) {
      float* to = packed + c * k + i * kPanelCols;
      for (int v = 0; v < kPanelCols; v += kLanes)
        narrow(c + v < cols ? widen_upto(from + c + v, cols - c - v) : Vector{}, to + v);
    }
  }
}

// The next K block of a matrix on its way to the L2 cache, some lines at a time: short pieces of many rows, of which no
// hardware guesses the next.
class Approach {
 public:
  Approach() = default;
  template <class T>
  Approach(const T* first, ptrdiff_t stride, int rows, int cols)
      : row_(reinterpret_cast<const char*>(first)), stride_(stride * sizeof(T)), bytes_(cols * sizeof(T)), rows_(rows) {}

  // So many of `steps` equal parts bring all of it.
  void go_on(int steps) {
    const int lines = (int(bytes_) + 63) / 64;
    for (int n = (lines * rows_ + steps - 1) / steps; n > 0 && done_ < rows_; --n) {
      __builtin_prefetch(row_ + at_, 0, 2);
      at_ += 64;
      if (at_ >= bytes_) at_ = 0, row_ += stride_, ++done_;
    }
  }

 private:
  const char* row_ = nullptr;
  ptrdiff_t stride_ = 0, bytes_ = 0, at_ = 0;
  int rows_ = 0, done_ = 0;
};

// sums[0:rows, 0:cols) += left · right over one K block. A panel stays in the L1 cache for all rows.
template <Left kLeft>
void add_outer(const cpu::OuterOperands& operands, int rows, int cols, int k, float* sums, Approach next = {}) {
  const int steps = ((cols + kPanelCols - 1) / kPanelCols) * ((rows + kGroupRows - 1) / kGroupRows);
  constexpr int kNextRow = kLeft == Left::kRows ? cpu::kOuterBlock : 1;
  for (int c = 0; c < cols; c += kPanelCols)
    for (int m = 0; m < rows; m += kGroupRows) {
      next.go_on(steps);
      outer_tile_of<kLeft>(rows - m < kGroupRows ? rows - m : kGroupRows, operands.left + m * kNextRow,
                           operands.right + c * k, k, sums + m * cpu::kGradCols + c);
    }
}

}  // namespace
}  // namespace flashmoe::FLASHMOE_ISA_NAMESPACE
