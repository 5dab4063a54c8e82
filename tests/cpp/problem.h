// A layer and the tokens of all ranks, drawn from one seed, so that no rank has to tell another what it holds.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstring>
#include <random>
#include <vector>

#include "protocol/config.h"

namespace flashmoe::test {

// A float32 number, or the 16-bit number next to it: Veltkamp's splitting leaves 24 - 16 bits of bfloat16, 24 - 13 of
// float16. (A mask of the lower bits would do, but GCC 12 loses `& 0xffff0000` on a float expression at -O1 and -O2.)
inline float representable(float v, DType dtype) {
  if (dtype == DType::kFloat16 && std::fabs(v) < 0x1p-14f) return std::nearbyint(v * 0x1p24f) * 0x1p-24f;
  const float c = (dtype == DType::kFloat16 ? 8193.0f : 65537.0f) * v;
  return dtype == DType::kFloat32 ? v : c - (c - v);
}
// Their bits: of a bfloat16 number, the upper half of the float's. A float16 number has the float's fields, of which
// the exponent counts from 112 less and the mantissa ends 13 bits earlier.
inline uint32_t to_bits(float v, DType dtype) {
  uint32_t bits;
  const float scaled = dtype == DType::kFloat16 ? v * 0x1p-112f : v;
  std::memcpy(&bits, &scaled, 4);
  if (dtype == DType::kFloat32) return bits;
  return dtype == DType::kBFloat16 ? bits >> 16 : (bits >> 16 & 0x8000) | (bits >> 13 & 0x7fff);
}
inline float from_bits(uint32_t bits, DType dtype) {
  if (dtype == DType::kBFloat16) bits <<= 16;
  if (dtype == DType::kFloat16) bits = (bits & 0x8000) << 16 | (bits & 0x7fff) << 13;
  float v;
  std::memcpy(&v, &bits, 4);
  return dtype == DType::kFloat16 ? v * 0x1p112f : v;
}
inline std::vector<std::byte> encode(const std::vector<float>& values, DType dtype) {
  const size_t size = dtype_bytes(dtype);
  std::vector<std::byte> bytes(values.size() * size);
  for (size_t i = 0; i < values.size(); ++i) {
    const uint32_t bits = to_bits(values[i], dtype);
    std::memcpy(&bytes[i * size], &bits, size);  // the lower half comes first
  }
  return bytes;
}
inline std::vector<float> decode(const std::vector<std::byte>& bytes, DType dtype) {
  const size_t size = dtype_bytes(dtype);
  std::vector<float> values(bytes.size() / size, 0.0f);
  for (size_t i = 0; i < values.size(); ++i) {
    uint32_t bits = 0;
    std::memcpy(&bits, &bytes[i * size], size);
    values[i] = from_bits(bits, dtype);
  }
  return values;
}

struct LayerShape {
  int hidden_size = 32, intermediate_size = 32, num_experts = 8, top_k = 2;
  bool gated = true, bias = false;
  DType dtype = DType::kFloat32;
  Activation activation = Activation::kSilu;
  int layer = 0;
};

struct Layer : LayerShape {
  std::vector<float> gate_up, gate_up_bias, down, down_bias;  // of all experts

  Layer(const LayerShape& shape, uint64_t seed) : LayerShape(shape) {
    std::mt19937_64 random(seed);
    const size_t e = num_experts, h = hidden_size, i = intermediate_size, up = up_rows();
    gate_up = values(random, e * up * h, std::sqrt(3.0f / h));
    down = values(random, e * h * i, std::sqrt(3.0f / i));
    if (!bias) return;
    gate_up_bias = values(random, e * up, 0.5f);
    down_bias = values(random, e * h, 0.5f);
  }
  int up_rows() const { return (gated ? 2 : 1) * intermediate_size; }

  std::vector<float> values(std::mt19937_64& random, size_t n, float most) const {
    std::uniform_real_distribution<float> draw(-most, most);
    std::vector<float> v(n);
    for (float& x : v) x = representable(draw(random), dtype);
    return v;
  }
};

// expert → owning rank.
using ExpertMap = std::vector<int32_t>;
inline ExpertMap equal_blocks(int num_experts, int ep_size) {
  ExpertMap map(num_experts);
  for (int e = 0; e < num_experts; ++e) map[e] = int32_t((long long)e * ep_size / num_experts);
  return map;
}

// What rank `rank` holds of `all`, an array of `per_expert` values for each expert: its experts in ascending order.
inline std::vector<std::byte> slice(const Layer& layer, const std::vector<float>& all, const ExpertMap& map, int rank) {
  const size_t per_expert = all.size() / layer.num_experts;
  std::vector<float> mine;
  for (int e = 0; e < layer.num_experts; ++e)
    if (map[e] == rank) mine.insert(mine.end(), all.begin() + e * per_expert, all.begin() + (e + 1) * per_expert);
  return encode(mine, layer.dtype);
}

struct Tokens {
  int num_tokens = 0;
  std::vector<float> x;          // [num_tokens, hidden_size]
  std::vector<int64_t> ids;      // [num_tokens, top_k]
  std::vector<float> weights;    // [num_tokens, top_k]
};

// How tokens choose their experts.
enum class Skew { kUniform, kZipf, kOneExpert, kDropSome };

inline Tokens draw_tokens(const Layer& layer, int num_tokens, uint64_t seed, Skew skew = Skew::kUniform) {
  std::mt19937_64 random(seed * 7919 + 13);
  Tokens t;
  t.num_tokens = num_tokens;
  t.x = layer.values(random, size_t(num_tokens) * layer.hidden_size, 1.0f);
  std::uniform_real_distribution<double> unit(0, 1);
  const int experts = layer.num_experts;
  for (int i = 0; i < num_tokens; ++i) {
    std::vector<int64_t> chosen;
    while (int(chosen.size()) < layer.top_k) {
      int64_t id = int64_t(random() % experts);
      if (skew == Skew::kZipf) id = int64_t(experts * std::pow(unit(random), 3.0));
      if (skew == Skew::kOneExpert && chosen.empty()) id = experts / 2;
      bool twice = false;
      for (int64_t other : chosen) twice = twice || other == id;
      if (twice && int(chosen.size()) < experts) continue;
      chosen.push_back(id);
    }
    for (int64_t id : chosen) {
      if (skew == Skew::kDropSome && random() % 3 == 0) id = random() % 2 ? -1 : experts;
      t.ids.push_back(id);
      t.weights.push_back(float(unit(random)));
    }
  }
  return t;
}

}  // namespace flashmoe::test
