// What a worker did, and when: a timeline of one call, kept only if somebody asked for it.
#pragma once

#include "protocol/work.h"
#include "protocol/workspace.h"

namespace flashmoe {

enum class TraceKind : uint32_t {
  kPlan = uint32_t(WorkKind::kPlan),
  kSendChunk = uint32_t(WorkKind::kSendChunk),  // chunk `part` to rank `index`
  kUpTile = uint32_t(WorkKind::kUpTile),        // tile `part` of the row block `sequence`
  kDownTile = uint32_t(WorkKind::kDownTile),
  kCombine = uint32_t(WorkKind::kCombine),
  kGradTile = uint32_t(WorkKind::kGradTile),  // tile `part` of the weight gradients of local expert `index`
  kArrived = 16,    // a moment: `part` chunks of rank `index` are here
  kPublished = 17,  // in this step row blocks below `sequence` became runnable
};

// Times are of the platform's clock. One crew's pieces of work do not overlap; where loaders fetch for it, what they do
// for the next piece overlaps with what it does for this one, and only their beginning is noted.
struct TraceEvent {
  uint64_t begin_ns;  // the crew takes the work up
  uint64_t end_ns;    // its results are written, and nobody has been told: whoever needs them begins after that
  uint64_t loads_ns;  // the loading of a tile's operands begins: with the tile, or before it where there are loaders
  uint32_t kind;
  int32_t index, part;
  int32_t expert;     // local, of a tile or a grad tile; else -1
  uint32_t rows;      // of its row block
  uint32_t sequence;
};

// Where a worker's events go. What does not fit is counted alone.
struct alignas(64) TraceBuffer {
  TraceEvent* events;
  uint32_t capacity, count;
  TraceEvent current{};  // the piece of work in hand: not in the worker's registers, for it is seldom looked at
};

// One worker's notes; without a buffer it notes nothing and costs a look at a pointer.
template <class P>
class Tracer {
 public:
  FLASHMOE_ROLE Tracer(const Context<P>& context, TraceBuffer* buffer) : c_(context), buffer_(buffer) {}

  FLASHMOE_ROLE void begins(const Work& work) {
    if (!buffer_) return;
    const bool tile = work.kind == WorkKind::kUpTile || work.kind == WorkKind::kDownTile;
    // Once the last tile is done, its row block may be another's.
    const RowBlock* block = tile ? &c_.ws.ring[work.index] : nullptr;
    const uint64_t now = P::now_ns();
    buffer_->current = {now, 0, now, uint32_t(work.kind), work.index, work.part, block ? block->local_expert : work.kind == WorkKind::kGradTile ? work.index : -1,
                        block ? block->num_rows : 0, block ? block->sequence : 0};
  }
  // Before others are told that the work is done. `loads_ns`: if others loaded for this worker.
  FLASHMOE_ROLE void ends(uint64_t loads_ns = 0) {
    if (!buffer_) return;
    buffer_->current.end_ns = P::now_ns();
    if (loads_ns) buffer_->current.loads_ns = loads_ns;
    add(buffer_->current);
  }

  // After the subscriber has moved on. What another worker has seen before may be noted again, later.
  FLASHMOE_ROLE void arrived() {
    if (!buffer_) return;
    const uint64_t now = P::now_ns();
    for (int i = 1; i < c_.call.ep_size; ++i)
      if (const uint32_t chunks = P::load_acquire(&c_.ws.chunks_ready[i]))
        add({now, now, now, uint32_t(TraceKind::kArrived), c_.call.canonical_source(i), int32_t(chunks), -1, 0, 0});
  }
  // After a step in which the scheduler has moved on; others may have taken a block before the step's end.
  FLASHMOE_ROLE uint64_t now() const { return buffer_ ? P::now_ns() : 0; }
  FLASHMOE_ROLE void published(uint64_t since) {
    if (!buffer_) return;
    const uint32_t sequence = P::load_acquire(&c_.ws.counters->up.published);
    add({since, P::now_ns(), since, uint32_t(TraceKind::kPublished), 0, 0, -1, 0, sequence});
  }

 private:
  FLASHMOE_ROLE void add(const TraceEvent& event) {
    if (buffer_->count < buffer_->capacity) buffer_->events[buffer_->count] = event;
    ++buffer_->count;
  }

  Context<P> c_;
  TraceBuffer* buffer_;
};

}  // namespace flashmoe
