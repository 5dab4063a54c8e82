// Which instruction set the CPU engine computes with, and the sizes of its tiles.
#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "engine/cpu_backward.h"

namespace flashmoe {

namespace cpu_baseline {
const CpuKernels& kernels();
}
#if defined(__x86_64__)
namespace cpu_avx2 {
const CpuKernels& kernels();
}
namespace cpu_avx512 {
const CpuKernels& kernels();
}
#endif

namespace {

struct Candidate {
  const char* name;
  const CpuKernels& (*kernels)();
  bool supported;
};

const CpuKernels& find(const std::string& isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const Candidate best_first[] = {{"avx512", cpu_avx512::kernels, avx512},
                                  {"avx2", cpu_avx2::kernels, avx2},
                                  {"baseline", cpu_baseline::kernels, true}};
#else
  const Candidate best_first[] = {{"baseline", cpu_baseline::kernels, true}};
#endif
  std::string known;
  for (const Candidate& candidate : best_first) {
    if (isa.empty() ? candidate.supported : isa == candidate.name) {
      if (candidate.supported) return candidate.kernels();
      throw std::invalid_argument("FLASHMOE_CPU_ISA: this processor does not support '" + isa + "'");
    }
    known += std::string(known.empty() ? "" : ", ") + candidate.name;
  }
  throw std::invalid_argument("FLASHMOE_CPU_ISA: expected one of " + known + ", got '" + isa + "'");
}

// Chosen once. If the choice throws it is made again, and throws again, at the next use.
const CpuKernels& chosen() {
  static const CpuKernels& kernels = cpu_kernels(std::getenv("FLASHMOE_CPU_ISA"));
  return kernels;
}

int tile_cols(int most, int cols) { return std::min(most, int(round_up(size_t(cols), 16))); }

}  // namespace

const CpuKernels& cpu_kernels(const char* isa) { return find(isa == nullptr ? "" : isa); }

const char* cpu_isa() { return chosen().name; }

CpuEngine::CpuEngine() : kernels_(&chosen()) {}

int CpuEngine::up_tile_cols(const Problem& problem) {
  return tile_cols(problem.gated ? cpu::kMaxTileRows / 2 : cpu::kMaxTileRows, problem.intermediate_size);
}

int CpuEngine::down_tile_cols(const Problem& problem) { return tile_cols(cpu::kMaxTileRows, problem.hidden_size); }

size_t CpuEngine::scratch_bytes(const Problem&) { return sizeof(cpu::Scratch); }
size_t CpuEngine::backward_scratch_bytes(const Problem&) { return sizeof(cpu::BackwardScratch); }

void CpuEngine::up_tile(const Problem& problem, const void* const* rows, int num_rows, const void* gate_up,
                        const void* gate_up_bias, int col_begin, int col_end, float* h, ptrdiff_t h_stride,
                        void* scratch) const {
  kernels_->up_tile(problem, rows, num_rows, gate_up, gate_up_bias, col_begin, col_end, h, h_stride, nullptr, scratch);
}

void CpuEngine::up_tile_keeping(const Problem& problem, const void* const* rows, int num_rows, const void* gate_up,
                                const void* gate_up_bias, int col_begin, int col_end, float* h, ptrdiff_t h_stride,
                                float* sums, void* scratch) const {
  kernels_->up_tile(problem, rows, num_rows, gate_up, gate_up_bias, col_begin, col_end, h, h_stride, sums, scratch);
}

void CpuEngine::down_tile(const Problem& problem, const float* h, ptrdiff_t h_stride, int num_rows, const void* down,
                          const void* down_bias, int col_begin, int col_end, void* const* out_rows,
                          void* scratch) const {
  kernels_->down_tile(problem, h, h_stride, num_rows, down, down_bias, col_begin, col_end, out_rows, scratch);
}

void CpuEngine::combine(const Problem& problem, const void* const* rows, const float* weights, int num,
                        void* y) const {
  kernels_->combine(problem, rows, weights, num, y);
}

static_assert(BackwardEngine<CpuEngine> && cpu::kGradRows == CpuEngine::kGradRows && cpu::kGradCols == CpuEngine::kGradCols);

void CpuEngine::up_backward(const Problem& problem, const GradientRows& rows, const ExpertWeights& weights, int part,
                            int col_begin, int col_end, void* scratch) const {
  kernels_->backward->up_backward(problem, rows, weights, part, col_begin, col_end, scratch);
}

void CpuEngine::down_backward(const Problem& problem, const BackwardRows& made, int num_rows, const void* gate_up,
                              int col_begin, int col_end, void* const* out_rows, void* scratch) const {
  kernels_->backward->down_backward(problem, made, num_rows, gate_up, col_begin, col_end, out_rows, scratch);
}

void CpuEngine::begin_gradient(const GradTile& tile, void* scratch) const {
  kernels_->backward->begin_gradient(tile, scratch);
}

void CpuEngine::add_to_gradient(const Problem& problem, const GradTile& tile, const GradientRows& rows,
                                void* scratch) const {
  kernels_->backward->add_to_gradient(problem, tile, rows, scratch);
}

void CpuEngine::end_gradient(const Problem& problem, const GradTile& tile, void* matrix, void* bias, void* scratch) const {
  kernels_->backward->end_gradient(problem, tile, matrix, bias, scratch);
}

}  // namespace flashmoe
