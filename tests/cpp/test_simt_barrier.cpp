// Barriers in shared memory on fibers: phases, rings of stages, and misuse of both.
#include <array>

#include "simt_run.h"

namespace {

using namespace flashmoe;
using namespace flashmoe::test;
using gpu::Barrier;

Barrier* barriers_at(size_t offset) { return reinterpret_cast<Barrier*>(gpu::shared_memory() + offset); }

void phases_and_parity() {
  on_seeds(20, 2, 64, 16, [] {
    Barrier* barrier = barriers_at(8);
    init_barriers(barrier, 1, 2);
    barrier->wait(1);  // before the first phase, the parity before it has ended
    expect(!barrier->try_wait(0) || gpu::warp_in_block() == 0);
    gpu::sync_block();
    if (gpu::lane() == 0) barrier->arrive();
    barrier->wait(0);
    gpu::sync_block();
    if (gpu::lane() == 0) barrier->arrive();
    barrier->wait(1);
  });
}

// One warp fills a ring of stages, two warps empty it.
enum class Plant { kNone, kWrongParity, kNoFullWait, kNoEmptyWait, kLostArrival };
constexpr int kStages = 3, kItems = 14;

void ring(Plant plant) {
  Barrier *full = barriers_at(0), *empty = full + kStages;
  volatile int* stage_data = reinterpret_cast<int*>(gpu::shared_memory() + 64);
  if (gpu::thread_in_block() == 0) {
    for (int s = 0; s < kStages; ++s) full[s].init(32), empty[s].init(64);
    gpu::fence_barrier_init();
  }
  gpu::sync_block();
  for (int i = 0; i < kItems; ++i) {
    const int stage = i % kStages;
    const uint32_t parity = i / kStages % 2;
    volatile int* data = stage_data + stage * 32;
    if (gpu::warp_in_block() == 0) {
      if (plant != Plant::kNoEmptyWait) empty[stage].wait(parity ^ 1);
      data[gpu::lane()] = i * 100 + gpu::lane();
      full[stage].arrive();
    } else {
      if (plant != Plant::kNoFullWait) full[stage].wait(plant == Plant::kWrongParity ? parity ^ 1 : parity);
      const int other = (gpu::lane() + i) % 32;
      expect(data[other] == i * 100 + other);
      if (plant != Plant::kLostArrival || gpu::thread_in_block() != 77) empty[stage].arrive();
    }
  }
}

void ring_of_stages() {
  on_seeds(100, 2, 96, 64 + kStages * 128, [] { ring(Plant::kNone); });
  auto caught = [](Plant plant) { return some_seed_fails(20, 1, 96, 64 + kStages * 128, [plant] { ring(plant); }); };
  check_caught(caught(Plant::kNoFullWait), "a consumer that does not wait");
  check_caught(caught(Plant::kNoEmptyWait), "a producer that does not wait");
  check_caught(caught(Plant::kWrongParity), "a consumer of the wrong parity");
  check_misuse("an arrival too few", "Barrier::wait", 1, 96, 64 + kStages * 128, [] { ring(Plant::kLostArrival); });
}

void misuse_is_named() {
  check_misuse("a barrier without init", "never initialised", 1, 32, 8, [] { barriers_at(0)->wait(0); });
  check_misuse("a barrier used before its fence", "fence_barrier_init", 1, 32, 8, [] {
    if (gpu::lane() == 0) barriers_at(0)->init(1);
    gpu::sync_warp();
    if (gpu::lane() == 1) barriers_at(0)->wait(1);
    gpu::sync_warp();
  });
  check_misuse("an init twice", "in use", 1, 32, 8, [] {
    init_barriers(barriers_at(0), 1, 1);
    init_barriers(barriers_at(0), 1, 1);
  });
  check_misuse("more arrivals than init's, while bytes are missing", "more arrivals", 1, 32, 8, [] {
    init_barriers(barriers_at(0), 1, 2);
    if (gpu::lane() == 0) barriers_at(0)->arrive_expect_tx(64);
    if (gpu::lane() < 2) barriers_at(0)->arrive();
    gpu::sync_warp();
  });
  check_misuse("bytes that nobody sends", "Barrier::wait(0) of 8", 1, 32, 16, [] {
    init_barriers(barriers_at(8), 1, 1);
    if (gpu::lane() == 0) barriers_at(8)->arrive_expect_tx(64);
    barriers_at(8)->wait(0);
  });
  check_misuse("a barrier that is overwritten", "overwritten", 1, 32, 8, [] {
    init_barriers(barriers_at(0), 1, 1);
    *reinterpret_cast<volatile uint32_t*>(gpu::shared_memory()) = 7;
    barriers_at(0)->wait(1);
  });
  check_misuse("a barrier outside shared memory", "outside", 1, 32, 8, [] { barriers_at(8)->init(1); });
  // A waiter that is a whole phase behind sleeps for ever, as on the hardware.
  check_caught(some_seed_fails(20, 1, 64, 8, [] {
    init_barriers(barriers_at(0), 1, 1);
    if (gpu::thread_in_block() == 0) barriers_at(0)->arrive(), barriers_at(0)->arrive();
    if (gpu::warp_in_block() == 1) barriers_at(0)->wait(0);
  }), "a phase behind");
}

}  // namespace

int main() {
  run_test("PhasesAndParity", phases_and_parity);
  run_test("RingOfStages", ring_of_stages);
  run_test("MisuseIsNamed", misuse_is_named);
  return finish();
}
