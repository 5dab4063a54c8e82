// What a GPU keeps of one rank between calls, and how a call begins: all of it in device memory, so that a captured
// graph replays call after call without the host.
#pragma once

#include "kernel/thread_groups.h"
#include "protocol/agent.h"

namespace flashmoe::gpu {

struct RankState {
  Call call;  // of the current call, with its epoch
  HeapLayout layout;
  Workspace workspace;
  std::byte* const* heaps;  // [ep_size] where each rank's heap is mapped here
  Deadlines deadlines;
  uint64_t last_epoch;
  Status failure;          // sticky: of the call that failed, if one did
  Status* report_failure;  // host-mapped, or null
};

// By one block, before the kernel of the call: the next epoch, and counters at zero. After a failure there is no next
// epoch: the call fails at once, as the last one did.
template <class Group>
FLASHMOE_DEVICE void begin_call(const Group& group, RankState& rank, const Call& call, const Workspace& workspace) {
  Workspace ws = workspace;
  Call next = call;
  const bool failed = rank.failure.failure;
  next.epoch = failed ? rank.last_epoch : next_epoch(rank.last_epoch);
  ws.reset(group, next, now_ns());
  group.sync();
  if (group.rank() != 0) return;
  if (failed) *ws.status = rank.failure;
  rank.last_epoch = next.epoch, rank.call = next, rank.workspace = ws;
}

}  // namespace flashmoe::gpu
