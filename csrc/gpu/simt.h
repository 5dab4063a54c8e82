// Runs a kernel's own source where there is no GPU, for tests: all blocks at once, on one host thread, in the order of
// a seed. Throws simt::Misuse, which names the thread and the verb, for
//   - a standstill, or a polling that nothing can end, and who waits in which verb
//   - threads that must act together and do not; a named barrier with the wrong participants
//   - lanes of a warp that meet in one verb from different places of the source, if built to tell (FLASHMOE_SIMT_WAYS)
//   - a barrier in shared memory without init or its fence, with too many arrivals or bytes, or overwritten
//   - addresses outside shared memory or not aligned; stores beyond its end
//   - wgmma or ldmatrix reading what cp_async, TMA or store_shared wrote, with no wait or barrier between
//   - the async proxy reading or overwriting what the generic proxy wrote, with no fence_async_shared between
//   - copies into what a wgmma in flight reads; accumulators touched in flight, or without wgmma_fence
//   - a block that ends before its TMA loads
// It cannot see weak memory order, plain stores to shared memory, a missing fence_async before TMA reads global memory
// that the kernel wrote, or anything about speed.
#pragma once

#include "gpu/verbs.h"

namespace flashmoe::gpu::simt {

inline void launch(int grid, int block_threads, size_t shared_bytes, uint64_t seed, const std::function<void()>& kernel,
                   uint64_t max_switches = 100'000'000) {
  Machine run(grid, block_threads, shared_bytes, seed, max_switches, kernel);
  struct Restore {
    ~Restore() { machine = nullptr; }
  } restore;
  machine = &run;
  run.run();
}

}  // namespace flashmoe::gpu::simt
