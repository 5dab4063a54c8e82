// Groups of threads. A role's deciding and doing are written for a group of any size; on the host a group is one
// thread (Alone), and every loop and collective below comes down to nothing.
//
//   lanes   threads that step together and have collectives: a warp. Each collective is called by all of them, and
//           orders their memory as sync() does.
//   group   lanes in one or more warps, that only meet in sync(): the crew of a block.
#pragma once

#include <concepts>

#include "protocol/config.h"

namespace flashmoe {

// How many of the lanes' keys equal mine: of the lanes before me, and of all.
struct Equals {
  uint32_t before, all;
};

template <class G>
concept LaneGroup = requires(const G& lanes, bool truth, uint32_t n, uint32_t& total, void (*f)(int)) {
  { lanes.rank() } -> std::convertible_to<int>;
  { lanes.size() } -> std::convertible_to<int>;
  lanes.sync();
  { lanes.broadcast(n) } -> std::same_as<uint32_t>;  // rank 0's
  { lanes.all(truth) } -> std::same_as<bool>;
  { lanes.leading(truth) } -> std::same_as<int>;  // how many say yes before the first that says no
  lanes.for_each_true(truth, f);                  // all lanes call f(rank) for each that says yes, in turn
  { lanes.exclusive_sum(n, total) } -> std::same_as<uint32_t>;
  { lanes.equals(n) } -> std::same_as<Equals>;
  { lanes.largest(uint64_t(n)) } -> std::same_as<uint64_t>;
};

template <class G>
concept ThreadGroup = requires(const G& group) {
  { group.rank() } -> std::convertible_to<int>;
  { group.size() } -> std::convertible_to<int>;
  group.sync();
  { group.warp() } -> std::convertible_to<int>;
  { group.num_warps() } -> std::convertible_to<int>;
  { group.lanes() } -> LaneGroup;
};

struct Alone {
  FLASHMOE_HD static constexpr int rank() { return 0; }
  FLASHMOE_HD static constexpr int size() { return 1; }
  FLASHMOE_HD static constexpr void sync() {}
  FLASHMOE_HD static constexpr int warp() { return 0; }
  FLASHMOE_HD static constexpr int num_warps() { return 1; }
  FLASHMOE_HD static constexpr Alone lanes() { return {}; }

  template <class T>
  FLASHMOE_HD static constexpr T broadcast(T value) {
    return value;
  }
  FLASHMOE_HD static constexpr bool all(bool truth) { return truth; }
  FLASHMOE_HD static constexpr int leading(bool truth) { return truth; }
  template <class F>
  FLASHMOE_HD static constexpr void for_each_true(bool truth, F&& f) {
    if (truth) f(0);
  }
  FLASHMOE_HD static constexpr uint32_t exclusive_sum(uint32_t value, uint32_t& total) {
    total = value;
    return 0;
  }
  FLASHMOE_HD static constexpr Equals equals(uint32_t) { return {0, 1}; }
  FLASHMOE_HD static constexpr uint64_t largest(uint64_t value) { return value; }
};

static_assert(LaneGroup<Alone> && ThreadGroup<Alone>);

}  // namespace flashmoe
