// Operands that have K as their rows: 32 rows of K in a step, and of each the columns of the tile. They come to shared
// memory as they lie; ldmatrix transposes them on the way to registers. Of 16-bit elements.
#pragma once

#include "engine/sm80_math.h"

namespace flashmoe {

// The left operand's panel is a row block wide, the right one's kTileN: the bytes are as many as where K runs along.
template <class Stage, bool kLeft>
struct AcrossPanel {
  static constexpr int kDepth = Stage::kStepBytes / 2;  // rows of K
  static constexpr int kRowBytes = 2 * (kLeft ? kBlockM : Stage::kTileN);

  // Such that the same 16 bytes of eight neighbouring rows, which ldmatrix reads at once, are in different banks.
  FLASHMOE_HD static constexpr uint32_t place(uint32_t k, uint32_t byte) {
    return k * kRowBytes + (byte ^ k % 8 * 16);
  }
  FLASHMOE_DEVICE static std::byte* of(Stage& stage) { return kLeft ? stage.rows : stage.weights; }
};

// As AlongK: 16 columns of the panel by 16 rows of K at a time.
template <class Stage, bool kLeft>
class AcrossK {
 public:
  FLASHMOE_DEVICE explicit AcrossK(int first_column)
      : k_((kLeft ? gpu::lane() / 16 : gpu::lane() / 8 % 2) * 8 + gpu::lane() % 8),
        column_(first_column + (kLeft ? gpu::lane() / 8 % 2 : gpu::lane() / 16) * 8) {}

  FLASHMOE_DEVICE void load(uint32_t (&words)[4], const std::byte* panel, int columns, int part) const {
    gpu::ldmatrix_x4_trans(words, panel + AcrossPanel<Stage, kLeft>::place(16 * part + k_, 2 * (column_ + columns)));
  }

 private:
  const uint32_t k_, column_;
};

// What one thread of kThreads copies of such a panel: the same 16 bytes of several rows. Columns that the tile lacks
// are stale, and their sums are dropped; rows beyond K are zeros, in both operands.
template <class Stage, int kThreads, bool kLeft>
class AcrossCopies {
 public:
  // `cols`: of the tile, a multiple of 8.
  FLASHMOE_DEVICE AcrossCopies(int thread, int depth, int cols)
      : depth_(depth), k_(thread / kAcross), byte_(thread % kAcross * 16), has_(byte_ < 2 * cols),
        place_(Panel::place(uint32_t(k_), uint32_t(byte_))) {}

 protected:
  using Panel = AcrossPanel<Stage, kLeft>;
  static constexpr int kAcross = Panel::kRowBytes / 16, kAtOnce = kThreads / kAcross, kPieces = Panel::kDepth / kAtOnce;
  static_assert(kAtOnce % 8 == 0, "a thread's rows must have their bytes in one order");
  static_assert(kPieces * kAtOnce == Panel::kDepth);

  // row(k): where the tile's columns begin in that row, whether or not there is one.
  template <class Row>
  FLASHMOE_DEVICE void issue_rows(Stage& stage, int step, const Row& row) const {
    if (!has_) return;
    FLASHMOE_UNROLL
    for (int i = 0; i < kPieces; ++i) {
      const int k = step * Panel::kDepth + k_ + i * kAtOnce;
      gpu::cp_async_16(Panel::of(stage) + place_ + i * kAtOnce * Panel::kRowBytes, row(k) + byte_, k < depth_ ? 16 : 0);
    }
  }

 private:
  const int depth_, k_, byte_;
  const bool has_;
  const uint32_t place_;
};

// Of a matrix whose rows follow each other.
template <class Stage, int kThreads>
class MatrixCopies : AcrossCopies<Stage, kThreads, false> {
 public:
  // `first`: where the tile's columns begin in row 0.
  FLASHMOE_DEVICE MatrixCopies(int thread, const std::byte* first, uint32_t row_bytes, int depth, int cols)
      : AcrossCopies<Stage, kThreads, false>(thread, depth, cols), first_(first), row_bytes_(row_bytes) {}

  FLASHMOE_DEVICE void issue(Stage& stage, int step) const {
    this->issue_rows(stage, step, [&](int k) { return first_ + size_t(k) * row_bytes_; });
  }

 private:
  const std::byte* const first_;
  const uint32_t row_bytes_;
};

// Of rows that lie anywhere. `rows` says where for two row blocks at a time: the one that is being copied, and its
// neighbour.
template <class Stage, int kThreads, bool kLeft>
class ScatteredCopies : AcrossCopies<Stage, kThreads, kLeft> {
 public:
  // `byte`: where the tile's columns begin in each.
  FLASHMOE_DEVICE ScatteredCopies(int thread, const std::byte* const* rows, uint32_t byte, int depth, int cols)
      : AcrossCopies<Stage, kThreads, kLeft>(thread, depth, cols), rows_(rows), byte_(byte) {}

  FLASHMOE_DEVICE void issue(Stage& stage, int step) const {
    this->issue_rows(stage, step, [&](int k) { return rows_[k % (2 * kBlockM)] + byte_; });
  }

 private:
  const std::byte* const* const rows_;
  const uint32_t byte_;
};

}  // namespace flashmoe
