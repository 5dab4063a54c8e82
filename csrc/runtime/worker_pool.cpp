#include "runtime/worker_pool.h"

#include <dlfcn.h>
#include <pthread.h>

#include "platform/host.h"

namespace flashmoe {
namespace {

// How long a helper stays awake after a call: the next layer's call usually comes soon.
constexpr uint64_t kAwakeNs = 100'000;

// The entry points of the OpenMP runtime that the process has already loaded, GNU's or LLVM's, as compilers call it.
struct OpenMP {
  void (*parallel)(void (*)(void*), void*, unsigned threads, unsigned flags);
  int (*max_threads)();

  // A team of another size would make the runtime end its threads and start new ones, here and in the next operator.
  // A forked child has inherited what the runtime knows of its team, and none of the threads: it would wait for ever.
  static const OpenMP* team_of(int workers) {
    static const OpenMP runtime{find<decltype(parallel)>("GOMP_parallel"),
                                find<decltype(max_threads)>("omp_get_max_threads")};
    static const int watching = pthread_atfork(nullptr, nullptr, [] { forked = true; });
    if (watching != 0 || forked) return nullptr;
    return runtime.parallel && runtime.max_threads && runtime.max_threads() == workers ? &runtime : nullptr;
  }

 private:
  inline static bool forked = false;

  template <class F>
  static F find(const char* name) {
    return reinterpret_cast<F>(dlsym(RTLD_DEFAULT, name));
  }
};

// One call by a team. Inside another parallel region the team may be smaller: then who is there does it all.
struct TeamCall {
  const std::function<void(int)>& work;
  std::atomic<int> next_worker{0};
  static void join(void* call) {
    TeamCall& c = *static_cast<TeamCall*>(call);
    c.work(c.next_worker.fetch_add(1, std::memory_order_relaxed));
  }
};

}  // namespace

WorkerPool::~WorkerPool() {
  stop_ = true;
  call_.fetch_add(1, std::memory_order_release);
  call_.notify_all();
  for (std::thread& helper : helpers_) helper.join();
}

void WorkerPool::reserve(int workers) {
  if (workers <= 1 || OpenMP::team_of(workers)) return;
  while (int(helpers_.size()) < workers - 1) {
    const int worker = int(helpers_.size()) + 1;
    const uint32_t call = call_.load(std::memory_order_relaxed);
    helpers_.emplace_back([this, worker, call] { help(worker, call); });
  }
}

void WorkerPool::run(int workers, const std::function<void(int)>& work) {
  if (workers <= 1) return work(0);
  if (const OpenMP* openmp = OpenMP::team_of(workers)) {
    TeamCall call{work};
    return openmp->parallel(&TeamCall::join, &call, unsigned(workers), 0);
  }
  work_ = &work;
  active_ = workers;
  // Every helper passes through every call, also one that has no part in it: so none can miss the next.
  busy_.store(int(helpers_.size()), std::memory_order_relaxed);
  call_.fetch_add(1, std::memory_order_release);
  call_.notify_all();
  work(0);
  for (uint32_t rounds = 0; busy_.load(std::memory_order_acquire);) HostPlatform::pause(++rounds);
}

void WorkerPool::help(int worker, uint32_t last_call) {
  while (true) {
    const uint64_t since = HostPlatform::now_ns();
    uint32_t call, rounds = 0;
    while ((call = call_.load(std::memory_order_acquire)) == last_call) {
      HostPlatform::pause(++rounds);
      if (HostPlatform::now_ns() - since > kAwakeNs) call_.wait(last_call, std::memory_order_acquire);
    }
    last_call = call;
    if (stop_) return;
    if (worker < active_) (*work_)(worker);
    busy_.fetch_sub(1, std::memory_order_release);
  }
}

}  // namespace flashmoe
