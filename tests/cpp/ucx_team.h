// Ranks that are threads and reach each other through UCX alone, or some of them through memory, as on two hosts.
#pragma once

#include "platform/host.h"
#include "platform/ucx_network.h"
#include "team.h"

namespace flashmoe::test {

// One fabric for each rank, each with memory of its own that starts as zeros.
struct UcxRanks {
  // `hosts[rank]`: ranks of one host do not connect.
  UcxRanks(size_t bytes, const std::vector<int>& hosts) : hosts(hosts), memory(hosts.size()) {
    const int ranks = int(hosts.size());
    for (int r = 0; r < ranks; ++r) {
      memory[r] = std::make_shared<std::vector<uint64_t>>(bytes / sizeof(uint64_t));
      fabrics.push_back(std::make_shared<UcxFabric>(FLASHMOE_UCX_LIBRARY, memory[r], heap(r), bytes, r, ranks));
    }
    on_threads(ranks, [&](int r) {
      std::vector<std::optional<UcxFabric::Address>> far(ranks);
      for (int other = 0; other < ranks; ++other)
        if (hosts[other] != hosts[r]) far[other] = fabrics[other]->address();
      const std::optional<int> missing = fabrics[r]->connect(far, 20);
      check(!missing, "rank " + std::to_string(r) + " reaches all others");
    });
  }
  std::byte* heap(int rank) { return reinterpret_cast<std::byte*>(memory[rank]->data()); }
  const uint64_t* word(int rank, size_t offset) { return &(*memory[rank])[offset / sizeof(uint64_t)]; }

  std::vector<int> hosts;
  std::vector<std::shared_ptr<std::vector<uint64_t>>> memory;
  std::vector<std::shared_ptr<UcxFabric>> fabrics;
};

// A team whose heaps lie at different offsets of their ranks' memory.
inline Team make_ucx_team(UcxRanks& ranks, const Limits& limits, double timeout_s, int num_workers = 1) {
  const size_t stride = round_up(HeapLayout(limits).bytes, 4096);
  Team team;
  for (int r = 0; r < limits.ep_size; ++r) {
    GroupOptions o;
    o.name = "ucx", o.ep_rank = r, o.limits = limits, o.num_workers = num_workers;
    o.timeout_s = o.entry_timeout_s = timeout_s;
    std::vector<UcxNetwork::Place> places;
    for (int pe = 0; pe < limits.ep_size; ++pe) {
      places.push_back({pe, pe * stride});
      o.heaps.push_back(ranks.hosts[pe] == ranks.hosts[r] ? ranks.heap(pe) + places[pe].offset : nullptr);
      o.keep.push_back(ranks.memory[pe]);
    }
    o.heaps[r] = ranks.heap(r) + places[r].offset;
    o.pids.assign(limits.ep_size, 0);
    o.network = std::make_shared<UcxNetwork>(ranks.fabrics[r], std::move(places));
    team.push_back(std::make_shared<Group>(std::move(o)));
  }
  return team;
}

inline size_t memory_for(const Limits& limits) { return limits.ep_size * round_up(HeapLayout(limits).bytes, 4096); }

}  // namespace flashmoe::test
