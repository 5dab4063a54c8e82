// The GPU's verbs: all that a kernel's source may say to the machine. Its only include, beside the protocol.
//
// Each verb is declared here once and defined twice: as PTX (ptx*.cuh) where nvcc compiles, and on fibers (simt*.h)
// where a host compiler does. So one kernel source is the product and also a program that tests run without a GPU,
// under a seeded interleaving that looks for misuse (simt.h). A kernel is a FLASHMOE_DEVICE function; nvcc enters
// it from a __global__ function, a test from gpu::simt::launch.
//
// "Warp verb": all 32 lanes call it together. "Warpgroup verb": four warps, the first one a multiple of four, do.
// "Generic proxy": plain stores, store_shared and cp_async. "Async proxy": TMA, and wgmma reading shared memory.
#pragma once

#include <cstddef>
#include <cstdint>

#include "protocol/config.h"

#if defined(__CUDACC__)
#include <cuda.h>
#define FLASHMOE_DEVICE __device__ __forceinline__
#define FLASHMOE_UNROLL _Pragma("unroll")
#define FLASHMOE_UNROLL_BY(times) FLASHMOE_PRAGMA(unroll times)
#define FLASHMOE_PRAGMA(text) _Pragma(#text)
#define FLASHMOE_ROLLED FLASHMOE_UNROLL_BY(1)
#else
#define FLASHMOE_DEVICE inline
#define FLASHMOE_UNROLL
#define FLASHMOE_UNROLL_BY(times)
#define FLASHMOE_ROLLED
#endif

namespace flashmoe::gpu {

// ---- Who am I: one-dimensional blocks and grids.
FLASHMOE_DEVICE int thread_in_block();
FLASHMOE_DEVICE int block_threads();
FLASHMOE_DEVICE int lane();
FLASHMOE_DEVICE int warp_in_block();  // a warp verb
FLASHMOE_DEVICE int block();
FLASHMOE_DEVICE int num_blocks();
FLASHMOE_DEVICE int multiprocessor();  // where the block is

// The block's dynamic shared memory, aligned to 1024 bytes.
FLASHMOE_DEVICE std::byte* shared_memory();

// ---- Barriers of a block. Each orders the shared and global accesses of those who take part.
FLASHMOE_DEVICE void sync_block();
FLASHMOE_DEVICE void sync_warp(uint32_t lanes = ~0u);
// Barriers 1 … 15 (0 is sync_block's) of `threads` threads, a multiple of 32; whole warps take part. A phase ends
// when sync and arrive together have counted `threads`; arrive does not wait. Warp verbs.
FLASHMOE_DEVICE void named_barrier_sync(int id, int threads);
FLASHMOE_DEVICE void named_barrier_arrive(int id, int threads);

// ---- Within a warp. Warp verbs; T has 4 or 8 bytes. Up and down leave the value of a lane without a source alone.
template <class T>
FLASHMOE_DEVICE T shuffle(T value, int source_lane);
template <class T>
FLASHMOE_DEVICE T shuffle_up(T value, int delta);
template <class T>
FLASHMOE_DEVICE T shuffle_down(T value, int delta);
template <class T>
FLASHMOE_DEVICE T shuffle_xor(T value, int lane_mask);
FLASHMOE_DEVICE uint32_t ballot(bool predicate);
FLASHMOE_DEVICE uint32_t match_any(uint32_t value);  // the lanes whose value is mine

FLASHMOE_DEVICE int count_bits(uint32_t word);
FLASHMOE_DEVICE int lowest_bit(uint32_t word);  // index of the lowest one; word != 0

// ---- Barriers in shared memory. One phase ends when its arrivals and its announced bytes are all in; phases have
// parity 0, 1, 0, …: wait(p) returns once the phase of parity p has ended, so wait(1) on a fresh barrier returns at
// once. Nobody may be a whole phase behind: parity could not tell.
class alignas(8) Barrier {
 public:
  // By one thread; then fence_barrier_init by that thread and sync_block, before anyone else touches it.
  FLASHMOE_DEVICE void init(uint32_t arrivals);
  FLASHMOE_DEVICE void arrive();
  // One arrival that makes the phase also wait for so many bytes of TMA.
  FLASHMOE_DEVICE void arrive_expect_tx(uint32_t bytes);
  // One arrival, one of init's count, made when all cp_async of this thread so far have landed. Those are then in the
  // generic proxy: whoever feeds them to wgmma needs fence_async_shared first.
  FLASHMOE_DEVICE void cp_async_arrive();
  FLASHMOE_DEVICE bool try_wait(uint32_t parity);  // may also give up after a while
  FLASHMOE_DEVICE bool has_ended(uint32_t parity);  // as wait, for one who has other things to do: returns at once
  FLASHMOE_DEVICE void wait(uint32_t parity);

 private:
  uint64_t word_;
};
FLASHMOE_DEVICE void fence_barrier_init();

// ---- Between the proxies: makes what this thread wrote, or saw by a barrier, in the generic proxy visible to the
// async proxy. To be called before the barrier by which the reader learns of it.
FLASHMOE_DEVICE void fence_async_shared();  // shared memory only
FLASHMOE_DEVICE void fence_async();         // shared and global memory

// Stores to shared memory that the async proxy reads, so that simt can see a missing fence. T: 4, 8 or 16 bytes.
template <class T>
FLASHMOE_DEVICE void store_shared(T* to, T value);

// ---- Copies from global to shared memory that do not wait.
// 16 bytes, of which the last 16 - bytes_valid come as zeros; with 0 nothing is read. Both addresses 16-byte aligned.
FLASHMOE_DEVICE void cp_async_16(void* shared, const void* global, int bytes_valid = 16);
FLASHMOE_DEVICE void cp_async_commit();
template <int kNewest>
FLASHMOE_DEVICE void cp_async_wait();  // until all but the kNewest latest commits have landed, for this thread

// A tensor and its box; made on the host by make_tensor_map (tensor_map.h). The kernel takes it as a
// __grid_constant__ parameter or reads it from global memory.
#if defined(__CUDACC__)
using TensorMap = CUtensorMap;
#else
struct TensorMap;
#endif
enum class CacheHint : uint8_t { kNone, kEvictFirst, kEvictLast };
FLASHMOE_DEVICE void prefetch_tensor_map(const TensorMap* map);
// One thread. The box whose first element is (x, y[, z]), x innermost, in elements; outside the tensor it is zeros.
// The barrier counts the box's full size in bytes. `shared` is aligned to 1024 bytes where the map swizzles, else 128.
FLASHMOE_DEVICE void tma_load_2d(void* shared, const TensorMap* map, int x, int y, Barrier* barrier,
                                 CacheHint hint = CacheHint::kNone);
FLASHMOE_DEVICE void tma_load_3d(void* shared, const TensorMap* map, int x, int y, int z, Barrier* barrier,
                                 CacheHint hint = CacheHint::kNone);

// ---- Hopper's matrix product. Warpgroup verbs. Operands are K-major: rows of 128 bytes, swizzled, in groups of
// eight rows (1024 bytes, aligned to that) that follow each other. swizzle_128 says where a byte of such a tile lies.
FLASHMOE_HD constexpr uint32_t swizzle_128(uint32_t row, uint32_t byte_in_row) {
  return row * 128 + (byte_in_row ^ (row % 8) * 16);
}
// Of a tile at that address in shared memory. Bits 0-13: address; 16-29: leading offset, unused by such a tile; 32-45:
// offset from one group of eight rows to the next; 62-63: swizzle, 1 for 128 bytes. All in units of 16 bytes.
FLASHMOE_HD constexpr uint64_t wgmma_descriptor_bits(uint32_t address) {
  return (address >> 4 & 0x3fff) | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}
// `byte_in_row`: where the step of K begins, a multiple of 32; each product takes 32 bytes of a row.
FLASHMOE_DEVICE uint64_t wgmma_descriptor(const void* tile, int byte_in_row = 0);
// Before the first product, and after any access of this thread to accumulators. Name those arrays here and in
// wgmma_wait, that the compiler moves no access across.
template <class... Accumulators>
FLASHMOE_DEVICE void wgmma_fence(Accumulators&... accumulators);
// acc = a · bᵀ (+ acc): 64 × N, fp32; K is 16 in bf16 and fp16, 8 in fp32, which is cut to tf32 by dropping bits.
// N: 8, 16, 32, 64, 96, 128, 192 or 256. acc may not be touched until wgmma_wait. Thread t of the warpgroup holds in
// acc[i] row wgmma_row(t, i) and column wgmma_column(t, i).
template <DType dtype, int N>
FLASHMOE_DEVICE void wgmma(float (&acc)[N / 2], uint64_t a, uint64_t b, bool accumulate);
FLASHMOE_DEVICE void wgmma_commit();
// Until all but the kNewest latest commits are done.
template <int kNewest, class... Accumulators>
FLASHMOE_DEVICE void wgmma_wait(Accumulators&... accumulators);
FLASHMOE_HD constexpr int wgmma_row(int thread, int i) {
  return thread % 128 / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
}
FLASHMOE_HD constexpr int wgmma_column(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }

// Registers per thread of this warpgroup from here on; a multiple of 8, 24 to 256. Warpgroup verbs.
template <int kRegisters>
FLASHMOE_DEVICE void increase_registers();
template <int kRegisters>
FLASHMOE_DEVICE void decrease_registers();

// ---- Ampere's matrix product. Warp verbs. acc += a · bᵀ, 16 × 8; K is 16 in bf16 and fp16, 8 in fp32 cut to tf32.
// With g = lane / 4 and q = lane % 4: acc[i] is row g + i / 2 · 8, column 2q + i % 2. A 16-bit register holds k = 2q
// and 2q + 1: a[i] of row g + i % 2 · 8 from k = i / 2 · 8 on, b[i] of column g from k = i · 8 on. A tf32 register
// holds one: a[i] row g + i % 2 · 8, k = q + i / 2 · 4; b[i] column g, k = q + i · 4.
// An fp32 that mma_sync cuts to the nearest tf32; halves go away from zero. Without it the cut is towards zero.
FLASHMOE_DEVICE uint32_t round_to_tf32(uint32_t fp32);
template <DType dtype>
FLASHMOE_DEVICE void mma_sync(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
// Four matrices of 8 rows of 16 bytes; lane l gives the address of row l % 8 of matrix l / 8, and gets in words[i] the
// four bytes at lane % 4 · 4 in row lane / 4 of matrix i.
FLASHMOE_DEVICE void ldmatrix_x4(uint32_t (&words)[4], const void* shared_row);
// The same of matrices of 8 rows of eight 16-bit elements, each transposed: a lane gets in words[i] column lane / 4 of
// matrix i, of it the elements in rows lane % 4 · 2, in the low half, and lane % 4 · 2 + 1.
FLASHMOE_DEVICE void ldmatrix_x4_trans(uint32_t (&words)[4], const void* shared_row);

// ---- Memory order. On uint32_t and uint64_t; at the scope of the GPU, or with _system of all GPUs and the host.
template <class T>
FLASHMOE_DEVICE T load_relaxed(const T* word);
template <class T>
FLASHMOE_DEVICE T load_acquire(const T* word);
template <class T>
FLASHMOE_DEVICE void store_release(T* word, T value);
template <class T>
FLASHMOE_DEVICE T load_acquire_system(const T* word);
template <class T>
FLASHMOE_DEVICE void store_release_system(T* word, T value);
template <class T>
FLASHMOE_DEVICE T fetch_add_relaxed(T* word, T value);
// Acquire and release; they return what was there, compare_exchange whether it was `expected`.
template <class T>
FLASHMOE_DEVICE T fetch_add(T* word, T value);
template <class T>
FLASHMOE_DEVICE T fetch_sub(T* word, T value);
template <class T>
FLASHMOE_DEVICE bool compare_exchange(T* word, T expected, T desired);
// A load of data that a peer or this kernel writes: never through the read-only cache. T: 4, 8 or 16 bytes.
template <class T>
FLASHMOE_DEVICE T load_coherent(const T* from);

struct alignas(16) Words4 {
  uint32_t word[4];
};

// ---- Time: one clock for all blocks of a GPU, and for no other GPU. How often it moves on differs: some GPUs let it
// stand still for a microsecond.
FLASHMOE_DEVICE uint64_t now_ns();
FLASHMOE_DEVICE void sleep_ns(uint32_t duration);

// ---- Pairs of 16-bit floats, the first in the low half; dtype is kBFloat16 or kFloat16. Rounds to nearest even.
struct FloatPair {
  float first, second;
};
template <DType dtype>
FLASHMOE_DEVICE uint32_t pack_pair(float first, float second);
template <DType dtype>
FLASHMOE_DEVICE FloatPair unpack_pair(uint32_t pair);

}  // namespace flashmoe::gpu

#if defined(__CUDACC__)
#include "gpu/ptx.cuh"
#else
#include "gpu/simt_verbs.h"
#endif
