// The product of a backward tile: sums of outer products, of operands whose rows follow K. For
// cpu_backward_kernels.cpp alone, like cpu_vector.h.
//
// Both operands of a K block are packed, the left one as groups of rows and the right one as panels of columns, and each
// output owns one lane of one accumulator. So the order of an output's sum is that of K, one product after the other,
// however K comes in blocks.
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

// sums[0:kRows, 0:kPanelCols) += the outer products of k columns of a group with k rows of a panel.
template <int kRows>
__attribute__((noinline)) void outer_tile(const float* group, const float* panel, int k, float* sums) {
  Vector sum[kRows][kPanelVectors];
#pragma GCC unroll 12
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 2
    for (int v = 0; v < kPanelVectors; ++v) sum[m][v] = widen(sums + m * cpu::kGradCols + v * kLanes);
  for (int i = 0; i < k; ++i, group += kRows, panel += kPanelCols) {
    const Vector first = widen(panel), second = widen(panel + kLanes);
#pragma GCC unroll 12
    for (int m = 0; m < kRows; ++m) {
      sum[m][0] += group[m] * first;
      sum[m][1] += group[m] * second;
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 2
    for (int v = 0; v < kPanelVectors; ++v) narrow(sum[m][v], sums + m * cpu::kGradCols + v * kLanes);
}

FLASHMOE_INLINE void outer_tile_of(int rows, const float* group, const float* panel, int k, float* sums) {
  switch (rows) {
    case 1: return outer_tile<1>(group, panel, k, sums);
    case 2: return outer_tile<2>(group, panel, k, sums);
    case 3: return outer_tile<3>(group, panel, k, sums);
    case 4: return outer_tile<4>(group, panel, k, sums);
    case 5: return outer_tile<5>(group, panel, k, sums);
    case 6: return outer_tile<6>(group, panel, k, sums);
#if FLASHMOE_LANES == 16
    case 7: return outer_tile<7>(group, panel, k, sums);
    case 8: return outer_tile<8>(group, panel, k, sums);
    case 9: return outer_tile<9>(group, panel, k, sums);
    case 10: return outer_tile<10>(group, panel, k, sums);
    case 11: return outer_tile<11>(group, panel, k, sums);
    case 12: return outer_tile<12>(group, panel, k, sums);
#endif
  }
}

// Where element (row m, k) of the left operand lies, packed: groups of kGroupRows rows, the last of what is left.
struct GroupPlace {
  int size;
  float* at;  // of k = 0
};
FLASHMOE_INLINE GroupPlace group_of(int m, int rows, int k, float* packed) {
  const int first = m / kGroupRows * kGroupRows, left = rows - first;
  return {left < kGroupRows ? left : kGroupRows, packed + first * k + (m - first)};
}

// The left operand from rows of M: row(m)[k0:k0+k).
template <class Row>
void pack_left_rows(const Row& row, int rows, int k0, int k, float* packed) {
  for (int m = 0; m < rows; ++m) {
    const auto* from = row(m) + k0;
    const GroupPlace place = group_of(m, rows, k, packed);
    float* to = place.at;
    for (int i = 0; i < k; i += kLanes) {
      float lanes[kLanes];
      narrow(widen_upto(from + i, k - i), lanes);
      for (int l = 0; l < kLanes && i + l < k; ++l, to += place.size) *to = lanes[l];
    }
  }
}

// The left operand from rows of K, each scaled: scale(i) · row(i)[m0:m0+rows).
template <class Row, class Scale>
void pack_left_columns(const Row& row, const Scale& scale, int m0, int rows, int k, float* packed) {
  for (int i = 0; i < k; ++i) {
    const auto* from = row(i) + m0;
    float scaled[cpu::kGradRows + cpu::kMaxLanes];
    for (int m = 0; m < rows; m += kLanes) narrow(scale(i) * widen_upto(from + m, rows - m), scaled + m);
    for (int m = 0; m < rows; m += kGroupRows) {
      const GroupPlace place = group_of(m, rows, k, packed);
      for (int g = 0; g < place.size; ++g) place.at[i * place.size + g] = scaled[m + g];
    }
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

// sums[0:rows, 0:cols) += left · right over one K block. A panel stays in the L1 cache for all groups.
inline void add_outer(const cpu::OuterOperands& operands, int rows, int cols, int k, float* sums) {
  for (int c = 0; c < cols; c += kPanelCols)
    for (int m = 0; m < rows; m += kGroupRows)
      outer_tile_of(rows - m < kGroupRows ? rows - m : kGroupRows, operands.left + m * k, operands.right + c * k, k,
                    sums + m * cpu::kGradCols + c);
}

}  // namespace
}  // namespace flashmoe::FLASHMOE_ISA_NAMESPACE
