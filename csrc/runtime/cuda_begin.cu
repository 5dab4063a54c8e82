#include "runtime/cuda_begin.h"

#include "kernel/begin_call.h"

namespace flashmoe {
namespace {

constexpr int kThreads = 512;

__global__ void __launch_bounds__(kThreads) begin_kernel(gpu::RankState* ranks, const __grid_constant__ BeginCall begin) {
  const BeginRank& mine = begin.rank[blockIdx.x];
  gpu::RankState& rank = ranks[blockIdx.x];
  Workspace workspace(mine.call, rank.layout, begin.machine, mine.workspace);
  workspace.row_offset = mine.row_offset, workspace.sent = mine.sent;
  if (threadIdx.x == 0) rank.trace = mine.trace;
  gpu::begin_call(gpu::WholeBlock{}, rank, mine.call, workspace, {mine.ids, mine.ids_bytes, mine.ids_out});
}

}  // namespace

cudaError_t launch_begin(gpu::RankState* ranks, int num_ranks, const BeginCall& begin, cudaStream_t stream) {
  void* arguments[] = {&ranks, const_cast<BeginCall*>(&begin)};
  return cudaLaunchKernel(begin_kernel, dim3(num_ranks), dim3(kThreads), arguments, 0, stream);
}

}  // namespace flashmoe
