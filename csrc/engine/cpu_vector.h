// Vectors of kLanes floats: loads that widen, stores that round, and the sum of a vector's lanes.
//
// For cpu_kernels.cpp alone, which is compiled once per instruction set. All of it has internal linkage and uses
// nothing inline from the standard library: a function compiled for AVX-512 must never become the linker's
// choice for the whole program. (The zero-masked intrinsics are the plain ones; g++ 12 warns about the latter.)
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "protocol/config.h"

namespace flashmoe::FLASHMOE_ISA_NAMESPACE {
namespace {

constexpr int kLanes = FLASHMOE_LANES;

typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVector __attribute__((vector_size(4 * kLanes)));
typedef uint32_t BitsVector __attribute__((vector_size(4 * kLanes)));
typedef uint16_t ShortVector __attribute__((vector_size(2 * kLanes)));
typedef float QuadVector __attribute__((vector_size(16)));

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

#define FLASHMOE_INLINE inline __attribute__((always_inline))

template <class V, class P>
FLASHMOE_INLINE V load_as(const P* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}

FLASHMOE_INLINE Vector splat(float x) { return Vector{} + x; }
FLASHMOE_INLINE Vector floats(BitsVector bits) { return (Vector)bits; }
FLASHMOE_INLINE BitsVector bits(Vector v) { return (BitsVector)v; }

FLASHMOE_INLINE Vector widen(const float* p) { return load_as<Vector>(p); }

FLASHMOE_INLINE Vector widen(const BFloat16* p) {
#if defined(__AVX512F__) && FLASHMOE_LANES == 16
  const BitsVector wide = (BitsVector)_mm512_maskz_cvtepu16_epi32(0xffff, load_as<__m256i>(p));
#elif defined(__AVX2__) && FLASHMOE_LANES == 8
  const BitsVector wide = (BitsVector)_mm256_cvtepu16_epi32(load_as<__m128i>(p));  // g++ 12 splits a conversion
#else
  const BitsVector wide = __builtin_convertvector(load_as<ShortVector>(p), BitsVector);
#endif
  return floats(wide << 16);
}

FLASHMOE_INLINE Vector widen(const Float16* p) {
#if defined(__AVX512F__) && FLASHMOE_LANES == 16
  return _mm512_maskz_cvtph_ps(0xffff, load_as<__m256i>(p));
#elif defined(__F16C__) && FLASHMOE_LANES == 8
  return _mm256_cvtph_ps(load_as<__m128i>(p));
#else
  const BitsVector half = __builtin_convertvector(load_as<ShortVector>(p), BitsVector);
  const BitsVector sign = (half & 0x8000) << 16, magnitude = half & 0x7fff;
  // A subnormal half is its integer value times 2^-24; neither is subnormal in fp32, so flush modes cannot hurt.
  const Vector subnormal = __builtin_convertvector((IntVector)magnitude, Vector) * splat(0x1p-24f);
  const BitsVector rebias = magnitude >= 0x7c00 ? BitsVector{} + (224u << 23) : BitsVector{} + (112u << 23);
  const BitsVector normal = (magnitude << 13) + rebias;
  return floats(sign | (magnitude < 0x400 ? bits(subnormal) : normal));
#endif
}

FLASHMOE_INLINE void narrow(Vector v, float* p) { memcpy(p, &v, sizeof v); }

FLASHMOE_INLINE void narrow(Vector v, BFloat16* p) {
  const BitsVector b = bits(v);
  const BitsVector rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
  const BitsVector quiet = (b >> 16) | 0x40;  // rounding could carry a NaN over into infinity
  const ShortVector out = __builtin_convertvector((b & 0x7fffffff) > 0x7f800000 ? quiet : rounded, ShortVector);
  memcpy(p, &out, sizeof out);
}

FLASHMOE_INLINE void narrow(Vector v, Float16* p) {
#if defined(__AVX512F__) && FLASHMOE_LANES == 16
  const __m256i out = _mm512_maskz_cvtps_ph(0xffff, v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__) && FLASHMOE_LANES == 8
  const __m128i out = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const BitsVector b = bits(v);
  const BitsVector sign = (b >> 16) & 0x8000, magnitude = b & 0x7fffffff;
  // Below 2^-14 the half is subnormal: adding 0.5 lets the fp32 addition itself round at 2^-24.
  const BitsVector subnormal = bits(floats(magnitude) + splat(0.5f)) - (126u << 23);
  const BitsVector normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const BitsVector infinite = magnitude > 0x7f800000 ? BitsVector{} + 0x7e00 : BitsVector{} + 0x7c00;
  const BitsVector finite = magnitude < (113u << 23) ? subnormal : normal;
  // 65520, half way between the largest half and the next power of two, is the first to round to infinity.
  const ShortVector out =
      __builtin_convertvector(sign | (magnitude >= 0x477ff000 ? infinite : finite), ShortVector);
#endif
  memcpy(p, &out, sizeof out);
}

// The first n elements, then zeros; reads nothing beyond them.
template <class T>
FLASHMOE_INLINE Vector widen_part(const T* p, int n) {
  T whole[kLanes] = {};
  for (int i = 0; i < n; ++i) whole[i] = p[i];
  return widen(whole);
}

template <class T>
FLASHMOE_INLINE void narrow_part(Vector v, T* p, int n) {
  T whole[kLanes];
  narrow(v, whole);
  for (int i = 0; i < n; ++i) p[i] = whole[i];
}

template <class T>
FLASHMOE_INLINE Vector widen_upto(const T* p, int n) {
  return n >= kLanes ? widen(p) : widen_part(p, n);
}

template <class T>
FLASHMOE_INLINE void narrow_upto(Vector v, T* p, int n) {
  n >= kLanes ? narrow(v, p) : narrow_part(v, p, n);
}

// The sums over the lanes of four vectors, each by the same tree, whichever of the four it is.
FLASHMOE_INLINE QuadVector sum_lanes(Vector a, Vector b, Vector c, Vector d) {
#if defined(__AVX__) && FLASHMOE_LANES >= 8
#if FLASHMOE_LANES == 16
  const auto fold = [](Vector v) __attribute__((always_inline)) {
#if defined(__AVX512F__)
    return _mm256_add_ps(_mm512_maskz_extractf32x8_ps(0xff, v, 0), _mm512_maskz_extractf32x8_ps(0xff, v, 1));
#else
    __m256 halves[2];
    memcpy(halves, &v, sizeof v);
    return _mm256_add_ps(halves[0], halves[1]);
#endif
  };
  const __m256 a8 = fold(a), b8 = fold(b), c8 = fold(c), d8 = fold(d);
#else
  const __m256 a8 = a, b8 = b, c8 = c, d8 = d;
#endif
  const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a8, b8), _mm256_unpackhi_ps(a8, b8));
  const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(c8, d8), _mm256_unpackhi_ps(c8, d8));
  const __m256 low = _mm256_shuffle_ps(ab, cd, _MM_SHUFFLE(1, 0, 1, 0));
  const __m256 high = _mm256_shuffle_ps(ab, cd, _MM_SHUFFLE(3, 2, 3, 2));
  const __m256 abcd = _mm256_add_ps(low, high);
  return _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1));
#else
  const auto sum = [](Vector v) __attribute__((always_inline)) {
    float lanes[kLanes];
    memcpy(lanes, &v, sizeof v);
    for (int width = kLanes / 2; width > 0; width /= 2)
      for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    return lanes[0];
  };
  return QuadVector{sum(a), sum(b), sum(c), sum(d)};
#endif
}

// Calls f with an element of the dtype.
template <class F>
FLASHMOE_INLINE void with_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float{});
    case DType::kBFloat16:
      return f(BFloat16{});
    case DType::kFloat16:
      return f(Float16{});
  }
}

}  // namespace
}  // namespace flashmoe::FLASHMOE_ISA_NAMESPACE
