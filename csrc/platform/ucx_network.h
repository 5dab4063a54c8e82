// A group's view of the fabric: its ranks by their number in the group, its heaps within their arenas.
#pragma once

#include <mutex>
#include <vector>

#include "platform/host_network.h"
#include "platform/ucx_fabric.h"

namespace flashmoe {

class UcxNetwork final : public HostNetwork, UcxFabric::Listener {
 public:
  struct Place {
    int rank;       // as the fabric knows it
    size_t offset;  // of the group's heap in that rank's memory
  };

  UcxNetwork(std::shared_ptr<UcxFabric> fabric, std::vector<Place> places);  // by pe
  ~UcxNetwork() override;

  void put(const Put& put) override;
  bool quiet() override;
  void release_when_landed(uint32_t* word, uint32_t value) override;
  bool alive(int pe) override { return fabric_->reachable(places_[pe].rank); }
  std::optional<int> awaited() override;

 private:
  struct Release {
    uint32_t* word;
    uint32_t value;
    std::vector<uint64_t> puts;  // by pe: how many must have landed
  };

  void landed() override;
  void release_landed();

  const std::shared_ptr<UcxFabric> fabric_;
  const std::vector<Place> places_;
  std::vector<std::atomic<uint64_t>> last_;  // by pe: numbers of the fabric's puts up to ours
  std::mutex mutex_;
  std::vector<Release> releases_;
};

}  // namespace flashmoe
