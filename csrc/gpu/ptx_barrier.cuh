// Barriers in shared memory and the fences between the proxies, in PTX.
#pragma once

#include "gpu/verbs.h"

namespace flashmoe::gpu {

// The 32-bit address within the shared window, which most instructions on shared memory take.
FLASHMOE_DEVICE uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

FLASHMOE_DEVICE void Barrier::init(uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&word_)), "r"(arrivals) : "memory");
}

FLASHMOE_DEVICE void Barrier::arrive() {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.shared::cta.b64 state, [%0]; }" ::"r"(shared_address(&word_))
               : "memory");
}

FLASHMOE_DEVICE void Barrier::arrive_expect_tx(uint32_t bytes) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1; }" ::"r"(
                   shared_address(&word_)),
               "r"(bytes)
               : "memory");
}

FLASHMOE_DEVICE void Barrier::cp_async_arrive() {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(&word_)) : "memory");
}

FLASHMOE_DEVICE bool Barrier::has_ended(uint32_t parity) {
  uint32_t ended;
  asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
               : "=r"(ended)
               : "r"(shared_address(&word_)), "r"(parity)
               : "memory");
  return ended;
}

FLASHMOE_DEVICE bool Barrier::try_wait(uint32_t parity) {
#if __CUDA_ARCH__ >= 900
  uint32_t ended;
  asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
               : "=r"(ended)
               : "r"(shared_address(&word_)), "r"(parity)
               : "memory");
  return ended;
#else
  return has_ended(parity);
#endif
}

FLASHMOE_DEVICE void Barrier::wait(uint32_t parity) {
  while (!try_wait(parity)) {
  }
}

// Before sm_90 there is no second proxy, and nothing to fence.
FLASHMOE_DEVICE void fence_async_shared() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

FLASHMOE_DEVICE void fence_async() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async;" ::: "memory");
#endif
}

FLASHMOE_DEVICE void fence_barrier_init() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  fence_async_shared();
#endif
}

template <class T>
FLASHMOE_DEVICE void store_shared(T* to, T value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  *to = value;
}

}  // namespace flashmoe::gpu
