// The ready queues under contention: every tile is taken once, a block's down tiles only after all its up tiles,
// and no entry is overwritten while one of its tickets is still to be turned into a tile. Blocks come in bundles, which
// share columns.
#include <memory>

#include "harness.h"
#include "platform/host.h"
#include "protocol/task.h"

namespace {

using namespace flashmoe;
using namespace flashmoe::test;

// Gives the core away between looking at a word and acting on it, where a race would show.
struct Yielding : HostPlatform {
  static uint32_t fetch_add(uint32_t* word, uint32_t n) {
    sched_yield();
    const uint32_t before = HostPlatform::fetch_add(word, n);
    sched_yield();
    return before;
  }
  static uint32_t fetch_add_relaxed(uint32_t* word, uint32_t n) {
    sched_yield();
    const uint32_t before = HostPlatform::fetch_add_relaxed(word, n);
    sched_yield();
    return before;
  }
};
struct TornFetchAdd : HostPlatform {
  static uint32_t fetch_add(uint32_t* word, uint32_t n) {
    const uint32_t old = load_acquire(word);
    sched_yield();
    store_release(word, old + n);
    return old;
  }
  static uint32_t fetch_add_relaxed(uint32_t* word, uint32_t n) { return fetch_add(word, n); }
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
  const uint32_t places = num_down_places(s.ring_blocks);
  UpQueue up{};
  DownQueue down{};
  std::vector<uint64_t> entries(places, 0);
  std::vector<Bundle> bundles(num_bundle_places(s.ring_blocks));
  std::vector<uint32_t> ring_free(s.ring_blocks), block_in(s.ring_blocks), up_left(s.ring_blocks), down_left(s.ring_blocks);
  for (uint32_t r = 0; r < s.ring_blocks; ++r) ring_free[r] = r;
  auto up_taken = std::make_unique<std::atomic<int>[]>(s.blocks * s.up_tiles);
  auto down_taken = std::make_unique<std::atomic<int>[]>(s.blocks * s.down_tiles);
  std::atomic<uint32_t> returned{0};
  std::atomic<bool> wrong{false};

  auto publish = [&] {
    const uint32_t first = up.published, most = max_bundle_blocks(s.ring_blocks, s.up_tiles, 1);
    const uint32_t blocks = std::min(1 + first / 3 % most, s.blocks - first);  // of every size
    for (uint32_t block = first; block < first + blocks; ++block)
      if (HostPlatform::load_acquire(&ring_free[block % s.ring_blocks]) != block) return false;
    for (uint32_t block = first; block < first + blocks; ++block) {
      const uint32_t slot = block % s.ring_blocks;
      HostPlatform::store_release(&block_in[slot], block);
      HostPlatform::store_release(&up_left[slot], s.up_tiles), HostPlatform::store_release(&down_left[slot], s.down_tiles);
      bundles[block % bundles.size()] = {first, blocks};
    }
    HostPlatform::store_release(&up.published, first + blocks);
    return blocks > 0;
  };
  auto work = [&](uint32_t& up_ticket, uint32_t& down_ticket) {
    TileTask task;
    if (take_down<P>(down, P::load_relaxed(&down.head), entries.data(), places, s.down_tiles, down_ticket, task)) {
      const uint32_t slot = task.ring_slot, block = HostPlatform::load_acquire(&block_in[slot]);
      if (HostPlatform::load_acquire(&up_left[slot]) != 0) wrong = true;
      if (down_taken[block * s.down_tiles + task.tile].fetch_add(1) != 0) wrong = true;
      if (HostPlatform::fetch_sub(&down_left[slot], 1) == 1) {
        HostPlatform::store_release(&ring_free[slot], block + s.ring_blocks);
        ++returned;
      }
      return true;
    }
    if (!take_up<P>(up, P::load_relaxed(&up.head), bundles.data(), s.ring_blocks, s.up_tiles, up_ticket, task)) return false;
    const uint32_t slot = task.ring_slot, block = HostPlatform::load_acquire(&block_in[slot]);
    if (up_taken[block * s.up_tiles + task.tile].fetch_add(1) != 0) wrong = true;
    if (HostPlatform::fetch_sub(&up_left[slot], 1) == 1) push_down<P>(down, entries.data(), places, slot);
    return true;
  };

  std::atomic<uint64_t> last_progress{HostPlatform::now_ns()};
  on_threads(s.workers, [&](int worker) {
    uint32_t up_ticket = kNoTicket, down_ticket = kNoTicket;
    for (uint32_t rounds = 0; returned < s.blocks && !wrong;) {
      const bool progress = (worker == 0 && publish()) | work(up_ticket, down_ticket);
      const uint64_t last = last_progress, now = HostPlatform::now_ns();
      if (progress) rounds = 0, last_progress = now;
      if (now > last + patience_ns) wrong = true;
      if (!progress) HostPlatform::pause(++rounds);
    }
  });
  bool once = !wrong && returned == s.blocks;
  for (uint32_t i = 0; i < s.blocks * s.up_tiles; ++i) once = once && up_taken[i] == 1;
  for (uint32_t i = 0; i < s.blocks * s.down_tiles; ++i) once = once && down_taken[i] == 1;
  uint32_t ticket = kNoTicket;
  TileTask task;
  return once && !take_up<P>(up, up.head, bundles.data(), s.ring_blocks, s.up_tiles, ticket, task) &&
         !take_down<P>(down, down.head, entries.data(), places, s.down_tiles, ticket, task);
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
  uint64_t entries[4] = {};
  TileTask task{7, 7};
  uint32_t ticket = kNoTicket;
  const Bundle bundles[num_bundle_places(2)] = {{0, 1}};
  const auto up_tile = [&] { return take_up<HostPlatform>(up, up.head, bundles, 2, 3, ticket, task); };
  const auto down_tile = [&] { return take_down<HostPlatform>(down, down.head, entries, 4, 3, ticket, task); };
  check(!up_tile() && !down_tile(), "empty queues");
  check(up.head == 0 && down.head == 0 && task.tile == 7, "a look at an empty queue changes nothing");
  up.published = 1;
  for (int tile = 0; tile < 3; ++tile) check(up_tile() && task.ring_slot == 0 && task.tile == tile, "tiles of a block in turn");
  check(!up_tile() && up.head == 3, "no tile of a block that is not published");
  push_down<HostPlatform>(down, entries, 4, 1);
  push_down<HostPlatform>(down, entries, 4, 0);
  for (uint32_t slot : {1u, 1u, 1u, 0u, 0u, 0u}) check(down_tile() && task.ring_slot == slot, "down tiles in the order of their blocks' ends");
  check(!down_tile() && ticket == kNoTicket, "a used entry is not taken again");
}

// A ticket drawn too early stays with its worker, and becomes the tile that it names.
void early_tickets() {
  constexpr uint32_t kPlaces = num_down_places(2);
  UpQueue up{.published = 1, .head = 3};
  const Bundle bundles[num_bundle_places(2)] = {{0, 1}, {1, 1}};
  uint32_t ticket = 3;
  TileTask task{7, 7};
  check(!take_up<HostPlatform>(up, up.head, bundles, 2, 3, ticket, task) && ticket == 3 && up.head == 3, "its block is not published");
  up.published = 2, up.head = 5;
  check(take_up<HostPlatform>(up, up.head, bundles, 2, 3, ticket, task) && task.ring_slot == 1 && task.tile == 0, "the tile of an early ticket");
  check(ticket == kNoTicket && up.head == 5, "and no other");
  DownQueue down{.tail = 0, .head = 2};
  uint64_t entries[kPlaces] = {};
  ticket = 1;
  check(!take_down<HostPlatform>(down, down.head, entries, kPlaces, 3, ticket, task) && ticket == 1, "its block has up tiles left");
  for (uint32_t slot : {1u, 0u, 1u, 0u}) push_down<HostPlatform>(down, entries, kPlaces, slot);
  check(take_down<HostPlatform>(down, down.head, entries, kPlaces, 3, ticket, task) && task.ring_slot == 1 && task.tile == 1,
        "the first entry, after as many more as can be under way");
}

// Tickets go through all blocks of a bundle before they go on to the next columns.
void bundles_share_columns() {
  constexpr uint32_t kRing = 16, kTiles = 2;
  std::vector<Bundle> bundles(num_bundle_places(kRing));
  UpQueue up{.published = 4, .head = 0};
  bundles[0] = bundles[1] = bundles[2] = {0, 3}, bundles[3] = {3, 1};
  uint32_t ticket = kNoTicket;
  TileTask task;
  constexpr std::pair<uint32_t, int> kOrder[] = {{0, 0}, {1, 0}, {2, 0}, {0, 1}, {1, 1}, {2, 1}, {3, 0}, {3, 1}};
  for (const auto& [slot, tile] : kOrder)
    check(take_up<HostPlatform>(up, up.head, bundles.data(), kRing, kTiles, ticket, task) && task.ring_slot == slot && task.tile == tile,
          "tile " + std::to_string(tile) + " of block " + std::to_string(slot));
}

// An H100 has 132 workers; of wide tiles Mixtral has 112, Llama4-Scout 64, DeepSeek-V3 16 and Qwen3 6.
void only_many_tiles_are_bundled() {
  for (const auto& [tiles, blocks] : {std::pair{112u, 8u}, {64u, 8u}, {33u, 1u}, {16u, 1u}, {6u, 1u}})
    check(max_bundle_blocks(64, tiles, 132) == blocks, std::to_string(tiles) + " tiles");
  for (const auto& [ring, blocks] : {std::pair{64u, 8u}, {31u, 7u}, {8u, 2u}, {7u, 1u}, {1u, 1u}})
    check(max_bundle_blocks(ring, 14, 2) == blocks, "a ring of " + std::to_string(ring));
}

// A ticket that names block 0 may be a tile of the last block of its bundle. While that is not computed, all blocks up
// to one ring later can have been published.
void late_tickets() {
  constexpr uint32_t kRing = 16, kTiles = 5, kBlocks = max_bundle_blocks(kRing, kTiles, 1);
  std::vector<Bundle> bundles(num_bundle_places(kRing));
  UpQueue up{.published = kRing + kBlocks - 1, .head = kBlocks};
  for (uint32_t block = 0; block < up.published; ++block) {
    const uint32_t first = block - block % kBlocks;
    bundles[block % bundles.size()] = {first, std::min(kBlocks, up.published - first)};
  }
  uint32_t ticket = kBlocks - 1;
  TileTask task;
  check(take_up<HostPlatform>(up, up.head, bundles.data(), kRing, kTiles, ticket, task) && task.ring_slot == kBlocks - 1 && task.tile == 0,
        "the tile of a late ticket");
}

}  // namespace

int main() {
  run_test("TicketAndRingReuse", contention);
  run_test("NothingToTake", nothing_to_take);
  run_test("EarlyTickets", early_tickets);
  run_test("LateTickets", late_tickets);
  run_test("OnlyManyTilesAreBundled", only_many_tiles_are_bundled);
  run_test("BundlesShareColumns", bundles_share_columns);
  run_test("PlantedRaces", [] {
    check_caught(caught_in_time<TornFetchAdd>(), "a ticket drawn twice, or two blocks pushed to one place");
    check_caught(caught_in_time<EntryBeforeItsPlace>(), "entries that do not say which they are");
  });
  return finish();
}
