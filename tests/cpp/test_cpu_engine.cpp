// The CPU engine against double precision, on every instruction set that this machine runs.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "engine/cpu_kernels.h"

namespace flashmoe::cpu_wide16 {
const CpuKernels& kernels();  // the logic of the AVX-512 kernels, compiled for what this machine has
}

namespace {

using namespace flashmoe;
using Problem = CpuEngine::Problem;

constexpr DType kDTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
constexpr Activation kActivations[] = {Activation::kSilu, Activation::kGelu, Activation::kGeluTanh, Activation::kRelu};
constexpr int kBlockM = CpuEngine::kBlockM;
constexpr double kEps = 0x1p-24;  // half a unit in the last place of 1.0f

int passed = 0, failed = 0;

void check(bool ok, const std::string& what) {
  ++(ok ? passed : failed);
  if (!ok && failed <= 50) std::printf("FAILED %s\n", what.c_str());
}

// ---- numbers in the problem's dtype, by definition rather than by bit tricks

struct Format {
  int significand, min_exponent, max_exponent;  // bits; of the smallest normal and of the largest number
};
Format format(DType dtype) {
  if (dtype == DType::kFloat32) return {24, -126, 127};
  return dtype == DType::kBFloat16 ? Format{8, -126, 127} : Format{11, -14, 15};
}

// What rounding to nearest may do to x, at most; below the smallest normal number units stay as they are there.
double half_unit(double x, DType dtype) {
  const Format f = format(dtype);
  return std::ldexp(std::max(std::fabs(x), std::ldexp(1.0, f.min_exponent)), -f.significand);
}

double rounded(double x, DType dtype) {
  if (!std::isfinite(x) || x == 0) return x;
  const Format f = format(dtype);
  const int exponent = std::max(std::ilogb(x), f.min_exponent);
  const double unit = std::ldexp(1.0, exponent - f.significand + 1);
  const double y = std::nearbyint(x / unit) * unit;
  return std::fabs(y) >= std::ldexp(1.0, f.max_exponent + 1) ? std::copysign(INFINITY, x) : y;
}

double decode(uint16_t bits, DType dtype) {
  const int mantissa_bits = format(dtype).significand - 1, exponent_bits = 15 - mantissa_bits;
  const int bias = (1 << (exponent_bits - 1)) - 1, mantissa = bits & ((1 << mantissa_bits) - 1);
  const int exponent = bits >> mantissa_bits & ((1 << exponent_bits) - 1);
  const double sign = bits >> 15 ? -1 : 1;
  if (exponent == (1 << exponent_bits) - 1) return mantissa ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
  return sign * std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
}

uint16_t encode(double x, DType dtype) {
  const int mantissa_bits = format(dtype).significand - 1, exponent_bits = 15 - mantissa_bits;
  const int bias = (1 << (exponent_bits - 1)) - 1, infinity = ((1 << exponent_bits) - 1) << mantissa_bits;
  const int sign = std::signbit(x) ? 0x8000 : 0;
  const double y = std::fabs(rounded(x, dtype));
  if (std::isnan(x)) return uint16_t(sign | infinity | 1 << (mantissa_bits - 1));
  if (std::isinf(y)) return uint16_t(sign | infinity);
  if (y < std::ldexp(1.0, 1 - bias)) return uint16_t(sign | int(std::ldexp(y, bias - 1 + mantissa_bits)));
  const int exponent = std::ilogb(y);
  const int mantissa = int(std::ldexp(y, mantissa_bits - exponent)) - (1 << mantissa_bits);
  return uint16_t(sign | (exponent + bias) << mantissa_bits | mantissa);
}

// An array of the dtype, of exactly its size, so that AddressSanitizer sees any read beyond it.
struct Array {
  DType dtype;
  size_t size;
  std::unique_ptr<std::byte[]> bytes;

  Array(DType d, size_t n) : dtype(d), size(n), bytes(new std::byte[n * dtype_bytes(d)]()) {}
  void* at(size_t i) { return bytes.get() + i * dtype_bytes(dtype); }
  void set(size_t i, double x) {
    const float f = float(x);
    const uint16_t s = dtype == DType::kFloat32 ? 0 : encode(x, dtype);
    dtype == DType::kFloat32 ? std::memcpy(at(i), &f, 4) : std::memcpy(at(i), &s, 2);
  }
  double get(size_t i) {
    float f;
    uint16_t s;
    if (dtype == DType::kFloat32) return std::memcpy(&f, at(i), 4), double(f);
    return std::memcpy(&s, at(i), 2), decode(s, dtype);
  }
  void fill(std::mt19937& random, double scale) {
    std::normal_distribution<double> normal(0, scale);
    for (size_t i = 0; i < size; ++i) set(i, normal(random));
  }
};

double exact(Activation activation, double x) {
  switch (activation) {
    case Activation::kSilu: return x / (1 + std::exp(-x));
    case Activation::kGelu: return 0.5 * x * std::erfc(-x * std::sqrt(0.5));
    case Activation::kGeluTanh: {
      const double v = 2 * std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x);
      return x / (1 + std::exp(-v));
    }
    case Activation::kRelu: return x < 0 ? 0 : x;
  }
  return NAN;
}

const char* name(DType dtype) {
  return dtype == DType::kFloat32 ? "float32" : dtype == DType::kBFloat16 ? "bfloat16" : "float16";
}
const char* name(Activation activation) {
  static const char* const names[] = {"silu", "gelu", "gelu_tanh", "relu"};
  return names[int(activation)];
}

// ---- one expert with random weights and tokens

struct Expert {
  Problem problem;
  int h_width, sections;
  Array x, gate_up, gate_up_bias, down, down_bias;
  bool bias;

  Expert(const Problem& p, bool with_bias, int seed = 1)
      : problem(p), h_width(p.intermediate_size), sections(p.gated ? 2 : 1),
        x(p.dtype, size_t(kBlockM) * p.hidden_size),
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
Splits whole(int n) { return {0, n}; }

// h of rows [first, first + num_rows) of x, each row also `pad` floats wider than needed.
std::vector<float> run_up(const CpuEngine& engine, Expert& e, int first, int num_rows, const Splits& splits) {
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

Array run_down(const CpuEngine& engine, Expert& e, const float* h, int num_rows, const Splits& splits) {
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
Dot dot(int k, A a, B b, double start) {
  double sum = start, absolute = std::fabs(start);
  for (int i = 0; i < k; ++i) sum += a(i) * b(i), absolute += std::fabs(a(i) * b(i));
  return {sum, kEps * (4 + std::sqrt(double(k))) * absolute};
}

// ---- checks

void check_accuracy(const CpuEngine& engine, Expert& e, int num_rows) {
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

// Every 16-bit pattern widens to its value, and what fp32 numbers round to is what the definition says.
void check_conversions(const CpuEngine& engine, DType dtype) {
  constexpr int kAll = 65536;
  const Problem up{dtype, Activation::kRelu, false, 1, kAll};
  Array weights(dtype, kAll), x(dtype, 2);
  for (int i = 0; i < kAll; ++i) {
    const uint16_t pattern = uint16_t(i);
    std::memcpy(weights.at(i), &pattern, 2);
  }
  x.set(0, 1), x.set(1, -1);
  for (int num_rows : {2, 7}) {  // widened in registers, and in scratch
    std::vector<const void*> rows;
    for (int i = 0; i < num_rows; ++i) rows.push_back(x.at(i % 2));
    std::vector<float> h(size_t(num_rows) * kAll);
    PoisonedScratch scratch(up);
    engine.up_tile(up, rows.data(), num_rows, weights.at(0), nullptr, 0, kAll, h.data(), kAll, scratch.memory);
    int wrong = 0;
    for (int i = 0; i < num_rows; ++i)
      for (int c = 0; c < kAll; ++c) {
        const double value = decode(uint16_t(c), dtype) * (i % 2 ? -1 : 1);
        const float got = h[size_t(i) * kAll + c];
        wrong += std::isnan(value) ? !std::isnan(got) : got != (value < 0 ? 0 : value);
      }
    check(wrong == 0, std::string(name(dtype)) + ": " + std::to_string(wrong) + " patterns widen wrongly");
  }

  // A column of ones passes h on to the rounding store.
  std::mt19937 random(5);
  std::vector<float> values;
  for (int i = 0; i < 200000; ++i) {
    uint32_t bits = random();
    if (i % 2) {  // near the middle between two neighbours, where rounding to even decides
      const float middle = float(0.5 * (decode(uint16_t(bits), dtype) + decode(uint16_t(bits + 1), dtype)));
      std::memcpy(&bits, &middle, 4);
      bits += i / 2 % 3 - 1;
    }
    float value;
    std::memcpy(&value, &bits, 4);
    values.push_back(value);
  }
  for (float special : {0.0f, 65504.0f, 65519.99f, 65520.0f, 65536.0f, 3.3895314e38f, 3.4e38f, INFINITY, -INFINITY, NAN})
    values.push_back(special), values.push_back(-special);
  const Problem down{dtype, Activation::kRelu, false, 1, 1};
  Array one(dtype, 1), out(dtype, kBlockM);
  one.set(0, 1);
  std::vector<void*> out_rows;
  for (int i = 0; i < kBlockM; ++i) out_rows.push_back(out.at(i));
  PoisonedScratch scratch(down);
  int wrong = 0;
  for (size_t first = 0; first < values.size(); first += kBlockM) {
    const int num_rows = int(std::min<size_t>(kBlockM, values.size() - first));
    engine.down_tile(down, values.data() + first, 1, num_rows, one.at(0), nullptr, 0, 1, out_rows.data(),
                     scratch.memory);
    for (int i = 0; i < num_rows; ++i) {
      const double want = rounded(values[first + i], dtype), got = out.get(i);
      wrong += std::isnan(want) ? !std::isnan(got) : got != want;
    }
  }
  check(wrong == 0, std::string(name(dtype)) + ": " + std::to_string(wrong) + " numbers round wrongly");
}

// Error of the activations over all magnitudes: relative to the result above -1, absolute below, where the result
// fades away (and where e^x turns half a unit of x into |x| half units of the result).
void check_activations(const CpuKernels& kernels) {
  std::vector<float> x;
  for (uint64_t b = 0; b < (uint64_t(1) << 32); b += 3989) {
    const uint32_t bits = uint32_t(b);
    float value;
    std::memcpy(&value, &bits, 4);
    x.push_back(value);
  }
  std::mt19937 random(9);
  std::uniform_real_distribution<float> uniform(-12, 12);
  for (int i = 0; i < 500000; ++i) x.push_back(uniform(random));
  for (float special : {0.0f, INFINITY, NAN}) x.push_back(special), x.push_back(-special);
  std::vector<float> y(x.size());
  for (Activation activation : kActivations) {
    kernels.activate(activation, x.data(), int(x.size()), y.data());
    double near = 0, tail = 0;
    int nan_wrong = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      const double want = exact(activation, x[i]);
      if (std::isnan(want) || std::isnan(y[i])) {
        nan_wrong += std::isnan(want) != std::isnan(y[i]);
      } else if (std::isinf(want) || std::isinf(y[i])) {
        nan_wrong += want != y[i];
      } else if (x[i] >= -1 && std::fabs(want) > 1.2e-38) {
        near = std::max(near, std::fabs(y[i] - want) / std::fabs(want));
      } else {
        tail = std::max(tail, std::fabs(y[i] - want));
      }
    }
    std::printf("  %-9s %-9s relative error %.2e above -1, absolute error %.2e below\n", kernels.name,
                name(activation), near, tail);
    check(nan_wrong == 0, std::string(kernels.name) + " " + name(activation) + ": NaN or infinity misplaced");
    const double near_bound = activation == Activation::kGelu ? 5.5e-7 : 3.0e-7;
    check(near <= near_bound && tail <= 1.0e-7, std::string(kernels.name) + " " + name(activation) + ": not accurate");
  }
}

void check_kernels(const CpuKernels& kernels) {
  const CpuEngine engine(kernels);
  const int before = failed;
  check_activations(kernels);
  for (DType dtype : kDTypes) {
    for (int H : {1, 7, 33, 100})
      for (int I : {1, 5, 130})
        for (Activation activation : kActivations)
          for (bool gated : {false, true})
            for (bool bias : {false, true}) {
              Expert e({dtype, activation, gated, H, I}, bias);
              check_accuracy(engine, e, 10);
              check_bits(engine, e, {1, 2, 3, 5, 7, 8, 31});
            }
    // Every row count of one pass, and some of two; K in several blocks, with tails, packed at once and block by block.
    for (auto [H, I] : {std::pair{33, 70}, {100, 130}, {1100, 140}, {130, 2061}}) {
      Expert e({dtype, Activation::kSilu, true, H, I}, true);
      std::vector<int> heights = one_to(cpu::kPassRows + 3);
      heights.insert(heights.end(), {kBlockM - 33, kBlockM - 1, kBlockM});
      check_bits(engine, e, heights);
      check_accuracy(engine, e, 5);
    }
    for (auto [H, I] : {std::pair{1, 5}, {33, 9}, {100, 130}, {1031, 21}}) check_isolation(engine, dtype, H, I);
    for (int H : {1, 7, 33, 100, 1024}) check_combine(engine, dtype, H);
    if (dtype != DType::kFloat32) check_conversions(engine, dtype);
  }
  std::printf("%s: %s\n", kernels.name, failed == before ? "ok" : "FAILED");
}

template <class F>
std::string thrown_by(F f) {
  try {
    f();
  } catch (const std::invalid_argument& e) {
    return e.what();
  }
  return "";
}

void check_selection() {
  setenv("FLASHMOE_CPU_ISA", "quantum", 1);
  for (int use = 0; use < 2; ++use) {  // the second use must not find the first one's failure cached as success
    const std::string message = thrown_by([] { CpuEngine engine; });
    check(message.find("quantum") != std::string::npos && message.find("baseline") != std::string::npos,
          "an unknown FLASHMOE_CPU_ISA must be named with the known ones, got: " + message);
  }
  check(!thrown_by([] { cpu_isa(); }).empty(), "cpu_isa() must throw for an unknown FLASHMOE_CPU_ISA");
  setenv("FLASHMOE_CPU_ISA", "baseline", 1);
  check(std::string(cpu_isa()) == "baseline", "FLASHMOE_CPU_ISA=baseline must be obeyed");
  check(std::string(cpu_kernels("").name) == cpu_kernels(nullptr).name, "an empty FLASHMOE_CPU_ISA means the best");
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

}  // namespace

int main() {
  check_selection();
  check_sizes();
  for (const char* isa : {"baseline", "avx2", "avx512"}) {
    const CpuKernels* kernels = nullptr;
    const std::string message = thrown_by([&] { kernels = &cpu_kernels(isa); });
    if (kernels == nullptr) {
      std::printf("%s: not run (%s)\n", isa, message.c_str());
      check(message.find(isa) != std::string::npos, "an unsupported instruction set must be named");
      continue;
    }
    check(std::string(kernels->name) == isa, "the kernels asked for");
    check_kernels(*kernels);
  }
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
#endif
    check_kernels(cpu_wide16::kernels());
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}
