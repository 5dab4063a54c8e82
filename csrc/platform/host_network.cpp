#include "platform/host_network.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>

namespace flashmoe {

HostNetwork::HostNetwork(uint64_t seed) : random_(seed), thread_([this] { deliver(); }) {}

HostNetwork::~HostNetwork() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
  }
  work_.notify_one();
  thread_.join();
}

void HostNetwork::put(const Put& put) {
  {
    std::lock_guard lock(mutex_);
    in_flight_.push_back({put, puts_++, false});
  }
  work_.notify_one();
}

bool HostNetwork::quiet() {
  std::lock_guard lock(mutex_);
  return in_flight_.empty();
}

void HostNetwork::release_when_landed(uint32_t* word, uint32_t value) {
  std::lock_guard lock(mutex_);
  releases_.push_back({word, value, puts_});
  release_landed();
}

void HostNetwork::deliver() {
  std::unique_lock lock(mutex_);
  while (true) {
    work_.wait(lock, [this] { return stop_ || !in_flight_.empty(); });
    if (in_flight_.empty()) return;
    // A pause lets more puts gather, so that there is something to reorder.
    if (!stop_ && random_() % 4 == 0) {
      const auto delay = std::chrono::microseconds(random_() % 60);
      lock.unlock();
      std::this_thread::sleep_for(delay);
      lock.lock();
    }
    move_one(lock);
  }
}

void HostNetwork::move_one(std::unique_lock<std::mutex>& lock) {
  const size_t i = random_() % in_flight_.size();
  InFlight& chosen = in_flight_[i];
  if (!chosen.payload_landed && chosen.put.bytes) {
    chosen.payload_landed = true;
    const Put put = chosen.put;
    // Only this thread takes puts away, and none is taken while one is copied.
    lock.unlock();
    std::memcpy(put.to, put.from, put.bytes);
    lock.lock();
    return;
  }
  // Pairs with the acquire of the destination's test_signal.
  std::atomic_ref(*chosen.put.signal).store(chosen.put.word, std::memory_order_release);
  in_flight_[i] = in_flight_.back();
  in_flight_.pop_back();
  release_landed();
}

void HostNetwork::release_landed() {
  uint64_t oldest = puts_;
  for (const InFlight& f : in_flight_) oldest = std::min(oldest, f.number);
  std::erase_if(releases_, [oldest](const Release& r) {
    if (r.puts_before > oldest) return false;
    std::atomic_ref(*r.word).store(r.value, std::memory_order_release);
    return true;
  });
}

}  // namespace flashmoe
