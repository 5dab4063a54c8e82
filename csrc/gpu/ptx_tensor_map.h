// make_tensor_map by the driver, whose one function is asked for at run time: nothing links against libcuda.
#pragma once

#include <cuda_runtime_api.h>

#include "gpu/tensor_map.h"

namespace flashmoe::gpu {

// The driver's function, or why there is none.
struct TensorMapMaker {
  decltype(&cuTensorMapEncodeTiled) make = nullptr;
  std::string error;
};

inline TensorMapMaker find_tensor_map_maker() {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
  const cudaError_t asked =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t asked = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &entry, cudaEnableDefault, &found);
#endif
  if (asked != cudaSuccess)
    return {nullptr, std::string("no CUDA driver to make a tensor map: ") + cudaGetErrorString(asked)};
  if (found != cudaDriverEntryPointSuccess || !entry)
    return {nullptr, "the CUDA driver knows no tensor maps (12.0 is the oldest that does)"};
  return {reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry), {}};
}

inline std::string make_tensor_map(TensorMap* map, const TensorBox& box) {
  if (std::string error = tensor_box_error(box); !error.empty()) return error;
  static const TensorMapMaker driver = find_tensor_map_maker();  // every call makes maps: looked for once
  if (!driver.make) return driver.error;

  const CUtensorMapDataType types[] = {CU_TENSOR_MAP_DATA_TYPE_FLOAT32, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                                       CU_TENSOR_MAP_DATA_TYPE_FLOAT16};
  const cuuint32_t every_element[] = {1, 1, 1};
  const CUresult made = driver.make(
      map, types[int(box.dtype)], cuuint32_t(box.dims), const_cast<void*>(box.data), box.size, box.stride_bytes,
      box.box, every_element, CU_TENSOR_MAP_INTERLEAVE_NONE,
      box.swizzle ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (made == CUDA_SUCCESS) return {};
  return "the CUDA driver refused a tensor map: error " + std::to_string(int(made));
}

}  // namespace flashmoe::gpu
