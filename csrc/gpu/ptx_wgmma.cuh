// Hopper's matrix product of a warpgroup, in PTX.
#pragma once

#include "gpu/ptx_barrier.cuh"

namespace flashmoe::gpu {

FLASHMOE_DEVICE uint64_t wgmma_descriptor(const void* tile, int byte_in_row) {
  return wgmma_descriptor_bits(shared_address(tile) + uint32_t(byte_in_row));
}

// An empty asm that claims to change the accumulators: no access of theirs moves across it.
template <int kCount>
FLASHMOE_DEVICE void pin_accumulators(float (&acc)[kCount]) {
  FLASHMOE_UNROLL
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(acc[i])::"memory");
}

template <class... Accumulators>
FLASHMOE_DEVICE void wgmma_fence(Accumulators&... accumulators) {
  (pin_accumulators(accumulators), ...);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
FLASHMOE_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kNewest, class... Accumulators>
FLASHMOE_DEVICE void wgmma_wait(Accumulators&... accumulators) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kNewest) : "memory");
  (pin_accumulators(accumulators), ...);
}

template <int kRegisters>
FLASHMOE_DEVICE void increase_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
FLASHMOE_DEVICE void decrease_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// The names of N / 2 operands, written out since asm numbers them and the preprocessor cannot count.
#define FLASHMOE_NAMES_8 "%0, %1, %2, %3"
#define FLASHMOE_NAMES_16 FLASHMOE_NAMES_8 ", %4, %5, %6, %7"
#define FLASHMOE_NAMES_32 FLASHMOE_NAMES_16 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define FLASHMOE_NAMES_64 \
  FLASHMOE_NAMES_32 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FLASHMOE_NAMES_96 \
  FLASHMOE_NAMES_64 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define FLASHMOE_NAMES_128 \
  FLASHMOE_NAMES_96 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FLASHMOE_NAMES_192                                                                                  \
  FLASHMOE_NAMES_128 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "   \
                     "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define FLASHMOE_NAMES_256                                                                                  \
  FLASHMOE_NAMES_192 ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, "   \
                     "%110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, " \
                     "%124, %125, %126, %127"

#define FLASHMOE_ACC_4(i) "+f"(acc[i]), "+f"(acc[i + 1]), "+f"(acc[i + 2]), "+f"(acc[i + 3])
#define FLASHMOE_ACC_16(i) FLASHMOE_ACC_4(i), FLASHMOE_ACC_4(i + 4), FLASHMOE_ACC_4(i + 8), FLASHMOE_ACC_4(i + 12)
#define FLASHMOE_ACC_32(i) FLASHMOE_ACC_16(i), FLASHMOE_ACC_16(i + 16)
#define FLASHMOE_OPERANDS_8 FLASHMOE_ACC_4(0)
#define FLASHMOE_OPERANDS_16 FLASHMOE_ACC_4(0), FLASHMOE_ACC_4(4)
#define FLASHMOE_OPERANDS_32 FLASHMOE_ACC_16(0)
#define FLASHMOE_OPERANDS_64 FLASHMOE_ACC_32(0)
#define FLASHMOE_OPERANDS_96 FLASHMOE_ACC_32(0), FLASHMOE_ACC_16(32)
#define FLASHMOE_OPERANDS_128 FLASHMOE_ACC_32(0), FLASHMOE_ACC_32(32)
#define FLASHMOE_OPERANDS_192 FLASHMOE_OPERANDS_128, FLASHMOE_ACC_32(64)
#define FLASHMOE_OPERANDS_256 FLASHMOE_OPERANDS_192, FLASHMOE_ACC_32(96)

// `k_type`: such as "k16.f32.bf16.bf16". `flags`: no negation; in 16-bit types also no transposition. da, db and
// add: the numbers of the operands after the accumulators.
#define FLASHMOE_WGMMA(n, k_type, da, db, add, flags)                                                      \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %" add ", 0; wgmma.mma_async.sync.aligned.m64n" #n k_type   \
               " {" FLASHMOE_NAMES_##n "}, %" da ", %" db ", p, " flags "; }"                              \
               : FLASHMOE_OPERANDS_##n                                                                     \
               : "l"(a), "l"(b), "r"(int(accumulate)))
#define FLASHMOE_WGMMA_OF(n, da, db, add)                                                                  \
  if constexpr (N == n && dtype == DType::kBFloat16)                                                       \
    FLASHMOE_WGMMA(n, "k16.f32.bf16.bf16", da, db, add, "1, 1, 0, 0");                                     \
  else if constexpr (N == n && dtype == DType::kFloat16)                                                   \
    FLASHMOE_WGMMA(n, "k16.f32.f16.f16", da, db, add, "1, 1, 0, 0");                                       \
  else if constexpr (N == n)                                                                               \
    FLASHMOE_WGMMA(n, "k8.f32.tf32.tf32", da, db, add, "1, 1")

template <DType dtype, int N>
FLASHMOE_DEVICE void wgmma(float (&acc)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(N == 8 || N == 16 || N == 32 || N == 64 || N == 96 || N == 128 || N == 192 || N == 256);
  FLASHMOE_WGMMA_OF(8, "4", "5", "6");
  FLASHMOE_WGMMA_OF(16, "8", "9", "10");
  FLASHMOE_WGMMA_OF(32, "16", "17", "18");
  FLASHMOE_WGMMA_OF(64, "32", "33", "34");
  FLASHMOE_WGMMA_OF(96, "48", "49", "50");
  FLASHMOE_WGMMA_OF(128, "64", "65", "66");
  FLASHMOE_WGMMA_OF(192, "96", "97", "98");
  FLASHMOE_WGMMA_OF(256, "128", "129", "130");
}

}  // namespace flashmoe::gpu
