// The kernels of the engine for GPUs from Ampere on.
#include "engine/sm80.h"
#include "runtime/cuda_launch.cuh"

namespace flashmoe {

template <DType dtype>
CudaKernel sm80_kernel_of() {
  static_assert(sizeof(typename CudaWorker<Sm80Engine<dtype>>::Shared) <= 99 << 10, "more than sm_86 has");
  return cuda_kernel<Sm80Engine<dtype>>();
}

CudaKernel sm80_kernel(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16: return sm80_kernel_of<DType::kBFloat16>();
    case DType::kFloat16: return sm80_kernel_of<DType::kFloat16>();
    default: return sm80_kernel_of<DType::kFloat32>();
  }
}

}  // namespace flashmoe
