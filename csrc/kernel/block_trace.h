// What a block notes of a call, if somebody asked for it: in shared memory the piece of work in hand and how many there
// were, in device memory the events. Each list has one writer, so none waits for another, and events are stores that
// nobody waits for.
#pragma once

#include "gpu/verbs.h"
#include "kernel/work_ring.h"
#include "protocol/trace.h"

namespace flashmoe::gpu {

// How a list ended.
struct TraceEnd {
  uint32_t count;           // of events, also of those for which there was no room
  uint32_t multiprocessor;  // of the writer
};

// A rank's lists: by block what its crew did, then what was seen to arrive, then what was published.
struct TraceLists {
  TraceEvent* events = nullptr;  // [num_lists(blocks), capacity]; null: nothing is noted
  TraceEnd* ends = nullptr;      // [num_lists(blocks)]
  uint32_t capacity = 0;

  FLASHMOE_HD static constexpr int num_lists(int blocks) { return blocks + 2; }
};

class BlockTrace {
 public:
  enum Writer { kCrew, kSubscriber, kScheduler };

  // By one thread; then sync_block.
  FLASHMOE_DEVICE void init(const TraceLists& lists, int block_of_rank, int blocks) {
    lists_ = lists, block_of_rank_ = block_of_rank, blocks_ = blocks;
    for (int writer = kCrew; writer <= kScheduler; ++writer) {
      TraceBuffer& buffer = buffers_[writer];
      buffer.events = lists.events ? lists.events + size_t(list_of(Writer(writer))) * lists.capacity : nullptr;
      buffer.capacity = lists.capacity, buffer.count = 0;
    }
  }

  // For a Tracer: null if nothing is noted.
  FLASHMOE_DEVICE TraceBuffer* of(Writer writer) { return lists_.events ? &buffers_[writer] : nullptr; }

  // By one of the loaders' threads, before it loads for the n-th piece of work; by the crew, who has what was loaded.
  FLASHMOE_DEVICE void note_loads(uint32_t n) {
    if (lists_.events) loads_ns_[n % kAhead] = now_ns();
  }
  FLASHMOE_DEVICE uint64_t loads_ns(uint32_t n) const { return lists_.events ? loads_ns_[n % kAhead] : 0; }

  // By each writer, when it has no more to note.
  FLASHMOE_DEVICE void end(Writer writer) {
    if (lists_.events) lists_.ends[list_of(writer)] = {buffers_[writer].count, uint32_t(multiprocessor())};
  }

 private:
  // While the crew is at one piece of work its loaders may have taken as many after it as the ring holds.
  static constexpr uint32_t kAhead = WorkRing::kDepth + 1;

  FLASHMOE_DEVICE int list_of(Writer writer) const {
    return writer == kCrew ? block_of_rank_ : blocks_ + (writer - kSubscriber);
  }

  TraceBuffer buffers_[kScheduler + 1];
  TraceLists lists_;
  int block_of_rank_, blocks_;
  uint64_t loads_ns_[kAhead];
};

}  // namespace flashmoe::gpu
