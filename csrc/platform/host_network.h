// A network between heaps of one machine, as unkind as put_signal allows: puts are delayed and reordered by a
// seed, the payload is read from its source only when it travels, and it lands some time before its signal.
// What it keeps is what put_signal promises: payload before its own signal, nothing between two puts.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

namespace flashmoe {

class HostNetwork {
 public:
  struct Put {
    std::byte* to;
    const std::byte* from;
    size_t bytes;
    uint64_t* signal;
    uint64_t word;
  };

  explicit HostNetwork(uint64_t seed);
  ~HostNetwork();  // everything lands first

  void put(const Put& put);
  bool quiet();
  // *word = value, once all puts made so far have landed.
  void release_when_landed(uint32_t* word, uint32_t value);

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
