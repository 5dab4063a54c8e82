// The kernel of one engine, and its launch: for the .cu file of that engine alone.
#pragma once

#include "kernel/worker.h"
#include "runtime/cuda_kernel.h"

namespace flashmoe {

template <class E, class P>
using CudaWorker = gpu::Worker<P, E>;

template <class E>
struct OperandsOfRanks {
  typename E::Operands rank[kMaxVirtualRanks];
};

template <class E, class P>
__global__ void __launch_bounds__(CudaWorker<E, P>::kThreads, 1)
    moe_kernel(gpu::RankState* ranks, int num_ranks, const __grid_constant__ OperandsOfRanks<E> operands) {
  CudaWorker<E, P>::run(ranks, num_ranks, gpu::shared_memory(), operands.rank);
}

template <class E, class P>
std::string launch_moe_kernel(const CudaLaunch& l) {
  constexpr size_t kSharedBytes = sizeof(typename CudaWorker<E, P>::Shared);
  static_assert(kSharedBytes <= 227 << 10, "more shared memory than a block may have");
  OperandsOfRanks<E> operands;
  int num_ranks = int(l.calls.size());
  for (int r = 0; r < num_ranks; ++r)
    if (std::string error = E::make_operands(&operands.rank[r], l.calls[r]); !error.empty()) return error;

  cudaError_t error =
      cudaFuncSetAttribute(moe_kernel<E, P>, cudaFuncAttributeMaxDynamicSharedMemorySize, int(kSharedBytes));
  if (error == cudaSuccess) error = l.begin();
  // Cooperative, so that all blocks run at once: they wait for each other.
  gpu::RankState* ranks = l.ranks;
  void* arguments[] = {&ranks, &num_ranks, &operands};
  if (error == cudaSuccess)
    error = cudaLaunchCooperativeKernel(moe_kernel<E, P>, dim3(num_ranks * l.blocks_per_rank),
                                        dim3(CudaWorker<E, P>::kThreads), arguments, kSharedBytes, l.stream);
  return error == cudaSuccess ? "" : std::string("launch of a call's kernels: ") + cudaGetErrorString(error);
}

template <class E, class P>
CudaKernel cuda_kernel() {
  return {E::kCrewWarps, E::kHiddenBytes, &launch_moe_kernel<E, P>, reinterpret_cast<const void*>(&moe_kernel<E, P>)};
}

// Of the engine for a dtype.
template <template <DType> class E, class P>
CudaKernel cuda_kernel(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16: return cuda_kernel<E<DType::kBFloat16>, P>();
    case DType::kFloat16: return cuda_kernel<E<DType::kFloat16>, P>();
    default: return cuda_kernel<E<DType::kFloat32>, P>();
  }
}

}  // namespace flashmoe
