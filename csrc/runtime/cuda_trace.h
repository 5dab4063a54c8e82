// Where the ranks of a GPU note what their blocks do, while somebody wants to know: memory that is there only then.
#pragma once

#include <algorithm>
#include <vector>

#include "runtime/cuda_kernel.h"
#include "runtime/cuda_memory.h"
#include "runtime/moe_cuda.h"

namespace flashmoe {

class CudaTrace {
 public:
  explicit CudaTrace(DeviceMemory& memory) : memory_(memory) {}

  // At most so many events of each list of each rank; 0: none, and no memory. What was noted before is lost.
  void set(uint32_t max_events, int ranks, int blocks_per_rank) {
    memory_.give_back(events_), memory_.give_back(ends_);
    capacity_ = 0, ranks_ = ranks, lists_ = gpu::TraceLists::num_lists(blocks_per_rank);
    if (!max_events) return;
    const size_t lists = size_t(ranks) * lists_;
    events_ = memory_.apart(lists * max_events * sizeof(TraceEvent));
    ends_ = memory_.apart(lists * sizeof(gpu::TraceEnd));
    capacity_ = max_events;
  }

  // For a call in a capture: its graph could be replayed when the memory is gone.
  void refuse() const {
    if (capacity_)
      throw std::runtime_error("flashmoe: a call that a CUDA graph captures cannot be traced: capture it outside of trace()");
  }

  // Of the i-th rank that is here, on the device.
  gpu::TraceLists of(int i) const {
    if (!capacity_) return {};
    const size_t first = size_t(i) * lists_;
    return {reinterpret_cast<TraceEvent*>(events_.data) + first * capacity_,
            reinterpret_cast<gpu::TraceEnd*>(ends_.data) + first, capacity_};
  }

  // By rank that is here, once the calls that note are done.
  std::vector<std::vector<CudaTraceList>> read() {
    std::vector<std::vector<CudaTraceList>> ranks(capacity_ ? ranks_ : 0);
    for (size_t i = 0; i < ranks.size(); ++i) ranks[i] = read(of(int(i)));
    return ranks;
  }

 private:
  std::vector<CudaTraceList> read(const gpu::TraceLists& here) {
    std::vector<CudaTraceList> lists;
    for (const gpu::TraceEnd& end : memory_.read<gpu::TraceEnd>(here.ends, lists_)) {
      const TraceEvent* events = here.events + lists.size() * capacity_;
      lists.push_back({memory_.read<TraceEvent>(events, std::min(end.count, capacity_)), end.count, end.multiprocessor});
    }
    return lists;
  }

  DeviceMemory& memory_;
  DeviceBuffer events_, ends_;
  uint32_t capacity_ = 0;
  int ranks_ = 0, lists_ = 0;
};

}  // namespace flashmoe
