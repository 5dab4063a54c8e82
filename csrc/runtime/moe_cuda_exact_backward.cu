// The kernel of backward calls by the exact engine, which every GPU runs.
#include "engine/exact_backward.h"
#include "platform/cuda.h"
#include "runtime/cuda_launch.cuh"

namespace flashmoe {

CudaKernel exact_backward_kernel() { return cuda_kernel<ExactBackwardEngine<>, CudaBackwardPlatform>(); }

}  // namespace flashmoe
