// The kernels of the exact engine, which every GPU runs.
#include "engine/exact.h"
#include "runtime/cuda_launch.cuh"

namespace flashmoe {

CudaKernel exact_kernel(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16: return cuda_kernel<ExactEngine<DType::kBFloat16>>();
    case DType::kFloat16: return cuda_kernel<ExactEngine<DType::kFloat16>>();
    default: return cuda_kernel<ExactEngine<DType::kFloat32>>();
  }
}

}  // namespace flashmoe
