// The kernels of the exact engine, for peers that are not mapped.
#include "engine/exact.h"
#include "platform/nvshmem.h"
#include "runtime/cuda_launch.cuh"

namespace flashmoe {

template <DType dtype>
using Engine = ExactEngine<dtype>;

CudaKernel nvshmem_exact_kernel(DType dtype) { return cuda_kernel<Engine, NvshmemPlatform>(dtype); }

}  // namespace flashmoe
