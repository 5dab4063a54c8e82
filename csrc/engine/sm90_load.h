// The loaders of the Hopper engine: two warps gather the rows of a tile by index, one thread brings the weights.
#pragma once

#include "engine/sm90_pipeline.h"
#include "engine/sm90_tile.h"

namespace flashmoe {

// One stage: kStepBytes of every row of a block and of every weight row of a tile, as wgmma wants them.
template <int kTileN>
struct alignas(1024) Sm90Stage {
  static constexpr int kStepBytes = 128;
  std::byte rows[kBlockM * kStepBytes];
  std::byte weights[kTileN * kStepBytes];
};

template <int kTileN, class Pipeline>
struct Sm90Loaders {
  using Stage = Sm90Stage<kTileN>;
  using Turn = typename Pipeline::Turn;
  static constexpr int kGatherWarps = 2, kWarps = kGatherWarps + 1;
  // Stages whose copies a gathering warp leaves in flight while it issues the next.
  static constexpr int kLag = 2;
  // The math lets a stage go with the next one's products under way: for that, the next must have been announced.
  static_assert(kLag + 2 <= Pipeline::kStages, "else all wait for each other");

  // By one warp: the weights of all steps of a tile.
  FLASHMOE_DEVICE static void fetch_weights(Pipeline& pipeline, Stage* stages, Turn& turn, const gpu::TensorMap* map,
                                            const int (&weight_row)[2], int steps, int step_columns) {
    for (int step = 0; step < steps; ++step, turn.next()) {
      if (gpu::lane() != 0) continue;
      pipeline.wait_empty(turn);
      gpu::Barrier* full = pipeline.expect_weights(turn, sizeof(Stage::weights));
      std::byte* to = stages[turn.stage].weights;
      gpu::tma_load_2d(to, map, step * step_columns, weight_row[0], full);
      gpu::tma_load_2d(to + sizeof(Stage::weights) / 2, map, step * step_columns, weight_row[1], full);
    }
  }

  // By each of the gathering warps: its rows of all steps of a tile. Eight lanes share a row, and each eight rows of a
  // block are shared by the warps. `address(row)` is looked up once per row. What a stage holds in rows that the block
  // lacks is stale, and their sums are dropped; beyond `row_bytes` it holds zeros.
  template <class Address>
  FLASHMOE_DEVICE static void gather_rows(Pipeline& pipeline, Stage* stages, Turn& turn, const std::byte** table,
                                          int gather_warp, int num_rows, int row_bytes, int steps,
                                          const Address& address) {
    constexpr int kRowsAtOnce = 8 / kGatherWarps;
    for (int i = gpu::lane(); i < kBlockM / kGatherWarps; i += 32) {
      const int row = i / kRowsAtOnce * 8 + gather_warp * kRowsAtOnce + i % kRowsAtOnce;
      if (row < num_rows) table[row] = address(row);
    }
    gpu::sync_warp();

    const int first = gather_warp * kRowsAtOnce + gpu::lane() / 8, piece = gpu::lane() % 8 * 16;
    const uint32_t place = gpu::swizzle_128(uint32_t(first), uint32_t(piece));
    Turn landed = turn;
    for (int step = 0; step < steps + kLag; ++step) {
      if (step < steps) {
        pipeline.wait_empty(turn);
        const int byte = step * Stage::kStepBytes + piece, valid = byte < row_bytes ? 16 : 0;
        std::byte* to = stages[turn.stage].rows + place;
        for (int row = first; row < num_rows; row += 8, to += 8 * Stage::kStepBytes)
          gpu::cp_async_16(to, table[row] + byte, valid);
        turn.next();
      }
      gpu::cp_async_commit();  // an empty one at the end, where only the last stages are waited for
      if (step < kLag) continue;
      gpu::cp_async_wait<kLag>();
      pipeline.rows_are_here(landed);
      landed.next();
    }
  }
};

}  // namespace flashmoe
