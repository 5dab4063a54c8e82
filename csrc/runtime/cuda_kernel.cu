#include "runtime/cuda_kernel.h"

#include <cuda.h>

#include "runtime/cuda_device.h"
#include "runtime/moe_cuda.h"

namespace flashmoe {
namespace {

CudaKernel by_address(CudaKernelKind kind, DType dtype) {
  switch (kind) {
    case CudaKernelKind::kSm80: return sm80_kernel(dtype);
    case CudaKernelKind::kSm90Wide: return sm90_kernel(dtype, Sm90Tiles::kWide);
    case CudaKernelKind::kSm90Narrow: return sm90_kernel(dtype, Sm90Tiles::kNarrow);
    case CudaKernelKind::kExactBackward: return exact_backward_kernel();
    case CudaKernelKind::kSm80Backward: return sm80_backward_kernel(dtype);
    default: return exact_kernel();
  }
}

#ifdef FLASHMOE_NVSHMEM_KERNELS
CudaKernel by_transport(CudaKernelKind kind, DType dtype) {
  switch (kind) {
    case CudaKernelKind::kSm80: return nvshmem_sm80_kernel(dtype);
    case CudaKernelKind::kSm90Wide: return nvshmem_sm90_kernel(dtype, Sm90Tiles::kWide);
    case CudaKernelKind::kSm90Narrow: return nvshmem_sm90_kernel(dtype, Sm90Tiles::kNarrow);
    case CudaKernelKind::kExactBackward: return nvshmem_exact_backward_kernel();
    case CudaKernelKind::kSm80Backward: return nvshmem_sm80_backward_kernel(dtype);
    default: return nvshmem_exact_kernel();
  }
}

// A function of the driver, which is not linked with.
template <class F>
F driver_function(const char* name, F) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
  check_cuda(cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &found), name);
#else
  check_cuda(cudaGetDriverEntryPoint(name, &function, cudaEnableDefault, &found), name);
#endif
  if (!function) throw std::runtime_error(std::string("flashmoe: the CUDA driver has no ") + name);
  return reinterpret_cast<F>(function);
}

void* module_of(const CudaKernel& kernel) {
  cudaFunction_t function = nullptr;
  check_cuda(cudaGetFuncBySymbol(&function, kernel.function), "cudaGetFuncBySymbol");
  CUmodule module = nullptr;
  const auto get_module = driver_function("cuFuncGetModule", &cuFuncGetModule);
  if (const CUresult error = get_module(&module, function); error != CUDA_SUCCESS)
    throw std::runtime_error("flashmoe: cuFuncGetModule: error " + std::to_string(int(error)));
  return module;
}
#endif

}  // namespace

#ifdef FLASHMOE_NVSHMEM_KERNELS
bool has_nvshmem_kernels() { return true; }

CudaKernel kernel_of(CudaKernelKind kind, DType dtype, bool all_mapped) {
  return all_mapped ? by_address(kind, dtype) : by_transport(kind, dtype);
}

// A source file is a module; each holds a copy of the transport's state.
std::vector<void*> nvshmem_modules() {
  int device = 0, major = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
  std::vector<void*> modules{module_of(nvshmem_exact_kernel()), module_of(nvshmem_exact_backward_kernel()),
                             module_of(nvshmem_sm80_kernel(DType::kFloat32)),
                             module_of(nvshmem_sm80_backward_kernel(DType::kBFloat16))};
  if (major == 9) modules.push_back(module_of(nvshmem_sm90_kernel(DType::kBFloat16, Sm90Tiles::kWide)));
  return modules;
}
#else
bool has_nvshmem_kernels() { return false; }

CudaKernel kernel_of(CudaKernelKind kind, DType dtype, bool) { return by_address(kind, dtype); }

std::vector<void*> nvshmem_modules() { return {}; }
#endif

}  // namespace flashmoe
