// A platform whose time is a random number generator: ranks, workers and transfers move one step at a time, in one
// thread, in the order of a seed. So every run can be repeated, thousands of orders fit in a second, and code that
// is broken on purpose shows as a wrong result or a standstill instead of as a data race.
#pragma once

#include <algorithm>
#include <list>
#include <random>

#include "platform/host.h"
#include "protocol/heap_layout.h"
#include "protocol/signal.h"

namespace flashmoe::test {

// What is broken on purpose.
enum class Fault {
  kNone,
  kSignalBeforePayload,  // the signal of tokens or results may land before its rows
  kLostSignal,           // one signal in twenty never lands
  kQuietLies,            // quiet() says yes while puts are under way
  kEarlyRelease,         // release_when_landed does not wait for the landing
  kStaleHeaders,         // any header word that was ever written is taken for this epoch's …
  kStaleChunks,          // … any chunk word
  kStaleReplies,         // … any result word
  kNewerIsNotYet,        // a newer header says nothing
  kEpochsAsNumbers,      // epochs compared as numbers rather than on their circle
};

// Puts under way between all ranks. Like put_signal, and no kinder: a payload travels piece by piece, is read only
// when it travels, and is there before its own signal; nothing holds between two puts.
class SimNetwork {
 public:
  // `newest_first`: mostly the latest put moves, so that old ones wait for very long.
  SimNetwork(std::mt19937_64& random, bool newest_first, Fault fault)
      : random_(random), newest_first_(newest_first), fault_(fault) {}

  struct Put {
    int rank;
    Traffic kind;
    std::byte* to;
    const std::byte* from;
    size_t bytes;
    uint64_t* signal;
    uint64_t word, number;
  };

  void put(Put p) {
    p.number = puts_++;
    // Here a lie shall cost the order of the signals alone: what they announce outlives the call that put it.
    if (fault_ == Fault::kQuietLies) p.from = kept_.emplace_back(p.from, p.from + p.bytes).data();
    in_flight_.push_back(p);
  }
  bool quiet(int rank) const {
    return fault_ == Fault::kQuietLies ||
           std::none_of(in_flight_.begin(), in_flight_.end(), [rank](const Put& p) { return p.rank == rank; });
  }
  void release_when_landed(int rank, uint32_t* word, uint32_t value) {
    releases_.push_back({rank, word, value, puts_});
    release_landed();
  }
  // A piece of a payload, or a signal. False if nothing is under way.
  bool move_one() {
    if (in_flight_.empty()) return false;
    const bool newest = newest_first_ && random_() % 40;
    const size_t i = newest ? in_flight_.size() - 1 : random_() % in_flight_.size();
    Put& p = in_flight_[i];
    const bool early = fault_ == Fault::kSignalBeforePayload && p.kind != Traffic::kHeader && random_() % 4 == 0;
    if (early) HostPlatform::store_release(p.signal, p.word);
    if (p.bytes) {
      const size_t piece = std::min<size_t>(p.bytes, 1 + random_() % (2 * p.bytes));
      std::memcpy(p.to, p.from, piece);
      p.to += piece, p.from += piece, p.bytes -= piece;
      return true;
    }
    if (fault_ != Fault::kLostSignal || random_() % 20) HostPlatform::store_release(p.signal, p.word);
    in_flight_.erase(in_flight_.begin() + i);
    release_landed();
    return true;
  }

 private:
  struct Release {
    int rank;
    uint32_t* word;
    uint32_t value;
    uint64_t puts_before;
  };
  void release_landed() {
    std::erase_if(releases_, [this](const Release& r) {
      const bool landed = std::none_of(in_flight_.begin(), in_flight_.end(),
                                       [&r](const Put& p) { return p.rank == r.rank && p.number < r.puts_before; });
      const bool early = fault_ == Fault::kEarlyRelease || fault_ == Fault::kQuietLies;
      if (landed || early) HostPlatform::store_release(r.word, r.value);
      return landed || early;
    });
  }

  std::mt19937_64& random_;
  bool newest_first_;
  Fault fault_;
  uint64_t puts_ = 0;
  std::vector<Put> in_flight_;
  std::list<std::vector<std::byte>> kept_;
  std::vector<Release> releases_;
};

// One rank's view. With a network its peers are reached by puts alone, without one they are mapped.
class SimPlatform : public HostPlatform {
 public:
  SimPlatform(int ep_rank, const std::vector<std::byte*>& heaps, const HeapLayout& layout, SimNetwork* network, Fault fault)
      : HostPlatform(ep_rank, heaps, std::vector<int>(heaps.size(), 0), nullptr),
        ep_rank_(ep_rank), heaps_(heaps), layout_(layout), network_(network), fault_(fault) {}

  uint64_t epoch = 0;  // of this rank's call; the faults that mistake epochs need it

  std::byte* window(int pe, size_t offset, std::byte* stage) const {
    return pe == ep_rank_ || !network_ ? heaps_[pe] + offset : stage;
  }
  void commit(int pe, size_t offset, const std::byte* source, size_t bytes, size_t signal, uint64_t word, Traffic kind) {
    uint64_t* flag = reinterpret_cast<uint64_t*>(heaps_[pe] + signal);
    if (pe == ep_rank_ || !network_)
      store_release(flag, word);
    else
      network_->put({ep_rank_, kind, heaps_[pe] + offset, source, bytes, flag, word, 0});
  }
  bool quiet() { return !network_ || network_->quiet(ep_rank_); }
  void release_when_landed(uint32_t* word, uint32_t value) {
    network_ ? network_->release_when_landed(ep_rank_, word, value) : store_release(word, value);
  }
  bool staged() const { return network_ != nullptr; }

  uint64_t test_signal(size_t offset) const {
    const uint64_t word = HostPlatform::test_signal(offset);
    const bool header = offset >= layout_.header_signal && offset < layout_.chunk_signal;
    const bool chunk = offset >= layout_.chunk_signal && offset < layout_.result_signal;
    const bool reply = offset >= layout_.result_signal && offset < layout_.header;
    const bool mistaken = (fault_ == Fault::kStaleHeaders && header) || (fault_ == Fault::kStaleChunks && chunk) ||
                          (fault_ == Fault::kStaleReplies && reply);
    if (mistaken && word) return make_signal(epoch, signal_payload(word));
    if (header && fault_ == Fault::kNewerIsNotYet && epoch_newer(signal_epoch(word), epoch)) return 0;
    if (header && fault_ == Fault::kEpochsAsNumbers && signal_epoch(word) < epoch) return 0;
    return word;
  }

 private:
  int ep_rank_;
  std::vector<std::byte*> heaps_;
  const HeapLayout& layout_;
  SimNetwork* network_;
  Fault fault_;
};

static_assert(Platform<SimPlatform>);

}  // namespace flashmoe::test
