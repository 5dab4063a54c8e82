// What a machine must offer for the protocol to run on it (design D9).
//
// Ordering sits on the atomics and on the three transfer verbs below, never in free fences: that is what
// ThreadSanitizer understands, so a run on threads checks the protocol of every platform.
//
//   window(pe, offset, stage)   where to write what shall land at `offset` of pe's heap: there directly if pe's
//                               memory is mapped here, else at `stage`, which must stay untouched until quiet
//   commit(pe, offset, source, bytes, signal, word, traffic)
//                               everything written through the window (by whoever passed the writes to us by an
//                               atomic) lands at pe before pe can see `word` at offset `signal`;
//                               two commits are not ordered with each other
//   quiet()                     true once every commit of this rank has landed
//   release_when_landed(word, value)
//                               store_release(word, value), of ring_free, once every commit of results that this worker
//                               made so far has landed
//   settle(lanes, first, num)   by the scheduler, while row blocks from number `first` on, `num` at most, may wait for
//                               ring slots: sees to those landings, where the transport tells of none by itself
//   kBackward                   whether backward calls run here; where not, nothing of them is compiled
//   test_signal(offset)         a word of my own heap; if it is the awaited one, what it announces may be read.
//                               A verb of its own: over RDMA the ordering lives inside the transport's test.
#pragma once

#include <concepts>

#include "protocol/group.h"

namespace flashmoe {

enum class Traffic : uint8_t { kHeader, kRows, kResults, kSignal };
inline constexpr int kTrafficKinds = 4;

template <class P>
concept Platform = requires(P& p, const P& cp, uint64_t* word64, uint32_t* word32, std::byte* bytes, size_t n, int pe, Alone group) {
  { P::kBackward } -> std::convertible_to<bool>;
  { P::load_acquire(word64) } -> std::same_as<uint64_t>;
  { P::load_acquire(word32) } -> std::same_as<uint32_t>;
  { P::load_relaxed(word32) } -> std::same_as<uint32_t>;
  P::store_release(word64, uint64_t{});
  P::store_release(word32, uint32_t{});
  { P::fetch_add(word32, uint32_t{}) } -> std::same_as<uint32_t>;  // acquire and release
  { P::fetch_add_relaxed(word32, uint32_t{}) } -> std::same_as<uint32_t>;
  { P::fetch_sub(word32, uint32_t{}) } -> std::same_as<uint32_t>;  // acquire and release
  { P::compare_exchange(word32, uint32_t{}, uint32_t{}) } -> std::same_as<bool>;
  { cp.heap() } -> std::same_as<std::byte*>;  // my own
  { cp.window(pe, n, bytes) } -> std::same_as<std::byte*>;
  p.commit(pe, n, bytes, n, n, uint64_t{}, Traffic::kRows);
  { p.quiet() } -> std::same_as<bool>;
  p.release_when_landed(word32, uint32_t{});
  p.settle(group, uint32_t{}, uint32_t{});
  { cp.test_signal(n) } -> std::same_as<uint64_t>;
  P::copy(group, bytes, bytes, n);  // by all threads of a group, which then still have to meet
  { P::now_ns() } -> std::same_as<uint64_t>;
  { p.peer_alive(pe) } -> std::same_as<bool>;
  { P::pause(uint32_t{}) };  // after so many fruitless rounds: spin, then give the core away
};

}  // namespace flashmoe
