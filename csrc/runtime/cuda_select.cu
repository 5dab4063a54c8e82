#include "kernel/select_tokens.h"
#include "runtime/cuda_device.h"
#include "runtime/select.h"

namespace flashmoe {
namespace {

constexpr int kWarps = 4;
constexpr size_t kSharedBytes = 48 << 10;  // what every GPU gives without being asked

__global__ void __launch_bounds__(32 * kWarps) select_kernel(const __grid_constant__ SelectCall call) {
  gpu::select_tokens(call);
}

}  // namespace

void select_on_gpu(const SelectCall& call, int device, void* stream) {
  const size_t bytes = gpu::selection_bytes(call.selection);
  if (bytes > kSharedBytes)
    throw std::invalid_argument("num_experts must be at most " + std::to_string(kSharedBytes / sizeof(uint64_t)) +
                                " less the number of groups on a GPU, got " + std::to_string(call.selection.num_experts));
  if (!call.num_tokens) return;
  const OnDevice there(device);
  const int warps = kWarps * bytes <= kSharedBytes ? kWarps : 1;
  void* arguments[] = {const_cast<SelectCall*>(&call)};
  check_cuda(cudaLaunchKernel(select_kernel, dim3((call.num_tokens + warps - 1) / warps), dim3(32 * warps), arguments,
                              warps * bytes, static_cast<cudaStream_t>(stream)),
             "the selection of experts");
}

}  // namespace flashmoe
