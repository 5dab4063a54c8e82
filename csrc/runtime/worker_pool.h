// The workers of one rank: the calling thread and as many helpers as are asked for.
//
// Where the tensor library keeps an OpenMP team of the same size in this process, its threads are the helpers: they
// stay awake for milliseconds after every operator and would keep other threads off the cores meanwhile. Elsewhere
// the pool has threads of its own, which wait between calls, first awake, then asleep.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

namespace flashmoe {

class WorkerPool {
 public:
  WorkerPool() = default;
  ~WorkerPool();
  WorkerPool(const WorkerPool&) = delete;

  // Makes the helpers that run(workers) needs. The only part that can throw.
  void reserve(int workers);
  // Runs work(0) here and work(1) … work(workers - 1) on helpers; returns when all have returned.
  void run(int workers, const std::function<void(int)>& work);

 private:
  void help(int worker, uint32_t last_call);

  std::vector<std::thread> helpers_;
  const std::function<void(int)>* work_ = nullptr;
  int active_ = 0;  // workers of the current call
  bool stop_ = false;
  std::atomic<uint32_t> call_{0};
  std::atomic<int> busy_{0};
};

}  // namespace flashmoe
