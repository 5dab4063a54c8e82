#include "runtime/cuda_begin.h"

namespace flashmoe {
namespace {

constexpr int kThreads = 512;

// Ids as int32, -1 for dropped. Returns the first of this thread's pairs whose id is none, or `pairs`.
template <class Id>
__device__ int take_device_ids(const void* ids, int pairs, int num_experts, int32_t* out) {
  int first_bad = pairs;
#pragma unroll 4
  for (int i = threadIdx.x; i < pairs; i += kThreads) {
    const long long id = static_cast<const Id*>(ids)[i];
    if ((id < -1 || id > num_experts) && i < first_bad) first_bad = i;
    out[i] = id < 0 || id >= num_experts ? -1 : int32_t(id);
  }
  return first_bad;
}

__device__ void report_bad_id(Status& status, const BeginRank& begin, int pair) {
  const int top_k = begin.call.top_k;
  status.seen = begin.ids_bytes == 8 ? uint64_t(static_cast<const int64_t*>(begin.ids)[pair])
                                     : uint64_t(int64_t(static_cast<const int32_t*>(begin.ids)[pair]));
  status.token = pair / top_k, status.choice = pair % top_k;
  status.peer = begin.call.ep_rank, status.expert = -1;
  status.claimed = 1, status.failure = uint32_t(Failure::kBadId);
}

// A call with a bad id has failed before its kernel begins, which then sees to y, to the peers and to the report.
__global__ void __launch_bounds__(kThreads) begin_kernel(gpu::RankState* ranks, const __grid_constant__ BeginCall begin) {
  const BeginRank& mine = begin.rank[blockIdx.x];
  const Call& call = mine.call;
  gpu::RankState& rank = ranks[blockIdx.x];
  __shared__ int first_bad;
  if (threadIdx.x == 0) {
    first_bad = call.num_tokens * call.top_k;
    // Nobody else holds anything of a lone rank's call, so a bad id was that call's trouble alone.
    if (call.ep_size == 1 && Failure(rank.failure.failure) == Failure::kBadId) rank.failure = Status{};
  }
  __syncthreads();
  const int pairs = call.num_tokens * call.top_k;
  const int bad = mine.ids_bytes == 8 ? take_device_ids<int64_t>(mine.ids, pairs, call.num_experts, mine.ids_out)
                                      : take_device_ids<int32_t>(mine.ids, pairs, call.num_experts, mine.ids_out);
  if (bad < pairs) atomicMin(&first_bad, bad);

  Workspace workspace(call, rank.layout, begin.machine, mine.workspace);
  workspace.row_offset = mine.row_offset;
  gpu::begin_call(gpu::WholeBlock{}, rank, call, workspace);
  if (threadIdx.x == 0 && first_bad < pairs && !rank.failure.failure) report_bad_id(*workspace.status, mine, first_bad);
}

}  // namespace

cudaError_t launch_begin(gpu::RankState* ranks, int num_ranks, const BeginCall& begin, cudaStream_t stream) {
  void* arguments[] = {&ranks, const_cast<BeginCall*>(&begin)};
  return cudaLaunchKernel(begin_kernel, dim3(num_ranks), dim3(kThreads), arguments, 0, stream);
}

}  // namespace flashmoe
