// The kernel of the exact engine, for peers that are not mapped.
#include "engine/exact.h"
#include "platform/nvshmem.h"
#include "runtime/cuda_launch.cuh"

namespace flashmoe {

CudaKernel nvshmem_exact_kernel() { return cuda_kernel<ExactEngine<>, NvshmemPlatform>(); }

}  // namespace flashmoe
