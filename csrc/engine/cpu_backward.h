// What one instruction set provides to the CPU engine for backward calls.
#pragma once

#include "engine/backward_engine.h"
#include "engine/cpu_kernels.h"

namespace flashmoe {

// The arguments are those of CpuEngine's methods of the same names.
struct CpuBackwardKernels {
  void (*up_backward)(const CpuProblem&, const GradientRows&, const ExpertWeights&, int part, int col_begin, int col_end,
                      void* scratch);
  void (*down_backward)(const CpuProblem&, const BackwardRows&, int num_rows, const void* gate_up, int col_begin,
                        int col_end, void* const* out_rows, void* scratch);
  void (*begin_gradient)(const GradTile&, void* scratch);
  void (*add_to_gradient)(const CpuProblem&, const GradTile&, const GradientRows&, void* scratch);
  void (*end_gradient)(const CpuProblem&, const GradTile&, void* matrix, void* bias, void* scratch);
  // value[i] = act(x[i]), slope[i] = act'(x[i]), for tests of the approximations.
  void (*differentiate)(Activation, const float* x, int num, float* value, float* slope);
};

namespace cpu {
inline constexpr int kGradRows = kBlockM;      // of the sums that one tile holds
inline constexpr int kGradCols = kMaxTileRows;
inline constexpr int kOuterBlock = kBlockM;    // longest stretch of K that is packed at one time

struct OuterOperands {
  alignas(64) float left[kGradRows * kOuterBlock];
  alignas(64) float right[kOuterBlock * kGradCols];
};

// One worker's memory during a backward tile. What is packed stays in the L2 cache.
struct BackwardScratch {
  Scratch forward;  // where the up product is made once more
  OuterOperands operands;
  alignas(64) float sums[kGradRows * kGradCols];
  alignas(64) float bias[kGradRows];
};
}  // namespace cpu

}  // namespace flashmoe
