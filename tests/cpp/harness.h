// Checks that are counted, tests that are named, and the last line that says how it went.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdio>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#if defined(__SANITIZE_THREAD__)
inline constexpr bool kThreadSanitizer = true;
#else
inline constexpr bool kThreadSanitizer = false;
#endif

#if defined(__SANITIZE_ADDRESS__)
inline constexpr bool kAddressSanitizer = true;
#else
inline constexpr bool kAddressSanitizer = false;
#endif

namespace flashmoe::test {

// Orders of events to try. AddressSanitizer makes each several times as slow, and finds in few what it finds in many.
constexpr int num_seeds(int n) { return kAddressSanitizer ? (n + 3) / 4 : n; }

inline std::atomic<int> num_passed{0}, num_failed{0};

inline bool check(bool ok, const std::string& what) {
  ++(ok ? num_passed : num_failed);
  if (!ok && num_failed <= 50) std::printf("  FAILED %s\n", what.c_str());
  return ok;
}

// A check that a planted fault must not get past: `caught` is what the sound check said of the unsound code.
inline bool check_caught(bool caught, const std::string& plant) { return check(caught, "planted fault not caught: " + plant); }

// A test is named for its hazard.
inline void run_test(const char* name, const std::function<void()>& body) {
  const int failed_before = num_failed;
  const auto begin = std::chrono::steady_clock::now();
  try {
    body();
  } catch (const std::exception& e) {
    check(false, std::string(name) + " ended in an exception: " + e.what());
  }
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
  std::printf("%-6s %s (%.2f s)\n", num_failed == failed_before ? "ok" : "FAILED", name, seconds.count());
  std::fflush(stdout);
}

inline int finish() {
  std::printf("%d passed, %d failed\n", int(num_passed), int(num_failed));
  return num_failed != 0;
}

// f(0) … f(n - 1), each on a thread of its own.
inline void on_threads(int n, const std::function<void(int)>& f) {
  std::vector<std::thread> threads;
  for (int i = 0; i < n; ++i) threads.emplace_back([&f, i] { f(i); });
  for (std::thread& t : threads) t.join();
}

inline bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

}  // namespace flashmoe::test
