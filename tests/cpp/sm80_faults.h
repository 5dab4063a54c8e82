// Pipelines of Ampere's engines with a fault in each.
#pragma once

#include "engine/sm80_load.h"

namespace flashmoe::test {

template <int kStages>
struct NoWait : Sm80Pipeline<kStages> {
  template <class Group>
  static void wait_full(const Group& group) { group.sync(); }
};
template <int kStages>
struct NoMeeting : Sm80Pipeline<kStages> {
  template <class Group>
  static void wait_full(const Group&) { gpu::cp_async_wait<kStages - 3>(); }
};
// Waits for one step less than it reads.
template <int kStages>
struct LateByOne : Sm80Pipeline<kStages> {
  template <class Group>
  static void wait_full(const Group& group) {
    gpu::cp_async_wait<kStages - 2>();
    group.sync();
  }
};
// Fills the stage that is being multiplied.
template <int kStages>
struct TooFarAhead : Sm80Pipeline<kStages> {
  static constexpr int kAhead = kStages;
};

}  // namespace flashmoe::test
