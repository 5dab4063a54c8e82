// Where NVSHMEM's host library is: found when it is first asked for, since whoever has one GPU, or none, never needs it.
#pragma once

#include <string>
#include <vector>

#include "runtime/nvshmem_calls.h"

namespace flashmoe {

struct NvshmemLibrary {
  void* handle = nullptr;
  std::string path, found;  // `found` says how
  NvshmemVersion version;

  // std::runtime_error: it has none of that name.
  void* symbol(const char* name) const;
};

// In this order: the copy that is mapped in this process already, which is CUDA torch's own, and never a second one;
// $NVSHMEM_HOME/lib; `folders`, where packages keep it; the loader's own search. std::runtime_error: why there is none.
NvshmemLibrary open_nvshmem_library(const std::string& home, const std::vector<std::string>& folders);

// In a build with NVSHMEM's headers: of what version they are, and the calls that they describe.
NvshmemVersion nvshmem_headers();
NvshmemCalls nvshmem_calls(const NvshmemLibrary& library);

}  // namespace flashmoe
