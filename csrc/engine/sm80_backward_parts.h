// What the three kinds of backward tiles on Ampere's tensor cores have in common: how the crew divides a tile, the loop
// over K, and the way of the sums to memory.
#pragma once

#include "engine/mma_sums.h"
#include "engine/sm80_across.h"
#include "protocol/backward.h"
#include "protocol/tile.h"

namespace flashmoe {

template <class Stage, int kStages>
struct Sm80BackwardShared {
  Stage stage[kStages];
  // Where rows lie, of one row block or, in a grad tile, of two: those of the left operand; of an up tile those of dy,
  // of a grad tile those of the right operand.
  const std::byte* left[2 * kBlockM];
  const std::byte* right[2 * kBlockM];
  std::byte* result[kBlockM];
  float weight[2 * kBlockM];  // w of each row, where it is needed
  float of_bias[kBlockM];     // dy · bias, or what an up tile takes of it

  FLASHMOE_DEVICE void init() {}
};

// Warps of 32 rows by 32 columns of each half of a tile, as in the forward engine.
template <DType dtype_, int kTileN, int kStages, template <int> class PipelineOf>
struct Sm80BackwardParts {
  static_assert(dtype_ != DType::kFloat32, "operands that have K as their rows are of 16-bit elements");
  static constexpr DType dtype = dtype_;
  static constexpr int kWarpRows = 32, kWarpColumns = 64, kHalf = kTileN / 2, kWarpsInRow = kTileN / kWarpColumns;
  static constexpr int kWarpHalf = kWarpColumns / 2;  // columns of a warp in either half
  static constexpr int kWarps = kBlockM / kWarpRows * kWarpsInRow, kThreads = 32 * kWarps;

  using Pipeline = PipelineOf<kStages>;
  using Stage = Sm80Stage<kTileN>;
  using Shared = Sm80BackwardShared<Stage, kStages>;
  using Sums = MmaSums<dtype, kWarpColumns>;
  using RowSums = typename Sums::Sums;  // of 16 rows
  using WarpSums = Sm80Sums<kWarpRows>;
  using Rows = ScaledBackwardRows;
  static constexpr int kStepDepth = AcrossPanel<Stage, true>::kDepth;  // K of a step

  template <class Group>
  FLASHMOE_DEVICE static int first_row_of(const Group& group) {
    return group.warp() / kWarpsInRow * kWarpRows;
  }
  // Of its columns in either half.
  template <class Group>
  FLASHMOE_DEVICE static int first_column_of(const Group& group) {
    return group.warp() % kWarpsInRow * kWarpHalf;
  }

  template <class P>
  FLASHMOE_DEVICE static Rows rows_of(const Context<P>& c, int ring_slot) {
    return backward_rows<uint16_t>(c, uint32_t(ring_slot));
  }
  FLASHMOE_DEVICE static std::byte* row_at(const Rows& rows, uint16_t* first, int row) {
    return reinterpret_cast<std::byte*>(first) + row * rows.stride * ptrdiff_t(sizeof(float));
  }
  template <class P>
  FLASHMOE_DEVICE static RowOrigin* origin_of(const Context<P>& c, const Rows& rows, int row) {
    return reinterpret_cast<RowOrigin*>(rows.dot + row * rows.stride + floats_of_dots(c.call));
  }

  // The warp's sums over all of K, of operands that lie as Left and Right say.
  template <template <class, bool> class Left, template <class, bool> class Right, int kHalves = 2, class Group,
            class LeftCopies, class RightCopies, class Besides = NothingBesides>
  FLASHMOE_DEVICE static void multiply(const Group& group, Shared& shared, const LeftCopies& left,
                                       const RightCopies& right, int num_rows, int depth, WarpSums& sums,
                                       const Besides& besides = {}) {
    const int first_row = first_row_of(group);
    const Sm80BothCopies<LeftCopies, RightCopies> copies{left, right};
    using Operands = Sm80Operands<dtype, kWarpRows, Stage, Left, Right, kHalves>;
    sm80_products_of<Pipeline>(group, shared.stage, copies, Operands(first_row, first_column_of(group)),
                               first_row < num_rows, ceil_div(depth, kStepDepth), sums, besides);
  }

  // f(i, the thread's two rows of the warp's 16 rows number i), for those that have any.
  template <class Group, class F>
  FLASHMOE_DEVICE static void for_each_16_rows(const Group& group, int num_rows, const F& f) {
    FLASHMOE_UNROLL
    for (int i = 0; i < kWarpRows / 16; ++i) {
      const int first_row = first_row_of(group) + 16 * i, row = first_row + gpu::lane() / 4;
      if (first_row >= num_rows) break;
      f(i, row, row + 8);
    }
  }

  // A whole tile, of `cols` columns. row(r): where it begins in that row.
  template <class Group, class Row>
  FLASHMOE_DEVICE static void store(const Group& group, const WarpSums& sums, int num_rows, int cols, const Row& row) {
    const int first = first_column_of(group);
    for_each_16_rows(group, num_rows, [&](int i, int row0, int row1) {
      const int mine[2] = {row0, row1};
      std::byte *near[2], *far[2];
      FLASHMOE_UNROLL
      for (int r = 0; r < 2; ++r) {
        near[r] = mine[r] < num_rows ? row(mine[r]) + 2 * first : nullptr;
        far[r] = near[r] ? near[r] + 2 * kHalf : nullptr;
      }
      Sums::template store<0>(sums[i], near, cols - first);
      Sums::template store<1>(sums[i], far, cols - first - kHalf);
    });
  }
};

}  // namespace flashmoe
