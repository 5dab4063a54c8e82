// What a GPU keeps of one rank between calls: in device memory, so that a captured graph replays call after call
// without the host.
#pragma once

#include "kernel/block_trace.h"
#include "protocol/agent.h"
#include "protocol/peers.h"

namespace flashmoe::gpu {

struct RankState {
  Call call;  // of the current call, with its epoch
  HeapLayout layout;
  Workspace workspace;
  Peers peers;
  Deadlines deadlines;
  uint64_t last_epoch;
  Status failure;          // sticky: of the call that failed, if one did
  Status* report_failure;  // host-mapped, or null
  TraceLists trace{};      // of the current call
};

}  // namespace flashmoe::gpu
