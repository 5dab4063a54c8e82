// What a math warpgroup does with its 64 rows of a tile: the products. Thread t holds, of sums[i], row wgmma_row(t, i)
// and column wgmma_column(t, i).
#pragma once

#include "engine/mma_sums.h"
#include "engine/sm90_load.h"

namespace flashmoe {

// The warpgroup's sums over all steps of a tile, one product in flight behind the next. `first_row`: of a stage's rows,
// the first of this warpgroup. A warpgroup without rows only lets each stage go.
template <DType dtype, int kTileN, class Stage, class Pipeline>
FLASHMOE_DEVICE void sm90_products(Pipeline& pipeline, const Stage* stages, typename Pipeline::Turn& turn,
                                   int first_row, bool has_rows, int steps, float (&sums)[kTileN / 2]) {
  // From zeros, and not by a first product that does not accumulate: else ptxas serialises all of them (C7515). Also
  // where there are no rows: else the registers seem to hold the last tile's sums, through all that lies between tiles.
  FLASHMOE_UNROLL
  for (float& sum : sums) sum = 0.0f;
  if (!has_rows) {
    for (int step = 0; step < steps; ++step, turn.next()) {
      pipeline.wait_full(turn);  // else it could let go twice in one phase
      pipeline.let_go(turn);
    }
    return;
  }
  typename Pipeline::Turn last = turn;
  for (int step = 0; step < steps; ++step) {
    pipeline.wait_full(turn);
    const std::byte* rows = stages[turn.stage].rows + first_row * Stage::kStepBytes;
    const std::byte* weights = stages[turn.stage].weights;
    gpu::wgmma_fence(sums);
    FLASHMOE_UNROLL
    for (int byte = 0; byte < Stage::kStepBytes; byte += 32)
      gpu::wgmma<dtype, kTileN>(sums, gpu::wgmma_descriptor(rows, byte), gpu::wgmma_descriptor(weights, byte), true);
    gpu::wgmma_commit();
    gpu::wgmma_wait<1>(sums);
    if (step > 0) pipeline.let_go(last);
    last = turn;
    turn.next();
  }
  Pipeline::wait_products(sums);
  pipeline.let_go(last);
}

template <DType dtype, int kTileN>
using Sm90Sums = MmaSums<dtype, kTileN>;

}  // namespace flashmoe
