// What happens in registers to the sums of a tensor core's products, Ampere's or Hopper's: bias, activation, rounding,
// and the way to memory. A warp holds 16 rows of a tile, a thread two of them, eight apart: with g = lane / 4 and
// q = lane % 4, sums[i] is row g + i / 2 % 2 · 8 and column i / 4 · 8 + 2q + i % 2, as mma_sync and wgmma leave them.
#pragma once

#include <cstring>

#include "engine/fast_activation.h"

namespace flashmoe {

// Both halves of a tile that is kTileN columns wide: of half kHalf, sums[kHalf · kSums + 0 … kSums).
template <DType dtype, int kTileN>
struct MmaSums {
  static constexpr int kSums = kTileN / 4;
  static constexpr int kColumns = kTileN / 2;
  using Sums = float[2 * kSums];

  // bias[begin + column], for the half's first `cols` columns.
  template <int kHalf>
  FLASHMOE_DEVICE static void add_bias(Sums& sums, const std::byte* bias, int begin, int cols) {
    const int mine = gpu::lane() % 4 * 2;
    FLASHMOE_UNROLL
    for (int group = 0; group < kColumns / 8; ++group) {
      if (8 * group + mine >= cols) break;
      const gpu::FloatPair b = load_pair(bias, begin + 8 * group + mine);
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
  // 64 bytes they turn the pairs that each holds into 16 bytes that lie together.
  template <int kHalf>
  FLASHMOE_DEVICE static void store(const Sums& sums, std::byte* const (&rows)[2], int cols) {
    constexpr int kAtOnce = 64 / dtype_bytes(dtype);
    FLASHMOE_UNROLL
    for (int begin = 0; begin < kColumns; begin += kAtOnce) {
      if (begin >= cols) break;
      const int column = begin + first_of_piece();
      FLASHMOE_UNROLL
      for (int row = 0; row < 2; ++row) {
        const gpu::Words4 words = piece(sums, kHalf * kSums + begin / 2 + 2 * row);
        if (rows[row] && column < cols)
          *reinterpret_cast<gpu::Words4*>(rows[row] + column * dtype_bytes(dtype)) = words;
      }
    }
  }

  // The same of 32 columns of one row that are rounded already, in 16 bits: word w is the pair at 8w + 2q.
  FLASHMOE_DEVICE static void store_pairs(gpu::Words4 words, std::byte* row, int cols) {
    static_assert(dtype_bytes(dtype) == 2);
    turn_pairs(words);
    if (row && first_of_piece() < cols) *reinterpret_cast<gpu::Words4*>(row + 2 * first_of_piece()) = words;
  }

 private:
  static_assert(kColumns % 32 == 0);

  FLASHMOE_DEVICE static gpu::FloatPair load_pair(const std::byte* from, int index) {
    if constexpr (dtype == DType::kFloat32) {
      const float* pair = reinterpret_cast<const float*>(from) + index;
      return {pair[0], pair[1]};
    } else {
      return gpu::unpack_pair<dtype>(reinterpret_cast<const uint32_t*>(from)[index / 2]);
    }
  }

  template <int kHalf, Activation activation>
  FLASHMOE_DEVICE static void activate_by(Sums& sums) {
    FLASHMOE_UNROLL
    for (int i = kHalf * kSums; i < (kHalf + 1) * kSums; ++i) sums[i] = fast_activate<activation>(sums[i]);
  }

  // Of 64 bytes of a row, the 16 that this lane gets, and their first column. Its pairs begin at sums[first], of every
  // eight columns one.
  FLASHMOE_DEVICE static int first_of_piece() {
    return dtype == DType::kFloat32 ? gpu::lane() % 2 * 8 + gpu::lane() / 2 % 2 * 4 : gpu::lane() % 4 * 8;
  }
  FLASHMOE_DEVICE static gpu::Words4 piece(const Sums& sums, int first) {
    if constexpr (dtype == DType::kFloat32) {
      float pair[2][2] = {{sums[first], sums[first + 1]}, {sums[first + 4], sums[first + 5]}};
      turn_around<1>(pair[0][0], pair[1][0]), turn_around<1>(pair[0][1], pair[1][1]);
      gpu::Words4 words;
      memcpy(&words, pair, 16);
      return words;
    } else {
      gpu::Words4 words;
      FLASHMOE_UNROLL
      for (int w = 0; w < 4; ++w) words.word[w] = gpu::pack_pair<dtype>(sums[first + 4 * w], sums[first + 4 * w + 1]);
      turn_pairs(words);
      return words;
    }
  }
  FLASHMOE_DEVICE static void turn_pairs(gpu::Words4& words) {
    turn_around<1>(words.word[0], words.word[1]), turn_around<1>(words.word[2], words.word[3]);
    turn_around<2>(words.word[0], words.word[2]), turn_around<2>(words.word[1], words.word[3]);
  }

  // One step of transposing a matrix that has a column in each lane: the lane whose bit of kMask is 0 keeps `low`.
  template <int kMask, class T>
  FLASHMOE_DEVICE static void turn_around(T& low, T& high) {
    const bool keeps_high = gpu::lane() & kMask;
    const T other = gpu::shuffle_xor(keeps_high ? low : high, kMask);
    keeps_high ? low = other : high = other;
  }
};

}  // namespace flashmoe
