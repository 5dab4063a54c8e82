// The remote verbs by NVSHMEM's device functions: the only file that includes its headers.
//
// They are compiled into the kernel's unit: relocatable device code would cost it setmaxnreg, and calls out of it the
// pipelining of its matrix products. NVSHMEM's headers can be had so from 3.7 on, for transports that a thread of
// the host drives (its proxy): those that the GPU drives itself come only with calls. The module that holds such a
// kernel knows nothing of the transport until the host has called nvshmemx_cumodule_init on it.
//
// A put and the ordering after a word are pages of code, at a dozen places of the agent's: inlined there they are half of
// what the compiler works on. They are rare, so a call is nothing beside them, and kernels call the one copy. Only a
// kernel that moves registers between its warps may not: for its calls ptxas would ignore setmaxnreg.
#pragma once

#if __has_include(<infiniband/mlx5dv.h>)
#error "infiniband/mlx5dv.h is in the include path: NVSHMEM's headers would take it, and serialise the matrix products"
#endif
#if !defined(NVSHMEM_ENABLE_ALL_DEVICE_INLINING) || defined(__CUDACC_RDC__)
#error "kernels that call NVSHMEM need NVSHMEM_ENABLE_ALL_DEVICE_INLINING, and no relocatable device code"
#endif

// Not nvshmem.h, which has the collectives too: seconds of parsing for every architecture.
#include <device/nvshmem_defines.h>
#include <device/nvshmemx_defines.h>

#include "gpu/verbs.h"

#if defined(FLASHMOE_CALL_NOTHING)
#define FLASHMOE_CALLED FLASHMOE_DEVICE
#else
#define FLASHMOE_CALLED inline __device__ __noinline__
#endif

static_assert(NVSHMEM_VENDOR_MAJOR_VERSION * 100 + NVSHMEM_VENDOR_MINOR_VERSION >= 307,
              "NVSHMEM's device functions can be inlined from 3.7 on");

namespace flashmoe::gpu {

FLASHMOE_CALLED void put_signal(int pe, std::byte* to, const std::byte* source, size_t bytes, uint64_t* signal,
                                uint64_t word) {
#if defined(__CUDA_ARCH__)
  // What others wrote and this thread acquired must be there for a device that reads over PCIe.
  __threadfence_system();
  if (bytes)
    nvshmem_putmem_signal_nbi(to, source, bytes, signal, word, NVSHMEM_SIGNAL_SET, pe);
  else
    nvshmemx_signal_op(signal, word, NVSHMEM_SIGNAL_SET, pe);
#endif
}
FLASHMOE_DEVICE void remote_put_signal(int, int pe, std::byte* to, const std::byte* source, size_t bytes,
                                       uint64_t* signal, uint64_t word) {
  put_signal(pe, to, source, bytes, signal, word);
}

// A value of the device state, asked for anew each time: taken out of the agent's loop, as compilers do with constants,
// the answers would cost it the predicates that it needs, and the kernel a stack.
FLASHMOE_DEVICE int asked_anew(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// nvshmem_uint64_test, which also orders what the transport wrote before the word, where the hardware does not.
FLASHMOE_CALLED void order_after_word() {
#if defined(__CUDA_ARCH__)
  __threadfence();
  if (asked_anew(nvshmemi_device_state_d.job_connectivity) > NVSHMEMI_JOB_GPU_PROXY)
    nvshmemi_transfer_enforce_consistency_at_target(true);
#endif
}
FLASHMOE_DEVICE bool remote_test(uint64_t* signal, uint64_t word) {
  if (*static_cast<volatile uint64_t*>(signal) != word) return false;
  order_after_word();
  return true;
}

// nvshmem_quiet in its two halves, since the whole waits without end for a peer that is gone: how many bytes of requests
// the proxy has been given, and whether it says that all of so many have landed. These are fields of 3.7's device state.
// Where the proxy moves nothing there is nothing to ask.
FLASHMOE_DEVICE uint64_t remote_quiet_begin(int) {
  const auto& state = nvshmemi_device_state_d;
  if (asked_anew(state.job_connectivity) <= NVSHMEMI_JOB_GPU_LDST) return 0;
  if (asked_anew(state.proxy) != NVSHMEMI_PROXY_FULL) return 0;
  const uint64_t issued = *static_cast<volatile uint64_t*>(state.proxy_channels_issue);
  atomicMax(reinterpret_cast<unsigned long long*>(state.proxy_channels_quiet_issue), issued);
  return issued;
}
FLASHMOE_DEVICE bool remote_quiet_done(int, uint64_t ticket) {
  if (ticket == 0) return true;
  if (*static_cast<volatile uint64_t*>(nvshmemi_device_state_d.proxy_channels_quiet_ack) < ticket) return false;
  __threadfence_system();
  return true;
}

}  // namespace flashmoe::gpu
