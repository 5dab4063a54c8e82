// The host platform: a worker is a thread, a peer is another thread's or another process's heap.
//
// Peers are either mapped, and written through their addresses, or reached by the puts of a HostNetwork alone: ranks
// of another host, and in the rehearsal of RDMA all of them.
#pragma once

#include <sched.h>
#include <time.h>

#include <array>
#include <atomic>
#include <cstring>
#include <memory>
#include <optional>
#include <vector>

#include "platform/host_network.h"
#include "platform/peer_process.h"
#include "protocol/platform.h"

namespace flashmoe {

class HostPlatform {
 public:
  static constexpr bool kBackward = true;

  // heaps[pe] is where pe's symmetric heap is mapped here, null where only the network leads there; pids[pe] is 0
  // where the peer is a thread or on another host.
  HostPlatform(int ep_rank, std::vector<std::byte*> heaps, const std::vector<int>& pids,
               std::shared_ptr<HostNetwork> network)
      : ep_rank_(ep_rank), heaps_(std::move(heaps)), network_(std::move(network)), sent_(heaps_.size()) {
    for (size_t pe = 0; pe < heaps_.size(); ++pe) peers_.emplace_back(int(pe) == ep_rank ? 0 : pids[pe]);
  }

  template <class T>
  static T load_acquire(const T* word) {
    return std::atomic_ref<T>(const_cast<T&>(*word)).load(std::memory_order_acquire);
  }
  template <class T>
  static void store_release(T* word, std::type_identity_t<T> value) {
    std::atomic_ref<T>(*word).store(value, std::memory_order_release);
  }
  static uint32_t load_relaxed(const uint32_t* word) {
    return std::atomic_ref(const_cast<uint32_t&>(*word)).load(std::memory_order_relaxed);
  }
  static uint32_t fetch_add_relaxed(uint32_t* word, uint32_t n) { return std::atomic_ref(*word).fetch_add(n, std::memory_order_relaxed); }
  static uint32_t fetch_add(uint32_t* word, uint32_t n) { return std::atomic_ref(*word).fetch_add(n, std::memory_order_acq_rel); }
  static uint32_t fetch_sub(uint32_t* word, uint32_t n) { return std::atomic_ref(*word).fetch_sub(n, std::memory_order_acq_rel); }
  static bool compare_exchange(uint32_t* word, uint32_t expected, uint32_t desired) {
    return std::atomic_ref(*word).compare_exchange_strong(expected, desired, std::memory_order_acq_rel);
  }
  static void copy(Alone, void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }

  std::byte* heap() const { return heaps_[ep_rank_]; }

  std::byte* window(int pe, size_t offset, std::byte* stage) const {
    return mapped(pe) ? heaps_[pe] + offset : stage;
  }

  void commit(int pe, size_t offset, const std::byte* source, size_t bytes, size_t signal, uint64_t word, Traffic kind) {
    count(pe, kind, bytes);
    count(pe, Traffic::kSignal, sizeof word);
    if (mapped(pe))  // pairs with the acquire of the reader's test_signal
      store_release(reinterpret_cast<uint64_t*>(heaps_[pe] + signal), word);
    else
      network_->put({pe, offset, source, bytes, signal, word});
  }

  uint64_t test_signal(size_t offset) const { return load_acquire(reinterpret_cast<const uint64_t*>(heap() + offset)); }
  bool quiet() { return !network_ || network_->quiet(); }
  void release_when_landed(uint32_t* word, uint32_t value) {
    network_ ? network_->release_when_landed(word, value) : store_release(word, value);
  }
  template <class Lanes>
  void settle(const Lanes&, uint32_t, uint32_t) {}  // the network releases what has landed by itself
  bool staged() const { return network_ != nullptr; }
  bool peer_alive(int pe) { return mapped(pe) ? peers_[pe].alive() : network_->alive(pe) && peers_[pe].alive(); }
  // A peer that a commit is still under way to, if not quiet.
  std::optional<int> awaited() { return network_ ? network_->awaited() : std::nullopt; }

  static uint64_t now_ns() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return uint64_t(t.tv_sec) * 1'000'000'000 + t.tv_nsec;
  }

  // Ranks may outnumber cores: spin only briefly, then let the one we wait for run; sleep in a long wait.
  static void pause(uint32_t rounds) {
    if (rounds < 100) {
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    } else if (rounds < 20'000) {
      sched_yield();
    } else {
      const timespec t{0, 50'000};
      nanosleep(&t, nullptr);
    }
  }

  // Bytes handed to the transport since the last reset, by destination.
  uint64_t sent(int pe, Traffic kind) const { return sent_[pe][int(kind)].load(std::memory_order_relaxed); }
  void reset_sent() {
    for (auto& pe : sent_)
      for (auto& n : pe) n.store(0, std::memory_order_relaxed);
  }

 private:
  bool mapped(int pe) const { return heaps_[pe] != nullptr; }
  void count(int pe, Traffic kind, size_t bytes) {
    if (pe != ep_rank_) sent_[pe][int(kind)].fetch_add(bytes, std::memory_order_relaxed);
  }

  int ep_rank_;
  std::vector<std::byte*> heaps_;
  std::shared_ptr<HostNetwork> network_;
  std::vector<PeerProcess> peers_;
  std::vector<std::array<std::atomic<uint64_t>, kTrafficKinds>> sent_;
};

static_assert(Platform<HostPlatform>);

}  // namespace flashmoe
