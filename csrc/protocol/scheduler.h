// Scheduler: turns headers and chunks into runnable row blocks.
//
// Row block b of an expert is rows [b · kBlockM, (b + 1) · kBlockM) of its canonical list: its members depend
// on the routing alone, never on arrival. It is published once its rows are here and it owns a ring slot, so
// memory is bounded under any skew; a slot always comes free, because down tiles wait for nothing.
#pragma once

#include "protocol/platform.h"
#include "protocol/row_block.h"

namespace flashmoe {

template <Platform P>
class Scheduler {
 public:
  FLASHMOE_HD Scheduler(const Context<P>& context, uint32_t up_tiles, uint32_t down_tiles)
      : c_(context), up_tiles_(up_tiles), down_tiles_(down_tiles) {}

  FLASHMOE_HD Step step() {
    Counters& n = *c_.ws.counters;
    if (P::load_acquire(&n.scheduler_done)) return Step::kDone;
    if (!P::compare_exchange(&n.scheduler_lock, 0, 1)) return Step::kIdle;
    const uint32_t before = n.up.published;
    const uint32_t known = P::load_acquire(&n.headers_known);
    bool all_published = known == uint32_t(c_.call.ep_size);
    for (int e = 0; e < c_.call.num_local_experts(); ++e) {
      while (publish_next(e, known)) {
      }
      all_published = all_published && next_row(e) >= rows_known(e, known);
    }
    if (all_published) P::store_release(&n.scheduler_done, 1);
    const bool progress = n.up.published != before || all_published;
    P::store_release(&n.scheduler_lock, 0);
    return progress ? Step::kProgress : Step::kIdle;
  }

  // Every row that any source sent in this epoch has been computed and returned.
  FLASHMOE_HD bool all_served() const {
    const Counters& n = *c_.ws.counters;
    return P::load_acquire(&n.scheduler_done) && P::load_acquire(&n.blocks_done) == P::load_acquire(&n.up.published);
  }

 private:
  FLASHMOE_HD uint32_t next_row(int expert) const { return c_.ws.next_block[expert] * kBlockM; }
  FLASHMOE_HD uint32_t rows_known(int expert, uint32_t known) const {
    return c_.ws.row_offset[known * c_.call.num_local_experts() + expert];
  }

  FLASHMOE_HD bool publish_next(int expert, uint32_t known) {
    Workspace& ws = c_.ws;
    const uint32_t begin = next_row(expert), end = rows_known(expert, known);
    if (begin >= end) return false;
    // The last block of the list may be short, but only when no source can add to it any more.
    if (begin + kBlockM > end && known < uint32_t(c_.call.ep_size)) return false;
    const uint32_t rows = begin + kBlockM < end ? kBlockM : end - begin;

    const uint32_t sequence = ws.counters->up.published, slot = sequence % ws.ring_blocks;
    if (P::load_acquire(&ws.ring_free[slot]) != sequence) return false;
    if (!rows_are_here(expert, begin, rows, int(known))) return false;

    ws.ring[slot] = {expert, begin, rows, sequence, up_tiles_, down_tiles_};
    ++ws.next_block[expert];
    P::store_release(&ws.counters->up.published, sequence + 1);
    return true;
  }

  FLASHMOE_HD bool rows_are_here(int expert, uint32_t begin, uint32_t rows, int known) const {
    bool here = true;
    for_each_run(c_.call, c_.ws, expert, begin, rows, known, [&](const Run& run) {
      const uint32_t ready = P::load_acquire(&c_.ws.chunks_ready[run.source_index]);
      if (!here || ready == c_.ws.num_chunks[run.source_index]) return;
      const uint32_t* slot = packet_slots_of(c_, run.source_index) + run.entry;
      for (uint32_t r = 0; r < run.num_rows; ++r) here = here && slot[r] / kChunkRows < ready;
    });
    return here;
  }

  Context<P> c_;
  uint32_t up_tiles_, down_tiles_;
};

}  // namespace flashmoe
