// Host side of TMA: makes the map that a kernel's tma_load reads by.
#pragma once

#include <string>

#include "gpu/tensor_box.h"
#include "gpu/verbs.h"

namespace flashmoe::gpu {

// Empty, or why there is no map: also what the driver says.
std::string make_tensor_map(TensorMap* map, const TensorBox& box);

}  // namespace flashmoe::gpu

#if defined(__CUDACC__)
#include "gpu/ptx_tensor_map.h"
#else
namespace flashmoe::gpu {

inline std::string make_tensor_map(TensorMap* map, const TensorBox& box) {
  std::string error = tensor_box_error(box);
  if (error.empty()) *map = {box};
  return error;
}

}  // namespace flashmoe::gpu
#endif
