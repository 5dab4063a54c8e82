#include "runtime/cuda_choice.h"

namespace flashmoe {

bool begin_aligned(const ForwardArgs& a) {
  uintptr_t bits = 0;
  const void* y = a.y;
  for (const void* begin : {a.x, y, a.gate_up_proj, a.gate_up_bias, a.down_proj, a.down_bias})
    bits |= reinterpret_cast<uintptr_t>(begin);
  return bits % 16 == 0;
}

bool begin_aligned(const Gradients& grad) {
  uintptr_t bits = reinterpret_cast<uintptr_t>(grad.y);
  for (const std::byte* begin : {grad.gate_up_proj, grad.gate_up_bias, grad.down_proj, grad.down_bias})
    bits |= reinterpret_cast<uintptr_t>(begin);
  return bits % 16 == 0;
}

CudaKernelKind choose_kernel(const CudaProblem& p) {
  const int item = dtype_bytes(p.dtype);
  // Tensor cores are fed in pieces of 16 bytes.
  const bool pieces = p.aligned && p.hidden_size * item % 16 == 0 && p.intermediate_size * item % 16 == 0;
  const bool exact = p.exact || !pieces || p.compute_capability < 80;
  if (p.backward)
    return exact || p.dtype == DType::kFloat32 ? CudaKernelKind::kExactBackward : CudaKernelKind::kSm80Backward;
  if (exact) return CudaKernelKind::kExact;
  if (p.dtype == DType::kFloat32) return p.tf32 ? CudaKernelKind::kSm80 : CudaKernelKind::kExact;
  // wgmma is Hopper's alone: no later architecture has it.
  if (p.compute_capability / 10 != 9) return CudaKernelKind::kSm80;
  const bool few = p.num_pairs <= (long long)kNarrowRows * p.num_experts;
  return few ? CudaKernelKind::kSm90Narrow : CudaKernelKind::kSm90Wide;
}

}  // namespace flashmoe
