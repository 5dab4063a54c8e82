// How a call begins on a GPU: one launch, with a block for each rank.
#pragma once

#include "runtime/cuda_kernel.h"

namespace flashmoe {

struct BeginRank {
  Call call;
  std::byte* workspace;
  uint32_t* row_offset;  // in place of the workspace's, so that a layer's counts outlive its call; …
  uint64_t* sent;        // … so does this
  const void* ids;       // as they came
  int ids_bytes;         // 4 or 8
  int32_t* ids_out;      // as the protocol knows them: the call's topk_ids
  gpu::TraceLists trace;
};

// The kernel's parameters.
struct BeginCall {
  BeginRank rank[kMaxVirtualRanks];
  Machine machine;
};
static_assert(sizeof(BeginCall) < 4000, "more than a kernel's parameters may be");

cudaError_t launch_begin(gpu::RankState* ranks, int num_ranks, const BeginCall& begin, cudaStream_t stream);

}  // namespace flashmoe
