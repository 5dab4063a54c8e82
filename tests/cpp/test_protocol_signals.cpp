// Epochs on their circle, the words they travel in, and what the one decider reads off a header's word.
#include <algorithm>
#include <set>

#include "harness.h"
#include "protocol/signal.h"

namespace {

using namespace flashmoe;
using namespace flashmoe::test;

// Epochs around the wrap in the order in which they come.
std::vector<uint64_t> epochs_from(uint64_t first, int n) {
  std::vector<uint64_t> epochs{first};
  while (int(epochs.size()) < n) epochs.push_back(next_epoch(epochs.back()));
  return epochs;
}

// Whether `newer` knows the order of any two of n epochs that follow each other from `first` on.
template <class Newer>
bool knows_order(uint64_t first, int n, Newer newer) {
  const std::vector<uint64_t> e = epochs_from(first, n);
  for (int a = 0; a < n; ++a) {
    if (newer(0, e[a])) return false;  // 0: never written, so never newer
    for (int b = 0; b < n; ++b)
      if (newer(e[a], e[b]) != (a > b)) return false;
  }
  return true;
}

constexpr uint64_t kStarts[] = {1, 1000, kMaxEpoch / 2 - 20, kMaxEpoch - 20, kMaxEpoch};

void signals_order() {
  for (uint64_t first : kStarts) check(knows_order(first, 60, epoch_newer), "order of epochs from " + std::to_string(first));
  // The furthest that an epoch may be behind: half the circle.
  check(epoch_newer(kMaxEpoch / 2, 1) && !epoch_newer(1, kMaxEpoch / 2), "half the circle ahead");

  auto everywhere = [](auto newer) {
    return std::all_of(std::begin(kStarts), std::end(kStarts), [&](uint64_t first) { return knows_order(first, 60, newer); });
  };
  check_caught(!everywhere([](uint64_t a, uint64_t b) { return a > b; }), "epochs compared as numbers");
  check_caught(!everywhere([](uint64_t a, uint64_t b) { return a != b && ((a - b) & kMaxEpoch) <= kMaxEpoch / 2; }),
               "a word that was never written taken for a new one");
  check_caught(!everywhere([](uint64_t a, uint64_t b) { return a != 0 && ((a - b) & kMaxEpoch) <= kMaxEpoch / 2; }),
               "an epoch newer than itself");
}

void epoch_wrap() {
  const std::vector<uint64_t> e = epochs_from(kMaxEpoch - 2, 6);
  check(e == std::vector<uint64_t>{kMaxEpoch - 2, kMaxEpoch - 1, kMaxEpoch, 1, 2, 3}, "the wrap goes past 0");
  for (uint64_t epoch : e)
    for (uint32_t payload : {0u, 1u, 64u, 0xffffu}) {
      const uint64_t word = make_signal(epoch, payload);
      check(signal_epoch(word) == epoch && signal_payload(word) == payload, "a word keeps both its parts");
    }
}

CallTag tag(int layer) { return {layer, 2048, 768, 128, 0xdeadbeef, 1, 0, 1, 0}; }

void header_verdicts() {
  const CallTag mine = tag(3), other = tag(4);
  for (uint64_t epoch : kStarts) {
    const uint64_t next = next_epoch(epoch), old = epoch == 1 ? kMaxEpoch : epoch - 1;
    auto verdict = [&](uint64_t word) { return decide_header(word, epoch, mine); };
    check(verdict(0) == HeaderVerdict::kNotYet, "never written");
    check(verdict(header_signal(old, mine, true)) == HeaderVerdict::kNotYet, "stale epoch with rows");
    check(verdict(header_signal(old, mine, false)) == HeaderVerdict::kNotYet, "stale epoch without rows");
    check(verdict(header_signal(old, other, true)) == HeaderVerdict::kNotYet, "stale epoch of another call");
    check(verdict(header_signal(epoch, mine, true)) == HeaderVerdict::kRows, "this epoch with rows");
    check(verdict(header_signal(epoch, mine, false)) == HeaderVerdict::kNoRows, "this epoch without rows");
    check(verdict(header_signal(epoch, other, true)) == HeaderVerdict::kOtherCall, "another call with rows");
    check(verdict(header_signal(epoch, other, false)) == HeaderVerdict::kOtherCall, "another call without rows");
    // Whatever the next call is, and whatever it sends: in mine there was nothing.
    for (const CallTag& t : {mine, other})
      for (bool rows : {false, true})
        check(verdict(header_signal(next, t, rows)) == HeaderVerdict::kNoRows, "newer epoch means zero rows");
  }
}

// An empty packet tells calls apart by 15 bits alone, so every field must reach them.
void tag_digests() {
  std::vector<CallTag> near(9, tag(0));
  near[1].layer = 1, near[2].hidden_size = 2049, near[3].intermediate_size = 769, near[4].num_experts = 129;
  near[5].placement ^= 1, near[6].dtype = 2, near[7].activation = 1, near[8].kind = 0;
  for (int bias = 1; bias < 4; ++bias) near.push_back(tag(0)), near.back().has_bias = uint8_t(bias);
  near.push_back(tag(0)), near.back().kind = 3;
  std::set<uint32_t> digests;
  for (const CallTag& t : near) digests.insert(tag_digest(t));
  check(digests.size() == near.size(), "calls that differ in one field have different digests");

  std::set<uint32_t> layers;
  for (int layer = 0; layer < 256; ++layer) layers.insert(tag_digest(tag(layer)));
  check(layers.size() == 256, "the layers of one model have different digests, got " + std::to_string(layers.size()));
  check(*layers.rbegin() <= 0x7fff, "a digest leaves the lowest bit of the payload free");
}

}  // namespace

int main() {
  run_test("Signals", signals_order);
  run_test("EpochWrap", epoch_wrap);
  run_test("NewerEpochWithZeroRows", header_verdicts);
  run_test("OtherCallDigest", tag_digests);
  return finish();
}
