// How a tile's operands come to shared memory without Hopper's loaders: every thread of the crew copies 16 bytes of
// some rows and of some weight rows, several steps ahead of the products.
#pragma once

#include "gpu/verbs.h"

namespace flashmoe {

// One stage: kStepBytes of every row of a block and of every weight row of a tile.
template <int kTileN_>
struct alignas(128) Sm80Stage {
  static constexpr int kTileN = kTileN_, kStepBytes = 64;
  std::byte rows[kBlockM * kStepBytes];
  std::byte weights[kTileN * kStepBytes];

  // Where a byte of a row lies: such that the same 16 bytes of eight neighbouring rows, which ldmatrix reads at once,
  // are in different banks.
  FLASHMOE_HD static constexpr uint32_t place(uint32_t row, uint32_t byte) {
    return row * kStepBytes + (byte ^ row / 2 % 4 * 16);
  }
};

// The stages' order. kAhead steps are on their way when one begins to be multiplied: one less than there are stages,
// since the stage that is filled is that of the step before.
template <int kStages_>
struct Sm80Pipeline {
  static constexpr int kStages = kStages_, kAhead = kStages - 1;

  // Until all but the newest steps have come, by the copies of all threads, and all are done with the step before. Then
  // one more is to be filled.
  template <class Group>
  FLASHMOE_DEVICE static void wait_full(const Group& group) {
    gpu::cp_async_wait<kAhead - 2>();
    group.sync();
  }
};

// What one thread of kThreads copies of each step. Four threads share a row. What a stage holds in rows that the block
// or the weights lack is stale, and their sums are dropped; beyond a row's end it holds zeros.
template <class Stage, int kThreads>
class Sm80Copies {
 public:
  // `rows`: where each row of the block lies.
  template <class Tile>
  FLASHMOE_DEVICE Sm80Copies(int thread, const Tile& tile, int row_bytes, const std::byte* const* rows)
      : row_bytes_(row_bytes), piece_(thread % 4 * 16), place_(Stage::place(uint32_t(thread / 4), uint32_t(piece_))) {
    const int first = thread / 4;
    FLASHMOE_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const int row = first + i * kAtOnce;
      row_[i] = rows[row];
      has_ |= uint32_t(row < tile.num_rows) << i;
    }
    FLASHMOE_UNROLL
    for (int half = 0; half < 2; ++half) {
      weight_[half] = tile.weights + size_t(tile.weight_row[half] + first) * row_bytes;
      FLASHMOE_UNROLL
      for (int i = 0; i < kWeights; ++i)
        has_ |= uint32_t(first + i * kAtOnce < tile.cols[half]) << (kRows + half * kWeights + i);
    }
  }

  FLASHMOE_DEVICE void issue(Stage& stage, int step) const {
    const int byte = step * Stage::kStepBytes + piece_, valid = byte < row_bytes_ ? 16 : 0;
    std::byte *rows = stage.rows + place_, *weights = stage.weights + place_;
    FLASHMOE_UNROLL
    for (int i = 0; i < kRows; ++i)
      if (has_ >> i & 1) gpu::cp_async_16(rows + i * kAtOnce * Stage::kStepBytes, row_[i] + byte, valid);
    FLASHMOE_UNROLL
    for (int i = 0; i < 2 * kWeights; ++i)
      if (has_ >> (kRows + i) & 1)
        gpu::cp_async_16(weights + i * kAtOnce * Stage::kStepBytes,
                         weight_[i / kWeights] + byte + size_t(i % kWeights * kAtOnce) * row_bytes_, valid);
  }

 private:
  static constexpr int kAtOnce = kThreads / 4;
  static constexpr int kRows = kBlockM / kAtOnce, kWeights = Stage::kTileN / 2 / kAtOnce;  // weights: of each half
  static_assert(kAtOnce % 8 == 0, "a thread's rows must have their bytes in one order");
  static_assert(kRows * kAtOnce == kBlockM && 2 * kWeights * kAtOnce == Stage::kTileN);

  const std::byte *row_[kRows], *weight_[2];
  uint32_t has_ = 0;  // a bit for each row, then for each weight row
  int row_bytes_, piece_;
  uint32_t place_;
};

}  // namespace flashmoe
