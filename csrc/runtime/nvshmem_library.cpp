#include "runtime/nvshmem_library.h"

#include <dlfcn.h>
#include <link.h>

#include <stdexcept>

namespace flashmoe {
namespace {

constexpr const char* kName = "libnvshmem_host.so.3";

std::string path_of(void* handle) {
  link_map* map = nullptr;
  return dlinfo(handle, RTLD_DI_LINKMAP, &map) == 0 && map ? map->l_name : kName;
}

NvshmemLibrary opened(void* handle, const char* found) {
  NvshmemLibrary library{handle, path_of(handle), found, {}};
  auto* version = reinterpret_cast<void (*)(int*, int*, int*)>(library.symbol("nvshmemx_vendor_get_version_info"));
  version(&library.version.major, &library.version.minor, &library.version.patch);
  return library;
}

}  // namespace

void* NvshmemLibrary::symbol(const char* name) const {
  void* found = dlsym(handle, name);
  if (!found) throw std::runtime_error("flashmoe: " + path + " is no NVSHMEM library that this build knows: no " + name);
  return found;
}

NvshmemLibrary open_nvshmem_library(const std::string& home, const std::vector<std::string>& folders) {
  if (void* mapped = dlopen(kName, RTLD_NOW | RTLD_NOLOAD)) return opened(mapped, "mapped in this process before");
  if (!home.empty()) {
    // Whoever names a place means it.
    if (void* handle = dlopen((home + "/lib/" + kName).c_str(), RTLD_NOW | RTLD_LOCAL)) return opened(handle, "NVSHMEM_HOME");
    throw std::runtime_error("flashmoe: NVSHMEM_HOME is " + home + ", and its library cannot be loaded: " + dlerror());
  }
  std::string why;
  for (const std::string& folder : folders) {
    if (void* handle = dlopen((folder + "/" + kName).c_str(), RTLD_NOW | RTLD_LOCAL)) return opened(handle, "a package");
    why += std::string(dlerror()) + "; ";
  }
  if (void* handle = dlopen(kName, RTLD_NOW | RTLD_LOCAL)) return opened(handle, "the loader's search");
  throw std::runtime_error(
      "flashmoe: NVSHMEM's host library was not found (" + why + dlerror() +
      "): pip install nvidia-nvshmem-cu13, or -cu12 as torch's CUDA is, or set NVSHMEM_HOME");
}

}  // namespace flashmoe
