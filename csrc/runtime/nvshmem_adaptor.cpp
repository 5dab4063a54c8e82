// NvshmemCalls by NVSHMEM's own headers, the only host code that includes them, and by the CUDA runtime. Nothing is
// linked: each function is looked up in the library that was found.
//
// nvshmem_init and nvshmemx_init_attr end the process when they fail; nvshmemx_hostlib_init_attr returns.
#include <cuda_runtime_api.h>
#include <nvshmem_host.h>

#include <cstring>

#include "runtime/cuda_device.h"
#include "runtime/moe_cuda.h"
#include "runtime/nvshmem_library.h"

namespace flashmoe {
namespace {

static_assert(sizeof(NvshmemId) == sizeof(nvshmemx_uniqueid_t));

template <class Function>
Function* look_up(const NvshmemLibrary& library, Function*, const char* name) {
  return reinterpret_cast<Function*>(library.symbol(name));
}
#define FLASHMOE_LOOK_UP(name) look_up(library, &name, #name)

NvshmemStatus status_of(int status) {
  if (status == NVSHMEM_STATUS_IS_BOOTSTRAPPED) return NvshmemStatus::kBootstrapped;
  // With several PEs on a GPU too, by whatever means.
  const bool initialized = status >= NVSHMEM_STATUS_IS_INITIALIZED && status <= NVSHMEM_STATUS_FULL_MPG;
  return initialized ? NvshmemStatus::kInitialized : NvshmemStatus::kNone;
}

}  // namespace

NvshmemVersion nvshmem_headers() {
  return {NVSHMEM_VENDOR_MAJOR_VERSION, NVSHMEM_VENDOR_MINOR_VERSION, NVSHMEM_VENDOR_PATCH_VERSION};
}

NvshmemCalls nvshmem_calls(const NvshmemLibrary& library) {
  NvshmemCalls calls;
  calls.version = [version = library.version] { return version; };
  calls.status = [f = FLASHMOE_LOOK_UP(nvshmemx_init_status)] { return status_of(f()); };
  calls.unique_id = [f = FLASHMOE_LOOK_UP(nvshmemx_get_uniqueid)](NvshmemId& id) {
    nvshmemx_uniqueid_t made = NVSHMEMX_UNIQUEID_INITIALIZER;
    const int error = f(&made);
    std::memcpy(id.data(), &made, id.size());
    return error;
  };
  calls.initialize = [init = FLASHMOE_LOOK_UP(nvshmemx_hostlib_init_attr),
                      set = FLASHMOE_LOOK_UP(nvshmemx_set_attr_uniqueid_args)](const NvshmemId& id, int rank, int size) {
    nvshmemx_uniqueid_t unique;
    std::memcpy(&unique, id.data(), id.size());
    nvshmemx_init_attr_t attributes = NVSHMEMX_INIT_ATTR_INITIALIZER;
    if (const int error = set(rank, size, &unique, &attributes)) return error;
    return init(NVSHMEMX_INIT_WITH_UNIQUEID, &attributes);
  };
  calls.my_pe = FLASHMOE_LOOK_UP(nvshmem_my_pe);
  calls.n_pes = FLASHMOE_LOOK_UP(nvshmem_n_pes);
  calls.allocate = FLASHMOE_LOOK_UP(nvshmem_align);
  calls.free = FLASHMOE_LOOK_UP(nvshmem_free);
  calls.mapped = FLASHMOE_LOOK_UP(nvshmem_ptr);
  calls.barrier = FLASHMOE_LOOK_UP(nvshmem_barrier_all);
  calls.module_init = [f = FLASHMOE_LOOK_UP(nvshmemx_cumodule_init)](void* module) {
    return f(static_cast<CUmodule>(module));
  };
  calls.module_finalize = [f = FLASHMOE_LOOK_UP(nvshmemx_cumodule_finalize)](void* module) {
    return f(static_cast<CUmodule>(module));
  };
  calls.finalize = FLASHMOE_LOOK_UP(nvshmemx_hostlib_finalize);

  calls.num_devices = num_cuda_devices;
  calls.select_device = [](int device) {
    check_cuda(cudaSetDevice(device), "cudaSetDevice");
    check_cuda(cudaFree(nullptr), "making the GPU's context");  // which NVSHMEM looks for
  };
  calls.zero = [](void* data, size_t bytes) { check_cuda(cudaMemset(data, 0, bytes), "cudaMemset"); };
  calls.synchronize = [] { check_cuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize"); };
  return calls;
}

}  // namespace flashmoe
