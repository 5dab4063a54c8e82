// NVSHMEM's life in this process: initialised once, one arena after another, finalised once at most. It keeps what
// NVSHMEM leaves to its caller: that nothing is called which would end the process or wait for ever. Whether all PEs
// make a collective call its own callers agree on before.
//
// Nothing here is undone by a destructor: to free or to finalise takes all PEs.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "runtime/nvshmem_calls.h"

namespace flashmoe {

class NvshmemWorld;

// Zeroed memory at one address on every PE. When nobody holds it any more it is idle: still there, and free() may go.
class NvshmemArena {
 public:
  ~NvshmemArena();
  NvshmemArena(const NvshmemArena&) = delete;
  NvshmemArena& operator=(const NvshmemArena&) = delete;

  uint64_t number() const { return number_; }  // the same on all PEs, if they have allocated alike
  std::byte* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  // Where each PE's arena is mapped here; null: it is not.
  const std::vector<std::byte*>& mapped() const { return mapped_; }
  // It is never idle: a peer may still write to it.
  void leak() { leaked_ = true; }

 private:
  friend class NvshmemWorld;
  NvshmemArena(std::shared_ptr<NvshmemWorld> world, uint64_t number) : world_(std::move(world)), number_(number) {}

  std::shared_ptr<NvshmemWorld> world_;
  uint64_t number_;
  std::byte* data_ = nullptr;
  size_t bytes_ = 0;
  std::vector<std::byte*> mapped_;
  std::atomic<bool> leaked_ = false;
};

// Every method may be called in any state; what cannot be done then raises std::runtime_error and calls nothing.
class NvshmemWorld : public std::enable_shared_from_this<NvshmemWorld> {
 public:
  // built_with: the headers that the table's maker knows; device_code: those of the GPU code that calls NVSHMEM, if
  // this build has any. The library must be as new as both, and of the same major version.
  NvshmemWorld(NvshmemCalls calls, NvshmemVersion built_with, std::optional<NvshmemVersion> device_code);

  // Initialised by us or, before us, by somebody else, and by neither finalised.
  bool ready() const;
  bool foreign() const { return foreign_; }
  // For messages, and to compare between ranks before all of them call: "initialised" if ready(), "not initialised" or
  // "initialised by somebody else" where initialize() may be called, else why nothing may.
  std::string state() const;
  // Of an initialised library.
  int pe() const;
  int size() const;

  // For one rank, right before initialize() on all.
  NvshmemId unique_id();
  // Collective, with one GPU each. Where somebody else has initialised the library already, no PE waits: its PEs are
  // taken as they are, if they are `size` many. `modules` hold this extension's GPU code that calls NVSHMEM.
  void initialize(const NvshmemId& id, int rank, int size, int device, std::vector<void*> modules);

  // Collective, bytes alike.
  std::shared_ptr<NvshmemArena> allocate(size_t bytes);
  // Collective: arenas that are idle here, and of those one that is idle on every PE.
  std::vector<uint64_t> idle() const;
  void free(uint64_t number);
  // Collective, once no PE uses the GPU for a group any more. What we have not initialised goes on. False: there was
  // nothing to finalise.
  bool finalize();

  // A collective call did not come back, or a peer is gone: no other one is made from here on.
  void abandon(const std::string& why);

 private:
  friend class NvshmemArena;
  enum class Stage { kUntouched, kReady, kFinalized, kBroken };

  void check_versions() const;
  void check_device(int device) const;
  void check_alive() const;
  void check_ready() const;
  [[noreturn]] void break_down(const std::string& why);

  const NvshmemCalls calls_;
  const NvshmemVersion built_with_;
  const std::optional<NvshmemVersion> device_code_;
  std::mutex mutex_;  // one thread in NVSHMEM at a time
  std::atomic<Stage> stage_ = Stage::kUntouched;
  std::atomic<bool> foreign_ = false, abandoned_ = false;
  int device_ = 0;
  std::vector<void*> modules_;
  uint64_t allocations_ = 0;
  mutable std::mutex told_;  // of what follows; never held in a call of NVSHMEM, which may not come back
  std::string why_;          // abandoned or broken
  std::map<uint64_t, void*> idle_;
};

}  // namespace flashmoe
