// The kernels of the engine for GPUs from Ampere on, for peers that are not mapped.
#include "engine/sm80.h"
#include "platform/nvshmem.h"
#include "runtime/cuda_launch.cuh"

namespace flashmoe {

template <DType dtype>
using Engine = Sm80Engine<dtype>;

static_assert(sizeof(CudaWorker<Engine<DType::kFloat32>, NvshmemPlatform>::Shared) <= 99 << 10, "more than sm_86 has");
static_assert(sizeof(CudaWorker<Engine<DType::kBFloat16>, NvshmemPlatform>::Shared) <= 99 << 10, "more than sm_86 has");

CudaKernel nvshmem_sm80_kernel(DType dtype) { return cuda_kernel<Engine, NvshmemPlatform>(dtype); }

}  // namespace flashmoe
