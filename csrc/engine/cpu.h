// The CPU engine: the tile products of one expert on one host thread.
//
// A row's bits depend on that row, its weights and the instruction set alone: never on how many rows share the
// tile, on its place among them, or on the column range that a call covers.
#pragma once

#include <cstddef>

#include "engine/backward_engine.h"

namespace flashmoe {

struct CpuKernels;  // engine/cpu_kernels.h

struct CpuProblem {
  DType dtype;
  Activation activation;
  bool gated;
  int hidden_size;
  int intermediate_size;
};

// I = intermediate_size, H = hidden_size. `gate_up` and `down` are one expert's weights, [2I, H] (gate rows
// first; [I, H] if not gated) and [H, I], row-major, of the problem's dtype, as are tokens, biases and results.
// Stateless: any number of threads may share one, each with a scratch of its own.
class CpuEngine {
 public:
  using Problem = CpuProblem;

  static constexpr int kBlockM = flashmoe::kBlockM;  // most rows that a tile may have

  // Columns of h that one up tile covers, and of y that one down tile covers: multiples of 16, from shapes alone.
  static int up_tile_cols(const Problem& problem);
  static int down_tile_cols(const Problem& problem);

  // Of a grad tile, at most.
  static constexpr int kGradRows = flashmoe::kBlockM, kGradCols = 256;

  // Bytes of the scratch that each worker passes in, 64-byte aligned. Nothing in it outlives a call.
  static size_t scratch_bytes(const Problem& problem);
  static size_t backward_scratch_bytes(const Problem& problem);

  // The kernels of the best instruction set here, or of the one that FLASHMOE_CPU_ISA names. Throws
  // std::invalid_argument if this machine or this build does not know it.
  CpuEngine();
  explicit CpuEngine(const CpuKernels& kernels) : kernels_(&kernels) {}

  // h[i · h_stride + c], fp32, for c in [col_begin, col_end): act(A Wg^T + bg) · (A Wu^T + bu), or act(A W^T + b)
  // if not gated. rows[i]: hidden_size elements; gate_up_bias: [2I] or [I], or null.
  void up_tile(const Problem& problem, const void* const* rows, int num_rows, const void* gate_up,
               const void* gate_up_bias, int col_begin, int col_end, float* h, ptrdiff_t h_stride,
               void* scratch) const;

  // Also leaves sums[i · up_rows + c] = A Wg^T, and A Wu^T beside it at I + c.
  void up_tile_keeping(const Problem& problem, const void* const* rows, int num_rows, const void* gate_up,
                       const void* gate_up_bias, int col_begin, int col_end, float* h, ptrdiff_t h_stride, float* sums,
                       void* scratch) const;

  // out_rows[i][c] for c in [col_begin, col_end): h[i] · down[c] + down_bias[c], rounded once, to nearest even.
  void down_tile(const Problem& problem, const float* h, ptrdiff_t h_stride, int num_rows, const void* down,
                 const void* down_bias, int col_begin, int col_end, void* const* out_rows, void* scratch) const;

  // y[0:hidden_size) = Σ_j weights[j] · rows[j], summed in fp32 in the order of j; zeros if num is 0.
  void combine(const Problem& problem, const void* const* rows, const float* weights, int num, void* y) const;

  // What engine/backward_engine.h says, with columns of the up and the down tiles above.
  void up_backward(const Problem& problem, const GradientRows& rows, const ExpertWeights& weights, int part,
                   int col_begin, int col_end, void* scratch) const;
  void down_backward(const Problem& problem, const BackwardRows& made, int num_rows, const void* gate_up, int col_begin,
                     int col_end, void* const* out_rows, void* scratch) const;
  void begin_gradient(const GradTile& tile, void* scratch) const;
  void add_to_gradient(const Problem& problem, const GradTile& tile, const GradientRows& rows, void* scratch) const;
  void end_gradient(const Problem& problem, const GradTile& tile, void* matrix, void* bias, void* scratch) const;

 private:
  const CpuKernels* kernels_;
};

// The instruction set that CpuEngine() computes with: "baseline", "avx2" or "avx512".
const char* cpu_isa();

}  // namespace flashmoe
