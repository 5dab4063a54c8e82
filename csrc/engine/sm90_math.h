// What a math warpgroup does with its 64 rows of a tile: the products, and all that happens to their sums in
// registers. Thread t holds, of sums[i], row wgmma_row(t, i) and column wgmma_column(t, i).
#pragma once

#include "engine/sm90_activation.h"
#include "engine/sm90_load.h"

namespace flashmoe {

// The warpgroup's sums over all steps of a tile, one product in flight behind the next. `first_row`: of a stage's rows,
// the first of this warpgroup. A warpgroup without rows only lets each stage go.
template <DType dtype, int kTileN, class Stage, class Pipeline>
FLASHMOE_DEVICE void sm90_products(Pipeline& pipeline, const Stage* stages, typename Pipeline::Turn& turn,
                                   int first_row, bool has_rows, int steps, float (&sums)[kTileN / 2]) {
  if (!has_rows) {
    for (int step = 0; step < steps; ++step, turn.next()) {
      pipeline.wait_full(turn);  // else it could let go twice in one phase
      pipeline.let_go(turn);
    }
    return;
  }
  // From zeros, and not by a first product that does not accumulate: else ptxas serialises all of them (C7515).
  FLASHMOE_UNROLL
  for (float& sum : sums) sum = 0.0f;
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

// Half `kHalf` of a tile's sums: its columns are sums[kHalf · kSums + 0 … kSums).
template <DType dtype, int kTileN>
struct Sm90Sums {
  static constexpr int kSums = kTileN / 4;
  static constexpr int kColumns = kTileN / 2;
  using Sums = float[2 * kSums];

  // bias[begin + column], for the half's first `cols` columns.
  template <int kHalf>
  FLASHMOE_DEVICE static void add_bias(Sums& sums, const std::byte* bias, int begin, int cols) {
    const uint32_t* pairs = reinterpret_cast<const uint32_t*>(bias) + begin / 2 + gpu::lane() % 4;
    FLASHMOE_UNROLL
    for (int group = 0; group < kColumns / 8; ++group) {
      if (8 * group >= cols) break;
      const gpu::FloatPair b = gpu::unpack_pair<dtype>(pairs[4 * group]);
      FLASHMOE_UNROLL
      for (int i = 0; i < 4; ++i) sums[kHalf * kSums + 4 * group + i] += i % 2 ? b.second : b.first;
    }
  }

  // The choice is made once per half, outside of the loop over registers.
  template <int kHalf>
  FLASHMOE_DEVICE static void activate(Sums& sums, Activation activation) {
    switch (activation) {
      case Activation::kSilu: return activate_by<kHalf, Activation::kSilu>(sums);
      case Activation::kGelu: return activate_by<kHalf, Activation::kGelu>(sums);
      case Activation::kGeluTanh: return activate_by<kHalf, Activation::kGeluTanh>(sums);
      case Activation::kRelu: return activate_by<kHalf, Activation::kRelu>(sums);
    }
  }

  FLASHMOE_DEVICE static void multiply_halves(Sums& sums) {
    FLASHMOE_UNROLL
    for (int i = 0; i < kSums; ++i) sums[i] *= sums[kSums + i];
  }

  // Columns [0, cols) of the half, rounded, to two rows: the thread's own, or null. Four lanes share a row; of every
  // 32 columns they turn the four pairs that each holds into 16 bytes that lie together.
  template <int kHalf>
  FLASHMOE_DEVICE static void store(const Sums& sums, std::byte* const (&rows)[2], int cols) {
    FLASHMOE_UNROLL
    for (int group = 0; group < kColumns / 32; ++group) {
      if (32 * group >= cols) break;
      const int column = 32 * group + gpu::lane() % 4 * 8;
      FLASHMOE_UNROLL
      for (int row = 0; row < 2; ++row) {
        gpu::Words4 words;
        FLASHMOE_UNROLL
        for (int w = 0; w < 4; ++w) {
          const int i = kHalf * kSums + 16 * group + 4 * w + 2 * row;
          words.word[w] = gpu::pack_pair<dtype>(sums[i], sums[i + 1]);
        }
        turn_around<1>(words.word[0], words.word[1]), turn_around<1>(words.word[2], words.word[3]);
        turn_around<2>(words.word[0], words.word[2]), turn_around<2>(words.word[1], words.word[3]);
        if (rows[row] && column < cols) *reinterpret_cast<gpu::Words4*>(rows[row] + 2 * column) = words;
      }
    }
  }

 private:
  static_assert(dtype != DType::kFloat32, "sums are stored as pairs of 16-bit floats");
  static_assert(kColumns % 32 == 0);

  template <int kHalf, Activation activation>
  FLASHMOE_DEVICE static void activate_by(Sums& sums) {
    FLASHMOE_UNROLL
    for (int i = kHalf * kSums; i < (kHalf + 1) * kSums; ++i) sums[i] = fast_activate<activation>(sums[i]);
  }

  // One step of transposing a matrix that has a column in each lane: the lane whose bit of kMask is 0 keeps `low`.
  template <int kMask>
  FLASHMOE_DEVICE static void turn_around(uint32_t& low, uint32_t& high) {
    const bool keeps_high = gpu::lane() & kMask;
    const uint32_t other = gpu::shuffle_xor(keeps_high ? low : high, kMask);
    keeps_high ? low = other : high = other;
  }
};

}  // namespace flashmoe
