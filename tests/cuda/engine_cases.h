// What the engines are asked for alone: products of small integers, which every type holds and whose sums are exact; so
// one wrong place, row or step cannot hide in rounding.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "engine_alone.h"

namespace flashmoe::test {

// f(name, engine) of each engine that a GPU of this compute capability (major · 10 + minor) can run.
template <class F>
void for_each_engine(int capability, const F& f) {
  f("Ampere bf16", Sm80Alone<DType::kBFloat16>{});
  f("Ampere fp16", Sm80Alone<DType::kFloat16>{});
  f("Ampere tf32", Sm80Alone<DType::kFloat32>{});
  if (capability != 90) return;
  f("Hopper wide bf16", Sm90Alone<Sm90Wide, DType::kBFloat16>{});
  f("Hopper wide fp16", Sm90Alone<Sm90Wide, DType::kFloat16>{});
  f("Hopper narrow bf16", Sm90Alone<Sm90Narrow, DType::kBFloat16>{});
  f("Hopper narrow fp16", Sm90Alone<Sm90Narrow, DType::kFloat16>{});
}

// Less than a step; one of Hopper's; some and a rest, fewer than there are stages; and all stages more than once.
inline constexpr int kDepths[] = {8, 64, 200, 1024};
// One; a warpgroup's, or a narrow pass; one more than that; all.
inline constexpr int kNumRows[] = {1, 64, 65, 128};

// As tensors hold it: of 0, or of a number that needs no more bits than the type has.
template <DType dtype>
uint32_t encoded(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if (dtype == DType::kFloat32) return bits;
  if (dtype == DType::kBFloat16) return bits >> 16;
  return value == 0 ? 0 : (bits >> 16 & 0x8000) | ((bits & 0x7fffffff) - (112u << 23)) >> 13;
}
template <DType dtype, class T>
std::vector<uint32_t> encoded(const std::vector<T>& values) {
  constexpr size_t kInWord = 4 / dtype_bytes(dtype);
  std::vector<uint32_t> words(std::max<size_t>(1, ceil_div(values.size(), kInWord)));
  for (size_t i = 0; i < values.size(); ++i)
    words[i / kInWord] |= encoded<dtype>(float(values[i])) << (i % kInWord * 16);
  return words;
}

struct Integers {
  static constexpr int kX = 256, kWeights = 304;
  int depth;
  std::vector<int> x, weights, sums;  // [kX, depth], [kWeights, depth], [kX, kWeights]

  explicit Integers(int depth) : depth(depth), x(kX * depth), weights(kWeights * depth), sums(kX * kWeights) {
    std::mt19937 random(static_cast<unsigned>(depth));
    for (int& value : x) value = int(random() % 7) - 3;
    for (int& value : weights) value = int(random() % 7) - 3;
    for (int row = 0; row < kX; ++row)
      for (int weight = 0; weight < kWeights; ++weight) {
        int sum = 0;
        for (int k = 0; k < depth; ++k) sum += x[row * depth + k] * weights[weight * depth + k];
        sums[row * kWeights + weight] = sum;
      }
  }

  // As they lie in memory for this engine. Across, x has its last row first: none lies where that of the weights does.
  template <class Alone>
  std::vector<int> x_for() const {
    return Alone::kXAcross ? across(x, kX, true) : x;
  }
  template <class Alone>
  std::vector<int> weights_for() const {
    return Alone::kWeightsAcross ? across(weights, kWeights, false) : weights;
  }

  // All but where x, the weights and the sums lie. The second half ends beyond the last of the weights.
  template <class Alone>
  Tiles tiles(int num_rows, int num_tiles) const {
    const int half = Alone::kTileN / 2;
    return {{}, nullptr, nullptr, kX, kWeights, depth, num_rows, num_tiles,
            {9, kWeights - half + 5}, 3, 8, kWeights, nullptr};
  }

 private:
  std::vector<int> across(const std::vector<int>& rows, int num_rows, bool last_first) const {
    std::vector<int> turned(rows.size());
    for (int row = 0; row < num_rows; ++row)
      for (int k = 0; k < depth; ++k)
        turned[(last_first ? depth - 1 - k : k) * num_rows + row] = rows[row * depth + k];
    return turned;
  }
};

// Empty, or which of the sums are not what they should be. Those that nobody stored are to be NaN.
template <class Alone>
std::string wrong_sums(const Integers& integers, const Tiles& tiles, const std::vector<float>& sums) {
  constexpr int kTileN = Alone::kTileN, kHalf = kTileN / 2;
  const int num_tiles = int(sums.size()) / (tiles.num_rows * kTileN);
  int num = 0, num_unstored = 0, first[3] = {num_tiles, tiles.num_rows, kTileN}, last[3] = {};
  std::string example;
  for (int tile = 0; tile < num_tiles; ++tile)
    for (int row = 0; row < tiles.num_rows; ++row)
      for (int column = 0; column < kTileN; ++column) {
        const int weight = tiles.weight_row(tile, column / kHalf) + column % kHalf;
        const bool beyond = weight >= tiles.num_weights;
        if (beyond && !Alone::kZerosBeyondWeights) continue;
        const int x = Alone::kXAcross ? tiles.x_column(tile) + row : tiles.x_row(tile, row);
        const int wanted = beyond ? 0 : integers.sums[x * tiles.num_weights + weight];
        const float sum = sums[(size_t(tile) * tiles.num_rows + row) * kTileN + column];
        if (sum == float(wanted)) continue;
        const int place[3] = {tile, row, column};
        for (int i = 0; i < 3; ++i) first[i] = std::min(first[i], place[i]), last[i] = std::max(last[i], place[i]);
        if (num++ == 0)
          example = "tile " + std::to_string(tile) + " row " + std::to_string(row) + " column " +
                    std::to_string(column) + " is " + std::to_string(sum) + ", not " + std::to_string(wanted);
        num_unstored += std::isnan(sum);
      }
  if (num == 0) return {};
  const auto range = [&](const char* of, int i) {
    return std::string(" ") + of + " " + std::to_string(first[i]) + "-" + std::to_string(last[i]);
  };
  return std::to_string(num) + " of " + std::to_string(sums.size()) + " sums are wrong, " +
         std::to_string(num_unstored) + " of these were never stored; in" + range("tiles", 0) + range("rows", 1) +
         range("columns", 2) + "; " + example;
}

}  // namespace flashmoe::test
