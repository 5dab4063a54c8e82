// The kernels of the exact engine, which every GPU runs.
#include "engine/exact.h"
#include "platform/cuda.h"
#include "runtime/cuda_launch.cuh"

namespace flashmoe {

template <DType dtype>
using Engine = ExactEngine<dtype>;

CudaKernel exact_kernel(DType dtype) { return cuda_kernel<Engine, CudaPlatform>(dtype); }

}  // namespace flashmoe
