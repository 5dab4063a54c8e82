// The backward engine for tensor cores without the protocol: those of its products that the forward engine lacks, of
// operands that lie across, with K as their rows, or of tiles with one half. For nvcc, and for fibers.
#pragma once

#include <type_traits>

#include "engine/sm80_backward.h"
#include "engine_alone.h"

namespace flashmoe::test {

// Left operands count as x, right ones as weights. kHalves: 1 where a tile has columns in its first half alone. Across:
// how a warp loads what lies across.
template <DType dtype, bool kXAcross_, bool kWeightsAcross_, int kHalves, template <class, bool> class Across = AcrossK>
struct Sm80BackwardAlone {
  using Engine = Sm80BackwardEngine<dtype>;
  using Parts = Sm80BackwardParts<dtype, 128, 5, Sm80Pipeline>;
  using Shared = typename Parts::Shared;
  using Stage = typename Parts::Stage;
  using Group = gpu::Crew<Parts::kWarps>;
  static_assert(std::is_same_v<Shared, typename Engine::Shared> && Parts::kWarps == Engine::kCrewWarps);
  static constexpr DType kDType = dtype;
  static constexpr int kTileN = Parts::kHalf * kHalves, kRows = kBlockM, kStepBytes = Stage::kStepBytes;
  static constexpr int kThreads = Group::kThreads;
  static constexpr bool kZerosBeyondWeights = false, kXAcross = kXAcross_, kWeightsAcross = kWeightsAcross_;

  static std::string make_map(Tiles*) { return {}; }

  FLASHMOE_DEVICE static void run(const Tiles& tiles, std::byte* shared_memory) {
    Shared& shared = *reinterpret_cast<Shared*>(shared_memory);
    const Group group;
    for (int i = 0; i < tiles.num_tiles; ++i) {
      const int tile = gpu::block() * tiles.num_tiles + i;
      typename Parts::WarpSums sums;
      if constexpr (kXAcross)
        multiply_scattered(group, tiles, tile, shared, sums);
      else
        multiply_rows(group, tiles, tile, shared, sums);
      store_sums<kTileN>(tiles, tile, Parts::first_row_of(group), Parts::first_column_of(group), sums);
      group.sync();
    }
  }

 private:
  using WarpSums = typename Parts::WarpSums;

  struct Halves {
    const std::byte* weights;
    int cols[2], weight_row[2];
  };

  // Columns of the tile, and where they begin in row 0 of their matrix.
  FLASHMOE_DEVICE static int columns_of(const Tiles& tiles, int tile) {
    const int left = tiles.width - tiles.weight_row(tile, 0) % tiles.width;
    return left < kTileN ? left : kTileN;
  }
  FLASHMOE_DEVICE static const std::byte* weights_of(const Tiles& tiles, int tile) {
    const int first = tiles.weight_row(tile, 0);
    return tiles.weights + 2 * (size_t(first / tiles.width) * tiles.depth * tiles.width + first % tiles.width);
  }

  FLASHMOE_DEVICE static void multiply_rows(const Group& group, const Tiles& tiles, int tile, Shared& shared,
                                            WarpSums& sums) {
    for (int row = group.rank(); row < tiles.num_rows; row += group.size())
      shared.left[row] = tiles.x + size_t(tiles.x_row(tile, row)) * tiles.depth * 2;
    group.sync();
    const int num_rows = tiles.num_rows, depth = tiles.depth;
    const Sm80RowCopies<Stage, kThreads> rows(group.rank(), num_rows, 2 * depth, shared.left);
    if constexpr (kWeightsAcross) {
      const MatrixCopies<Stage, kThreads> weights(group.rank(), weights_of(tiles, tile), 2 * tiles.width, depth,
                                                  columns_of(tiles, tile));
      Parts::template multiply<AlongK, Across, kHalves>(group, shared, rows, weights, num_rows, depth, sums);
    } else {
      static_assert(kHalves == 1, "two halves are the forward engine's");
      const Halves halves{tiles.weights, {columns_of(tiles, tile), 0}, {tiles.weight_row(tile, 0), 0}};
      const Sm80WeightCopies<Stage, kThreads> weights(group.rank(), halves, 2 * depth);
      Parts::template multiply<AlongK, AlongK, 1>(group, shared, rows, weights, num_rows, depth, sums);
    }
  }

  // As a grad tile does: rows of K lie anywhere, and shared memory says where for two blocks of them at a time.
  FLASHMOE_DEVICE static void multiply_scattered(const Group& group, const Tiles& tiles, int tile, Shared& shared,
                                                 WarpSums& sums) {
    static_assert(kWeightsAcross);
    constexpr int kStepsOfBlock = kBlockM / Parts::kStepDepth;
    put(group, tiles, tile, 0, shared);
    group.sync();
    Parts::template multiply<Across, Across, kHalves>(
        group, shared,
        ScatteredCopies<Stage, kThreads, true>(group.rank(), shared.left, 2 * tiles.x_column(tile), tiles.depth,
                                               tiles.num_rows),
        ScatteredCopies<Stage, kThreads, false>(group.rank(), shared.right, 0, tiles.depth, columns_of(tiles, tile)),
        tiles.num_rows, tiles.depth, sums, [&](int step, const Stage&) {
          if (step % kStepsOfBlock == 0) put(group, tiles, tile, step / kStepsOfBlock + 1, shared);
        });
  }

  // Rows that the last block lacks are the last row once more: they are copied as zeros.
  FLASHMOE_DEVICE static void put(const Group& group, const Tiles& tiles, int tile, int block, Shared& shared) {
    const int k = block * kBlockM + group.rank(), last = tiles.depth - 1;
    if (group.rank() >= kBlockM || block * kBlockM > last) return;
    const int row = tiles.k_row(tile, k < last ? k : last);
    shared.left[k % (2 * kBlockM)] = tiles.x + size_t(last - row) * tiles.num_x * 2;
    shared.right[k % (2 * kBlockM)] = weights_of(tiles, tile) + size_t(row) * tiles.width * 2;
  }
};

// dy · down; x · up, without a gate; the gradients of gate and up · gate_up; and sums over rows.
template <DType dtype, template <class, bool> class Across = AcrossK>
using GradOfHidden = Sm80BackwardAlone<dtype, false, true, 1, Across>;
template <DType dtype>
using UngatedUp = Sm80BackwardAlone<dtype, false, false, 1>;
template <DType dtype, template <class, bool> class Across = AcrossK>
using GradOfX = Sm80BackwardAlone<dtype, false, true, 2, Across>;
template <DType dtype, template <class, bool> class Across = AcrossK>
using GradOfWeights = Sm80BackwardAlone<dtype, true, true, 2, Across>;

}  // namespace flashmoe::test
