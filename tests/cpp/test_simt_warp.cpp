// The verbs of warps, blocks and memory order on fibers, and what the machine says of threads that misuse them.
#include "simt_run.h"

namespace {

using namespace flashmoe;
using namespace flashmoe::test;

void warp_exchanges() {
  on_seeds(20, 2, 96, 0, [] {
    const int t = gpu::thread_in_block(), l = gpu::lane(), first = t - l;
    expect(gpu::warp_in_block() == t / 32 && l == t % 32 && gpu::block_threads() == 96 && gpu::num_blocks() == 2);
    for (int round = 0; round < 3; ++round) {
      expect(gpu::shuffle(t * 10 + round, 7) == (first + 7) * 10 + round);
      expect(gpu::shuffle(float(t), (l + round) % 32) == float(first + (l + round) % 32));
      expect(gpu::shuffle_up(t, 3) == (l < 3 ? t : t - 3));
      expect(gpu::shuffle_down(uint64_t(t) << 40, 5) == uint64_t(l > 26 ? t : t + 5) << 40);
      expect(gpu::shuffle_xor(t, 16) == (t ^ 16));
      expect(gpu::ballot(l % 3 == 0) == 0x49249249u);
      expect(gpu::match_any(uint32_t(l / 4)) == 0xfu << l / 4 * 4);
    }
    expect(gpu::count_bits(0xf0f0u) == 8 && gpu::lowest_bit(0x50u) == 4);
  });
}

// What one thread writes before sync_block the others read after it, round after round.
void block_barrier() {
  on_seeds(20, 3, 128, 128 * 4, [] {
    volatile int* board = reinterpret_cast<int*>(gpu::shared_memory());
    const int t = gpu::thread_in_block();
    for (int round = 1; round < 5; ++round) {
      board[t] = t * round + gpu::block();
      gpu::sync_block();
      expect(board[(t + 37) % 128] == (t + 37) % 128 * round + gpu::block());
      gpu::sync_block();
    }
  });
  check_caught(some_seed_fails(20, 1, 128, 128 * 4, [] {
    volatile int* board = reinterpret_cast<int*>(gpu::shared_memory());
    board[gpu::thread_in_block()] = gpu::thread_in_block();
    gpu::sync_warp();
    expect(board[(gpu::thread_in_block() + 37) % 128] == (gpu::thread_in_block() + 37) % 128);
  }), "sync_block replaced by sync_warp");
}

// Halves of a warp that take different branches sync by themselves.
void partial_warp() {
  on_seeds(20, 1, 64, 64 * 4, [] {
    volatile int* board = reinterpret_cast<int*>(gpu::shared_memory());
    const int t = gpu::thread_in_block(), half = gpu::lane() / 16;
    for (int round = 0; round < 1 + half * 3; ++round) {
      board[t] = round;
      gpu::sync_warp(0xffffu << half * 16);
      expect(board[t ^ 1] == round);
      gpu::sync_warp(0xffffu << half * 16);
    }
    gpu::sync_warp();
  });
}

// Two warps hand over to two others and get the board back: sync on one side, arrive on the other.
template <bool kPlanted>
void hand_over() {
  volatile int* board = reinterpret_cast<int*>(gpu::shared_memory());
  const int t = gpu::thread_in_block();
  for (int round = 0; round < 4; ++round) {
    if (t < 64) {
      if (round > 0) gpu::named_barrier_sync(2, 128);
      board[t] = t + round;
      gpu::named_barrier_arrive(1, 128);
    } else {
      if (!kPlanted) gpu::named_barrier_sync(1, 128);
      else gpu::named_barrier_arrive(1, 128);
      expect(board[127 - t] == 127 - t + round);
      if (round < 3) gpu::named_barrier_arrive(2, 128);
    }
  }
}
void named_barriers() {
  on_seeds(40, 2, 128, 64 * 4, hand_over<false>);
  check_caught(some_seed_fails(40, 2, 128, 64 * 4, hand_over<true>), "a named barrier that does not wait");
}

// A message and its flag between blocks, a ticket counter, a lock.
void memory_order() {
  for (uint64_t seed = 0; seed < 20; ++seed) {
    uint64_t flag = 0, sum = 0;
    uint32_t ticket = 0, left = 128, lock = 0, holders = 0;
    int message = 0;
    std::vector<int> taken(128);
    gpu::simt::launch(2, 64, 0, seed, [&] {
      if (gpu::block() == 0 && gpu::thread_in_block() == 0) {
        message = 42;
        gpu::store_release_system(&flag, uint64_t{7});
      }
      while (gpu::load_acquire_system(&flag) != 7) {
      }
      expect(message == 42);
      expect(++taken[gpu::fetch_add(&ticket, 1u)] == 1);
      while (!gpu::compare_exchange(&lock, 0u, 1u)) gpu::sleep_ns(50);
      expect(++holders == 1);
      sum += gpu::load_relaxed(&flag);
      --holders;
      gpu::store_release(&lock, 0u);
      gpu::fetch_sub(&left, 1u);
    });
    check(ticket == 128 && left == 0 && sum == 7 * 128, "counters of seed " + std::to_string(seed));
  }
}

// A deadline of a minute passes at once where nothing else happens, but not while others still work.
void time_flies_when_all_wait() {
  on_seeds(10, 1, 64, 0, [] {
    const uint64_t begin = gpu::now_ns();
    while (gpu::now_ns() - begin < 60'000'000'000u) gpu::sleep_ns(1000);
  });
  on_seeds(10, 1, 64, 4, [] {
    uint32_t* done = reinterpret_cast<uint32_t*>(gpu::shared_memory());
    if (gpu::thread_in_block() == 0) *done = 0;
    gpu::sync_block();
    if (gpu::warp_in_block() == 0) {
      for (int i = 0; i < 2000; ++i) gpu::shuffle(i, 0);
      if (gpu::lane() == 0) gpu::store_release(done, 1u);
    } else {
      const uint64_t begin = gpu::now_ns();
      while (!gpu::load_acquire(done)) expect(gpu::now_ns() - begin < 60'000'000'000u);
    }
  });
}

void misuse_is_named() {
  check_misuse("lanes of a warp diverge", "diverge", 1, 32, 0,
               [] { gpu::lane() < 16 ? gpu::ballot(true) : gpu::match_any(1); });
  check_misuse("half a warp shuffles", "in shuffle", 1, 32, 0, [] {
    if (gpu::lane() < 16) gpu::shuffle(1, 0);
  });
  check_misuse("one lane asks for its warp's number", "warp_in_block by some lanes", 1, 32, 0, [] {
    if (gpu::lane() == 0) gpu::warp_in_block();
    gpu::shuffle(1, 0);
  });
  check_misuse("a thread misses sync_block", "in sync_block", 1, 64, 0, [] {
    if (gpu::thread_in_block() != 5) gpu::sync_block();
  });
  check_misuse("a named barrier of other sizes", "others came for", 1, 96, 0,
               [] { gpu::named_barrier_sync(3, gpu::warp_in_block() == 1 ? 64 : 96); });
  check_misuse("a named barrier that one warp misses", "named_barrier_sync of 3", 1, 96, 0, [] {
    if (gpu::warp_in_block() < 2) gpu::named_barrier_sync(3, 96);
  });
  check_misuse("a warp twice in one phase", "twice", 1, 64, 0, [] {
    if (gpu::warp_in_block() == 0) gpu::named_barrier_arrive(3, 64), gpu::named_barrier_arrive(3, 64);
  });
  check_misuse("barrier 16", "1 to 15", 1, 32, 0, [] { gpu::named_barrier_sync(16, 32); });
  check_misuse("sync_warp by a stranger", "not among", 1, 32, 0, [] { gpu::sync_warp(1); });
  check_misuse("a flag that nobody sets", "polling", 1, 32, 0, [] {
    static uint32_t flag = 0;
    while (!gpu::load_acquire(&flag)) {
    }
  });
  check_misuse("a store beyond shared memory", "beyond its end", 1, 32, 64, [] {
    if (gpu::lane() == 0) *const_cast<volatile std::byte*>(gpu::shared_memory() + 64) = std::byte{1};
  });
  bool stopped = false;
  try {
    gpu::simt::launch(1, 32, 0, 1, [] { for (;;) gpu::shuffle(1, 0); }, 10'000);
  } catch (const gpu::simt::Misuse& misuse) {
    stopped = contains(misuse.what(), "too many steps");
  }
  check_caught(stopped, "a loop without end");
}

// The same seed is the same run; what threads hold is given back when a run breaks off.
void seeds_repeat() {
  auto order = [](uint64_t seed) {
    std::string order;
    gpu::simt::launch(2, 32, 0, seed, [&] {
      gpu::sync_warp();
      order += char('a' + gpu::lane());
      gpu::shuffle(1, 0);
      order += char('A' + gpu::block());
    });
    return order;
  };
  check(order(5) == order(5) && order(5) != order(6), "orders by seed");
  auto held = std::make_shared<int>();
  try {
    gpu::simt::launch(1, 64, 0, 3, [held] {
      const std::shared_ptr<int> mine = held;
      if (gpu::warp_in_block() == 0) gpu::sync_block();
    });
  } catch (const gpu::simt::Misuse&) {
  }
  check(held.use_count() == 1, "stacks are unwound");
}

#if defined(__SANITIZE_ADDRESS__)
// A later thread's stack may lie where this one's lay, and frames that never return leave red zones.
void stacks_are_left_clean() {
  constexpr size_t kBytes = 64;
  char* below = nullptr;
  auto fiber = std::make_unique<gpu::simt::Fiber>([&below] {
    below = static_cast<char*>(__builtin_frame_address(0)) - 8192;
    __asan_poison_memory_region(below, kBytes);
  });
  fiber->enter();
  check(__asan_region_is_poisoned(below, kBytes) != nullptr, "the stack has a red zone");
  fiber.reset();
  check(__asan_region_is_poisoned(below, kBytes) == nullptr, "and leaves none behind");
}
#endif

}  // namespace

int main() {
  run_test("WarpExchanges", warp_exchanges);
  run_test("BlockBarrier", block_barrier);
  run_test("PartialWarp", partial_warp);
  run_test("NamedBarriers", named_barriers);
  run_test("MemoryOrder", memory_order);
  run_test("TimeFliesWhenAllWait", time_flies_when_all_wait);
  run_test("MisuseIsNamed", misuse_is_named);
  run_test("SeedsRepeat", seeds_repeat);
#if defined(__SANITIZE_ADDRESS__)
  run_test("StacksAreLeftClean", stacks_are_left_clean);
#endif
  return finish();
}
