// The kernels of the engine for GPUs from Ampere on.
#include "engine/sm80.h"
#include "platform/cuda.h"
#include "runtime/cuda_launch.cuh"

namespace flashmoe {

template <DType dtype>
using Engine = Sm80Engine<dtype>;

static_assert(sizeof(CudaWorker<Engine<DType::kFloat32>, CudaPlatform>::Shared) <= 99 << 10, "more than sm_86 has");
static_assert(sizeof(CudaWorker<Engine<DType::kBFloat16>, CudaPlatform>::Shared) <= 99 << 10, "more than sm_86 has");

CudaKernel sm80_kernel(DType dtype) { return cuda_kernel<Engine, CudaPlatform>(dtype); }

}  // namespace flashmoe
