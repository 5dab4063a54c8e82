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

// What one thread of kThreads copies of each step's rows, and of its weight rows. Four threads share a row. What a
// stage holds in rows that the block or the weights lack is stale, and their sums are dropped; beyond a row's end it
// holds zeros.
template <class Stage, int kThreads>
struct Sm80Piece {
  static constexpr int kAtOnce = kThreads / 4;  // rows
  static_assert(kAtOnce % 8 == 0, "a thread's rows must have their bytes in one order");

  FLASHMOE_DEVICE Sm80Piece(int thread, int row_bytes)
      : row_bytes(row_bytes), first(thread / 4), byte(thread % 4 * 16),
        place(Stage::place(uint32_t(first), uint32_t(byte))) {}

  FLASHMOE_DEVICE int byte_of(int step) const { return step * Stage::kStepBytes + byte; }
  FLASHMOE_DEVICE int valid(int step) const { return byte_of(step) < row_bytes ? 16 : 0; }

  const int row_bytes, first, byte;
  const uint32_t place;
};

template <class Stage, int kThreads>
class Sm80RowCopies {
 public:
  // `rows`: where each row of the block lies.
  FLASHMOE_DEVICE Sm80RowCopies(int thread, int num_rows, int row_bytes, const std::byte* const* rows)
      : piece_(thread, row_bytes) {
    FLASHMOE_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const int row = piece_.first + i * kAtOnce;
      row_[i] = rows[row];
      has_ |= uint32_t(row < num_rows) << i;
    }
  }

  FLASHMOE_DEVICE void issue(Stage& stage, int step) const {
    FLASHMOE_UNROLL
    for (int i = 0; i < kRows; ++i)
      if (has_ >> i & 1)
        gpu::cp_async_16(stage.rows + piece_.place + i * kAtOnce * Stage::kStepBytes, row_[i] + piece_.byte_of(step),
                         piece_.valid(step));
  }

 private:
  static constexpr int kAtOnce = kThreads / 4, kRows = kBlockM / kAtOnce;
  static_assert(kRows * kAtOnce == kBlockM);

  const Sm80Piece<Stage, kThreads> piece_;
  const std::byte* row_[kRows];
  uint32_t has_ = 0;  // a bit for each row
};

template <class Stage, int kThreads>
class Sm80WeightCopies {
 public:
  template <class Tile>
  FLASHMOE_DEVICE Sm80WeightCopies(int thread, const Tile& tile, int row_bytes) : piece_(thread, row_bytes) {
    FLASHMOE_UNROLL
    for (int half = 0; half < 2; ++half) {
      weight_[half] = tile.weights + size_t(tile.weight_row[half] + piece_.first) * row_bytes;
      FLASHMOE_UNROLL
      for (int i = 0; i < kWeights; ++i)
        has_ |= uint32_t(piece_.first + i * kAtOnce < tile.cols[half]) << (half * kWeights + i);
    }
  }

  FLASHMOE_DEVICE void issue(Stage& stage, int step) const {
    FLASHMOE_UNROLL
    for (int i = 0; i < 2 * kWeights; ++i)
      if (has_ >> i & 1)
        gpu::cp_async_16(
            stage.weights + piece_.place + i * kAtOnce * Stage::kStepBytes,
            weight_[i / kWeights] + piece_.byte_of(step) + size_t(i % kWeights * kAtOnce) * piece_.row_bytes,
            piece_.valid(step));
  }

 private:
  static constexpr int kAtOnce = kThreads / 4, kWeights = Stage::kTileN / 2 / kAtOnce;  // of each half
  static_assert(2 * kWeights * kAtOnce == Stage::kTileN);

  const Sm80Piece<Stage, kThreads> piece_;
  const std::byte* weight_[2];
  uint32_t has_ = 0;  // a bit for each weight row
};

// Both of a step's operands.
template <class Left, class Right>
struct Sm80BothCopies {
  Left left;
  Right right;

  template <class Stage>
  FLASHMOE_DEVICE void issue(Stage& stage, int step) const {
    left.issue(stage, step);
    right.issue(stage, step);
  }
};

template <class Stage, int kThreads>
struct Sm80Copies : Sm80BothCopies<Sm80RowCopies<Stage, kThreads>, Sm80WeightCopies<Stage, kThreads>> {
  template <class Tile>
  FLASHMOE_DEVICE Sm80Copies(int thread, const Tile& tile, int row_bytes, const std::byte* const* rows)
      : Sm80BothCopies<Sm80RowCopies<Stage, kThreads>, Sm80WeightCopies<Stage, kThreads>>{
            {thread, tile.num_rows, row_bytes, rows}, {thread, tile, row_bytes}} {}
};

}  // namespace flashmoe
