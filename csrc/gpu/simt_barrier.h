// Barriers on fibers: of the block, named ones, in shared memory; and the fences between the proxies.
#pragma once

#include "gpu/simt_meeting.h"

namespace flashmoe::gpu {

namespace simt {

// Whole warps come to a named barrier, and each is counted once per phase. `phase`: the one that it was counted in.
inline NamedBarrier& enter_named_barrier(int id, int threads, const char* verb, uint64_t& phase) {
  if (id < 1 || id > 15) throw Misuse(std::string(verb) + ": there are barriers 1 to 15, not " + std::to_string(id));
  if (threads < 32 || threads % 32 || threads > int(my_block().threads.size()))
    throw Misuse(std::string(verb) + ": impossible number of threads " + std::to_string(threads));
  NamedBarrier& barrier = my_block().named[id];
  const int warp_index = self().index / 32;
  Warp& warp = my_block().warps[warp_index];
  release(barrier.clock);
  const uint64_t named = uint64_t(id) << 32 | uint32_t(threads);
  const auto count_warp = [&](std::vector<uint64_t>& board) {
    for (uint64_t& value : board) {
      if (value != named) throw Misuse(std::string(verb) + ": lanes of a warp name different barriers");
      value = barrier.phase;
    }
    if (barrier.arrived && barrier.threads != threads)
      throw Misuse(std::string(verb) + " " + std::to_string(id) + " of " + std::to_string(threads) +
                   " threads, while others came for " + std::to_string(barrier.threads));
    if (barrier.warps >> warp_index & 1)
      throw Misuse(std::string(verb) + " " + std::to_string(id) + ": a warp comes twice in one phase");
    barrier.threads = threads;
    barrier.arrived += 32;
    barrier.warps |= 1u << warp_index;
    if (barrier.arrived < threads) return;
    barrier.arrived = 0, barrier.warps = 0, ++barrier.phase;
    barrier.published = barrier.clock;
    machine->wake(barrier.waiting);
    machine->progress();
  };
  const auto& phases = meet(warp.meeting, 32, self().index % 32, verb, id, named, false, count_warp);
  phase = phases[self().index % 32];
  return barrier;
}

struct BarrierState {
  const void* address;
  Block* block;
  uint32_t count, pending;
  int64_t bytes = 0;  // announced and not landed
  uint64_t phase = 0;
  int initializer;
  bool fenced = false;
  Clock clock, published;
  WaitList waiting;

  std::string place() const {
    return "the barrier at shared+" + std::to_string(static_cast<const std::byte*>(address) - block->shared.data());
  }
  void arrive() {
    if (pending == 0)
      throw Misuse("more arrivals at " + place() + " than init's " + std::to_string(count) + " in one phase");
    --pending;
    turn();
  }
  void land_bytes(int64_t landed) {
    bytes -= landed;
    turn();
  }
  void turn() {
    machine->progress();
    if (pending) return;
    if (bytes < 0)
      throw Misuse(std::to_string(-bytes) + " bytes more landed at " + place() + " than its phase announced");
    if (bytes > 0) return;
    pending = count;
    ++phase;
    published = clock;
    machine->wake(waiting);
  }
  bool ended(uint32_t parity) const { return (phase & 1) != parity; }
};

// What a barrier's word holds, so that a barrier that was never made, or was overwritten, is found out.
inline uint64_t barrier_mark(const void* barrier) { return 0x6261727269657200 ^ reinterpret_cast<uintptr_t>(barrier); }

inline std::shared_ptr<BarrierState> barrier_at(const void* barrier, const char* verb) {
  my_block().shared.offset(barrier, 8, 8, verb);
  const auto found = my_block().barriers.find(barrier);
  uint64_t word;
  std::memcpy(&word, barrier, 8);
  if (found == my_block().barriers.end()) throw Misuse(std::string(verb) + ": the barrier was never initialised");
  if (word != barrier_mark(barrier))
    throw Misuse(std::string(verb) + ": " + found->second->place() + " was overwritten");
  if (!found->second->fenced && found->second->initializer != self().index)
    throw Misuse(std::string(verb) + ": no fence_barrier_init after the init of " + found->second->place());
  return found->second;
}

}  // namespace simt

FLASHMOE_DEVICE void sync_block() {
  const int threads = int(simt::my_block().threads.size());
  simt::meet(simt::my_block().all, threads, simt::self().index, "sync_block", simt::my_block().index, 0, true,
             [](auto&) { simt::machine->progress(); });
}

FLASHMOE_DEVICE void named_barrier_sync(int id, int threads) {
  uint64_t phase;
  simt::NamedBarrier& barrier = simt::enter_named_barrier(id, threads, "named_barrier_sync", phase);
  simt::machine->wait_until(barrier.waiting, "named_barrier_sync", id, [&] { return barrier.phase != phase; });
  simt::acquire(barrier.published);
}
FLASHMOE_DEVICE void named_barrier_arrive(int id, int threads) {
  uint64_t phase;
  simt::enter_named_barrier(id, threads, "named_barrier_arrive", phase);
}

FLASHMOE_DEVICE void Barrier::init(uint32_t arrivals) {
  using namespace simt;
  machine->step();
  my_block().shared.offset(this, 8, 8, "Barrier::init");
  if (arrivals == 0 || arrivals >= 1u << 20)
    throw Misuse("Barrier::init for " + std::to_string(arrivals) + " arrivals");
  auto& state = my_block().barriers[this];
  if (state) throw Misuse("Barrier::init: " + state->place() + " is in use");
  state = std::make_shared<BarrierState>();
  state->address = this, state->block = &my_block(), state->initializer = self().index;
  state->count = state->pending = arrivals;
  word_ = barrier_mark(this);
}

FLASHMOE_DEVICE void Barrier::arrive() {
  simt::machine->step();
  const auto state = simt::barrier_at(this, "Barrier::arrive");
  simt::release(state->clock);
  state->arrive();
}

FLASHMOE_DEVICE void Barrier::arrive_expect_tx(uint32_t bytes) {
  simt::machine->step();
  const auto state = simt::barrier_at(this, "Barrier::arrive_expect_tx");
  if (state->bytes + bytes >= 1 << 20) throw simt::Misuse(state->place() + " cannot count 1 MiB");
  simt::release(state->clock);
  state->bytes += bytes;
  state->arrive();
}

FLASHMOE_DEVICE bool Barrier::has_ended(uint32_t parity) {
  simt::machine->poll();
  const auto state = simt::barrier_at(this, "Barrier::has_ended");
  if (!state->ended(parity)) return false;
  simt::acquire(state->published);
  return true;
}
FLASHMOE_DEVICE bool Barrier::try_wait(uint32_t parity) { return has_ended(parity); }

FLASHMOE_DEVICE void Barrier::wait(uint32_t parity) {
  simt::machine->step();
  const auto state = simt::barrier_at(this, "Barrier::wait");
  simt::machine->wait_until(state->waiting, parity ? "Barrier::wait(1)" : "Barrier::wait(0)",
                            reinterpret_cast<std::byte*>(this) - simt::my_block().shared.data(),
                            [&] { return state->ended(parity); });
  simt::acquire(state->published);
}

FLASHMOE_DEVICE void fence_barrier_init() {
  simt::machine->step();
  for (auto& [address, state] : simt::my_block().barriers)
    if (state->initializer == simt::self().index) state->fenced = true;
}

FLASHMOE_DEVICE void fence_async_shared() {
  simt::machine->step();
  simt::my_block().shared.fence(simt::self().clock);
}
FLASHMOE_DEVICE void fence_async() { fence_async_shared(); }

}  // namespace flashmoe::gpu
