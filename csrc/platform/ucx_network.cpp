#include "platform/ucx_network.h"

#include <algorithm>
#include <utility>

namespace flashmoe {

UcxNetwork::UcxNetwork(std::shared_ptr<UcxFabric> fabric, std::vector<Place> places)
    : fabric_(std::move(fabric)), places_(std::move(places)), last_(places_.size()) {
  fabric_->add(this);
}

UcxNetwork::~UcxNetwork() { fabric_->remove(this); }

void UcxNetwork::put(const Put& put) {
  const Place& place = places_[put.pe];
  const UcxMessage message{.offset = place.offset + put.offset, .signal = place.offset + put.signal, .word = put.word};
  fabric_->put(place.rank, message, put.from, put.bytes, last_[put.pe]);
}

// What was to be released is, too: nothing is written to the caller's memory any more.
bool UcxNetwork::quiet() {
  if (awaited()) return false;
  landed();
  return true;
}

std::optional<int> UcxNetwork::awaited() {
  for (size_t pe = 0; pe < places_.size(); ++pe)
    if (fabric_->landed(places_[pe].rank) < last_[pe].load(std::memory_order_relaxed)) return int(pe);
  return std::nullopt;
}

void UcxNetwork::release_when_landed(uint32_t* word, uint32_t value) {
  std::lock_guard lock(mutex_);
  Release& release = releases_.emplace_back(word, value, std::vector<uint64_t>());
  for (const std::atomic<uint64_t>& last : last_) release.puts.push_back(last.load(std::memory_order_relaxed));
  release_landed();
}

void UcxNetwork::landed() {
  std::lock_guard lock(mutex_);
  release_landed();
}

void UcxNetwork::release_landed() {
  std::erase_if(releases_, [this](const Release& release) {
    for (size_t pe = 0; pe < places_.size(); ++pe)
      if (fabric_->landed(places_[pe].rank) < release.puts[pe]) return false;
    std::atomic_ref(*release.word).store(release.value, std::memory_order_release);
    return true;
  });
}

}  // namespace flashmoe
