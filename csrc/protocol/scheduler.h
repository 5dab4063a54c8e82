// Scheduler: turns headers and chunks into runnable row blocks.
//
// Row block b of an expert is rows [b · kBlockM, (b + 1) · kBlockM) of its canonical list: its members depend
// on the routing alone, never on arrival. It is published once its rows are here and it owns a ring slot, so
// memory is bounded under any skew; a slot always comes free, because down tiles wait for nothing. Blocks of one
// expert that are runnable at one time are published as bundles (protocol/task.h), which own all their slots.
#pragma once

#include "protocol/group.h"
#include "protocol/platform.h"
#include "protocol/row_block.h"
#include "protocol/work.h"

namespace flashmoe {

template <Platform P>
class Scheduler {
 public:
  FLASHMOE_ROLE Scheduler(const Context<P>& context, const TileShape& tiles) : c_(context), tiles_(tiles) {}

  // Publishes what has become runnable. True if anything has, or if all is published.
  template <LaneGroup Lanes>
  FLASHMOE_ROLE bool step(const Lanes& lanes) {
    Counters& n = *c_.ws.counters;
    const bool mine =
        lanes.rank() == 0 && !P::load_acquire(&n.scheduler_done) && P::compare_exchange(&n.scheduler_lock, 0, 1);
    if (!lanes.broadcast(uint32_t(mine))) return false;
    const uint32_t before = n.up.published;
    const uint32_t known = lanes.broadcast(lanes.rank() == 0 ? P::load_acquire(&n.headers_known) : 0u);
    const int experts = c_.call.num_local_experts();
    const bool all_here = known_rows_are_here(lanes, known);
    // Experts take turns: none goes before one that waits for slots, or small bundles would take what large ones wait for.
    bool all_published = known == uint32_t(c_.call.ep_size), room = true;
    for (int first = 0; first < experts; first += lanes.size()) {
      const int expert = first + lanes.rank();
      if (all_here) {
        room = room && publish_together(lanes, expert, known);
      } else {
        lanes.for_each_true(is_waiting(expert, known), [&](int rank) {
          while (room && publish_bundle(lanes, first + rank, known, room)) {
          }
        });
      }
      all_published = lanes.all(all_published && !is_waiting(expert, known));
    }
    if (!all_published) c_.platform.settle(lanes, n.up.published, most_blocks());
    if (c_.backward() && !room) refuse_if_too_many(lanes, known);
    const bool progress = n.up.published != before || all_published;
    lanes.sync();
    if (lanes.rank() == 0) {
      if (all_published) P::store_release(&n.scheduler_done, 1);
      P::store_release(&n.scheduler_lock, 0);
    }
    return progress;
  }

  // Every row that any source sent in this epoch has been computed and returned.
  FLASHMOE_ROLE bool all_served() const {
    const Counters& n = *c_.ws.counters;
    return P::load_acquire(&n.scheduler_done) && P::load_acquire(&n.blocks_done) == P::load_acquire(&n.up.published);
  }

 private:
  FLASHMOE_ROLE uint32_t next_row(int expert) const { return c_.ws.next_block[expert] * kBlockM; }
  FLASHMOE_ROLE uint32_t rows_known(int expert, uint32_t known) const {
    return c_.ws.row_offset[known * c_.call.num_local_experts() + expert];
  }

  FLASHMOE_ROLE bool is_waiting(int expert, uint32_t known) const {
    return expert < c_.call.num_local_experts() && next_row(expert) < rows_known(expert, known);
  }

  template <LaneGroup Lanes>
  FLASHMOE_ROLE bool known_rows_are_here(const Lanes& lanes, uint32_t known) const {
    bool here = true;
    for (uint32_t i = lanes.rank(); i < known; i += lanes.size())
      here = here && P::load_acquire(&c_.ws.chunks_ready[i]) == c_.ws.num_chunks[i];
    return lanes.all(here);
  }

  // That can be cut from an expert's rows; the last may be short, but only when no source can add to it any more.
  FLASHMOE_ROLE uint32_t num_blocks(uint32_t begin, uint32_t end, uint32_t known) const {
    return begin < end ? (end - begin + (known == uint32_t(c_.call.ep_size) ? kBlockM - 1 : 0)) / kBlockM : 0;
  }

  FLASHMOE_ROLE uint32_t most_blocks() const {
    return max_bundle_blocks(c_.blocks_in_flight(), tiles_.up_tiles, c_.ws.num_workers);
  }
  FLASHMOE_ROLE static uint32_t smaller(uint32_t a, uint32_t b) { return a < b ? a : b; }

  FLASHMOE_ROLE bool owns_slot(uint32_t sequence) const {
    // Of a backward call weight gradients read the rows of all blocks: none lies where another lay.
    if (c_.backward() && sequence >= c_.ws.ring_blocks) return false;
    return P::load_acquire(&c_.ws.ring_free[sequence % c_.blocks_in_flight()]) == sequence;
  }

  // Whether more rows have come to a backward call than it has memory for, or blocks only wait for others to end.
  template <LaneGroup Lanes>
  FLASHMOE_ROLE void refuse_if_too_many(const Lanes& lanes, uint32_t known) {
    const int experts = c_.call.num_local_experts();
    uint32_t blocks = 0, waiting = 0;
    for (int expert = lanes.rank(); expert < experts; expert += lanes.size())
      blocks += num_blocks(next_row(expert), rows_known(expert, known), known);
    lanes.exclusive_sum(blocks, waiting);
    if (lanes.rank() != 0 || c_.ws.counters->up.published + waiting <= c_.ws.ring_blocks) return;
    fail_call(c_, Failure::kNoRoom, [&](Status& status) {
      status.peer = c_.call.ep_rank, status.expert = -1, status.room = uint64_t(c_.ws.ring_blocks) * kBlockM;
      for (int expert = 0; expert < c_.call.num_local_experts(); ++expert) status.seen += rows_known(expert, known);
    });
  }

  FLASHMOE_ROLE RowBlock block_at(int expert, uint32_t row, uint32_t end, uint32_t known, uint32_t sequence) const {
    const uint32_t rows = row + kBlockM < end ? kBlockM : end - row;
    return {expert, row, rows, int32_t(known), sequence, tiles_.up_tiles, tiles_.down_tiles};
  }

  FLASHMOE_ROLE void describe(const RowBlock& block, Bundle bundle) {
    c_.ws.ring[block.sequence % c_.ws.ring_blocks] = block;
    c_.ws.bundles[block.sequence % num_bundle_places(c_.ws.ring_blocks)] = bundle;
  }

  // For the weight gradients of a backward call: `num` more blocks of one expert, from sequence number `first` on.
  FLASHMOE_ROLE void append_blocks(int expert, uint32_t first, uint32_t num) {
    if (!c_.backward() || num == 0) return;
    const BackwardTables tables = c_.backward_tables();
    uint32_t& last = tables.last_block[expert];
    (c_.ws.next_block[expert] == 0 ? tables.first_block[expert] : tables.following[last]) = first;
    for (uint32_t b = first + 1; b < first + num; ++b) tables.following[b - 1] = b;
    last = first + num - 1;
  }

  // All bundles of the lanes' experts that own their ring slots, in the order of the experts; true if that is all of them.
  // One after another they would keep many small experts waiting for longer than their tiles take.
  template <LaneGroup Lanes>
  FLASHMOE_ROLE bool publish_together(const Lanes& lanes, int expert, uint32_t known) {
    Workspace& ws = c_.ws;
    const bool waiting = is_waiting(expert, known);
    const uint32_t begin = waiting ? next_row(expert) : 0, end = waiting ? rows_known(expert, known) : 0;
    const uint32_t blocks = num_blocks(begin, end, known), published = ws.counters->up.published;
    uint32_t all;
    const uint32_t first = published + lanes.exclusive_sum(blocks, all);
    if (all == 0) return true;
    uint32_t num = 0;
    while (num < blocks && owns_slot(first + num)) ++num;
    // Sequences have no gaps: after the first lane that lacks a slot none publishes, and that one only whole bundles.
    const int last = lanes.leading(num == blocks);
    if (lanes.rank() == last) num -= num % most_blocks();
    if (lanes.rank() > last) num = 0;
    for (uint32_t begun = 0; begun < num; begun += most_blocks()) {
      const uint32_t together = smaller(num - begun, most_blocks());
      for (uint32_t b = begun; b < begun + together; ++b)
        describe(block_at(expert, begin + b * kBlockM, end, known, first + b), {first + begun, together});
    }
    append_blocks(expert, first, num);
    if (num) ws.next_block[expert] += num;
    lanes.exclusive_sum(num, all);
    lanes.sync();
    if (lanes.rank() == 0 && all) P::store_release(&ws.counters->up.published, published + all);
    lanes.sync();
    return last == lanes.size();
  }

  // As many of the expert's next blocks as are here, up to a bundle, if there is room for them.
  template <LaneGroup Lanes>
  FLASHMOE_ROLE bool publish_bundle(const Lanes& lanes, int expert, uint32_t known, bool& room) {
    Workspace& ws = c_.ws;
    const uint32_t begin = next_row(expert), end = rows_known(expert, known), first = ws.counters->up.published;
    if (c_.backward() && begin >= end) return false;  // no room for more is then no failure
    const auto block = [&](uint32_t b) { return block_at(expert, begin + b * kBlockM, end, known, first + b); };
    const auto own_slots = [&](uint32_t num) {
      bool owned = true;
      for (uint32_t b = lanes.rank(); b < num; b += lanes.size()) owned = owned && owns_slot(first + b);
      return lanes.all(owned);
    };
    room = own_slots(1);
    if (!room) return false;
    const uint32_t most = smaller(num_blocks(begin, end, known), most_blocks());
    uint32_t num = 0;
    while (num < most && lanes.all(rows_are_here(lanes, block(num)))) ++num;
    room = own_slots(num);
    if (num == 0 || !room) return false;
    for (uint32_t b = lanes.rank(); b < num; b += lanes.size()) describe(block(b), {first, num});
    lanes.sync();
    if (lanes.rank() == 0) {
      append_blocks(expert, first, num);
      ws.next_block[expert] += num;
      P::store_release(&ws.counters->up.published, first + num);
    }
    lanes.sync();
    return true;
  }

  // Of the rows that this lane looks at.
  template <LaneGroup Lanes>
  FLASHMOE_ROLE bool rows_are_here(const Lanes& lanes, const RowBlock& block) const {
    bool here = true;
    for_each_run(c_.call, c_.ws, block, 0, block.num_rows, [&](const Run& run) {
      const uint32_t ready = P::load_acquire(&c_.ws.chunks_ready[run.source_index]);
      if (!here || ready == c_.ws.num_chunks[run.source_index]) return;
      const uint32_t* slot = packet_slots_of(c_, run.source_index) + run.entry;
      for (uint32_t r = lanes.rank(); r < run.num_rows; r += lanes.size()) here = here && slot[r] / kChunkRows < ready;
    });
    return here;
  }

  Context<P> c_;
  TileShape tiles_;
};

}  // namespace flashmoe
