// A network between heaps of one machine, as unkind as put_signal allows: puts are delayed and reordered by a
// seed, the payload is read from its source only when it travels, and it lands some time before its signal.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include "platform/host_network.h"

namespace flashmoe {

class RehearsalNetwork final : public HostNetwork {
 public:
  // heaps[pe] is where pe's heap is mapped here.
  RehearsalNetwork(uint64_t seed, std::vector<std::byte*> heaps);
  ~RehearsalNetwork() override;  // everything lands first

  void put(const Put& put) override;
  bool quiet() override;
  void release_when_landed(uint32_t* word, uint32_t value) override;
  bool alive(int) override { return true; }
  std::optional<int> awaited() override;

 private:
  struct InFlight {
    Put put;
    uint64_t number;
    bool payload_landed;
  };
  struct Release {
    uint32_t* word;
    uint32_t value;
    uint64_t puts_before;
  };

  void deliver();
  void move_one(std::unique_lock<std::mutex>& lock);
  void release_landed();

  const std::vector<std::byte*> heaps_;
  std::mutex mutex_;
  std::condition_variable work_;
  std::vector<InFlight> in_flight_;
  std::vector<Release> releases_;
  uint64_t puts_ = 0;
  bool stop_ = false;
  std::mt19937_64 random_;
  std::thread thread_;  // last: it uses the rest
};

}  // namespace flashmoe
