#include "runtime/nvshmem_world.h"

#include <stdexcept>

namespace flashmoe {
namespace {

constexpr size_t kPage = 4096;  // heaps of groups begin on one

[[noreturn]] void fail(const std::string& what) { throw std::runtime_error("flashmoe: NVSHMEM " + what); }

}  // namespace

NvshmemArena::~NvshmemArena() {
  if (!data_ || leaked_) return;
  const std::lock_guard lock(world_->told_);
  world_->idle_[number_] = data_;
}

NvshmemWorld::NvshmemWorld(NvshmemCalls calls, NvshmemVersion built_with, std::optional<NvshmemVersion> device_code)
    : calls_(std::move(calls)), built_with_(built_with), device_code_(device_code) {}

bool NvshmemWorld::ready() const {
  return stage_ == Stage::kReady && !abandoned_ && calls_.status() == NvshmemStatus::kInitialized;
}

std::string NvshmemWorld::state() const {
  const Stage stage = stage_;
  if (stage == Stage::kFinalized) return "finalised";
  if (stage == Stage::kBroken || abandoned_) {
    const std::lock_guard lock(told_);
    return "left as it is, since " + why_;
  }
  const NvshmemStatus status = calls_.status();
  if (stage == Stage::kReady) return status == NvshmemStatus::kInitialized ? "initialised" : "finalised by somebody else";
  if (status == NvshmemStatus::kNone) return "not initialised";
  return status == NvshmemStatus::kInitialized ? "initialised by somebody else" : "half initialised by somebody else";
}

int NvshmemWorld::pe() const {
  check_ready();
  return calls_.my_pe();
}

int NvshmemWorld::size() const {
  check_ready();
  return calls_.n_pes();
}

void NvshmemWorld::check_versions() const {
  const NvshmemVersion found = calls_.version();
  const auto check = [&](const NvshmemVersion& wanted, const char* whose) {
    if (found.major == wanted.major && found >= wanted) return;
    fail("is " + found.text() + " in this process, and " + whose + " of this build needs " + wanted.text() +
         " or a later one of the same major version");
  };
  check(built_with_, "the host code");
  if (device_code_) check(*device_code_, "the GPU code");
}

void NvshmemWorld::check_device(int device) const {
  // NVSHMEM would end the process.
  const int devices = calls_.num_devices();
  if (devices == 0) fail("needs a GPU: there is none here, or no CUDA driver that this build can use");
  if (device < 0 || device >= devices)
    fail("cannot use device " + std::to_string(device) + " of " + std::to_string(devices));
}

void NvshmemWorld::check_alive() const {
  const Stage stage = stage_;
  if (stage == Stage::kFinalized) fail("was finalised in this process, and is not initialised again");
  if (stage != Stage::kBroken && !abandoned_) return;
  const std::lock_guard lock(told_);
  fail("is left as it is until the end of this process, since " + why_);
}

void NvshmemWorld::check_ready() const {
  check_alive();
  if (stage_ != Stage::kReady) fail("is not initialised: call flashmoe.distributed.init(device=\"cuda\")");
  if (calls_.status() != NvshmemStatus::kInitialized) fail("was finalised in this process by somebody else");
}

void NvshmemWorld::break_down(const std::string& why) {
  {
    const std::lock_guard lock(told_);
    why_ = why;
  }
  stage_ = Stage::kBroken;
  check_alive();
  fail(why);
}

NvshmemId NvshmemWorld::unique_id() {
  check_alive();
  const std::lock_guard lock(mutex_);
  check_versions();
  NvshmemId id{};
  if (const int error = calls_.unique_id(id)) fail("made no unique id: error " + std::to_string(error));
  return id;
}

void NvshmemWorld::initialize(const NvshmemId& id, int rank, int size, int device, std::vector<void*> modules) {
  check_alive();
  const std::lock_guard lock(mutex_);
  if (stage_ == Stage::kReady) fail("is initialised already");
  check_versions();
  check_device(device);
  if (size < 1 || rank < 0 || rank >= size)
    fail("has ranks in [0, " + std::to_string(size) + "), got " + std::to_string(rank));
  calls_.select_device(device);
  const NvshmemStatus before = calls_.status();
  if (before == NvshmemStatus::kBootstrapped)
    fail("has been initialised half-way by somebody else, without a GPU: select one before");
  if (before == NvshmemStatus::kNone) {
    // What it has set up by then stays, so that a second attempt would meet the ruins of the first.
    if (const int error = calls_.initialize(id, rank, size))
      break_down("its initialisation on rank " + std::to_string(rank) + " failed with error " + std::to_string(error) +
                 " (NVSHMEM_DEBUG=INFO tells more)");
    if (calls_.status() != NvshmemStatus::kInitialized)
      break_down("its initialisation on rank " + std::to_string(rank) + " stopped before it had a GPU");
    if (calls_.my_pe() != rank || calls_.n_pes() != size)
      break_down("it made rank " + std::to_string(rank) + " of " + std::to_string(size) + " its PE " +
                 std::to_string(calls_.my_pe()) + " of " + std::to_string(calls_.n_pes()));
  } else if (calls_.n_pes() != size) {
    fail("was initialised by somebody else with " + std::to_string(calls_.n_pes()) + " PEs, and this world has " +
         std::to_string(size) + " ranks");
  }
  foreign_ = before == NvshmemStatus::kInitialized;
  for (void* module : modules) {
    if (const int error = calls_.module_init(module))
      break_down("it would not serve this build's GPU code: error " + std::to_string(error));
    modules_.push_back(module);
  }
  device_ = device;
  stage_ = Stage::kReady;
}

std::shared_ptr<NvshmemArena> NvshmemWorld::allocate(size_t bytes) {
  check_ready();
  const std::lock_guard lock(mutex_);
  if (bytes == 0) fail("allocates at least one byte");
  calls_.select_device(device_);
  std::shared_ptr<NvshmemArena> arena(new NvshmemArena(shared_from_this(), ++allocations_));
  void* data = calls_.allocate(kPage, bytes);
  // The others may have got theirs. To free it takes all of us, and whoever has nothing has nothing to free.
  if (!data)
    fail("has no " + std::to_string(bytes) + " bytes of symmetric memory left on PE " + std::to_string(calls_.my_pe()) +
         "; NVSHMEM_SYMMETRIC_SIZE sets the heap's size where the GPU's memory is not mapped on demand");
  arena->data_ = static_cast<std::byte*>(data), arena->bytes_ = bytes;
  calls_.zero(data, bytes);
  calls_.synchronize();
  for (int pe = 0; pe < calls_.n_pes(); ++pe)
    arena->mapped_.push_back(pe == calls_.my_pe() ? arena->data_ : static_cast<std::byte*>(calls_.mapped(data, pe)));
  return arena;
}

std::vector<uint64_t> NvshmemWorld::idle() const {
  const std::lock_guard lock(told_);
  std::vector<uint64_t> numbers;
  for (const auto& [number, data] : idle_) numbers.push_back(number);
  return numbers;
}

void NvshmemWorld::free(uint64_t number) {
  check_ready();
  const std::lock_guard lock(mutex_);
  void* data = nullptr;
  {
    const std::lock_guard told(told_);
    const auto found = idle_.find(number);
    if (found == idle_.end()) fail("cannot free arena " + std::to_string(number) + ": it is not idle here");
    data = found->second;
    idle_.erase(found);
  }
  calls_.select_device(device_);
  calls_.synchronize();
  calls_.barrier();
  calls_.free(data);
}

bool NvshmemWorld::finalize() {
  if (stage_ != Stage::kReady || abandoned_) return false;
  const std::lock_guard lock(mutex_);
  if (stage_ != Stage::kReady) return false;
  stage_ = Stage::kFinalized;
  if (calls_.status() != NvshmemStatus::kInitialized) return false;  // by whoever else thought it theirs
  calls_.select_device(device_);
  calls_.synchronize();
  for (void* module : modules_) calls_.module_finalize(module);
  if (foreign_) return false;
  calls_.finalize();
  return true;
}

void NvshmemWorld::abandon(const std::string& why) {
  const std::lock_guard lock(told_);
  if (abandoned_ || stage_ == Stage::kBroken) return;
  why_ = why;
  abandoned_ = true;
}

}  // namespace flashmoe
