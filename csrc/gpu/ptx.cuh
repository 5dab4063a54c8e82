// The verbs in PTX: identity, block and warp, memory order, time, pairs. The rest by theme in the files below.
#pragma once

#include "gpu/ptx_barrier.cuh"
#include "gpu/ptx_copy.cuh"
#include "gpu/ptx_memory.cuh"
#include "gpu/ptx_mma.cuh"
#include "gpu/ptx_wgmma.cuh"

namespace flashmoe::gpu {

FLASHMOE_DEVICE int thread_in_block() { return int(threadIdx.x); }
FLASHMOE_DEVICE int block_threads() { return int(blockDim.x); }
FLASHMOE_DEVICE int lane() { return int(threadIdx.x % 32); }
// Through a shuffle, so that the compiler knows the number to be one per warp and branches on it without masks.
FLASHMOE_DEVICE int warp_in_block() { return __shfl_sync(~0u, int(threadIdx.x / 32), 0); }
FLASHMOE_DEVICE int block() { return int(blockIdx.x); }
FLASHMOE_DEVICE int num_blocks() { return int(gridDim.x); }
FLASHMOE_DEVICE int multiprocessor() {
  int id;
  asm volatile("mov.u32 %0, %%smid;" : "=r"(id));
  return id;
}

FLASHMOE_DEVICE std::byte* shared_memory() {
  extern __shared__ __align__(1024) std::byte flashmoe_shared_memory[];
  return flashmoe_shared_memory;
}

FLASHMOE_DEVICE void sync_block() { __syncthreads(); }
FLASHMOE_DEVICE void sync_warp(uint32_t lanes) { __syncwarp(lanes); }
FLASHMOE_DEVICE void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
FLASHMOE_DEVICE void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

template <class T>
FLASHMOE_DEVICE T shuffle(T value, int source_lane) {
  return __shfl_sync(~0u, value, source_lane);
}
template <class T>
FLASHMOE_DEVICE T shuffle_up(T value, int delta) {
  return __shfl_up_sync(~0u, value, unsigned(delta));
}
template <class T>
FLASHMOE_DEVICE T shuffle_down(T value, int delta) {
  return __shfl_down_sync(~0u, value, unsigned(delta));
}
template <class T>
FLASHMOE_DEVICE T shuffle_xor(T value, int lane_mask) {
  return __shfl_xor_sync(~0u, value, lane_mask);
}
FLASHMOE_DEVICE uint32_t ballot(bool predicate) { return __ballot_sync(~0u, predicate); }
FLASHMOE_DEVICE uint32_t match_any(uint32_t value) { return __match_any_sync(~0u, value); }
FLASHMOE_DEVICE int count_bits(uint32_t word) { return __popc(word); }
FLASHMOE_DEVICE int lowest_bit(uint32_t word) { return __ffs(int(word)) - 1; }

FLASHMOE_DEVICE uint64_t now_ns() {
  uint64_t time;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time)::"memory");
  return time;
}
FLASHMOE_DEVICE void sleep_ns(uint32_t duration) { __nanosleep(duration); }

template <DType dtype>
FLASHMOE_DEVICE uint32_t pack_pair(float first, float second) {
  static_assert(dtype != DType::kFloat32);
  uint32_t pair;
  if constexpr (dtype == DType::kBFloat16)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}

template <DType dtype>
FLASHMOE_DEVICE FloatPair unpack_pair(uint32_t pair) {
  static_assert(dtype != DType::kFloat32);
  if constexpr (dtype == DType::kBFloat16) return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
  FloatPair floats;
  asm("{ .reg .b16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high; }"
      : "=f"(floats.first), "=f"(floats.second)
      : "r"(pair));
  return floats;
}

}  // namespace flashmoe::gpu
