// How a block's agent hands work to its crew: a ring in shared memory. Every warp of the crew sees every piece of
// work, in order; the agent may be kDepth pieces ahead of the slowest of them, and no more, since what one block has
// taken no other block will do. For the same reason it takes a tile only when asked for one: by then another block may
// have become free for it.
//
// What the agent acquired, of this GPU or of another, the crew may read: its arrival at `full` passes that on.
#pragma once

#include "kernel/thread_groups.h"
#include "protocol/work.h"

namespace flashmoe::gpu {

class WorkRing {
 public:
  static constexpr uint32_t kDepth = 2;

  // By one thread; then sync_block.
  FLASHMOE_DEVICE void init(int crew_warps) {
    for (uint32_t i = 0; i < kDepth; ++i) full_[i].init(1), empty_[i].init(uint32_t(crew_warps));
    asked_.init(1);
    fence_barrier_init();
  }

  // By the agent's warp: whether the n-th piece of work has been asked for.
  FLASHMOE_DEVICE bool is_wanted(uint32_t n) {
    return Warp::broadcast(uint32_t(n == 0 || (lane() == 0 && asked_.has_ended((n - 1) % 2))));
  }

  // By the agent's warp: the n-th piece of work, unless the crew is too far behind.
  FLASHMOE_DEVICE bool post(uint32_t n, const Work& work) {
    const uint32_t slot = n % kDepth;
    bool posted = false;
    if (lane() == 0 && empty_[slot].has_ended(n / kDepth % 2 ^ 1)) {
      work_[slot] = work;
      full_[slot].arrive();
      posted = true;
    }
    return Warp::broadcast(uint32_t(posted));
  }

  // By one thread, once for each piece of work, after taking it: soon the next will be needed.
  FLASHMOE_DEVICE void ask() { asked_.arrive(); }

  // By each of the crew's warps.
  FLASHMOE_DEVICE Work take(uint32_t n) {
    const uint32_t slot = n % kDepth;
    full_[slot].wait(n / kDepth % 2);
    const Work work = work_[slot];
    sync_warp();
    if (lane() == 0) empty_[slot].arrive();
    return work;
  }

 private:
  Barrier full_[kDepth], empty_[kDepth], asked_;
  Work work_[kDepth];
};

}  // namespace flashmoe::gpu
