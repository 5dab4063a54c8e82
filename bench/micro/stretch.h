// A stretch of equal operations, timed as a whole, where the clock is read twice and Python is not met at all.
#pragma once

#include <atomic>
#include <exception>
#include <functional>
#include <stdexcept>
#include <thread>

#include "platform/host.h"

namespace flashmoe::micro {

// Seconds of each of `n` operations, f(0) to f(n - 1).
template <class F>
double seconds_each(int n, F&& f) {
  const uint64_t begin = HostPlatform::now_ns();
  for (int i = 0; i < n; ++i) f(i);
  return double(HostPlatform::now_ns() - begin) * 1e-9 / n;
}

// Waits as workers do. A partner that is gone must end the benchmark, not hang it.
template <class Done>
void await(Done&& done) {
  constexpr uint64_t kPatience = 20'000'000'000;
  uint64_t begin = 0;
  for (uint32_t rounds = 0; !done();) {
    HostPlatform::pause(++rounds);
    if (rounds % 4096) continue;
    const uint64_t now = HostPlatform::now_ns();
    if (!begin) begin = now;
    if (now - begin > kPatience) throw std::runtime_error("the other side of the benchmark does not answer");
  }
}

// work(0) here and work(1) … work(threads - 1) beside it, from a common start; what work(0) returns.
template <class F>
double together(int threads, F&& work) {
  std::atomic<int> ready{0};
  std::exception_ptr failure;
  std::atomic<bool> failed{false};
  const auto part = [&](int thread) {
    double seconds = 0;
    try {
      ready.fetch_add(1);
      await([&] { return ready.load() == threads; });
      seconds = work(thread);
    } catch (...) {
      if (!failed.exchange(true)) failure = std::current_exception();
    }
    return seconds;
  };
  std::vector<std::thread> others;
  for (int thread = 1; thread < threads; ++thread) others.emplace_back([&, thread] { part(thread); });
  const double seconds = part(0);
  for (std::thread& other : others) other.join();
  if (failure) std::rethrow_exception(failure);
  return seconds;
}

}  // namespace flashmoe::micro
