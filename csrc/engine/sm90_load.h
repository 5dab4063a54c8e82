// The loaders of the Hopper engine: two warps gather the rows of a tile by index, one thread brings the weights.
#pragma once

#include "engine/sm90_pipeline.h"
#include "engine/sm90_tile.h"

namespace flashmoe {

// One stage: kStepBytes of kRows rows of a block and of every weight row of a tile, as wgmma wants them.
template <int kTileN, int kRows_>
struct alignas(1024) Sm90Stage {
  static constexpr int kStepBytes = 128, kRows = kRows_;
  std::byte rows[kRows * kStepBytes];
  std::byte weights[kTileN * kStepBytes];
};

template <class Stage, class Pipeline>
struct Sm90Loaders {
  using Turn = typename Pipeline::Turn;
  static constexpr int kGatherWarps = 2, kWarps = kGatherWarps + 1;
  // Stages whose copies a gathering warp leaves in flight while it issues the next.
  static constexpr int kLag = Pipeline::kStages / 2;
  // The math lets a stage go with the next one's products under way: for that, the next must have been announced.
  static_assert(kLag + 2 <= Pipeline::kStages, "else all wait for each other");

  // By one warp: the weights of all steps of a tile, once for each pass over its rows. Asks for more work when no more
  // steps are left than there are stages, all of which are still to be multiplied then: time enough to decide on it.
  template <class Tile, class Ask>
  FLASHMOE_DEVICE static void fetch_weights(Pipeline& pipeline, Stage* stages, Turn& turn, const Tile& tile, int passes,
                                            int steps, int step_columns, gpu::CacheHint hint, const Ask& ask) {
    int left = passes * steps;
    bool asked = false;
    for (int pass = 0; pass < passes; ++pass)
      for (int step = 0; step < steps; ++step, turn.next()) {
        if (gpu::lane() != 0) continue;
        if (!asked && left <= Pipeline::kStages) ask(), asked = true;
        --left;
        pipeline.wait_empty(turn);
        gpu::Barrier* full = pipeline.expect_weights(turn, sizeof(Stage::weights));
        std::byte* to = stages[turn.stage].weights;
        const int column = step * step_columns;
        gpu::tma_load_2d(to, tile.weights, column, tile.weight_row[0], full, hint);
        gpu::tma_load_2d(to + sizeof(Stage::weights) / 2, tile.weights, column, tile.weight_row[1], full, hint);
      }
  }

  // By each of the gathering warps: its rows of all steps of one pass. Eight lanes share a row, and each eight rows are
  // shared by the warps. `address(row)` is looked up once per row. What a stage holds in rows that the block lacks is
  // stale, and their sums are dropped; beyond `row_bytes` it holds zeros.
  template <class Address>
  FLASHMOE_DEVICE static void gather_rows(Pipeline& pipeline, Stage* stages, Turn& turn, const std::byte** table,
                                          int gather_warp, int num_rows, int row_bytes, int steps,
                                          const Address& address) {
    constexpr int kRowsAtOnce = 8 / kGatherWarps;
    for (int i = gpu::lane(); i < Stage::kRows / kGatherWarps; i += 32) {
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
