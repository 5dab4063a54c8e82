// How the host platform reaches peers whose memory is not mapped here: by puts with a signal, and by nothing else.
//
// A network keeps what put_signal promises: the payload is there before its own signal is, and nothing holds between
// two puts. Calls come from several threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>

namespace flashmoe {

class HostNetwork {
 public:
  struct Put {
    int pe;
    size_t offset;  // in pe's heap
    const std::byte* from;  // must lie still until the put has landed
    size_t bytes;
    size_t signal;  // in pe's heap
    uint64_t word;
  };

  virtual ~HostNetwork() = default;
  virtual void put(const Put& put) = 0;
  // All puts made so far have landed. Nothing is under way to a peer that is lost: its puts count as landed.
  virtual bool quiet() = 0;
  // *word = value, once all puts made so far have landed.
  virtual void release_when_landed(uint32_t* word, uint32_t value) = 0;
  // Whether pe can still be reached, as far as the network has noticed.
  virtual bool alive(int pe) = 0;
  // A peer that a put of ours is still under way to.
  virtual std::optional<int> awaited() = 0;
};

}  // namespace flashmoe
