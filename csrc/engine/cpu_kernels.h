// What one instruction set provides to the CPU engine, and how one is chosen.
#pragma once

#include "engine/cpu.h"

namespace flashmoe {

struct CpuBackwardKernels;  // engine/cpu_backward.h

// The arguments are those of CpuEngine's methods of the same names.
struct CpuKernels {
  const char* name;
  void (*up_tile)(const CpuProblem&, const void* const* rows, int num_rows, const void* gate_up,
                  const void* gate_up_bias, int col_begin, int col_end, float* h, ptrdiff_t h_stride,
                  float* kept_sums, void* scratch);
  void (*down_tile)(const CpuProblem&, const float* h, ptrdiff_t h_stride, int num_rows, const void* down,
                    const void* down_bias, int col_begin, int col_end, void* const* out_rows, void* scratch);
  void (*combine)(const CpuProblem&, const void* const* rows, const float* weights, int num, void* y);
  // out[i] = act(x[i]), for tests of the approximations.
  void (*activate)(Activation, const float* x, int num, float* out);
  const CpuBackwardKernels* backward;
};

// Sizes that all instruction sets share, so that tiles and scratch follow from shapes alone.
namespace cpu {
inline constexpr int kPassRows = 64;      // rows that meet a tile's weights at one time; a higher tile takes two passes
inline constexpr int kPanelRows = 4;      // weight rows that a register tile covers
inline constexpr int kMaxKBlock = 1024;   // longest stretch of K that is summed in registers
inline constexpr int kMaxTileRows = 256;  // weight rows of a tile: gate and up rows together
inline constexpr int kMaxLanes = 16;

// One worker's memory during a tile. The rows of a K block stay in the L2 cache, the panel in the L1.
struct Scratch {
  alignas(64) float rows[kPassRows * kMaxKBlock];  // rows of the tile, widened, in register tile order
  alignas(64) float panel[kPanelRows * kMaxKBlock];         // a panel of weight rows, widened
  alignas(64) float panel_tail[kPanelRows * kMaxLanes];     // its last, partial vectors, filled up with zeros
  alignas(64) float product[kPassRows * kMaxTileRows];
  alignas(64) float bias[kMaxTileRows];
};
}  // namespace cpu

// The kernels named `isa`, or the best that this machine runs if it is null or "". Throws std::invalid_argument.
const CpuKernels& cpu_kernels(const char* isa);

}  // namespace flashmoe
