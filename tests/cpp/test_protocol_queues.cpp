// The ready queues under contention: every tile is taken once, a block's down tiles only after all its up tiles,
// and no entry is overwritten while one of its tickets is still to be taken.
#include <memory>

#include "harness.h"
#include "platform/host.h"
#include "protocol/task.h"

namespace {

using namespace flashmoe;
using namespace flashmoe::test;

// Gives the core away between looking at a word and acting on it, where a race would show.
struct Yielding : HostPlatform {
  static bool compare_exchange(uint32_t* word, uint32_t expected, uint32_t desired) {
    sched_yield();
    return HostPlatform::compare_exchange(word, expected, desired);
  }
};
struct BlindCompareExchange : HostPlatform {
  static bool compare_exchange(uint32_t* word, uint32_t, uint32_t desired) {
    sched_yield();
    store_release(word, desired);
    return true;
  }
};
struct TornFetchAdd : HostPlatform {
  static uint32_t fetch_add(uint32_t* word, uint32_t n) {
    const uint32_t old = load_acquire(word);
    sched_yield();
    store_release(word, old + n);
    return old;
  }
};
struct EntryBeforeItsPlace : HostPlatform {  // every entry claims to be the first of the queue
  using HostPlatform::store_release;
  static void store_release(uint64_t* word, uint64_t entry) {
    HostPlatform::store_release(word, (entry & 0xffffffff) | uint64_t(1) << 32);
  }
};

struct Sizes {
  uint32_t blocks, ring_blocks, up_tiles, down_tiles;
  int workers;
};

// A rank's row blocks without rows: one publisher, `workers` takers, each tile counted. True if all is as it must be.
// A lost tile shows as a queue that stands still for longer than `patience_ns`.
template <class P>
bool every_tile_once(const Sizes& s, uint64_t patience_ns = 20'000'000'000) {
  UpQueue up{};
  DownQueue down{};
  std::vector<uint64_t> entries(s.ring_blocks, 0);
  std::vector<uint32_t> ring_free(s.ring_blocks), block_in(s.ring_blocks), up_left(s.ring_blocks), down_left(s.ring_blocks);
  for (uint32_t r = 0; r < s.ring_blocks; ++r) ring_free[r] = r;
  auto up_taken = std::make_unique<std::atomic<int>[]>(s.blocks * s.up_tiles);
  auto down_taken = std::make_unique<std::atomic<int>[]>(s.blocks * s.down_tiles);
  std::atomic<uint32_t> returned{0};
  std::atomic<bool> wrong{false};

  auto publish = [&] {
    const uint32_t block = up.published, slot = block % s.ring_blocks;
    if (block == s.blocks || HostPlatform::load_acquire(&ring_free[slot]) != block) return false;
    HostPlatform::store_release(&block_in[slot], block);
    HostPlatform::store_release(&up_left[slot], s.up_tiles), HostPlatform::store_release(&down_left[slot], s.down_tiles);
    HostPlatform::store_release(&up.published, block + 1);
    return true;
  };
  auto work = [&] {
    TileTask task;
    if (take_down<P>(down, entries.data(), s.ring_blocks, s.down_tiles, task)) {
      const uint32_t slot = task.ring_slot, block = HostPlatform::load_acquire(&block_in[slot]);
      if (HostPlatform::load_acquire(&up_left[slot]) != 0) wrong = true;
      if (down_taken[block * s.down_tiles + task.tile].fetch_add(1) != 0) wrong = true;
      if (HostPlatform::fetch_sub(&down_left[slot], 1) == 1) {
        HostPlatform::store_release(&ring_free[slot], block + s.ring_blocks);
        ++returned;
      }
      return true;
    }
    if (!take_up<P>(up, s.ring_blocks, s.up_tiles, task)) return false;
    const uint32_t slot = task.ring_slot, block = HostPlatform::load_acquire(&block_in[slot]);
    if (up_taken[block * s.up_tiles + task.tile].fetch_add(1) != 0) wrong = true;
    if (HostPlatform::fetch_sub(&up_left[slot], 1) == 1) push_down<P>(down, entries.data(), s.ring_blocks, slot);
    return true;
  };

  std::atomic<uint64_t> last_progress{HostPlatform::now_ns()};
  on_threads(s.workers, [&](int worker) {
    for (uint32_t rounds = 0; returned < s.blocks && !wrong;) {
      const bool progress = (worker == 0 && publish()) | work();
      const uint64_t last = last_progress, now = HostPlatform::now_ns();
      if (progress) rounds = 0, last_progress = now;
      if (now > last + patience_ns) wrong = true;
      if (!progress) HostPlatform::pause(++rounds);
    }
  });
  bool once = !wrong && returned == s.blocks;
  for (uint32_t i = 0; i < s.blocks * s.up_tiles; ++i) once = once && up_taken[i] == 1;
  for (uint32_t i = 0; i < s.blocks * s.down_tiles; ++i) once = once && down_taken[i] == 1;
  TileTask task;
  return once && !take_up<P>(up, s.ring_blocks, s.up_tiles, task) &&
         !take_down<P>(down, entries.data(), s.ring_blocks, s.down_tiles, task);
}

constexpr Sizes kSizes[] = {{1, 1, 1, 1, 3}, {300, 1, 3, 2, 3}, {500, 2, 1, 1, 4}, {400, 3, 5, 7, 4}, {600, 32, 4, 2, 3}};

// By one worker and by many; a race shows only with many.
template <class P>
bool caught_in_time() {
  for (int attempt = 0; attempt < 50; ++attempt)
    for (const Sizes& s : kSizes)
      if (!every_tile_once<P>(s, 500'000'000)) return true;
  return false;
}

void contention() {
  for (Sizes s : kSizes) {
    const std::string what = std::to_string(s.blocks) + " blocks in a ring of " + std::to_string(s.ring_blocks);
    check(every_tile_once<HostPlatform>(s), what);
    check(every_tile_once<Yielding>(s), what + ", yielding");
    s.workers = 1;
    check(every_tile_once<HostPlatform>(s), what + ", one worker");
  }
}

// An empty queue and a queue whose next block is not published give nothing, and take no ticket.
void nothing_to_take() {
  UpQueue up{};
  DownQueue down{};
  uint64_t entries[2] = {};
  TileTask task{7, 7};
  check(!take_up<HostPlatform>(up, 2, 3, task) && !take_down<HostPlatform>(down, entries, 2, 3, task), "empty queues");
  check(up.head == 0 && down.head == 0 && task.tile == 7, "a look at an empty queue changes nothing");
  up.published = 1;
  for (int tile = 0; tile < 3; ++tile)
    check(take_up<HostPlatform>(up, 2, 3, task) && task.ring_slot == 0 && task.tile == tile, "tiles of a block in turn");
  check(!take_up<HostPlatform>(up, 2, 3, task) && up.head == 3, "no tile of a block that is not published");
  push_down<HostPlatform>(down, entries, 2, 1);
  push_down<HostPlatform>(down, entries, 2, 0);
  for (uint32_t slot : {1u, 1u, 1u, 0u, 0u, 0u})
    check(take_down<HostPlatform>(down, entries, 2, 3, task) && task.ring_slot == slot, "down tiles in the order of their blocks' ends");
  // The place of position 0 holds its old entry; position 2 is not there yet.
  check(!take_down<HostPlatform>(down, entries, 2, 3, task), "a used entry is not taken again");
}

}  // namespace

int main() {
  run_test("TicketAndRingReuse", contention);
  run_test("NothingToTake", nothing_to_take);
  run_test("PlantedRaces", [] {
    check_caught(caught_in_time<BlindCompareExchange>(), "a ticket taken without comparing");
    check_caught(caught_in_time<TornFetchAdd>(), "two blocks pushed to one place");
    check_caught(caught_in_time<EntryBeforeItsPlace>(), "entries that do not say which they are");
  });
  return finish();
}
