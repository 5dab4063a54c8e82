// The kernels of the Hopper engine: compiled for sm_90a alone.
#include "engine/sm90.h"
#include "runtime/cuda_launch.cuh"

namespace flashmoe {

CudaKernel sm90_kernel(DType dtype) {
  return dtype == DType::kBFloat16 ? cuda_kernel<Sm90Engine<DType::kBFloat16>>()
                                   : cuda_kernel<Sm90Engine<DType::kFloat16>>();
}

}  // namespace flashmoe
