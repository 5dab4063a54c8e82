// The kernel of backward calls by the exact engine, for peers that are not mapped.
#include "engine/exact_backward.h"
#include "platform/nvshmem.h"
#include "runtime/cuda_launch.cuh"

namespace flashmoe {

CudaKernel nvshmem_exact_backward_kernel() { return cuda_kernel<ExactBackwardEngine<>, NvshmemBackwardPlatform>(); }

}  // namespace flashmoe
