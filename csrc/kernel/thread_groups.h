// The protocol's groups of threads on a GPU: a warp, and the crew of a block.
#pragma once

#include "gpu/verbs.h"
#include "protocol/group.h"

namespace flashmoe::gpu {

struct Warp {
  FLASHMOE_DEVICE static int rank() { return lane(); }
  FLASHMOE_DEVICE static int size() { return 32; }
  FLASHMOE_DEVICE static void sync() { sync_warp(); }

  // A shuffle alone orders no memory: what lane 0 acquired, all lanes may read after the sync_warp before it.
  template <class T>
  FLASHMOE_DEVICE static T broadcast(T value) {
    static_assert(sizeof(T) % 4 == 0);
    constexpr int kWords = sizeof(T) / 4;
    union {
      T value;
      uint32_t word[kWords];
    } carried{value};
    sync_warp();
    FLASHMOE_UNROLL
    for (int i = 0; i < kWords; ++i) carried.word[i] = shuffle(carried.word[i], 0);
    return carried.value;
  }
  FLASHMOE_DEVICE static bool all(bool truth) {
    sync_warp();
    return ballot(truth) == ~0u;
  }
  FLASHMOE_DEVICE static int leading(bool truth) {
    sync_warp();
    const uint32_t others = ballot(!truth);
    return others ? lowest_bit(others) : 32;
  }
  template <class F>
  FLASHMOE_DEVICE static void for_each_true(bool truth, F&& f) {
    sync_warp();
    for (uint32_t left = ballot(truth); left; left &= left - 1) f(lowest_bit(left));
  }
  FLASHMOE_DEVICE static uint32_t exclusive_sum(uint32_t value, uint32_t& total) {
    sync_warp();
    uint32_t sum = value;
    FLASHMOE_UNROLL
    for (int delta = 1; delta < 32; delta *= 2) {
      const uint32_t before = shuffle_up(sum, delta);
      if (lane() >= delta) sum += before;
    }
    total = shuffle(sum, 31);
    return sum - value;
  }
  FLASHMOE_DEVICE static Equals equals(uint32_t key) {
    sync_warp();
    const uint32_t same = match_any(key);
    return {uint32_t(count_bits(same & ((1u << lane()) - 1))), uint32_t(count_bits(same))};
  }
  FLASHMOE_DEVICE static uint64_t largest(uint64_t value) {
    sync_warp();
    FLASHMOE_UNROLL
    for (int mask = 16; mask; mask /= 2) {
      const uint64_t other = shuffle_xor(value, mask);
      value = other > value ? other : value;
    }
    return value;
  }
};

// The first kWarps warps of a block. Barrier 1 is theirs.
template <int kWarps>
struct Crew {
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kBarrier = 1;

  FLASHMOE_DEVICE static int rank() { return thread_in_block(); }
  FLASHMOE_DEVICE static int size() { return kThreads; }
  FLASHMOE_DEVICE static void sync() { named_barrier_sync(kBarrier, kThreads); }
  FLASHMOE_DEVICE static int warp() { return warp_in_block(); }
  FLASHMOE_DEVICE static int num_warps() { return kWarps; }
  FLASHMOE_DEVICE static Warp lanes() { return {}; }
};

// A whole block, where it has no agent.
struct WholeBlock {
  FLASHMOE_DEVICE static int rank() { return thread_in_block(); }
  FLASHMOE_DEVICE static int size() { return block_threads(); }
  FLASHMOE_DEVICE static void sync() { sync_block(); }
  FLASHMOE_DEVICE static int warp() { return warp_in_block(); }
  FLASHMOE_DEVICE static int num_warps() { return block_threads() / 32; }
  FLASHMOE_DEVICE static Warp lanes() { return {}; }
};

}  // namespace flashmoe::gpu
