// NVSHMEM as its documentation describes it, for PEs that are threads: collective calls meet, and whatever would end
// the process, wait for ever or touch what is not there fails the test.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <vector>

#include "harness.h"
#include "runtime/nvshmem_calls.h"

namespace flashmoe::test {

// Where all PEs' collective calls meet.
class FakeJob {
 public:
  explicit FakeJob(int size) : size_(size) {}

  int size() const { return size_; }
  int meetings() const { return meetings_; }

  void meet(int pe, const std::string& call) {
    std::unique_lock lock(mutex_);
    calls_[pe] = call;
    if (int(calls_.size()) == size_) {
      for (const auto& [other, theirs] : calls_)
        check(theirs == call, "PE " + std::to_string(pe) + " calls " + call + ", PE " + std::to_string(other) + " " + theirs);
      calls_.clear();
      ++meetings_;
      met_.notify_all();
      return;
    }
    const int before = meetings_;
    if (met_.wait_for(lock, std::chrono::seconds(20), [&] { return meetings_ != before; })) return;
    check(false, "PE " + std::to_string(pe) + " waits for ever in " + call);
    throw std::runtime_error("a collective call without all PEs");
  }

 private:
  const int size_;
  std::mutex mutex_;
  std::condition_variable met_;
  std::map<int, std::string> calls_;  // of those that wait
  int meetings_ = 0;
};

// One process. Its members plant faults before they are met, and tell afterwards what came.
class FakePe {
 public:
  FakePe(FakeJob& job, int pe) : job_(job), pe_(pe) {}

  NvshmemVersion version{3, 4, 5};
  int devices = 1;
  int unique_id_error = 0, init_error = 0, module_error = 0;
  bool keep_device = false;  // selecting one does nothing
  bool exhausted = false;
  std::set<int> unmapped;
  int other_pe = -1;  // that initialize() makes of this rank

  NvshmemStatus status = NvshmemStatus::kNone;
  std::atomic<int> calls = 0;  // of the library, but for questions
  std::vector<void*> modules;
  std::set<void*> freed;
  bool gpu_idle = true;  // it has been waited for, since it was asked for anything

  NvshmemCalls table() {
    NvshmemCalls t;
    t.version = [this] { return version; };
    t.status = [this] { return status; };
    t.unique_id = [this](NvshmemId& id) {
      const Turn turn(*this, "unique_id", false);
      id.fill(std::byte(7));
      return unique_id_error;
    };
    t.initialize = [this](const NvshmemId& id, int rank, int size) {
      const Turn turn(*this, "initialize", false);
      misuse(devices > 0, "initialize without a driver: the process ends");
      misuse(status == NvshmemStatus::kNone, "initialize twice");
      misuse(id[0] == std::byte(7) && size == job_.size(), "initialize with an id that unique_id has not made");
      if (init_error) {
        status = NvshmemStatus::kBootstrapped;
        return init_error;
      }
      job_.meet(rank, "initialize");
      status = device_ < 0 ? NvshmemStatus::kBootstrapped : NvshmemStatus::kInitialized;
      if (other_pe >= 0) pe_ = other_pe;
      return 0;
    };
    t.my_pe = [this] { return initialized("my_pe"), pe_; };
    t.n_pes = [this] { return initialized("n_pes"), job_.size(); };
    t.allocate = [this](size_t alignment, size_t bytes) -> void* {
      const Turn turn(*this, "allocate");
      misuse(bytes > 0, "allocate nothing, which no PE waits for");
      job_.meet(pe_, "allocate " + std::to_string(alignment) + " " + std::to_string(bytes));
      if (exhausted) return nullptr;
      heap_.push_back(std::make_unique<std::byte[]>(bytes + alignment));
      void* data = heap_.back().get();
      size_t space = bytes + alignment;
      std::align(alignment, bytes, data, space);
      std::memset(data, 0xff, bytes);  // the library promises nothing about the content
      live_[data] = ++allocations_;
      return data;
    };
    t.free = [this](void* data) {
      const Turn turn(*this, "free");
      if (!data) return;  // and nobody is met
      misuse(live_.count(data) == 1, "free of what is not allocated");
      misuse(gpu_idle, "free while the GPU may write there");
      job_.meet(pe_, "free of allocation " + std::to_string(live_[data]));
      live_.erase(data);
      freed.insert(data);
    };
    t.mapped = [this](const void* data, int pe) -> void* {
      initialized("mapped");
      misuse(live_.count(const_cast<void*>(data)) == 1, "mapped of what is not symmetric");
      return unmapped.count(pe) ? nullptr : static_cast<std::byte*>(const_cast<void*>(data)) + 1000 * (pe + 1);
    };
    t.barrier = [this] {
      const Turn turn(*this, "barrier");
      job_.meet(pe_, "barrier");
    };
    t.module_init = [this](void* module) {
      const Turn turn(*this, "module_init");
      if (!module_error) modules.push_back(module);
      return module_error;
    };
    t.module_finalize = [this](void* module) {
      const Turn turn(*this, "module_finalize");
      misuse(std::erase(modules, module) == 1, "module_finalize without module_init");
      return 0;
    };
    t.finalize = [this] {
      const Turn turn(*this, "finalize");
      misuse(modules.empty(), "finalize before its modules");
      misuse(gpu_idle, "finalize while the GPU may work");
      job_.meet(pe_, "finalize");
      status = NvshmemStatus::kNone;
      live_.clear();
    };
    t.num_devices = [this] { return devices; };
    t.select_device = [this](int device) {
      if (!keep_device) device_ = device;
    };
    t.zero = [this](void* data, size_t bytes) {
      std::memset(data, 0, bytes);
      gpu_idle = false;
    };
    t.synchronize = [this] { gpu_idle = true; };
    return t;
  }

 private:
  // Only one thread of a process may be in the library, which must be initialised, with a GPU selected.
  struct Turn {
    Turn(FakePe& pe, const char* call, bool needs_init = true) : pe(pe) {
      ++pe.calls;
      pe.misuse(!pe.inside_.exchange(true), std::string(call) + " while another thread is in the library");
      if (needs_init) pe.initialized(call);
    }
    ~Turn() { pe.inside_ = false; }
    FakePe& pe;
  };

  void initialized(const std::string& call) {
    misuse(status == NvshmemStatus::kInitialized, call + " of a library that is not initialised: the process ends");
  }
  void misuse(bool well, const std::string& what) { check(well, "PE " + std::to_string(pe_) + ": " + what); }

  FakeJob& job_;
  int pe_, device_ = -1;
  std::atomic<bool> inside_ = false;
  std::vector<std::unique_ptr<std::byte[]>> heap_;
  std::map<void*, int> live_;
  int allocations_ = 0;
};

}  // namespace flashmoe::test
