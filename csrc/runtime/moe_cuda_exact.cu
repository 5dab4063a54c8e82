// The kernel of the exact engine, which every GPU runs.
#include "engine/exact.h"
#include "platform/cuda.h"
#include "runtime/cuda_launch.cuh"

namespace flashmoe {

CudaKernel exact_kernel() { return cuda_kernel<ExactEngine<>, CudaPlatform>(); }

}  // namespace flashmoe
