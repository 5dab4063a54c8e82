// Which rank owns which expert, as both the host and a GPU know it. Placements are few: each stays on the device once it
// has been seen.
#pragma once

#include <map>
#include <vector>

#include "runtime/check.h"
#include "runtime/cuda_memory.h"

namespace flashmoe {

struct Placement {
  std::vector<int32_t> position, rank_begin;
  const int32_t *device_position, *device_rank_begin;
  uint32_t digest;
};

class Placements {
 public:
  const Placement& of(const ForwardArgs& a, int ep_size, int rank, DeviceMemory& memory) {
    std::vector<int32_t> key{a.num_experts};
    if (a.expert_map) key.insert(key.end(), a.expert_map, a.expert_map + a.num_experts);
    const auto known = known_.find(key);
    if (known != known_.end()) return known->second;
    Placement p;
    p.position.resize(a.num_experts), p.rank_begin.resize(ep_size + 1);
    take_placement(a, ep_size, rank, p.position.data(), p.rank_begin.data());
    p.digest = placement_digest(p.position.data(), p.rank_begin.data(), a.num_experts, ep_size);
    p.device_position = memory.copy_of(p.position), p.device_rank_begin = memory.copy_of(p.rank_begin);
    return known_.emplace(std::move(key), std::move(p)).first->second;
  }

 private:
  std::map<std::vector<int32_t>, Placement> known_;
};

}  // namespace flashmoe
