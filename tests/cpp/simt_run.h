// Kernels over many seeds: sound ones must hold on each, planted faults must be caught.
#pragma once

#include <memory>

#include "gpu/simt.h"
#include "harness.h"

namespace flashmoe::test {

class WrongResult : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

// In a kernel: ends the run.
inline void expect(bool right) {
  if (!right)
    throw WrongResult("wrong result in block " + std::to_string(gpu::block()) + " thread " +
                      std::to_string(gpu::thread_in_block()));
}

// What went wrong under this seed, or nothing.
inline std::string failure(uint64_t seed, int grid, int threads, size_t shared, const std::function<void()>& kernel) {
  try {
    gpu::simt::launch(grid, threads, shared, seed, kernel);
  } catch (const WrongResult& wrong) {
    return wrong.what();
  } catch (const gpu::simt::Misuse& misuse) {
    return misuse.what();
  }
  return {};
}

inline void on_seeds(int seeds, int grid, int threads, size_t shared, const std::function<void()>& kernel) {
  for (int seed = 0; seed < seeds; ++seed) {
    const std::string wrong = failure(uint64_t(seed), grid, threads, shared, kernel);
    check(wrong.empty(), "seed " + std::to_string(seed) + ": " + wrong);
  }
}

inline bool some_seed_fails(int seeds, int grid, int threads, size_t shared, const std::function<void()>& kernel) {
  for (int seed = 0; seed < seeds; ++seed)
    if (!failure(uint64_t(seed), grid, threads, shared, kernel).empty()) return true;
  return false;
}

// Caught under every seed, in these words.
inline void check_misuse(const std::string& plant, const std::string& words, int grid, int threads, size_t shared,
                         const std::function<void()>& kernel) {
  for (uint64_t seed = 0; seed < 5; ++seed) {
    const std::string said = failure(seed, grid, threads, shared, kernel);
    if (!check_caught(contains(said, words), plant)) std::printf("  said \"%s\"\n", said.c_str());
  }
}

// A block's barriers, made by its first thread.
inline void init_barriers(gpu::Barrier* barriers, int num, uint32_t arrivals) {
  if (gpu::thread_in_block() == 0) {
    for (int i = 0; i < num; ++i) barriers[i].init(arrivals);
    gpu::fence_barrier_init();
  }
  gpu::sync_block();
}

}  // namespace flashmoe::test
