// Numbers of the three dtypes, by definition rather than by bit tricks, and arrays of them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <random>

#include "protocol/config.h"

namespace flashmoe::test {

inline constexpr DType kDTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
inline constexpr Activation kActivations[] = {Activation::kSilu, Activation::kGelu, Activation::kGeluTanh, Activation::kRelu};
inline constexpr double kEps = 0x1p-24;  // half a unit in the last place of 1.0f

struct Format {
  int significand, min_exponent, max_exponent;  // bits; of the smallest normal and of the largest number
};
inline Format format(DType dtype) {
  if (dtype == DType::kFloat32) return {24, -126, 127};
  return dtype == DType::kBFloat16 ? Format{8, -126, 127} : Format{11, -14, 15};
}

// What rounding to nearest may do to x, at most; below the smallest normal number units stay as they are there.
inline double half_unit(double x, DType dtype) {
  const Format f = format(dtype);
  return std::ldexp(std::max(std::fabs(x), std::ldexp(1.0, f.min_exponent)), -f.significand);
}

inline double rounded(double x, DType dtype) {
  if (!std::isfinite(x) || x == 0) return x;
  const Format f = format(dtype);
  const int exponent = std::max(std::ilogb(x), f.min_exponent);
  const double unit = std::ldexp(1.0, exponent - f.significand + 1);
  const double y = std::nearbyint(x / unit) * unit;
  return std::fabs(y) >= std::ldexp(1.0, f.max_exponent + 1) ? std::copysign(INFINITY, x) : y;
}

inline double decode(uint16_t bits, DType dtype) {
  const int mantissa_bits = format(dtype).significand - 1, exponent_bits = 15 - mantissa_bits;
  const int bias = (1 << (exponent_bits - 1)) - 1, mantissa = bits & ((1 << mantissa_bits) - 1);
  const int exponent = bits >> mantissa_bits & ((1 << exponent_bits) - 1);
  const double sign = bits >> 15 ? -1 : 1;
  if (exponent == (1 << exponent_bits) - 1) return mantissa ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
  return sign * std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
}

inline uint16_t encode(double x, DType dtype) {
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

inline double exact(Activation activation, double x) {
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

inline double exact_slope(Activation activation, double x) {
  if (std::isinf(x)) return x > 0;
  const auto sigmoid = [](double v) { return 1 / (1 + std::exp(-v)); };
  switch (activation) {
    case Activation::kSilu: return sigmoid(x) * (1 + x * sigmoid(-x));
    case Activation::kGelu: return 0.5 * std::erfc(-x * std::sqrt(0.5)) + x * std::exp(-0.5 * x * x) / std::sqrt(2 * M_PI);
    case Activation::kGeluTanh: {
      const double c = 2 * std::sqrt(2 / M_PI), v = c * (x + 0.044715 * x * x * x);
      return sigmoid(v) + x * c * (1 + 3 * 0.044715 * x * x) * (sigmoid(v) * sigmoid(-v));
    }
    case Activation::kRelu: return std::isnan(x) ? x : x > 0;
  }
  return NAN;
}

inline const char* name(DType dtype) {
  return dtype == DType::kFloat32 ? "float32" : dtype == DType::kBFloat16 ? "bfloat16" : "float16";
}
inline const char* name(Activation activation) {
  static const char* const names[] = {"silu", "gelu", "gelu_tanh", "relu"};
  return names[int(activation)];
}

}  // namespace flashmoe::test
