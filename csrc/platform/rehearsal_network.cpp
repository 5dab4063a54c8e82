#include "platform/rehearsal_network.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <utility>

namespace flashmoe {

RehearsalNetwork::RehearsalNetwork(uint64_t seed, std::vector<std::byte*> heaps)
    : heaps_(std::move(heaps)), random_(seed), thread_([this] { deliver(); }) {}

RehearsalNetwork::~RehearsalNetwork() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
  }
  work_.notify_one();
  thread_.join();
}

void RehearsalNetwork::put(const Put& put) {
  {
    std::lock_guard lock(mutex_);
    in_flight_.push_back({put, puts_++, false});
  }
  work_.notify_one();
}

bool RehearsalNetwork::quiet() {
  std::lock_guard lock(mutex_);
  return in_flight_.empty();
}

std::optional<int> RehearsalNetwork::awaited() {
  std::lock_guard lock(mutex_);
  if (in_flight_.empty()) return std::nullopt;
  return in_flight_.front().put.pe;
}

void RehearsalNetwork::release_when_landed(uint32_t* word, uint32_t value) {
  std::lock_guard lock(mutex_);
  releases_.push_back({word, value, puts_});
  release_landed();
}

void RehearsalNetwork::deliver() {
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

void RehearsalNetwork::move_one(std::unique_lock<std::mutex>& lock) {
  const size_t i = random_() % in_flight_.size();
  InFlight& chosen = in_flight_[i];
  if (!chosen.payload_landed && chosen.put.bytes) {
    chosen.payload_landed = true;
    const Put put = chosen.put;
    // Only this thread takes puts away, and none is taken while one is copied.
    lock.unlock();
    std::memcpy(heaps_[put.pe] + put.offset, put.from, put.bytes);
    lock.lock();
    return;
  }
  // Pairs with the acquire of the destination's test_signal.
  uint64_t* signal = reinterpret_cast<uint64_t*>(heaps_[chosen.put.pe] + chosen.put.signal);
  std::atomic_ref(*signal).store(chosen.put.word, std::memory_order_release);
  in_flight_[i] = in_flight_.back();
  in_flight_.pop_back();
  release_landed();
}

void RehearsalNetwork::release_landed() {
  uint64_t oldest = puts_;
  for (const InFlight& f : in_flight_) oldest = std::min(oldest, f.number);
  std::erase_if(releases_, [oldest](const Release& r) {
    if (r.puts_before > oldest) return false;
    std::atomic_ref(*r.word).store(r.value, std::memory_order_release);
    return true;
  });
}

}  // namespace flashmoe
