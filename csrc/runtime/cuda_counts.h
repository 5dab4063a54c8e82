// What is counted of each layer's last call, on the device: of a workspace that which outlives the call.
#pragma once

#include <map>
#include <optional>

#include "runtime/cuda_memory.h"
#include "runtime/moe.h"

namespace flashmoe {

class CudaCounts {
 public:
  CudaCounts(DeviceMemory& memory, int ep_size) : memory_(memory), ep_size_(ep_size) {}

  struct OfCall {
    uint32_t* row_offset;
    uint64_t* sent;
  };
  // Where the next call of that layer counts; `rank` is a place among the ranks that are here.
  OfCall of(int layer, int rank, int num_local_experts) {
    Layer& l = known_[{layer, rank}];
    memory_.at_least(l.row_offset, sizeof(uint32_t) * (ep_size_ + 1) * num_local_experts);
    memory_.at_least(l.sent, sizeof(uint64_t) * ep_size_ * kTrafficKinds);
    l.num_local_experts = num_local_experts;
    return {reinterpret_cast<uint32_t*>(l.row_offset.data), reinterpret_cast<uint64_t*>(l.sent.data)};
  }

  // Of its last finished call, for which this waits.
  std::optional<GroupStats> stats(int layer, int rank) {
    const auto known = known_.find({layer, rank});
    if (known == known_.end()) return std::nullopt;
    check_cuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    const size_t experts = known->second.num_local_experts;
    const std::vector<uint32_t> rows =
        memory_.read<uint32_t>(known->second.row_offset.data + sizeof(uint32_t) * ep_size_ * experts, experts);
    const std::vector<uint64_t> sent =
        memory_.read<uint64_t>(known->second.sent.data, size_t(ep_size_) * kTrafficKinds);
    GroupStats s{{rows.begin(), rows.end()}, {}, {}, {}, {}};
    std::vector<uint64_t>* kinds[kTrafficKinds] = {&s.header, &s.rows, &s.results, &s.signals};
    for (size_t i = 0; i < sent.size(); ++i) kinds[i % kTrafficKinds]->push_back(sent[i]);
    return s;
  }

 private:
  struct Layer {
    DeviceBuffer row_offset, sent;
    int num_local_experts = 0;
  };

  DeviceMemory& memory_;
  int ep_size_;
  std::map<std::pair<int, int>, Layer> known_;  // by layer and rank
};

}  // namespace flashmoe
