// Copies from global to shared memory that do not wait, in PTX: cp.async and TMA.
#pragma once

#include "gpu/ptx_barrier.cuh"

namespace flashmoe::gpu {

// .cg: through L2 alone, so that it sees what a peer or another SM wrote. L2 fetches whole lines: where a step takes
// half of one, the next takes the rest.
FLASHMOE_DEVICE void cp_async_16(void* shared, const void* global, int bytes_valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(bytes_valid)
               : "memory");
}
FLASHMOE_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kNewest>
FLASHMOE_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kNewest) : "memory");
}

FLASHMOE_DEVICE void prefetch_tensor_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Not volatile: the compiler may make a policy once, outside the loop.
FLASHMOE_DEVICE uint64_t cache_policy(CacheHint hint) {
  uint64_t policy;
  if (hint == CacheHint::kEvictFirst)
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  else
    asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

FLASHMOE_DEVICE void tma_load_2d(void* shared, const TensorMap* map, int x, int y, Barrier* barrier, CacheHint hint) {
  if (hint == CacheHint::kNone)
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
            shared_address(shared)),
        "l"(map), "r"(x), "r"(y), "r"(shared_address(barrier))
        : "memory");
  else
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(shared)),
        "l"(map), "r"(x), "r"(y), "r"(shared_address(barrier)), "l"(cache_policy(hint))
        : "memory");
}

FLASHMOE_DEVICE void tma_load_3d(void* shared, const TensorMap* map, int x, int y, int z, Barrier* barrier,
                                 CacheHint hint) {
  if (hint == CacheHint::kNone)
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3, %4}], [%5];" ::"r"(shared_address(shared)),
        "l"(map), "r"(x), "r"(y), "r"(z), "r"(shared_address(barrier))
        : "memory");
  else
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(shared_address(shared)),
        "l"(map), "r"(x), "r"(y), "r"(z), "r"(shared_address(barrier)), "l"(cache_policy(hint))
        : "memory");
}

}  // namespace flashmoe::gpu
