// The products of one warp on Ampere's tensor cores: kRows rows of a block by 64 columns of a tile, 32 of each half.
#pragma once

#include "engine/sm80_load.h"

namespace flashmoe {

// Of 16 rows each, as MmaSums has them.
template <int kRows>
using Sm80Sums = float[kRows / 16][32];

// How a warp loads its part of a panel whose rows are the operand's own, with 64 bytes of K in each: 16 rows by 32
// bytes of K at a time, as fragments of the left operand or of the right one.
template <class Stage, bool kLeft>
class AlongK {
 public:
  FLASHMOE_DEVICE explicit AlongK(int first_row)
      : row_(first_row + (kLeft ? gpu::lane() % 16 : gpu::lane() / 16 * 8 + gpu::lane() % 8)),
        byte_(kLeft ? gpu::lane() / 16 * 16 : gpu::lane() / 8 % 2 * 16) {}

  // From the warp's row `rows` on, of the step's 32 bytes number `part`.
  FLASHMOE_DEVICE void load(uint32_t (&words)[4], const std::byte* panel, int rows, int part) const {
    gpu::ldmatrix_x4(words, panel + Stage::place(row_ + rows, 32 * part + byte_));
  }

 private:
  const uint32_t row_, byte_;
};

// What a warp holds of a step's two parts of 32 bytes of K: all columns of both, of the rows 16 and the next 16. The
// same loads bring 16-bit floats and fp32 into the registers in which mma_sync wants them. Left and Right: how the
// operands lie. kHalves: 1 where the tile has columns in its first half alone.
template <DType dtype, int kRows, class Stage, template <class, bool> class Left = AlongK,
          template <class, bool> class Right = AlongK, int kHalves = 2>
class Sm80Operands {
 public:
  static constexpr int kTimes = kRows / 16, kQuarters = 2 * kHalves;
  static_assert(kTimes % 2 == 0 && kQuarters % kTimes == 0);

  FLASHMOE_DEVICE Sm80Operands(int first_row, int first_column) : left_(first_row), right_(first_column) {}

  // The 16 rows number `rows`.
  FLASHMOE_DEVICE void load_rows(const Stage& stage, int part, int rows) {
    left_.load(rows_[rows % 2], stage.rows, 16 * rows, part);
    round(rows_[rows % 2]);
  }
  // Two quarters of either half of the tile.
  FLASHMOE_DEVICE void load_weights(const Stage& stage, int part, int quarter) {
    right_.load(weights_[part][quarter], stage.weights, quarter / 2 * (Stage::kTileN / 2) + quarter % 2 * 16, part);
    round(weights_[part][quarter]);
  }

  // 16 rows by all columns.
  FLASHMOE_DEVICE void multiply(int part, int rows, Sm80Sums<kRows>& sums) const {
    FLASHMOE_UNROLL
    for (int n = 0; n < 2 * kQuarters; ++n) {
      const uint32_t(&words)[4] = weights_[part][n / 2];
      gpu::mma_sync<dtype>(reinterpret_cast<float(&)[4]>(sums[rows][4 * n]), rows_[rows % 2],
                           {words[n % 2 * 2], words[n % 2 * 2 + 1]});
    }
  }

 private:
  FLASHMOE_DEVICE static void round(uint32_t (&words)[4]) {
    if constexpr (dtype == DType::kFloat32)
      for (uint32_t& word : words) word = gpu::round_to_tf32(word);
  }

  const Left<Stage, true> left_;
  const Right<Stage, false> right_;
  uint32_t rows_[2][4], weights_[2][kQuarters][4];
};

struct NothingBesides {
  template <class Stage>
  FLASHMOE_DEVICE void operator()(int, const Stage&) const {}
};

// The warp's sums over all steps of a tile, and its share of the copies for everybody's. What is multiplied next is
// loaded while 16 rows are multiplied, beyond the end of a part and of a step, so that the tensor cores find work
// behind each meeting of the warps. A warp without rows only copies. All warps call besides(step, stage) once for each
// step, in order, while its operands are in the stage and before the meeting that lets copies of step + kAhead begin.
template <class Pipeline, class Group, class Stage, class Copies, class Operands, class Sums,
          class Besides = NothingBesides>
FLASHMOE_DEVICE void sm80_products_of(const Group& group, Stage* stages, const Copies& copies, Operands operands,
                                      bool has_rows, int steps, Sums& sums, const Besides& besides = {}) {
  const auto fill = [&](int step) {
    if (step < steps) copies.issue(stages[step % Pipeline::kStages], step);
    gpu::cp_async_commit();  // an empty one at the end, where only the last stages are waited for
  };
  FLASHMOE_ROLLED
  for (int step = 0; step < Pipeline::kAhead; ++step) fill(step);
  Pipeline::wait_full(group);
  constexpr int kTimes = Operands::kTimes, kQuarters = Operands::kQuarters;
  // Also where there are no rows: sums that on some way are never written would hold their registers from one tile to
  // the next.
  FLASHMOE_UNROLL
  for (int i = 0; i < kTimes * 32; ++i) sums[i / 32][i % 32] = 0.0f;
  if (!has_rows) {
    FLASHMOE_ROLLED
    for (int step = 0; step < steps; ++step) {
      besides(step, stages[step % Pipeline::kStages]);
      Pipeline::wait_full(group);
      fill(step + Pipeline::kAhead);
    }
    return;
  }
  operands.load_rows(stages[0], 0, 0);
  FLASHMOE_UNROLL
  for (int quarter = 0; quarter < kQuarters; ++quarter) operands.load_weights(stages[0], 0, quarter);
  FLASHMOE_ROLLED
  for (int step = 0; step < steps; ++step) {
    const Stage& stage = stages[step % Pipeline::kStages];
    // After the last step there is no next one: what is loaded of it is an old step's, and goes nowhere.
    const Stage& next_stage = stages[(step + 1) % Pipeline::kStages];
    besides(step, stage);
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
        for (int i = 0; i < kQuarters / kTimes; ++i)
          operands.load_weights(next, 1 - part, rows * (kQuarters / kTimes) + i);
        rows + 1 < kTimes ? operands.load_rows(stage, part, rows + 1) : operands.load_rows(next, 1 - part, 0);
        operands.multiply(part, rows, sums);
      }
    }
  }
}

// Where both operands lie along K.
template <DType dtype, int kRows, class Pipeline, class Group, class Stage, class Copies>
FLASHMOE_DEVICE void sm80_products(const Group& group, Stage* stages, const Copies& copies, int first_row,
                                   int first_column, bool has_rows, int steps, Sm80Sums<kRows>& sums) {
  sm80_products_of<Pipeline>(group, stages, copies, Sm80Operands<dtype, kRows, Stage>(first_row, first_column),
                             has_rows, steps, sums);
}

}  // namespace flashmoe
