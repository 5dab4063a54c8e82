// Put-with-signal on fibers, as unkind as it may be: a payload is read piece by piece, and late; two puts are not
// ordered; and a signal may be there before its payload, which is then sure to be seen only by who tests the signal
// with the transport's verb. All of it moves when the machine likes.
#pragma once

#include "gpu/remote_verbs.h"

namespace flashmoe::gpu {

namespace simt {

// The memory that the transport knows, of each PE.
struct Arena {
  std::byte* base;
  size_t bytes;
};

class RemoteNetwork {
 public:
  explicit RemoteNetwork(std::vector<Arena> arenas) : arenas_(std::move(arenas)), puts_(arenas_.size()) {}

  struct Put : InFlight {
    std::byte* to;
    const std::byte* source;
    size_t bytes;
    uint64_t* signal;
    uint64_t word;
    std::vector<std::byte> carried;
    size_t delivered = 0;
    bool signalled = false;
    int pace = 0;  // one in so many chances to move is taken

    void land(Random& random) override;
    void deliver(size_t most) {
      const size_t piece = std::min(most, carried.size() - delivered);
      std::copy_n(carried.begin() + ptrdiff_t(delivered), piece, to + delivered);
      delivered += piece;
      landed = signalled && delivered == bytes;
    }
  };

  void put(int from, int to, std::byte* there, const std::byte* source, size_t bytes, uint64_t* signal, uint64_t word);
  // A signal is looked at: what came with it is there.
  void reveal(const uint64_t* signal) {
    for (auto& of_pe : puts_)
      for (auto& put : of_pe)
        if (put->signal == signal && put->signalled) put->deliver(put->bytes);
  }
  uint64_t made_by(int pe) const { return made_[size_t(pe)]; }
  bool landed(int pe, uint64_t made) {
    auto& of_pe = puts_[size_t(pe)];
    size_t first = made_[size_t(pe)] - of_pe.size();
    for (; !of_pe.empty() && of_pe.front()->landed; ++first) of_pe.pop_front();
    for (size_t i = 0; i < of_pe.size() && first + i < made; ++i)
      if (!of_pe[i]->landed) return false;
    return true;
  }

 private:
  std::byte* at(int from, int to, const void* address, size_t bytes, const char* what) const {
    const Arena &mine = arenas_[size_t(from)], &theirs = arenas_[size_t(to)];
    const std::byte* p = static_cast<const std::byte*>(address);
    if (p < mine.base || p + bytes > mine.base + mine.bytes)
      throw Misuse(std::string("remote_put_signal: ") + what + " is no memory of the transport's");
    return theirs.base + (p - mine.base);
  }

  std::vector<Arena> arenas_;
  std::vector<std::deque<std::shared_ptr<Put>>> puts_;  // by PE, in the order of their making
  std::vector<uint64_t> made_ = std::vector<uint64_t>(arenas_.size());
};

inline RemoteNetwork* network = nullptr;  // the one that the kernels use

inline void RemoteNetwork::Put::land(Random& random) {
  if (pace == 0) pace = random.one_in(4) ? 64 : 1;
  if (!random.one_in(size_t(pace))) return;
  machine->progress();
  const size_t piece = 1 + random.below(2 * bytes + 1);
  if (carried.size() < bytes) {
    const size_t end = std::min(bytes, carried.size() + piece);
    carried.insert(carried.end(), source + carried.size(), source + end);
  } else if (!signalled && (delivered == bytes || random.one_in(4))) {
    *static_cast<volatile uint64_t*>(signal) = word;
    signalled = true;
    deliver(0);
  } else {
    deliver(piece);
  }
}

inline void RemoteNetwork::put(int from, int to, std::byte* there, const std::byte* source, size_t bytes,
                               uint64_t* signal, uint64_t word) {
  auto put = std::make_shared<Put>();
  put->to = bytes ? at(from, to, there, bytes, "the destination") : nullptr;
  if (bytes) at(from, from, source, bytes, "the source");
  put->signal = reinterpret_cast<uint64_t*>(at(from, to, signal, sizeof word, "the signal"));
  put->source = source, put->bytes = bytes, put->word = word;
  puts_[size_t(from)].push_back(put);
  ++made_[size_t(from)];
  machine->launch(std::move(put));
}

}  // namespace simt

FLASHMOE_DEVICE void remote_put_signal(int my_pe, int pe, std::byte* to, const std::byte* source, size_t bytes,
                                       uint64_t* signal, uint64_t word) {
  simt::machine->step();
  simt::network->put(my_pe, pe, to, source, bytes, signal, word);
}
FLASHMOE_DEVICE bool remote_test(uint64_t* signal, uint64_t word) {
  simt::machine->step();
  simt::network->reveal(signal);
  return *static_cast<const volatile uint64_t*>(signal) == word;
}
FLASHMOE_DEVICE uint64_t remote_quiet_begin(int my_pe) {
  simt::machine->step();
  return simt::network->made_by(my_pe);
}
FLASHMOE_DEVICE bool remote_quiet_done(int my_pe, uint64_t ticket) {
  simt::machine->poll();
  return simt::network->landed(my_pe, ticket);
}

}  // namespace flashmoe::gpu
