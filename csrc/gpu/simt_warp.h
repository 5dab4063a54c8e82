// What the lanes of a warp do together, on fibers.
#pragma once

#include <bit>

#include "gpu/simt_meeting.h"

namespace flashmoe::gpu {

namespace simt {

template <class T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}
template <class T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline int my_lane() { return self().index % 32; }
inline Warp& my_warp() { return my_block().warps[self().index / 32]; }

inline void check_asked_together() {
  const auto lanes = my_block().threads.begin() + self().index / 32 * 32;
  if (std::any_of(lanes, lanes + 32, [](const auto& l) { return l->asked_for_warp != self().asked_for_warp; }))
    throw Misuse("warp_in_block by some lanes of a warp alone");
}

// Every lane shows a value; the board of all 32.
template <class Last>
const std::vector<uint64_t>& meet_warp(const char* verb, uint64_t value, Last last) {
  return meet(my_warp().meeting, 32, my_lane(), verb, self().index / 32, value, false, [&](auto& board) {
    check_asked_together();
    last(board);
  });
}
inline const std::vector<uint64_t>& meet_warp(const char* verb, uint64_t value) {
  return meet_warp(verb, value, [](auto&) {});
}

}  // namespace simt

FLASHMOE_DEVICE void sync_warp(uint32_t lanes) {
  using namespace simt;
  if (!(lanes >> my_lane() & 1)) throw Misuse("sync_warp by a lane that is not among its lanes");
  Meeting& meeting = lanes == ~0u ? my_warp().meeting : my_warp().partial[lanes];
  meet(meeting, std::popcount(lanes), my_lane(), "sync_warp", self().index / 32, 0, true, [](auto&) {});
}

template <class T>
FLASHMOE_DEVICE T shuffle(T value, int source_lane) {
  return simt::from_bits<T>(simt::meet_warp("shuffle", simt::to_bits(value))[source_lane & 31]);
}
template <class T>
FLASHMOE_DEVICE T shuffle_up(T value, int delta) {
  const auto& board = simt::meet_warp("shuffle_up", simt::to_bits(value));
  return simt::my_lane() < delta ? value : simt::from_bits<T>(board[simt::my_lane() - delta]);
}
template <class T>
FLASHMOE_DEVICE T shuffle_down(T value, int delta) {
  const auto& board = simt::meet_warp("shuffle_down", simt::to_bits(value));
  return simt::my_lane() + delta > 31 ? value : simt::from_bits<T>(board[simt::my_lane() + delta]);
}
template <class T>
FLASHMOE_DEVICE T shuffle_xor(T value, int lane_mask) {
  return simt::from_bits<T>(simt::meet_warp("shuffle_xor", simt::to_bits(value))[(simt::my_lane() ^ lane_mask) & 31]);
}
FLASHMOE_DEVICE uint32_t ballot(bool predicate) {
  const auto& board = simt::meet_warp("ballot", predicate);
  uint32_t mask = 0;
  for (int l = 0; l < 32; ++l) mask |= uint32_t(board[l] != 0) << l;
  return mask;
}
FLASHMOE_DEVICE uint32_t match_any(uint32_t value) {
  const auto& board = simt::meet_warp("match_any", value);
  uint32_t mask = 0;
  for (int l = 0; l < 32; ++l) mask |= uint32_t(board[l] == value) << l;
  return mask;
}
FLASHMOE_DEVICE int count_bits(uint32_t word) { return std::popcount(word); }
FLASHMOE_DEVICE int lowest_bit(uint32_t word) { return std::countr_zero(word); }

}  // namespace flashmoe::gpu
