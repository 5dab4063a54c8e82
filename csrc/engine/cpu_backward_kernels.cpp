// The backward tiles of the CPU engine for one instruction set: compiled as cpu_kernels.cpp is.
#define FLASHMOE_JOIN_(a, b) a##b
#define FLASHMOE_JOIN(a, b) FLASHMOE_JOIN_(a, b)
#define FLASHMOE_ISA_NAMESPACE FLASHMOE_JOIN(cpu_, FLASHMOE_ISA)

#include "engine/cpu_outer.h"
#include "engine/cpu_product.h"
#include "engine/cpu_slope.h"
#include "engine/cpu_vector.h"

namespace flashmoe::FLASHMOE_ISA_NAMESPACE {
namespace {

// sums[0:num_rows, 0:cols) = rows · matrix[:, c0:c0+cols), a matrix of `k` rows that lie `stride` elements apart.
template <class T, class Row>
void times_matrix(const Row& row, int num_rows, const T* matrix, ptrdiff_t stride, int k, int c0, int cols,
                  cpu::BackwardScratch& scratch) {
  memset(scratch.sums, 0, sizeof(float) * num_rows * cpu::kGradCols);
  for (int k0 = 0; k0 < k; k0 += cpu::kOuterBlock) {
    const int block = k - k0 < cpu::kOuterBlock ? k - k0 : cpu::kOuterBlock;
    copy_rows(row, num_rows, k0, block, scratch.operands.left);
    pack_right([&](int i) { return matrix + (k0 + i) * stride; }, c0, cols, block, scratch.operands.right);
    const int beyond = k0 + block, left = k - beyond < cpu::kOuterBlock ? k - beyond : cpu::kOuterBlock;
    add_outer<Left::kRows>(scratch.operands, num_rows, cols, block, scratch.sums,
                           Approach(matrix + beyond * stride + c0, stride, left, cols));
  }
}

template <class T>
Vector bias_upto(const T* bias, int n) {
  return bias == nullptr ? Vector{} : widen_upto(bias, n);
}

// a · b over n elements: interleaved sums, then their tree.
template <class A, class B>
float dot(const A* a, const B* b, int n) {
  Vector sum{};
  for (int i = 0; i < n; i += kLanes) sum += widen_upto(a + i, n - i) * widen_upto(b + i, n - i);
  return sum_lanes(sum, sum, sum, sum)[0];
}

// Of one row and n columns: gate_sums and up_sums are the up product's, g the gradient of h.
template <Activation kActivation, bool kGated, class T>
void differentiate_row(const float* gate_sums, const float* up_sums, const float* g, const T* bias, int intermediate_size,
                       int n, float* gate_up_grad, float* h) {
  for (int c = 0; c < n; c += kLanes) {
    const int left = n - c;
    const Vector dh = widen(g + c);
    ValueAndSlope act = differentiate<kActivation>(widen_upto(gate_sums + c, left) + bias_upto(bias ? bias + c : bias, left));
    if constexpr (kGated) {
      const T* up_bias = bias ? bias + intermediate_size + c : bias;
      const Vector up = widen_upto(up_sums + c, left) + bias_upto(up_bias, left);
      narrow_upto(dh * act.value, gate_up_grad + intermediate_size + c, left);
      act.value *= up, act.slope *= up;
    }
    narrow_upto(dh * act.slope, gate_up_grad + c, left);
    narrow_upto(act.value, h + c, left);
  }
}

template <bool kGated, class T>
void differentiate_row(Activation activation, const float* gate_sums, const float* up_sums, const float* g, const T* bias,
                       int intermediate_size, int n, float* gate_up_grad, float* h) {
  const auto with = [&]<Activation kActivation>() {
    differentiate_row<kActivation, kGated, T>(gate_sums, up_sums, g, bias, intermediate_size, n, gate_up_grad, h);
  };
  switch (activation) {
    case Activation::kSilu: return with.template operator()<Activation::kSilu>();
    case Activation::kGelu: return with.template operator()<Activation::kGelu>();
    case Activation::kGeluTanh: return with.template operator()<Activation::kGeluTanh>();
    case Activation::kRelu: return with.template operator()<Activation::kRelu>();
  }
}

template <class T>
void up_backward(const CpuProblem& problem, const GradientRows& rows, const ExpertWeights& weights, int part,
                 int col_begin, int col_end, cpu::BackwardScratch& scratch) {
  const int sections = problem.gated ? 2 : 1, n = col_end - col_begin;
  const auto* gate_up = static_cast<const T*>(weights.gate_up);
  const auto* bias = static_cast<const T*>(weights.gate_up_bias);
  const auto* down_bias = static_cast<const T*>(weights.down_bias);
  const auto dy = [&](int i) { return static_cast<const T*>(rows.dy[i]); };
  times_matrix(dy, rows.num_rows, static_cast<const T*>(weights.down), problem.intermediate_size, problem.hidden_size,
               col_begin, n, scratch);
  const WeightRows<T> tile{gate_up, problem.hidden_size, col_begin, n, sections, problem.intermediate_size};
  for (int first = 0; first < rows.num_rows; first += cpu::kPassRows) {
    const int num = rows.num_rows - first < cpu::kPassRows ? rows.num_rows - first : cpu::kPassRows;
    if (!rows.up_sums)
      product<T>([&](int i) { return static_cast<const T*>(rows.x[first + i]); }, num, tile, scratch.forward);
    for (int i = 0; i < num; ++i) {
      const float *gate = scratch.forward.product + i * cpu::kMaxTileRows, *up = gate + cpu::kMaxTileRows / 2;
      if (rows.up_sums) {
        gate = rows.up_sums + ptrdiff_t(first + i) * sections * problem.intermediate_size + col_begin;
        up = gate + (sections - 1) * problem.intermediate_size;
      }
      const float* g = scratch.sums + (first + i) * cpu::kGradCols;
      const ptrdiff_t row = (first + i) * rows.made.stride;
      float *grad = rows.made.gate_up_grad + row + col_begin, *h = rows.made.hidden + row + col_begin;
      const T* columns_bias = bias ? bias + col_begin : bias;
      if (problem.gated)
        differentiate_row<true>(problem.activation, gate, up, g, columns_bias, problem.intermediate_size, n, grad, h);
      else
        differentiate_row<false>(problem.activation, gate, up, g, columns_bias, problem.intermediate_size, n, grad, h);
      rows.made.dot[row + part] =
          dot(g, h, n) + (part == 0 && down_bias ? dot(dy(first + i), down_bias, problem.hidden_size) : 0.0f);
    }
  }
}

template <class T>
void down_backward(const CpuProblem& problem, const BackwardRows& made, int num_rows, const void* gate_up, int col_begin,
                   int col_end, void* const* out_rows, cpu::BackwardScratch& scratch) {
  const int up_rows = (problem.gated ? 2 : 1) * problem.intermediate_size, n = col_end - col_begin;
  times_matrix([&](int i) { return made.gate_up_grad + i * made.stride; }, num_rows, static_cast<const T*>(gate_up),
               problem.hidden_size, up_rows, col_begin, n, scratch);
  for (int i = 0; i < num_rows; ++i)
    for (int c = 0; c < n; c += kLanes)
      narrow_upto(widen(scratch.sums + i * cpu::kGradCols + c), static_cast<T*>(out_rows[i]) + col_begin + c, n - c);
}

template <class T>
void add_to_gradient(const GradTile& tile, const GradientRows& rows, cpu::BackwardScratch& scratch) {
  const int num_rows = tile.row_end - tile.row_begin, cols = tile.col_end - tile.col_begin, k = rows.num_rows;
  const auto weight = [&](int i) { return rows.weight[i]; };
  const auto made = [&](const float* first) { return [=, &rows](int i) { return first + i * rows.made.stride; }; };
  const auto came = [](const void* const* all) { return [=](int i) { return static_cast<const T*>(all[i]); }; };
  float* left = scratch.operands.left;
  if (tile.down) {
    copy_columns(came(rows.dy), weight, tile.row_begin, num_rows, k, left);
    pack_right(made(rows.made.hidden), tile.col_begin, cols, k, scratch.operands.right);
  } else {
    copy_columns(made(rows.made.gate_up_grad), weight, tile.row_begin, num_rows, k, left);
    pack_right(came(rows.x), tile.col_begin, cols, k, scratch.operands.right);
  }
  add_outer<Left::kColumns>(scratch.operands, num_rows, cols, k, scratch.sums);
  if (tile.col_begin != 0) return;
  for (int m = 0; m < num_rows; m += kLanes) {
    Vector sum = widen(scratch.bias + m);
    for (int i = 0; i < k; ++i) sum += widen(left + i * cpu::kGradRows + m);
    narrow(sum, scratch.bias + m);
  }
}

template <class T>
void end_gradient(const CpuProblem& problem, const GradTile& tile, T* matrix, T* bias, const cpu::BackwardScratch& scratch) {
  const ptrdiff_t stride = tile.down ? problem.intermediate_size : problem.hidden_size;
  const int num_rows = tile.row_end - tile.row_begin, cols = tile.col_end - tile.col_begin;
  for (int m = 0; m < num_rows; ++m)
    for (int c = 0; c < cols; c += kLanes)
      narrow_upto(widen(scratch.sums + m * cpu::kGradCols + c),
                  matrix + (tile.row_begin + m) * stride + tile.col_begin + c, cols - c);
  if (!bias || tile.col_begin != 0) return;
  for (int m = 0; m < num_rows; m += kLanes)
    narrow_upto(widen(scratch.bias + m), bias + tile.row_begin + m, num_rows - m);
}

cpu::BackwardScratch& scratch_at(void* scratch) { return *static_cast<cpu::BackwardScratch*>(scratch); }

void up_backward_any(const CpuProblem& problem, const GradientRows& rows, const ExpertWeights& weights, int part,
                     int col_begin, int col_end, void* scratch) {
  with_dtype(problem.dtype, [&](auto element) {
    up_backward<decltype(element)>(problem, rows, weights, part, col_begin, col_end, scratch_at(scratch));
  });
}

void down_backward_any(const CpuProblem& problem, const BackwardRows& made, int num_rows, const void* gate_up,
                       int col_begin, int col_end, void* const* out_rows, void* scratch) {
  with_dtype(problem.dtype, [&](auto element) {
    down_backward<decltype(element)>(problem, made, num_rows, gate_up, col_begin, col_end, out_rows, scratch_at(scratch));
  });
}

void begin_gradient(const GradTile& tile, void* scratch) {
  memset(scratch_at(scratch).sums, 0, sizeof(float) * (tile.row_end - tile.row_begin) * cpu::kGradCols);
  memset(scratch_at(scratch).bias, 0, sizeof scratch_at(scratch).bias);
}

void add_to_gradient_any(const CpuProblem& problem, const GradTile& tile, const GradientRows& rows, void* scratch) {
  with_dtype(problem.dtype, [&](auto element) { add_to_gradient<decltype(element)>(tile, rows, scratch_at(scratch)); });
}

void end_gradient_any(const CpuProblem& problem, const GradTile& tile, void* matrix, void* bias, void* scratch) {
  with_dtype(problem.dtype, [&](auto element) {
    using T = decltype(element);
    end_gradient(problem, tile, static_cast<T*>(matrix), static_cast<T*>(bias), scratch_at(scratch));
  });
}

template <Activation kActivation>
void differentiate_all(const float* x, int num, float* value, float* slope) {
  for (int i = 0; i < num; i += kLanes) {
    const ValueAndSlope act = differentiate<kActivation>(widen_upto(x + i, num - i));
    narrow_upto(act.value, value + i, num - i);
    narrow_upto(act.slope, slope + i, num - i);
  }
}

void differentiate_any(Activation activation, const float* x, int num, float* value, float* slope) {
  switch (activation) {
    case Activation::kSilu: return differentiate_all<Activation::kSilu>(x, num, value, slope);
    case Activation::kGelu: return differentiate_all<Activation::kGelu>(x, num, value, slope);
    case Activation::kGeluTanh: return differentiate_all<Activation::kGeluTanh>(x, num, value, slope);
    case Activation::kRelu: return differentiate_all<Activation::kRelu>(x, num, value, slope);
  }
}

}  // namespace

const CpuBackwardKernels& backward_kernels();  // declared where it is called, in cpu_kernels.cpp
const CpuBackwardKernels& backward_kernels() {
  static constexpr CpuBackwardKernels table{up_backward_any,     down_backward_any, begin_gradient,
                                            add_to_gradient_any, end_gradient_any,  differentiate_any};
  return table;
}

}  // namespace flashmoe::FLASHMOE_ISA_NAMESPACE
