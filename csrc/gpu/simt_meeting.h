// Where threads of a block come together: what every warp verb and every barrier is made of.
#pragma once

#include "gpu/simt_machine.h"

namespace flashmoe::gpu::simt {

inline Thread& self() { return *machine->current; }
inline Block& my_block() { return *self().block; }

// Publishes what this thread did so far, or takes over what others published.
inline void release(Clock& to) {
  join(to, self().clock);
  ++self().count();
}
inline void acquire(const Clock& from) { join(self().clock, from); }

// On a GPU the lanes of a warp meet in one instruction: in another one of the same name they would wait for each other.
// `ways`: of the meeting's warps, by which calls the first lane of each came.
inline void check_way(Meeting& meeting, int place, const char* verb) {
#if defined(FLASHMOE_SIMT_WAYS)
  uint64_t mine = 0;
  auto frame = static_cast<void* const*>(__builtin_frame_address(0));
  for (; frame; frame = static_cast<void* const*>(frame[0]))
    mine = (mine ^ reinterpret_cast<uintptr_t>(frame[1])) * 0x9e3779b97f4a7c15;
  meeting.ways.resize(std::max<size_t>(meeting.ways.size(), size_t(place) / 32 + 1));
  auto& [meetings, way] = meeting.ways[size_t(place) / 32];
  if (meetings != meeting.number + 1)
    meetings = meeting.number + 1, way = mine;
  else if (way != mine)
    throw Misuse(std::string(verb) + ": lanes of a warp come from different places");
#else
  (void)meeting, (void)place, (void)verb;
#endif
}

// All `n` threads come with the same verb; each shows a value and sees the others'. `last` runs once, in whoever comes
// last, before anyone leaves.
template <class Last>
const std::vector<uint64_t>& meet(Meeting& meeting, int n, int place, const char* verb, int64_t on, uint64_t value,
                                  bool orders_memory, Last last) {
  machine->step();
  std::vector<uint64_t>& board = meeting.board[meeting.number % 2];
  board.resize(std::max<size_t>(board.size(), size_t(place) + 1));
  if (meeting.arrived == 0) meeting.verb = verb;
  if (std::strcmp(meeting.verb, verb) != 0)
    throw Misuse(std::string(verb) + " while others are in " + meeting.verb + ": threads that act together diverge");
  check_way(meeting, place, verb);
  board[place] = value;
  if (orders_memory) release(meeting.clock);
  const uint64_t number = meeting.number;
  if (++meeting.arrived == n) {
    last(board);
    meeting.arrived = 0;
    ++meeting.number;
    machine->wake(meeting.waiting);
  } else {
    machine->wait_until(meeting.waiting, verb, on, [&] { return meeting.number != number; });
  }
  if (orders_memory) acquire(meeting.clock);
  return board;
}

}  // namespace flashmoe::gpu::simt
