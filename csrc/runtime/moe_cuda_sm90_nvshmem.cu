// The kernels of the Hopper engine, for peers that are not mapped: compiled for sm_90a alone.
#define FLASHMOE_CALL_NOTHING  // they move registers between their warps

#include "engine/sm90.h"
#include "platform/nvshmem.h"
#include "runtime/cuda_launch.cuh"

namespace flashmoe {

CudaKernel nvshmem_sm90_kernel(DType dtype, Sm90Tiles tiles) {
  using P = NvshmemPlatform;
  const bool bfloat16 = dtype == DType::kBFloat16;
  if (tiles == Sm90Tiles::kNarrow)
    return bfloat16 ? cuda_kernel<Sm90Narrow<DType::kBFloat16>, P>() : cuda_kernel<Sm90Narrow<DType::kFloat16>, P>();
  return bfloat16 ? cuda_kernel<Sm90Wide<DType::kBFloat16>, P>() : cuda_kernel<Sm90Wide<DType::kFloat16>, P>();
}

}  // namespace flashmoe
