// The CPU engine's tiles against double precision, on every instruction set that this machine runs.
#include <limits>

#include "cpu_expert.h"
#include "cpu_isas.h"

namespace {

using namespace flashmoe;
using namespace flashmoe::test;

constexpr int kBlockM = CpuEngine::kBlockM;

void check_accuracy(const CpuEngine& engine, Expert& e, int num_rows) {
  if (kAddressSanitizer) return;  // what is right is right without it; check_bits reaches the same memory, and more
  const Problem& p = e.problem;
  const int H = p.hidden_size, I = p.intermediate_size;
  std::vector<double> x(e.x.size), gate_up(e.gate_up.size), down(e.down.size);
  for (size_t i = 0; i < x.size(); ++i) x[i] = e.x.get(i);
  for (size_t i = 0; i < gate_up.size(); ++i) gate_up[i] = e.gate_up.get(i);
  for (size_t i = 0; i < down.size(); ++i) down[i] = e.down.get(i);

  const std::vector<float> h = run_up(engine, e, 0, num_rows, whole(I));
  double worst = 0;
  for (int i = 0; i < num_rows; ++i)
    for (int c = 0; c < I; ++c) {
      const auto section = [&](int row) {
        return dot(H, [&](int k) { return x[size_t(i) * H + k]; }, [&](int k) { return gate_up[size_t(row) * H + k]; },
                   e.bias ? e.gate_up_bias.get(row) : 0);
      };
      const Dot gate = section(c), up = p.gated ? section(I + c) : Dot{1, 0};
      const double act = exact(p.activation, gate.value);
      const double bound = 1.2 * gate.error * std::fabs(up.value) + (std::fabs(act) + 1.2 * gate.error) * up.error +
                           8 * kEps * std::fabs(act * up.value);
      worst = std::max(worst, std::fabs(h[size_t(i) * I + c] - act * up.value) / bound);
    }
  check(worst <= 1, e.describe() + ": up_tile is off by " + std::to_string(worst) + " of its bound");

  Array y = run_down(engine, e, h.data(), num_rows, whole(H));
  worst = 0;
  for (int i = 0; i < num_rows; ++i)
    for (int c = 0; c < H; ++c) {
      const Dot want = dot(I, [&](int k) { return double(h[size_t(i) * I + k]); },
                           [&](int k) { return down[size_t(c) * I + k]; }, e.bias ? e.down_bias.get(c) : 0);
      const double ulp = half_unit(want.value, p.dtype);
      worst = std::max(worst, std::fabs(y.get(size_t(i) * H + c) - want.value) / (want.error * 1.01 + ulp));
    }
  check(worst <= 1, e.describe() + ": down_tile is off by " + std::to_string(worst) + " of its bound");
}

// Column ranges of many widths, none aligned to anything.
Splits ragged(int n) {
  Splits splits = {0};
  for (int width = 1; splits.back() < n; width = width * 2 + 1) splits.push_back(std::min(n, splits.back() + width));
  return splits;
}
Splits by_tiles(int n, int tile) {
  Splits splits = {0};
  while (splits.back() < n) splits.push_back(std::min(n, splits.back() + tile));
  return splits;
}

void check_bits(const CpuEngine& engine, Expert& e, const std::vector<int>& row_counts) {
  const int H = e.problem.hidden_size, I = e.problem.intermediate_size;
  const size_t row_bytes = size_t(H) * dtype_bytes(e.problem.dtype);
  const std::vector<float> h = run_up(engine, e, 0, kBlockM, whole(I));
  Array y = run_down(engine, e, h.data(), kBlockM, whole(H));
  for (int num_rows : row_counts) {
    const int first = kBlockM - num_rows;  // so that every row changes its place as well
    const bool odd = num_rows % 2;
    const Splits up = odd ? ragged(I) : by_tiles(I, CpuEngine::up_tile_cols(e.problem));
    const Splits down = odd ? ragged(H) : by_tiles(H, CpuEngine::down_tile_cols(e.problem));
    const std::vector<float> some = run_up(engine, e, first, num_rows, up);
    check(std::memcmp(some.data(), h.data() + size_t(first) * I, some.size() * 4) == 0,
          e.describe() + ": up_tile's bits depend on M, M=" + std::to_string(num_rows));
    Array out = run_down(engine, e, h.data() + size_t(first) * I, num_rows, down);
    check(std::memcmp(out.at(0), y.at(size_t(first) * H), num_rows * row_bytes) == 0,
          e.describe() + ": down_tile's bits depend on M, M=" + std::to_string(num_rows));
  }
}

std::vector<int> one_to(int n) {
  std::vector<int> counts;
  for (int i = 1; i <= n; ++i) counts.push_back(i);
  return counts;
}

bool same_bits_except(const float* a, const float* b, int rows, int cols, int skip_row, int skip_col) {
  for (int i = 0; i < rows; ++i)
    for (int c = 0; c < cols; ++c)
      if (i != skip_row && c != skip_col && std::memcmp(a + i * cols + c, b + i * cols + c, 4)) return false;
  return true;
}

// A NaN or Inf stays in its row of tokens, or in its column of weights, whatever stands next to it in memory.
void check_isolation(const CpuEngine& engine, DType dtype, int H, int I) {
  constexpr int kRows = 11;
  for (int num_rows : {2, kRows})
    for (double poison : {double(NAN), double(INFINITY), -double(INFINITY)}) {
      if (kAddressSanitizer && !std::isnan(poison)) continue;
      Expert e({dtype, Activation::kSilu, true, H, I}, false);
      const std::string what = e.describe() + " poison " + std::to_string(poison);
      const std::vector<float> clean = run_up(engine, e, 0, num_rows, whole(I));
      Array clean_y = run_down(engine, e, clean.data(), num_rows, whole(H));
      const auto y_of = [&](Array& y) {
        std::vector<float> values;
        for (size_t i = 0; i < y.size; ++i) values.push_back(float(y.get(i)));
        return values;
      };
      for (int k : {0, H - 1}) {
        Expert bad({dtype, Activation::kSilu, true, H, I}, false);
        bad.x.set(size_t(1) * H + k, poison);
        const std::vector<float> h = run_up(engine, bad, 0, num_rows, whole(I));
        check(same_bits_except(h.data(), clean.data(), num_rows, I, 1, -1), what + ": a token reached other rows");
        bool all_finite = true;
        for (int c = 0; c < I; ++c) all_finite &= bool(std::isfinite(h[I + c]));
        if (std::isnan(poison)) {
          bool all_nan = true;
          for (int c = 0; c < I; ++c) all_nan &= std::isnan(h[I + c]);
          check(all_nan, what + ": a NaN token was lost");
        } else if (I > 8) {
          check(!all_finite, what + ": an infinite token was lost");
        }
        Array y = run_down(engine, bad, h.data(), num_rows, whole(H));
        check(same_bits_except(y_of(y).data(), y_of(clean_y).data(), num_rows, H, 1, -1),
              what + ": a row of h reached other rows");
      }
      for (int c : {0, I / 2, I - 1})
        for (int k : {0, H - 1}) {
          Expert bad({dtype, Activation::kSilu, true, H, I}, false);
          bad.gate_up.set(size_t(I + c) * H + k, poison);
          const std::vector<float> h = run_up(engine, bad, 0, num_rows, whole(I));
          check(same_bits_except(h.data(), clean.data(), num_rows, I, -1, c), what + ": a weight reached other columns");
          check(!std::isfinite(h[c]), what + ": a weight was lost");
        }
      for (int c : {0, H / 2, H - 1})
        for (int k : {0, I - 1}) {
          Expert bad({dtype, Activation::kSilu, true, H, I}, false);
          bad.down.set(size_t(c) * I + k, poison);
          Array y = run_down(engine, bad, clean.data(), num_rows, whole(H));
          check(same_bits_except(y_of(y).data(), y_of(clean_y).data(), num_rows, H, -1, c),
                what + ": a down weight reached other columns");
          check(!std::isfinite(y.get(c)), what + ": a down weight was lost");
        }
    }
}

void check_combine(const CpuEngine& engine, DType dtype, int H) {
  std::mt19937 random(3);
  for (int num = 0; num <= 9; ++num) {
    Array rows(dtype, size_t(9) * H), y(dtype, H);
    rows.fill(random, 1);
    for (int c = 0; c < H; ++c) y.set(c, NAN);
    std::vector<const void*> pointers;
    std::vector<float> weights;
    for (int j = 0; j < 9; ++j) pointers.push_back(rows.at(size_t(j) * H)), weights.push_back(0.1f * (j + 1));
    engine.combine({dtype, Activation::kSilu, true, H, 1}, pointers.data(), weights.data(), num, y.at(0));
    double worst = 0;
    for (int c = 0; c < H; ++c) {
      const Dot want = dot(num, [&](int j) { return double(weights[j]); },
                           [&](int j) { return rows.get(size_t(j) * H + c); }, 0);
      const double ulp = half_unit(want.value, dtype);
      const double error = std::fabs(y.get(c) - want.value);
      worst = std::max(worst, num == 0 ? error * INFINITY : error / (want.error * 1.01 + ulp));
      if (num == 0 && error != 0) worst = INFINITY;
    }
    check(num == 0 ? !(worst == INFINITY) : worst <= 1,
          std::string("combine ") + name(dtype) + " H=" + std::to_string(H) + " num=" + std::to_string(num));
  }
}

void check_sizes() {
  for (DType dtype : kDTypes)
    for (bool gated : {false, true})
      for (auto [H, I] : {std::pair{1, 1}, {100, 130}, {2048, 768}, {7168, 2048}}) {
        const Problem p{dtype, Activation::kSilu, gated, H, I};
        check(CpuEngine::up_tile_cols(p) > 0 && CpuEngine::up_tile_cols(p) % 16 == 0, "up_tile_cols");
        check(CpuEngine::down_tile_cols(p) > 0 && CpuEngine::down_tile_cols(p) % 16 == 0, "down_tile_cols");
        check(CpuEngine::scratch_bytes(p) % 64 == 0, "scratch_bytes");
      }
}

void check_tiles(const CpuKernels& kernels) {
  const CpuEngine engine(kernels);
  for (DType dtype : kDTypes) {
    for (int H : {1, 7, 33, 100})
      for (int I : {1, 5, 130})
        for (Activation activation : kActivations)
          for (bool gated : {false, true})
            for (bool bias : {false, true}) {
              // One activation reaches all memory that another does.
              if (kAddressSanitizer && H != 7 && activation != Activation::kSilu) continue;
              Expert e({dtype, activation, gated, H, I}, bias);
              check_accuracy(engine, e, 10);
              check_bits(engine, e, {1, 2, 3, 5, 7, 8, 31});
            }
    // Every row count of one pass, and some of two; K in several blocks, with tails, packed at once and block by block.
    for (auto [H, I] : {std::pair{33, 70}, {100, 130}, {1100, 140}, {130, 2061}}) {
      Expert e({dtype, Activation::kSilu, true, H, I}, true);
      std::vector<int> heights = one_to(cpu::kPassRows + 3);
      if (kAddressSanitizer && H * I > 100'000) heights = {1, 2, 3, 7, cpu::kPassRows - 1, cpu::kPassRows, cpu::kPassRows + 1};
      heights.insert(heights.end(), {kBlockM - 33, kBlockM - 1, kBlockM});
      check_bits(engine, e, heights);
      check_accuracy(engine, e, 5);
    }
    for (auto [H, I] : {std::pair{1, 5}, {33, 9}, {100, 130}, {1031, 21}}) check_isolation(engine, dtype, H, I);
    for (int H : {1, 7, 33, 100, 1024}) check_combine(engine, dtype, H);
  }
}

}  // namespace

int main() {
  run_test("Sizes", check_sizes);
  for_each_isa(check_tiles);
  return finish();
}
