// Host side of TMA: what tensor a kernel's tma_load reads, and in which boxes.
#pragma once

#include <cstdint>
#include <string>

#include "gpu/verbs.h"

namespace flashmoe::gpu {

// A row-major tensor of two or three dimensions; index 0 is the innermost, whose elements are adjacent.
struct TensorBox {
  DType dtype;
  const void* data;         // 16-byte aligned
  int dims;                 // 2 or 3
  uint64_t size[3];         // elements
  uint64_t stride_bytes[2]; // from one row to the next, and from one matrix to the next; multiples of 16
  uint32_t box[3];          // elements, 256 at most in each; box[0] fills 128 bytes or, swizzled, less
  bool swizzle;             // as wgmma's operands want it (swizzle_128)
};

// Empty, or what is wrong with the box.
std::string make_tensor_map(TensorMap* map, const TensorBox& box);

}  // namespace flashmoe::gpu

#if defined(__CUDACC__)
#include "gpu/ptx_tensor_map.h"
#else
#include "gpu/simt_tensor_map.h"
#endif
