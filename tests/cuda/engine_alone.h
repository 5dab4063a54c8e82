// The engines for tensor cores without the protocol: their loaders, stages and products, by blocks that go from tile to
// tile. What a GPU does wrong here is the engine's fault, or the verbs'. For nvcc, and for fibers.
#pragma once

#include "engine/sm80.h"
#include "engine/sm90.h"
#include "kernel/thread_groups.h"

namespace flashmoe::test {

// Tiles, each the products of some rows of x with some rows of the weights; both have rows of `depth` elements. Where
// they lie across, with K as their rows, these are their columns.
struct Tiles {
  gpu::TensorMap map;  // of the weights, for Hopper's engine
  const std::byte *x, *weights;
  int num_x, num_weights, depth;
  int num_rows;                    // of each tile,
  int num_tiles;                   // of each block
  int first_weight[2], way, turn;  // of the first tile's halves; the next tile's lie so far behind, modulo the turn
  int width;                       // columns of a matrix, where weights lie across: several, one after the other
  float* sums;                     // [tiles of all blocks, num_rows, columns]; or null, and they are dropped

  FLASHMOE_HD int x_row(int tile, int row) const { return (row * 7 + tile * 13) % num_x; }
  FLASHMOE_HD int weight_row(int tile, int half) const { return first_weight[half] + tile * way % turn; }
  // Where x lies across: a tile's first column, and which of the rows is the tile's number k.
  FLASHMOE_HD int x_column(int tile) const { return tile * way % (num_x - kBlockM); }
  FLASHMOE_HD int k_row(int tile, int k) const { return (k * 7 + tile * 13) % depth; }
  FLASHMOE_HD float* row_of_sums(int tile, int row, int columns) const {
    return sums + (size_t(tile) * num_rows + row) * columns;
  }
};

// What a warp on Ampere's tensor cores has summed up, from this row and this column of either half on.
template <int kColumns, int kTimes>
FLASHMOE_DEVICE void store_sums(const Tiles& tiles, int tile, int first_row, int first_column,
                                const float (&sums)[kTimes][32]) {
  if (!tiles.sums || first_row >= tiles.num_rows) return;
  FLASHMOE_UNROLL
  for (int n = 0; n < kTimes * 32; ++n) {
    const int row = first_row + n / 32 * 16 + gpu::lane() / 4 + n / 2 % 2 * 8;
    const int column = n % 32 / 16 * 64 + first_column + n % 16 / 4 * 8 + gpu::lane() % 4 * 2 + n % 2;
    if (row < tiles.num_rows && column < kColumns)
      tiles.row_of_sums(tile, row, kColumns)[column] = sums[n / 32][n % 32];
  }
}

template <template <DType> class EngineOf, DType dtype>
struct Sm90Alone {
  using Engine = EngineOf<dtype>;
  using Shared = typename Engine::Shared;
  using Loaders = typename Engine::Loaders;
  using Turn = typename Engine::Pipeline::Turn;
  static constexpr DType kDType = dtype;
  static constexpr int kTileN = Engine::kTileN, kRows = Engine::kRows, kStepBytes = Engine::Stage::kStepBytes;
  static constexpr int kThreads = 32 * (Engine::kCrewWarps + Engine::kLoaderWarps + 1);  // with the agent's warp
  static constexpr bool kZerosBeyondWeights = true, kXAcross = false, kWeightsAcross = false;

  static std::string make_map(Tiles* tiles) {
    const uint64_t size = dtype_bytes(dtype), depth = uint64_t(tiles->depth);
    return gpu::make_tensor_map(&tiles->map, {dtype, tiles->weights, 2, {depth, uint64_t(tiles->num_weights), 1},
                                              {depth * size, 0}, {uint32_t(kStepBytes / size), kTileN / 2, 1}, true});
  }

  FLASHMOE_DEVICE static void run(const Tiles& tiles, std::byte* shared_memory) {
// For a GPU of another kind nothing is left of it.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
    Shared& shared = *reinterpret_cast<Shared*>(shared_memory);
    if (gpu::thread_in_block() == 0) shared.init();
    gpu::sync_block();
    if (gpu::warp_in_block() < Engine::kCrewWarps) {
      Engine::crew_begins();
      return multiply(tiles, shared);
    }
    Engine::others_begin();
    load(tiles, shared, gpu::warp_in_block() - Engine::kCrewWarps);
#endif
  }

 private:
  struct Tile {
    const gpu::TensorMap* weights;
    int weight_row[2];
  };

  FLASHMOE_HD static int steps_of(const Tiles& tiles) { return ceil_div(tiles.depth * dtype_bytes(dtype), kStepBytes); }
  FLASHMOE_DEVICE static int tile_of(const Tiles& tiles, int i) { return gpu::block() * tiles.num_tiles + i; }

  FLASHMOE_DEVICE static void multiply(const Tiles& tiles, Shared& shared) {
    const int thread = gpu::thread_in_block(), first_row = thread / 128 * 64, steps = steps_of(tiles);
    Turn turn;
    for (int i = 0; i < tiles.num_tiles; ++i)
      for (int first = first_row; first - first_row < tiles.num_rows; first += kRows) {
        float sums[kTileN / 2];
        const bool has_rows = first < tiles.num_rows;
        sm90_products<dtype, kTileN>(shared.pipeline, shared.stage, turn, first_row, has_rows, steps, sums);
        if (!tiles.sums) continue;
        FLASHMOE_UNROLL
        for (int n = 0; n < kTileN / 2; ++n)
          if (const int row = first + gpu::wgmma_row(thread, n); row < tiles.num_rows)
            tiles.row_of_sums(tile_of(tiles, i), row, kTileN)[gpu::wgmma_column(thread, n)] = sums[n];
      }
  }

  FLASHMOE_DEVICE static void load(const Tiles& tiles, Shared& shared, int loader) {
    const int row_bytes = tiles.depth * dtype_bytes(dtype), steps = steps_of(tiles);
    const gpu::CacheHint hint = kRows < kBlockM ? gpu::CacheHint::kEvictFirst : gpu::CacheHint::kNone;
    Turn turn;
    for (int i = 0; i < tiles.num_tiles; ++i) {
      const int tile = tile_of(tiles, i);
      if (loader == Loaders::kGatherWarps)
        Loaders::fetch_weights(shared.pipeline, shared.stage, turn,
                               Tile{&tiles.map, {tiles.weight_row(tile, 0), tiles.weight_row(tile, 1)}},
                               ceil_div(tiles.num_rows, kRows), steps, kStepBytes / dtype_bytes(dtype), hint, [] {});
      for (int first = 0; loader < Loaders::kGatherWarps && first < tiles.num_rows; first += kRows)
        Loaders::gather_rows(shared.pipeline, shared.stage, turn, shared.row, loader,
                             tiles.num_rows - first < kRows ? tiles.num_rows - first : kRows, row_bytes, steps,
                             [&](int row) { return tiles.x + size_t(tiles.x_row(tile, first + row)) * row_bytes; });
    }
  }
};

template <DType dtype>
struct Sm80Alone {
  using Engine = Sm80Engine<dtype>;
  using Shared = typename Engine::Shared;
  using Stage = typename Engine::Stage;
  using Group = gpu::Crew<Engine::kCrewWarps>;
  static constexpr DType kDType = dtype;
  static constexpr int kTileN = Stage::kTileN, kRows = kBlockM, kStepBytes = Stage::kStepBytes;
  static constexpr int kThreads = Group::kThreads;
  static constexpr bool kZerosBeyondWeights = false;  // it never looks there, and drops the sums
  static constexpr bool kXAcross = false, kWeightsAcross = false;

  static std::string make_map(Tiles*) { return {}; }

  FLASHMOE_DEVICE static void run(const Tiles& tiles, std::byte* shared_memory) {
    Shared& shared = *reinterpret_cast<Shared*>(shared_memory);
    const Group group;
    const int row_bytes = tiles.depth * dtype_bytes(dtype);
    for (int i = 0; i < tiles.num_tiles; ++i) {
      const int tile = gpu::block() * tiles.num_tiles + i;
      for (int row = group.rank(); row < tiles.num_rows; row += group.size())
        shared.row[row] = tiles.x + size_t(tiles.x_row(tile, row)) * row_bytes;
      group.sync();
      multiply(group, tiles, tile, row_bytes, shared);
      group.sync();
    }
  }

 private:
  struct Tile {
    const std::byte* weights;
    int num_rows, cols[2], weight_row[2];
  };

  FLASHMOE_DEVICE static void multiply(const Group& group, const Tiles& tiles, int tile, int row_bytes,
                                       Shared& shared) {
    const int first_row = group.warp() / Engine::kWarpsInRow * Engine::kWarpRows;
    const int first_column = group.warp() % Engine::kWarpsInRow * (Engine::kWarpColumns / 2);
    Tile t{tiles.weights, tiles.num_rows, {}, {tiles.weight_row(tile, 0), tiles.weight_row(tile, 1)}};
    for (int half = 0; half < 2; ++half) {
      const int left = tiles.num_weights - t.weight_row[half];
      t.cols[half] = left < kTileN / 2 ? left : kTileN / 2;
    }
    const Sm80Copies<Stage, kThreads> copies(group.rank(), t, row_bytes, shared.row);
    Sm80Sums<Engine::kWarpRows> sums;
    sm80_products<dtype, Engine::kWarpRows, typename Engine::Pipeline>(
        group, shared.stage, copies, first_row, first_column, first_row < tiles.num_rows,
        ceil_div(row_bytes, kStepBytes), sums);
    store_sums<kTileN>(tiles, tile, first_row, first_column, sums);
  }
};

}  // namespace flashmoe::test
