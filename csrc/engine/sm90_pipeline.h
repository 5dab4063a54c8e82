// The stages through which a block's loaders feed its math warpgroups, and the barriers that pass them to and fro.
// Whoever uses them keeps a Turn of its own, from the first piece of work to the last, so that loaders run ahead of
// the math across pieces of work.
#pragma once

#include "gpu/verbs.h"

namespace flashmoe {

// Which stage is next, and the parity of its phase.
template <int kStages>
struct Sm90Turn {
  uint32_t stage = 0, parity = 0;

  FLASHMOE_DEVICE void next() {
    if (++stage < kStages) return;
    stage = 0, parity ^= 1;
  }
};

// Barriers of the stages. A stage is full when its rows and weights are in, empty when every math warp let go of it.
template <int kStages_, int kGatherWarps, int kMathWarps>
class Sm90Pipeline {
 public:
  static constexpr int kStages = kStages_;
  static constexpr uint32_t kTables = 3;  // in turn: while one tile's is written, those of the two before may be read
  using Turn = Sm90Turn<kStages>;

  // By one thread; then sync_block.
  FLASHMOE_DEVICE void init() {
    for (int s = 0; s < kStages; ++s) full_[s].init(kGatherWarps + 1), empty_[s].init(kMathWarps);
    gpu::fence_barrier_init();
  }

  FLASHMOE_DEVICE static uint32_t table_of(uint32_t tile) { return tile % kTables; }

  // ---- Loaders.
  FLASHMOE_DEVICE void wait_empty(const Turn& turn) { empty_[turn.stage].wait(turn.parity ^ 1); }
  // By a gathering warp whose copies into the stage have landed.
  FLASHMOE_DEVICE void rows_are_here(const Turn& turn) {
    gpu::fence_async_shared();
    gpu::sync_warp();
    if (gpu::lane() == 0) full_[turn.stage].arrive();
  }
  // By one thread: so many bytes will come by TMA, which is to tell the barrier returned.
  FLASHMOE_DEVICE gpu::Barrier* expect_weights(const Turn& turn, uint32_t bytes) {
    full_[turn.stage].arrive_expect_tx(bytes);
    return &full_[turn.stage];
  }

  // ---- Math warps.
  FLASHMOE_DEVICE void wait_full(const Turn& turn) { full_[turn.stage].wait(turn.parity); }
  template <class Accumulators>
  FLASHMOE_DEVICE static void wait_products(Accumulators& sums) {
    gpu::wgmma_wait<0>(sums);
  }
  FLASHMOE_DEVICE void let_go(const Turn& turn) {
    if (gpu::lane() == 0) empty_[turn.stage].arrive();
  }

 protected:
  gpu::Barrier full_[kStages], empty_[kStages];
};

}  // namespace flashmoe
