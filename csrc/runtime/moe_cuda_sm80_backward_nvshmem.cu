// The kernels of backward calls of the engine for GPUs from Ampere on, for peers that are not mapped.
#include "engine/sm80_backward.h"
#include "platform/nvshmem.h"
#include "runtime/cuda_launch.cuh"

namespace flashmoe {

template <DType dtype>
using Engine = Sm80BackwardEngine<dtype>;

static_assert(sizeof(CudaWorker<Engine<DType::kBFloat16>, NvshmemBackwardPlatform>::Shared) <= 99 << 10,
              "more than sm_86 has");

CudaKernel nvshmem_sm80_backward_kernel(DType dtype) {
  return dtype == DType::kFloat16 ? cuda_kernel<Engine<DType::kFloat16>, NvshmemBackwardPlatform>()
                                  : cuda_kernel<Engine<DType::kBFloat16>, NvshmemBackwardPlatform>();
}

}  // namespace flashmoe
