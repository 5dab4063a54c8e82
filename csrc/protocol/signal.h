// The signal word: how one rank tells another that something it wrote may be read.
//
//   63            16 15      0
//   [ epoch: 48    ][ payload ]
//
// Every word has one writer per epoch and is tested for *equality* of its epoch, never cleared.
//   header signal   payload = digest of the call's tag (15 bits) << 1 | the packet has rows
//   chunk signal    payload = 0
//   result signal   payload = rows of the first run of its segment (see result_run)
//   release signal  payload = 0
#pragma once

#include "protocol/config.h"

namespace flashmoe {

inline constexpr uint64_t kMaxEpoch = (uint64_t(1) << 48) - 1;

FLASHMOE_HD constexpr uint64_t make_signal(uint64_t epoch, uint32_t payload) { return epoch << 16 | payload; }
FLASHMOE_HD constexpr uint64_t signal_epoch(uint64_t word) { return word >> 16; }
FLASHMOE_HD constexpr uint32_t signal_payload(uint64_t word) { return uint32_t(word & 0xffff); }

// Epoch 0 stands for "never written": heaps start zeroed.
FLASHMOE_HD constexpr uint64_t next_epoch(uint64_t epoch) { return epoch == kMaxEpoch ? 1 : epoch + 1; }

// Epochs are compared serially, so that the counter may wrap: `a` is newer if it is less than half the
// circle ahead of `b`.
FLASHMOE_HD constexpr bool epoch_newer(uint64_t a, uint64_t b) {
  return a != 0 && a != b && ((a - b) & kMaxEpoch) <= kMaxEpoch / 2;
}

// The abort word: who gave up first, because of whom, and why (a Failure). Passed on as it is by those who hear of
// it, so that every rank can name the origin. Ranks are stored plus one: the word is never zero.
FLASHMOE_HD constexpr uint64_t abort_word(int origin, int about, uint32_t failure) {
  return uint64_t(origin + 1) << 36 | uint64_t(about + 1) << 8 | failure;
}
FLASHMOE_HD constexpr int abort_origin(uint64_t word) { return int(word >> 36) - 1; }
FLASHMOE_HD constexpr int abort_about(uint64_t word) { return int(word >> 8 & 0xfffffff) - 1; }
FLASHMOE_HD constexpr uint32_t abort_failure(uint64_t word) { return uint32_t(word & 0xff); }

// What the one decider of a (destination, source, epoch) reads off the header signal.
enum class HeaderVerdict : uint8_t { kNotYet, kNoRows, kRows, kOtherCall };

FLASHMOE_HD constexpr uint32_t tag_digest(const CallTag& t) {
  uint32_t h = 2166136261u;
  const uint32_t words[] = {uint32_t(t.layer), uint32_t(t.hidden_size), uint32_t(t.intermediate_size),
                            uint32_t(t.num_experts), t.placement,
                            uint32_t(t.dtype | t.activation << 8 | t.kind << 16 | uint32_t(t.has_bias) << 24)};
  for (uint32_t w : words) h = (h ^ w) * 16777619u;
  return (h ^ h >> 15) & 0x7fff;
}

FLASHMOE_HD constexpr uint64_t header_signal(uint64_t epoch, const CallTag& tag, bool has_rows) {
  return make_signal(epoch, tag_digest(tag) << 1 | (has_rows ? 1u : 0u));
}

// A source whose packet had rows cannot be ahead of us: it still waits for our reply. So a header *newer*
// than my epoch says that there were no rows for me in mine.
FLASHMOE_HD constexpr HeaderVerdict decide_header(uint64_t word, uint64_t epoch, const CallTag& tag) {
  if (epoch_newer(signal_epoch(word), epoch)) return HeaderVerdict::kNoRows;
  if (signal_epoch(word) != epoch) return HeaderVerdict::kNotYet;
  if (signal_payload(word) >> 1 != tag_digest(tag)) return HeaderVerdict::kOtherCall;
  return signal_payload(word) & 1 ? HeaderVerdict::kRows : HeaderVerdict::kNoRows;
}

}  // namespace flashmoe
