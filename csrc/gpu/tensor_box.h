// What tensor a kernel's tma_load reads, and in which boxes.
#pragma once

#include <cstdint>
#include <string>

#include "protocol/config.h"

namespace flashmoe::gpu {

// A row-major tensor of two or three dimensions; index 0 is the innermost, whose elements are adjacent.
struct TensorBox {
  DType dtype;
  const void* data;          // 16-byte aligned
  int dims;                  // 2 or 3
  uint64_t size[3];          // elements
  uint64_t stride_bytes[2];  // from one row to the next, and from one matrix to the next; multiples of 16
  uint32_t box[3];           // elements, 1 to 256 in each; a row of the box is a multiple of 16 bytes
  bool swizzle;              // as wgmma's operands want it (swizzle_128): a row of the box is 128 bytes
};

// Empty, or what is wrong with the box.
inline std::string tensor_box_error(const TensorBox& box) {
  if (box.dims != 2 && box.dims != 3) return "a tensor map has 2 or 3 dimensions, not " + std::to_string(box.dims);
  if (!box.data || reinterpret_cast<uintptr_t>(box.data) % 16) return "a tensor map's data are not 16-byte aligned";
  for (int d = 0; d < box.dims; ++d) {
    const std::string dimension = " in dimension " + std::to_string(d);
    if (box.size[d] == 0 || box.size[d] > uint64_t{1} << 32) return "a tensor map has an impossible size" + dimension;
    if (box.box[d] == 0 || box.box[d] > 256) return "a tensor map's box is not of 1 to 256 elements" + dimension;
  }
  for (int d = 0; d + 1 < box.dims; ++d)
    if (box.stride_bytes[d] == 0 || box.stride_bytes[d] % 16 || box.stride_bytes[d] >> 40)
      return "a tensor map's stride is not a multiple of 16 bytes: " + std::to_string(box.stride_bytes[d]);
  const uint64_t box_row = uint64_t(box.box[0]) * dtype_bytes(box.dtype);
  if (box_row % 16) return "a row of a tensor map's box is not a multiple of 16 bytes";
  if (box.swizzle && box_row != 128) return "a row of a swizzled tensor map's box is not 128 bytes";
  return {};
}

}  // namespace flashmoe::gpu
