// What the CUDA runtime asks of a kernel, so that each engine's kernels are compiled apart, for the architectures that
// can run them.
#pragma once

#include <cuda_runtime_api.h>

#include <functional>
#include <string>
#include <vector>

#include "kernel/rank_state.h"
#include "runtime/cuda_choice.h"

namespace flashmoe {

// Most virtual ranks of one GPU: what each needs travels in the kernel's parameters.
inline constexpr int kMaxVirtualRanks = 8;

struct CudaLaunch {
  gpu::RankState* ranks;  // on the device
  std::vector<Call> calls;  // of each rank, with tables that the host can read
  int blocks_per_rank;
  cudaStream_t stream;
  // The call's first launch, to be made when the second can no longer be refused: with it the ranks enter the call, and
  // peers would wait for one that then did not come.
  std::function<cudaError_t()> begin;
};

struct CudaKernel {
  int crew_warps, hidden_bytes;
  std::string (*launch)(const CudaLaunch&);  // empty, or why it could not be
  const void* function;                      // by which the CUDA runtime knows it
};

CudaKernel exact_kernel();  // of any dtype
CudaKernel exact_backward_kernel();
CudaKernel sm80_kernel(DType dtype);  // fp32 as tf32; rows of a multiple of 16 bytes
CudaKernel sm80_backward_kernel(DType dtype);  // of bfloat16 or float16, as the forward one

// Tiles of 256 weight rows for many rows an expert; of 64 for few, where what counts is that every multiprocessor reads.
enum class Sm90Tiles { kWide, kNarrow };
CudaKernel sm90_kernel(DType dtype, Sm90Tiles tiles);  // of bfloat16 or float16, on Hopper alone

// The kernel of that kind, for groups whose memory is all mapped here or for others.
CudaKernel kernel_of(CudaKernelKind kind, DType dtype, bool all_mapped);

// The same for groups in which some peers' memory is not mapped: where NVSHMEM's headers were found.
CudaKernel nvshmem_exact_kernel();
CudaKernel nvshmem_exact_backward_kernel();
CudaKernel nvshmem_sm80_kernel(DType dtype);
CudaKernel nvshmem_sm80_backward_kernel(DType dtype);
CudaKernel nvshmem_sm90_kernel(DType dtype, Sm90Tiles tiles);

}  // namespace flashmoe
