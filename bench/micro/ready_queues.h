// The ready queues without any tiles' products: what it costs to hand a tile to whoever computes it.
#pragma once

#include "protocol/task.h"
#include "stretch.h"

namespace flashmoe::micro {

using P = HostPlatform;

inline constexpr uint32_t kRing = 16, kPlaces = num_down_places(kRing);

// The scheduler's part, of row blocks that come one by one.
struct Publisher {
  UpQueue up{};
  Bundle bundles[num_bundle_places(kRing)] = {};

  void publish(uint32_t block) {
    bundles[block % num_bundle_places(kRing)] = {block, 1};
    P::store_release(&up.published, block + 1);
  }
  bool take(uint32_t tiles, uint32_t& ticket, TileTask& task) {
    return take_up<P>(up, P::load_relaxed(&up.head), bundles, kRing, tiles, ticket, task);
  }
};

// Seconds of each of about `n` tiles that one worker alone takes, of row blocks of `tiles` up and as many down tiles.
inline double take_alone(uint32_t tiles, int n) {
  Publisher publisher;
  DownQueue down{};
  uint64_t entries[kPlaces] = {};
  uint32_t up_ticket = kNoTicket, down_ticket = kNoTicket, wrong = 0;
  TileTask task;
  const double seconds = seconds_each(int(ceil_div<uint32_t>(n, 2 * tiles)), [&](int block) {
    publisher.publish(uint32_t(block));
    for (uint32_t tile = 0; tile < tiles; ++tile)
      wrong += !publisher.take(tiles, up_ticket, task) || task.tile != int(tile);
    push_down<P>(down, entries, kPlaces, block % kRing);
    for (uint32_t tile = 0; tile < tiles; ++tile)
      wrong += !take_down<P>(down, P::load_relaxed(&down.head), entries, kPlaces, tiles, down_ticket, task) || task.tile != int(tile);
  });
  if (wrong) throw std::logic_error("a tile was lost, or came twice");
  return seconds / (2 * tiles);
}

// Seconds of each of `n` tiles that `workers` draw from one queue at the same time.
inline double take_together(int workers, uint32_t tiles, int n) {
  const uint32_t blocks = ceil_div<uint32_t>(n, tiles);
  UpQueue up{.published = blocks, .head = 0};
  std::vector<Bundle> bundles(num_bundle_places(blocks));
  for (uint32_t block = 0; block < blocks; ++block) bundles[block] = {block, 1};
  std::atomic<uint64_t> numbers{0}, begin{0}, last{0};
  together(workers, [&](int worker) {
    if (worker == 0) begin = P::now_ns();
    uint32_t ticket = kNoTicket;
    uint64_t sum = 0;
    for (TileTask task; take_up<P>(up, P::load_relaxed(&up.head), bundles.data(), blocks, tiles, ticket, task);)
      sum += uint64_t(task.ring_slot) * tiles + task.tile;
    numbers += sum;
    const uint64_t now = P::now_ns();
    for (uint64_t before = last; before < now && !last.compare_exchange_weak(before, now);) {
    }
    return 0.0;
  });
  const uint64_t all = uint64_t(blocks) * tiles;
  if (numbers != all * (all - 1) / 2) throw std::logic_error("a tile was lost, or came twice");
  return double(last - begin) * 1e-9 / double(all);
}

// Seconds from one worker's publishing of a tile to another's having it: half of a row block's way to the other thread
// as an up tile, and back as a down tile.
inline double hand_off(int n) {
  Publisher publisher;
  DownQueue down{};
  uint64_t entries[kPlaces] = {};
  return 0.5 * together(2, [&](int thread) {
    uint32_t ticket = kNoTicket;
    TileTask task;
    return seconds_each(n, [&](int block) {
      if (thread == 0) {
        publisher.publish(uint32_t(block));
        await([&] { return take_down<P>(down, P::load_relaxed(&down.head), entries, kPlaces, 1, ticket, task); });
      } else {
        await([&] { return publisher.take(1, ticket, task); });
        push_down<P>(down, entries, kPlaces, task.ring_slot);
      }
      if (task.ring_slot != block % kRing) throw std::logic_error("another tile than the one that was handed over");
    });
  });
}

}  // namespace flashmoe::micro
