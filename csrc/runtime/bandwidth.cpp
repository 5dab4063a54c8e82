// How fast the cores read memory that no cache holds: one of the two floors that a call is measured against.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <thread>
#include <vector>

#include "platform/host.h"
#include "runtime/moe.h"

namespace flashmoe {

double read_bandwidth_gb_s(size_t bytes, int workers, int repeats) {
  const size_t words = std::max<size_t>(bytes / sizeof(uint64_t) / workers, 1024);
  std::vector<std::vector<uint64_t>> memory(workers, std::vector<uint64_t>(words, 1));
  std::atomic<uint64_t> sink{0};
  double best = 0;
  for (int r = 0; r < std::max(repeats, 1); ++r) {
    std::atomic<int> ready{0};
    std::vector<std::thread> threads;
    std::atomic<uint64_t> start{0};
    for (int w = 0; w < workers; ++w)
      threads.emplace_back([&, w] {
        ready.fetch_add(1);
        for (uint32_t rounds = 0; !start.load();) HostPlatform::pause(++rounds);
        uint64_t sum[8] = {};
        const uint64_t* p = memory[w].data();
        for (size_t i = 0; i + 8 <= words; i += 8)
          for (int j = 0; j < 8; ++j) sum[j] += p[i + j];
        for (uint64_t s : sum) sink += s;
      });
    while (ready.load() < workers) sched_yield();
    const uint64_t begin = HostPlatform::now_ns();
    start = 1;
    for (std::thread& t : threads) t.join();
    best = std::max(best, double(words) * workers * sizeof(uint64_t) / double(HostPlatform::now_ns() - begin));
  }
  return sink.load() ? best : 0;
}

}  // namespace flashmoe
