// Ampere's matrix product of one warp, in PTX.
#pragma once

#include "gpu/ptx_barrier.cuh"

namespace flashmoe::gpu {

#define FLASHMOE_MMA(shape, type)                                                                          \
  asm volatile("mma.sync.aligned." shape ".row.col.f32." type "." type                                     \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                      \
               : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])                                    \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

template <DType dtype>
FLASHMOE_DEVICE void mma_sync(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (dtype == DType::kBFloat16)
    FLASHMOE_MMA("m16n8k16", "bf16");
  else if constexpr (dtype == DType::kFloat16)
    FLASHMOE_MMA("m16n8k16", "f16");
  else
    FLASHMOE_MMA("m16n8k8", "tf32");
}
#undef FLASHMOE_MMA

FLASHMOE_DEVICE uint32_t round_to_tf32(uint32_t fp32) {
  uint32_t tf32;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(tf32) : "r"(fp32));
  return tf32;
}

#define FLASHMOE_LDMATRIX(kind)                                                            \
  asm volatile("ldmatrix.sync.aligned.m8n8.x4" kind ".shared.b16 {%0, %1, %2, %3}, [%4];" \
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])            \
               : "r"(shared_address(shared_row))                                          \
               : "memory")

FLASHMOE_DEVICE void ldmatrix_x4(uint32_t (&words)[4], const void* shared_row) { FLASHMOE_LDMATRIX(""); }
FLASHMOE_DEVICE void ldmatrix_x4_trans(uint32_t (&words)[4], const void* shared_row) { FLASHMOE_LDMATRIX(".trans"); }
#undef FLASHMOE_LDMATRIX

}  // namespace flashmoe::gpu
