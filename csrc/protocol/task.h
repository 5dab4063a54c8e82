// Row blocks, the ring that holds their intermediate activations, and the two ready queues.
//
// A row block is up to kBlockM rows of one expert's canonical list. It is worth `num_up_tiles` up tasks; the
// last of them to end makes its `num_down_tiles` down tasks runnable; the last of those returns the rows.
// A task is a ticket: ticket t of the down queue is tile t % tiles of the queue's block t / tiles.
//
// Row blocks of one expert may be published as a bundle. Its up tickets go through all its blocks before they go on to
// the next columns: workers then read the same weights at one time, and memory gives them once for the bundle and not
// once for each block. Its blocks end their up tiles together, so where workers are as many as their down tiles, they
// read the same down weights at one time, too.
#pragma once

#include "protocol/config.h"

namespace flashmoe {

struct RowBlock {
  int32_t local_expert;
  uint32_t row_begin;        // in the expert's canonical list
  uint32_t num_rows;
  int32_t num_sources;       // whose rows it may hold: all that were decided when it was published
  uint32_t sequence;         // of all row blocks of the call, in order of publication
  uint32_t up_tiles_left;    // arrival counter: the last arriver publishes the block's down tiles
  uint32_t down_tiles_left;  // arrival counter: the last arriver returns the block's rows
};

// Sequence numbers `first` to `first + blocks`, exclusive.
struct Bundle {
  uint32_t first, blocks;
};

// Where an expert has so few tiles that workers are at four of its row blocks at one time anyway, a bundle would only
// have the first rows wait for the last. A bundle waits until it owns all its ring slots: four fit into the ring, so
// that some compute while it waits.
FLASHMOE_HD constexpr uint32_t max_bundle_blocks(uint32_t ring_blocks, uint32_t up_tiles, uint32_t num_workers) {
  if (ring_blocks < 8 || 4 * up_tiles <= num_workers) return 1;
  return ring_blocks < 32 ? ring_blocks / 4 : 8;
}

// Blocks in the order in which the scheduler published them: block b lies in ring slot b % ring_blocks, and its bundle
// is known at place b % num_bundle_places.
struct UpQueue {
  uint32_t published;  // blocks; one writer, the scheduler
  uint32_t head;       // next ticket
};

// A ticket names a bundle by one of its blocks, not always by the one whose tile it is. As long as that tile is not
// computed, no block from its own number + ring_blocks on is published. That number is less than the named one +
// ring_blocks, so the place is not overwritten.
FLASHMOE_HD constexpr uint32_t num_bundle_places(uint32_t ring_blocks) { return 2 * ring_blocks; }

// Blocks in the order in which their up tiles ended. Entry p is (p + 1) << 32 | ring slot, so that a reader
// sees at once whether it is the entry it looks for.
struct DownQueue {
  uint32_t tail;
  uint32_t head;
};

// Entry p lies at place p % num_down_places, and may not be overwritten before all its tickets are turned into tiles.
// A block is not published before the one ring_blocks before it is done. So if block b, the p-th to end its up tiles,
// is not done, all that ended so far are among the first b + ring_blocks; and all but ring_blocks - 1 of those before b
// had ended when it did: b < p + ring_blocks. Hence no entry from p + 2 · ring_blocks on was written yet.
FLASHMOE_HD constexpr uint32_t num_down_places(uint32_t ring_blocks) { return 2 * ring_blocks; }

struct TileTask {
  uint32_t ring_slot;
  int32_t tile;
};

// Tickets are drawn by adding: a worker never tries again because another was faster, as comparing and exchanging would
// have it do, one success to each round of all who try. So a worker may draw one whose block is not there yet, when
// others drew the last that was. It keeps that ticket until the block comes, or the call ends.
//
// Tickets order nothing, and `head` is what the worker saw of the queue's a moment ago, to draw none in vain: it is what
// was published that hands over a block. So a worker may look at both heads at once, and draw without waiting for
// anything that it wrote.
inline constexpr uint32_t kNoTicket = ~0u;

// Takes the next up tile if it is runnable.
template <class P>
FLASHMOE_ROLE bool take_up(UpQueue& queue, uint32_t head, const Bundle* bundles, uint32_t ring_blocks, uint32_t tiles,
                           uint32_t& ticket, TileTask& task) {
  const uint32_t published = P::load_acquire(&queue.published);
  if (ticket == kNoTicket) {
    if (head / tiles >= published) return false;
    ticket = P::fetch_add_relaxed(&queue.head, 1);
  }
  const uint32_t block = ticket / tiles;
  if (block >= published) return false;
  const Bundle bundle = bundles[block % num_bundle_places(ring_blocks)];
  const uint32_t place = ticket - bundle.first * tiles;
  task = {(bundle.first + place % bundle.blocks) % ring_blocks, int32_t(place / bundle.blocks)};
  ticket = kNoTicket;
  return true;
}

template <class P>
FLASHMOE_ROLE bool take_down(DownQueue& queue, uint32_t head, const uint64_t* entries, uint32_t places, uint32_t tiles,
                             uint32_t& ticket, TileTask& task) {
  const bool looks = ticket == kNoTicket;
  uint32_t position = (looks ? head : ticket) / tiles;
  uint64_t entry = P::load_acquire(&entries[position % places]);
  if (entry >> 32 != position + 1) return false;
  if (looks) {
    ticket = P::fetch_add_relaxed(&queue.head, 1);
    if (ticket / tiles != position) {
      position = ticket / tiles, entry = P::load_acquire(&entries[position % places]);
      if (entry >> 32 != position + 1) return false;
    }
  }
  task = {uint32_t(entry), int32_t(ticket % tiles)};
  ticket = kNoTicket;
  return true;
}

template <class P>
FLASHMOE_ROLE void push_down(DownQueue& queue, uint64_t* entries, uint32_t places, uint32_t ring_slot) {
  const uint32_t position = P::fetch_add(&queue.tail, 1);
  P::store_release(&entries[position % places], uint64_t(position + 1) << 32 | ring_slot);
}

}  // namespace flashmoe
