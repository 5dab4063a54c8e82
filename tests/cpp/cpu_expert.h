// One expert with random weights and tokens, and what the CPU engine makes of them.
#pragma once

#include <cstdlib>
#include <string>
#include <vector>

#include "cpu_numbers.h"
#include "engine/cpu.h"
#include "harness.h"

namespace flashmoe::test {

using Problem = CpuEngine::Problem;

struct Expert {
  Problem problem;
  int h_width, sections;
  Array x, gate_up, gate_up_bias, down, down_bias;
  bool bias;

  Expert(const Problem& p, bool with_bias, int seed = 1)
      : problem(p), h_width(p.intermediate_size), sections(p.gated ? 2 : 1),
        x(p.dtype, size_t(CpuEngine::kBlockM) * p.hidden_size),
        gate_up(p.dtype, size_t(sections) * p.intermediate_size * p.hidden_size),
        gate_up_bias(p.dtype, size_t(sections) * p.intermediate_size),
        down(p.dtype, size_t(p.hidden_size) * p.intermediate_size), down_bias(p.dtype, p.hidden_size),
        bias(with_bias) {
    std::mt19937 random(seed);
    x.fill(random, 1);
    gate_up.fill(random, 1.5 / std::sqrt(p.hidden_size));
    gate_up_bias.fill(random, 0.3);
    down.fill(random, 1 / std::sqrt(p.intermediate_size));
    down_bias.fill(random, 0.3);
  }

  std::string describe() const {
    return std::string(name(problem.dtype)) + " " + name(problem.activation) + (problem.gated ? " gated" : "") +
           (bias ? " bias" : "") + " H=" + std::to_string(problem.hidden_size) +
           " I=" + std::to_string(problem.intermediate_size);
  }
};

// Scratch full of NaN, 64-byte aligned, freed at its exact size: nothing may depend on what it held.
struct PoisonedScratch {
  size_t bytes;
  void* memory;
  explicit PoisonedScratch(const Problem& p)
      : bytes(CpuEngine::scratch_bytes(p)), memory(std::aligned_alloc(64, round_up(bytes, 64))) {
    std::memset(memory, 0xff, bytes);
  }
  ~PoisonedScratch() { std::free(memory); }
};

using Splits = std::vector<int>;  // column ranges [s0, s1), [s1, s2), ...
inline Splits whole(int n) { return {0, n}; }

// h of rows [first, first + num_rows) of x, each row also `pad` floats wider than needed.
inline std::vector<float> run_up(const CpuEngine& engine, Expert& e, int first, int num_rows, const Splits& splits) {
  const int stride = e.h_width + 3;
  std::vector<float> h(size_t(num_rows) * stride - 3, -77.0f);
  std::vector<const void*> rows;
  for (int i = 0; i < num_rows; ++i) rows.push_back(e.x.at(size_t(first + i) * e.problem.hidden_size));
  PoisonedScratch scratch(e.problem);
  for (size_t s = 0; s + 1 < splits.size(); ++s)
    engine.up_tile(e.problem, rows.data(), num_rows, e.gate_up.at(0), e.bias ? e.gate_up_bias.at(0) : nullptr,
                   splits[s], splits[s + 1], h.data(), stride, scratch.memory);
  std::vector<float> packed;
  for (int i = 0; i < num_rows; ++i)
    packed.insert(packed.end(), h.begin() + i * stride, h.begin() + i * stride + e.h_width);
  for (int i = 0; i + 1 < num_rows; ++i)
    for (int j = 0; j < 3; ++j)
      if (h[i * stride + e.h_width + j] != -77.0f) check(false, e.describe() + ": up_tile wrote beyond its columns");
  return packed;
}

inline Array run_down(const CpuEngine& engine, Expert& e, const float* h, int num_rows, const Splits& splits) {
  Array y(e.problem.dtype, size_t(num_rows) * e.problem.hidden_size);
  std::vector<void*> out;
  for (int i = 0; i < num_rows; ++i) out.push_back(y.at(size_t(i) * e.problem.hidden_size));
  PoisonedScratch scratch(e.problem);
  for (size_t s = 0; s + 1 < splits.size(); ++s)
    engine.down_tile(e.problem, h, e.h_width, num_rows, e.down.at(0), e.bias ? e.down_bias.at(0) : nullptr,
                     splits[s], splits[s + 1], out.data(), scratch.memory);
  return y;
}

struct Dot {
  double value, error;  // and a bound on what fp32 arithmetic may do to it
};
template <class A, class B>
inline Dot dot(int k, A a, B b, double start) {
  double sum = start, absolute = std::fabs(start);
  for (int i = 0; i < k; ++i) sum += a(i) * b(i), absolute += std::fabs(a(i) * b(i));
  return {sum, kEps * (4 + std::sqrt(double(k))) * absolute};
}

}  // namespace flashmoe::test
