// Every verb once, for every element type and width: what nvcc and ptxas say of it is the test.
//   nvcc -std=c++20 -I csrc -Xptxas -v -gencode arch=compute_90a,code=sm_90a -c tests/cuda/verbs_compile.cu
// On other architectures the part that they lack is left out.
#include "gpu/tensor_map.h"
#include "gpu/verbs.h"

namespace flashmoe::gpu {
namespace {

template <DType dtype>
__device__ void warp_products(float* out) {
  uint32_t a[4];
  ldmatrix_x4(a, shared_memory() + lane() * 16);
  const uint32_t b[2] = {a[2], a[3]};
  ldmatrix_x4_trans(a, shared_memory() + lane() * 16);
  float acc[4] = {};
  mma_sync<dtype>(acc, a, b);
  for (int i = 0; i < 4; ++i) out[i] += acc[i];
}

template <class T>
__device__ void memory_order(T* word) {
  T seen = load_relaxed(word) + load_acquire(word + 1) + load_acquire_system(word + 2);
  store_release(word + 3, seen);
  store_release_system(word + 4, seen);
  seen = fetch_add(word + 5, seen) + fetch_sub(word + 6, seen);
  word[7] = compare_exchange(word + 8, seen, T{1}) ? load_coherent(word + 9) : seen;
}

__global__ void everywhere(uint32_t* words, uint64_t* long_words, float* floats, const Words4* rows, uint64_t* until) {
  const int t = block() * block_threads() + thread_in_block();
  std::byte* shared = shared_memory();
  Barrier* barrier = reinterpret_cast<Barrier*>(shared + 8192);
  if (thread_in_block() == 0) {
    barrier->init(block_threads());
    fence_barrier_init();
  }
  sync_block();

  cp_async_16(shared + thread_in_block() * 16, rows + t, t % 2 ? 16 : 0);
  cp_async_commit();
  cp_async_wait<1>();
  barrier->cp_async_arrive();
  barrier->wait(0);
  if (barrier->try_wait(1)) barrier->arrive();
  store_shared(reinterpret_cast<Words4*>(shared) + lane(), load_coherent(rows + t));
  fence_async_shared();
  fence_async();
  warp_in_block() % 2 ? named_barrier_sync(1, 64) : named_barrier_arrive(1, 64);

  const uint32_t mask = ballot(t % 3) ^ match_any(uint32_t(t) / 4);
  words[t] = shuffle(mask, 3) + shuffle_up(mask, 1) + shuffle_down(mask, 2) + shuffle_xor(mask, 16);
  long_words[t] = shuffle(long_words[t], 1) + count_bits(mask) + lowest_bit(mask | 1) + num_blocks() + multiprocessor();
  sync_warp();
  memory_order(words + t);
  memory_order(long_words + t);
  while (now_ns() < *until) sleep_ns(100);

  warp_products<DType::kBFloat16>(floats + t);
  warp_products<DType::kFloat16>(floats + t);
  warp_products<DType::kFloat32>(floats + t);
  const FloatPair bf16 = unpack_pair<DType::kBFloat16>(pack_pair<DType::kBFloat16>(floats[t], floats[t + 1]));
  const FloatPair f16 = unpack_pair<DType::kFloat16>(pack_pair<DType::kFloat16>(bf16.first, bf16.second));
  floats[t] = f16.first + f16.second;
}

__global__ void tma(const __grid_constant__ TensorMap map) {
#if __CUDA_ARCH__ >= 900
  Barrier* barrier = reinterpret_cast<Barrier*>(shared_memory() + 65536);
  if (thread_in_block() != 0) return;
  barrier->init(1);
  fence_barrier_init();
  prefetch_tensor_map(&map);
  barrier->arrive_expect_tx(6 * 8192);
  int stage = 0;
  for (CacheHint hint : {CacheHint::kNone, CacheHint::kEvictFirst, CacheHint::kEvictLast}) {
    tma_load_2d(shared_memory() + stage++ * 8192, &map, 0, 64, barrier, hint);
    tma_load_3d(shared_memory() + stage++ * 8192, &map, 0, 64, 2, barrier, hint);
  }
  barrier->wait(0);
#endif
}

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
// Two commits in flight, as a main loop has them.
template <DType dtype, int N>
__global__ void __launch_bounds__(256, 1) warpgroup_product(float* out, int steps) {
  if (warp_in_block() < 4) {
    decrease_registers<40>();
    return;
  }
  increase_registers<232>();
  const std::byte* a = shared_memory();
  float acc[N / 2];
  for (int step = 0; step < steps; ++step) {
    wgmma_fence(acc);
    for (int byte = 0; byte < 128; byte += 32)
      wgmma<dtype, N>(acc, wgmma_descriptor(a, byte), wgmma_descriptor(a + 8192, byte), step + byte > 0);
    wgmma_commit();
    wgmma_wait<1>(acc);
    sync_warp();
  }
  wgmma_wait<0>(acc);
  FLASHMOE_UNROLL
  for (int i = 0; i < N / 2; ++i)
    out[wgmma_row(thread_in_block(), i) * N + wgmma_column(thread_in_block(), i)] = acc[i];
}

template <DType dtype>
void warpgroup_products(float* out) {
  warpgroup_product<dtype, 8><<<1, 256>>>(out, 4);
  warpgroup_product<dtype, 16><<<1, 256>>>(out, 4);
  warpgroup_product<dtype, 32><<<1, 256>>>(out, 4);
  warpgroup_product<dtype, 64><<<1, 256>>>(out, 4);
  warpgroup_product<dtype, 96><<<1, 256>>>(out, 4);
  warpgroup_product<dtype, 128><<<1, 256>>>(out, 4);
  warpgroup_product<dtype, 192><<<1, 256>>>(out, 4);
  warpgroup_product<dtype, 256><<<1, 256>>>(out, 4);
}
template void warpgroup_products<DType::kBFloat16>(float*);
template void warpgroup_products<DType::kFloat16>(float*);
template void warpgroup_products<DType::kFloat32>(float*);
#endif

}  // namespace

std::string launch_each(uint32_t* words, uint64_t* long_words, float* floats, const Words4* rows, uint64_t* until) {
  everywhere<<<1, 64>>>(words, long_words, floats, rows, until);
  TensorMap map;
  const TensorBox box{DType::kBFloat16, rows, 3, {256, 128, 4}, {512, 65536}, {64, 64, 1}, true};
  std::string error = make_tensor_map(&map, box);
  if (error.empty()) tma<<<1, 32>>>(map);
  return error;
}

}  // namespace flashmoe::gpu
