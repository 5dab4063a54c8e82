// The fixed cost of one call, one worker per rank: what the protocol adds to a layer's arithmetic.
//
//   protocol_bench [calls]
//
// Rank 0 times each of its calls; ranks call back to back, so a call of an empty packet is the time in which two
// ranks tell each other that there is nothing. p50 and p95 are of all timed calls after a tenth for warming up.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

#include "platform/host.h"
#include "platform/shared_segment.h"
#include "runtime/moe.h"
#include "tiny_call.h"

namespace {

using namespace flashmoe;

std::vector<double> time_calls(Group& group, int num_tokens, int to, int calls) {
  TinyCall call(num_tokens, group.options().limits.ep_size, to);
  std::vector<double> microseconds;
  for (int i = 0; i < calls; ++i) {
    const uint64_t begin = HostPlatform::now_ns();
    group.forward(call.args);
    if (i >= calls / 10) microseconds.push_back(double(HostPlatform::now_ns() - begin) * 1e-3);
  }
  return microseconds;
}

void report(const std::string& what, std::vector<double> us) {
  std::sort(us.begin(), us.end());
  double sum = 0;
  for (double v : us) sum += v;
  std::printf("%-52s p50 %7.2f us   p95 %7.2f us   mean %7.2f us\n", what.c_str(), us[us.size() / 2], us[us.size() * 95 / 100], sum / us.size());
  std::fflush(stdout);
}

void bench_threads(int num_tokens, int calls, const std::string& what) {
  GroupOptions options;
  options.name = "threads", options.limits = kTwo;
  const auto team = make_local_team(options);
  std::thread peer([&] { time_calls(*team[1], num_tokens, other(1), calls); });
  const std::vector<double> us = time_calls(*team[0], num_tokens, other(0), calls);
  peer.join();
  report(what, us);
}

void bench_processes(int num_tokens, int calls, const std::string& what) {
  const size_t bytes = HeapLayout(kTwo).bytes;
  const auto segments = {SharedSegment::create(bytes), SharedSegment::create(bytes)};
  auto run = [&](int rank, std::vector<int> pids) {
    GroupOptions options;
    options.name = "processes", options.ep_rank = rank, options.limits = kTwo, options.pids = pids;
    options.entry_timeout_s = options.timeout_s = 20;
    for (const auto& segment : segments) {
      const auto mine = SharedSegment::attach(segment->fd(), segment->bytes());
      options.heaps.push_back(mine->data()), options.keep.push_back(mine);
    }
    Group group(options);
    return time_calls(group, num_tokens, other(rank), calls);
  };
  const int parent = getpid(), child = fork();
  if (child == 0) {
    run(1, {parent, getpid()});
    _exit(0);
  }
  const std::vector<double> us = run(0, {parent, child});
  int status;
  waitpid(child, &status, 0);
  if (status != 0) std::exit(1);
  report(what, us);
}

}  // namespace

int main(int argc, char** argv) {
  const int calls = argc > 1 ? std::atoi(argv[1]) : 20000;
  if (calls < 10) {
    std::fprintf(stderr, "calls must be at least 10, got %s\n", argv[1]);
    return 1;
  }
  std::printf("float32, H %d, I %d, E %d, k %d; %d calls; %u cores\n", kHidden, kIntermediate, kExperts, kTopK, calls,
              std::thread::hardware_concurrency());
  // Processes first: a fork takes only the thread that calls it.
  bench_processes(0, calls, "2 processes, empty packets");
  bench_processes(1, calls, "2 processes, one token each, to the other's experts");
  bench_threads(0, calls, "2 threads, empty packets");
  bench_threads(1, calls, "2 threads, one token each, to the other's experts");
  const auto alone = make_local_group(1);
  report("1 rank, no tokens", time_calls(*alone, 0, 0, calls));
  report("1 rank, one token", time_calls(*alone, 1, 0, calls));
  return 0;
}
