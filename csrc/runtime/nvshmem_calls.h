// What is asked of NVSHMEM and, around it, of the CUDA runtime: one table, filled from the library where there is one,
// and by a fake in tests. Whoever uses it knows neither's headers.
#pragma once

#include <array>
#include <compare>
#include <cstddef>
#include <functional>
#include <string>

namespace flashmoe {

struct NvshmemVersion {
  int major = 0, minor = 0, patch = 0;
  auto operator<=>(const NvshmemVersion&) const = default;
  std::string text() const {
    return std::to_string(major) + "." + std::to_string(minor) + "." + std::to_string(patch);
  }
};

// Made by one PE, told to all, used once.
using NvshmemId = std::array<std::byte, 128>;

// How far the library has come in this process, whoever took it there.
enum class NvshmemStatus { kNone, kBootstrapped, kInitialized };

// Calls marked "collective" return when every PE has made the same one: a PE that does not come lets the others wait
// for ever. Only one thread of a process may be in any of them.
struct NvshmemCalls {
  std::function<NvshmemVersion()> version;
  std::function<NvshmemStatus()> status;
  std::function<int(NvshmemId&)> unique_id;                                    // 0: made
  std::function<int(const NvshmemId&, int rank, int size)> initialize;         // collective; 0: done, as far as it got
  std::function<int()> my_pe, n_pes;
  std::function<void*(size_t alignment, size_t bytes)> allocate;               // collective; null: not here
  std::function<void(void*)> free;                                             // collective
  std::function<void*(const void*, int pe)> mapped;                            // null: only the network gets there
  std::function<void()> barrier;                                               // collective; all puts have landed
  std::function<int(void* module)> module_init, module_finalize;               // of code that calls NVSHMEM on the GPU
  std::function<void()> finalize;                                              // collective; an error in it ends the process

  std::function<int()> num_devices;  // 0 also where there is no driver
  std::function<void(int device)> select_device;
  std::function<void(void*, size_t)> zero;
  std::function<void()> synchronize;  // all that this process has asked of the GPU is done
};

}  // namespace flashmoe
