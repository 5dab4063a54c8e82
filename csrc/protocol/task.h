// Row blocks, the ring that holds their intermediate activations, and the two ready queues.
//
// A row block is up to kBlockM rows of one expert's canonical list. It is worth `num_up_tiles` up tasks; the
// last of them to end makes its `num_down_tiles` down tasks runnable; the last of those returns the rows.
// A task is a ticket: ticket t of a queue is tile t % tiles of the queue's block t / tiles.
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

// Blocks in the order in which the scheduler published them: block b lies in ring slot b % ring_blocks.
struct UpQueue {
  uint32_t published;  // blocks; one writer, the scheduler
  uint32_t head;       // next ticket
};

// Blocks in the order in which their up tiles ended. Entry p is (p + 1) << 32 | ring slot, so that a reader
// sees at once whether it is the entry it looks for. It is not overwritten before all its tickets are taken:
// no more than ring_blocks blocks are under way.
struct DownQueue {
  uint32_t tail;
  uint32_t head;
};

struct TileTask {
  uint32_t ring_slot;
  int32_t tile;
};

// Takes the next up tile if it is runnable.
template <class P>
FLASHMOE_ROLE bool take_up(UpQueue& queue, uint32_t ring_blocks, uint32_t tiles, TileTask& task) {
  while (true) {
    const uint32_t ticket = P::load_acquire(&queue.head);
    const uint32_t block = ticket / tiles;
    if (block >= P::load_acquire(&queue.published)) return false;
    if (!P::compare_exchange(&queue.head, ticket, ticket + 1)) continue;
    task = {block % ring_blocks, int32_t(ticket % tiles)};
    return true;
  }
}

template <class P>
FLASHMOE_ROLE bool take_down(DownQueue& queue, uint64_t* entries, uint32_t ring_blocks, uint32_t tiles, TileTask& task) {
  while (true) {
    const uint32_t ticket = P::load_acquire(&queue.head);
    const uint32_t position = ticket / tiles;
    const uint64_t entry = P::load_acquire(&entries[position % ring_blocks]);
    if (entry >> 32 != position + 1) {
      if (P::load_acquire(&queue.head) != ticket) continue;  // it was taken, and its place used again
      return false;
    }
    if (!P::compare_exchange(&queue.head, ticket, ticket + 1)) continue;
    task = {uint32_t(entry), int32_t(ticket % tiles)};
    return true;
  }
}

template <class P>
FLASHMOE_ROLE void push_down(DownQueue& queue, uint64_t* entries, uint32_t ring_blocks, uint32_t ring_slot) {
  const uint32_t position = P::fetch_add(&queue.tail, 1);
  P::store_release(&entries[position % ring_blocks], uint64_t(position + 1) << 32 | ring_slot);
}

}  // namespace flashmoe
