// The tile products of the CPU engine for one instruction set. CMake compiles this file, and cpu_backward_kernels.cpp,
// once for each:
//
//   baseline  -DFLASHMOE_ISA=baseline -DFLASHMOE_LANES=4
//   avx2      -DFLASHMOE_ISA=avx2 -DFLASHMOE_LANES=8 -mavx2 -mfma -mf16c
//   avx512    -DFLASHMOE_ISA=avx512 -DFLASHMOE_LANES=16 -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq
//             -mavx512vl -mprefer-vector-width=512
//   wide16    -DFLASHMOE_ISA=wide16 -DFLASHMOE_LANES=16 -mavx2 -mfma -mf16c   (tests: AVX-512's logic on AVX2)
//
// all with -std=c++20 -O3 -ffp-contract=fast -Wno-psabi, never with -ffast-math.
//
// The product is in *dot form*: weights are read where they lie, K is contiguous in both operands, and each
// output owns one accumulator vector over K. So the order of an output's sum is fixed by K alone: kLanes
// interleaved sums over a K block, the tree of sum_lanes, then the K blocks in order.
#define FLASHMOE_JOIN_(a, b) a##b
#define FLASHMOE_JOIN(a, b) FLASHMOE_JOIN_(a, b)
#define FLASHMOE_STRING_(a) #a
#define FLASHMOE_STRING(a) FLASHMOE_STRING_(a)
#define FLASHMOE_ISA_NAMESPACE FLASHMOE_JOIN(cpu_, FLASHMOE_ISA)

#include "engine/cpu_kernels.h"

#include "engine/cpu_activation.h"
#include "engine/cpu_product.h"
#include "engine/cpu_vector.h"

namespace flashmoe::FLASHMOE_ISA_NAMESPACE {
namespace {

// bias[0:n) widened, the rest of the last vector zero; all zero without a bias.
template <class T>
void widen_bias(const T* bias, int n, float* out) {
  for (int i = 0; i < n; i += kLanes) narrow(bias == nullptr ? Vector{} : widen_upto(bias + i, n - i), out + i);
}

template <Activation kActivation, bool kGated, class T>
void up_epilogue(const cpu::Scratch& scratch, int num_rows, int n, float* h, ptrdiff_t h_stride) {
  for (int i = 0; i < num_rows; ++i) {
    const float* product = scratch.product + i * cpu::kMaxTileRows;
    for (int c = 0; c < n; c += kLanes) {
      Vector v = activate<kActivation>(widen(product + c) + widen(scratch.bias + c));
      if constexpr (kGated) {
        const int up = cpu::kMaxTileRows / 2 + c;
        v *= widen(product + up) + widen(scratch.bias + up);
      }
      narrow_upto(v, h + i * h_stride + c, n - c);
    }
  }
}

template <bool kGated, class T>
void up_epilogue(Activation activation, const cpu::Scratch& scratch, int num_rows, int n, float* h,
                 ptrdiff_t h_stride) {
  switch (activation) {
    case Activation::kSilu:
      return up_epilogue<Activation::kSilu, kGated, T>(scratch, num_rows, n, h, h_stride);
    case Activation::kGelu:
      return up_epilogue<Activation::kGelu, kGated, T>(scratch, num_rows, n, h, h_stride);
    case Activation::kGeluTanh:
      return up_epilogue<Activation::kGeluTanh, kGated, T>(scratch, num_rows, n, h, h_stride);
    case Activation::kRelu:
      return up_epilogue<Activation::kRelu, kGated, T>(scratch, num_rows, n, h, h_stride);
  }
}

template <class T>
void up_tile(const CpuProblem& problem, const void* const* rows, int num_rows, const void* gate_up,
             const void* gate_up_bias, int col_begin, int col_end, float* h, ptrdiff_t h_stride, float* kept_sums,
             cpu::Scratch& scratch) {
  const int sections = problem.gated ? 2 : 1, most = cpu::kMaxTileRows / sections;
  const T* weights = static_cast<const T*>(gate_up);
  const T* bias = static_cast<const T*>(gate_up_bias);
  const auto row = [&](int i) { return static_cast<const T*>(rows[i]); };
  for (int c = col_begin; c < col_end; c += most) {
    const int n = col_end - c < most ? col_end - c : most;
    const WeightRows<T> tile{weights, problem.hidden_size, c, n, sections, problem.intermediate_size};
    product<T>(row, num_rows, tile, scratch);
    for (int i = 0; kept_sums && i < num_rows * sections; ++i)
      memcpy(kept_sums + ptrdiff_t(i) * problem.intermediate_size + c,
             scratch.product + i / sections * cpu::kMaxTileRows + i % sections * most, sizeof(float) * n);
    for (int s = 0; s < sections; ++s)
      widen_bias(bias == nullptr ? nullptr : bias + s * problem.intermediate_size + c, n, scratch.bias + s * most);
    if (problem.gated)
      up_epilogue<true, T>(problem.activation, scratch, num_rows, n, h + c, h_stride);
    else
      up_epilogue<false, T>(problem.activation, scratch, num_rows, n, h + c, h_stride);
  }
}

template <class T>
void down_tile(const CpuProblem& problem, const float* h, ptrdiff_t h_stride, int num_rows, const void* down,
               const void* down_bias, int col_begin, int col_end, void* const* out_rows, cpu::Scratch& scratch) {
  const T* bias = static_cast<const T*>(down_bias);
  const auto row = [&](int i) { return h + i * h_stride; };
  for (int c = col_begin; c < col_end; c += cpu::kMaxTileRows) {
    const int n = col_end - c < cpu::kMaxTileRows ? col_end - c : cpu::kMaxTileRows;
    const WeightRows<T> tile{static_cast<const T*>(down), problem.intermediate_size, c, n, 1, 0};
    product<T>(row, num_rows, tile, scratch);
    widen_bias(bias == nullptr ? nullptr : bias + c, n, scratch.bias);
    for (int i = 0; i < num_rows; ++i) {
      const float* from = scratch.product + i * cpu::kMaxTileRows;
      T* to = static_cast<T*>(out_rows[i]) + c;
      for (int j = 0; j < n; j += kLanes)
        narrow_upto(widen(from + j) + widen(scratch.bias + j), to + j, n - j);
    }
  }
}

template <class T>
void combine(const CpuProblem& problem, const void* const* rows, const float* weights, int num, void* y) {
  constexpr int kStep = 4 * kLanes;  // vectors in flight, so that the sums over j do not wait for each other
  const int n = problem.hidden_size;
  T* to = static_cast<T*>(y);
  int c = 0;
  for (; c + kStep <= n; c += kStep) {
    Vector sum[4] = {};
    for (int j = 0; j < num; ++j)
      for (int v = 0; v < 4; ++v) sum[v] += weights[j] * widen(static_cast<const T*>(rows[j]) + c + v * kLanes);
    for (int v = 0; v < 4; ++v) narrow(sum[v], to + c + v * kLanes);
  }
  for (; c < n; c += kLanes) {
    Vector sum{};
    for (int j = 0; j < num; ++j) sum += weights[j] * widen_upto(static_cast<const T*>(rows[j]) + c, n - c);
    narrow_upto(sum, to + c, n - c);
  }
}

// Calls f(first, num) for each pass over the rows of a tile, as equal as can be. The weights of the second pass come
// from a cache.
template <class F>
FLASHMOE_INLINE void for_each_pass(int num_rows, const F& f) {
  const int passes = (num_rows + cpu::kPassRows - 1) / cpu::kPassRows;
  for (int pass = 0, first = 0; pass < passes; ++pass) {
    const int num = (num_rows - first) / (passes - pass);
    f(first, num);
    first += num;
  }
}

void up_tile_any(const CpuProblem& problem, const void* const* rows, int num_rows, const void* gate_up,
                 const void* gate_up_bias, int col_begin, int col_end, float* h, ptrdiff_t h_stride,
                 float* kept_sums, void* scratch) {
  const ptrdiff_t up_rows = (problem.gated ? 2 : 1) * ptrdiff_t(problem.intermediate_size);
  with_dtype(problem.dtype, [&](auto element) {
    for_each_pass(num_rows, [&](int first, int num) {
      up_tile<decltype(element)>(problem, rows + first, num, gate_up, gate_up_bias, col_begin, col_end,
                                 h + first * h_stride, h_stride, kept_sums ? kept_sums + first * up_rows : nullptr,
                                 *static_cast<cpu::Scratch*>(scratch));
    });
  });
}

void down_tile_any(const CpuProblem& problem, const float* h, ptrdiff_t h_stride, int num_rows, const void* down,
                   const void* down_bias, int col_begin, int col_end, void* const* out_rows, void* scratch) {
  with_dtype(problem.dtype, [&](auto element) {
    for_each_pass(num_rows, [&](int first, int num) {
      down_tile<decltype(element)>(problem, h + first * h_stride, h_stride, num, down, down_bias, col_begin, col_end,
                                   out_rows + first, *static_cast<cpu::Scratch*>(scratch));
    });
  });
}

void combine_any(const CpuProblem& problem, const void* const* rows, const float* weights, int num, void* y) {
  with_dtype(problem.dtype, [&](auto element) { combine<decltype(element)>(problem, rows, weights, num, y); });
}

template <Activation kActivation>
void activate_all(const float* x, int num, float* out) {
  for (int i = 0; i < num; i += kLanes)
    narrow_upto(activate<kActivation>(widen_upto(x + i, num - i)), out + i, num - i);
}

void activate_any(Activation activation, const float* x, int num, float* out) {
  switch (activation) {
    case Activation::kSilu:
      return activate_all<Activation::kSilu>(x, num, out);
    case Activation::kGelu:
      return activate_all<Activation::kGelu>(x, num, out);
    case Activation::kGeluTanh:
      return activate_all<Activation::kGeluTanh>(x, num, out);
    case Activation::kRelu:
      return activate_all<Activation::kRelu>(x, num, out);
  }
}

}  // namespace

const CpuBackwardKernels& backward_kernels();  // in cpu_backward_kernels.cpp
const CpuKernels& kernels();  // declared where it is called, in cpu_dispatch.cpp
const CpuKernels& kernels() {
  static const CpuKernels table{FLASHMOE_STRING(FLASHMOE_ISA), up_tile_any, down_tile_any, combine_any, activate_any,
                                &backward_kernels()};
  return table;
}

}  // namespace flashmoe::FLASHMOE_ISA_NAMESPACE
