// The products of one warp on Ampere's tensor cores: kRows rows of a block by 64 columns of a tile, 32 of each half.
#pragma once

#include "engine/sm80_load.h"

namespace flashmoe {

// Of 16 rows each, as MmaSums has them.
template <int kRows>
using Sm80Sums = float[kRows / 16][32];

// What a warp holds of a step's two parts of 32 bytes of K: all columns of both, of the rows 16 and the next 16. The
// same loads bring 16-bit floats and fp32 into the registers in which mma_sync wants them.
template <DType dtype, int kRows, class Stage>
class Sm80Operands {
 public:
  FLASHMOE_DEVICE Sm80Operands(int first_row, int first_column)
      : row_(first_row + gpu::lane() % 16), column_(first_column + gpu::lane() / 16 * 8 + gpu::lane() % 8) {}

  // The 16 rows number `rows`.
  FLASHMOE_DEVICE void load_rows(const Stage& stage, int part, int rows) {
    load(rows_[rows % 2], stage.rows + Stage::place(row_ + 16 * rows, 32 * part + gpu::lane() / 16 * 16));
  }
  // Two quarters of either half of the tile.
  FLASHMOE_DEVICE void load_weights(const Stage& stage, int part, int quarter) {
    const uint32_t column = column_ + quarter / 2 * (Stage::kTileN / 2) + quarter % 2 * 16;
    load(weights_[part][quarter], stage.weights + Stage::place(column, 32 * part + gpu::lane() / 8 % 2 * 16));
  }

  // 16 rows by all columns.
  FLASHMOE_DEVICE void multiply(int part, int rows, Sm80Sums<kRows>& sums) const {
    FLASHMOE_UNROLL
    for (int n = 0; n < 8; ++n) {
      const uint32_t(&words)[4] = weights_[part][n / 2];
      gpu::mma_sync<dtype>(reinterpret_cast<float(&)[4]>(sums[rows][4 * n]), rows_[rows % 2],
                           {words[n % 2 * 2], words[n % 2 * 2 + 1]});
    }
  }

 private:
  FLASHMOE_DEVICE static void load(uint32_t (&words)[4], const std::byte* from) {
    gpu::ldmatrix_x4(words, from);
    if constexpr (dtype == DType::kFloat32)
      for (uint32_t& word : words) word = gpu::round_to_tf32(word);
  }

  const uint32_t row_, column_;
  uint32_t rows_[2][4], weights_[2][4][4];
};

// The warp's sums over all steps of a tile, and its share of the copies for everybody's. What is multiplied next is
// loaded while 16 rows are multiplied, beyond the end of a part and of a step, so that the tensor cores find work
// behind each meeting of the warps. A warp without rows only copies.
template <DType dtype, int kRows, class Pipeline, class Group, class Stage, class Copies>
FLASHMOE_DEVICE void sm80_products(const Group& group, Stage* stages, const Copies& copies, int first_row,
                                   int first_column, bool has_rows, int steps, Sm80Sums<kRows>& sums) {
  const auto fill = [&](int step) {
    if (step < steps) copies.issue(stages[step % Pipeline::kStages], step);
    gpu::cp_async_commit();  // an empty one at the end, where only the last stages are waited for
  };
  FLASHMOE_ROLLED
  for (int step = 0; step < Pipeline::kAhead; ++step) fill(step);
  Pipeline::wait_full(group);
  if (!has_rows) {
    FLASHMOE_ROLLED
    for (int step = 0; step < steps; ++step) {
      Pipeline::wait_full(group);
      fill(step + Pipeline::kAhead);
    }
    return;
  }
  constexpr int kTimes = kRows / 16;
  static_assert(kTimes % 2 == 0 && 4 % kTimes == 0);
  FLASHMOE_UNROLL
  for (int i = 0; i < kTimes * 32; ++i) sums[i / 32][i % 32] = 0.0f;
  Sm80Operands<dtype, kRows, Stage> operands(first_row, first_column);
  operands.load_rows(stages[0], 0, 0);
  FLASHMOE_UNROLL
  for (int quarter = 0; quarter < 4; ++quarter) operands.load_weights(stages[0], 0, quarter);
  FLASHMOE_ROLLED
  for (int step = 0; step < steps; ++step) {
    const Stage& stage = stages[step % Pipeline::kStages];
    // After the last step there is no next one: what is loaded of it is an old step's, and goes nowhere.
    const Stage& next_stage = stages[(step + 1) % Pipeline::kStages];
    FLASHMOE_UNROLL
    for (int part = 0; part < 2; ++part) {
      if (part == 1) {
        Pipeline::wait_full(group);
        fill(step + Pipeline::kAhead);
      }
      FLASHMOE_UNROLL
      for (int rows = 0; rows < kTimes; ++rows) {
        const Stage& next = part == 0 ? stage : next_stage;
        FLASHMOE_UNROLL
        for (int i = 0; i < 4 / kTimes; ++i) operands.load_weights(next, 1 - part, rows * (4 / kTimes) + i);
        rows + 1 < kTimes ? operands.load_rows(stage, part, rows + 1) : operands.load_rows(next, 1 - part, 0);
        operands.multiply(part, rows, sums);
      }
    }
  }
}

}  // namespace flashmoe
