// What a rank says when a transfer is lost, a peer dies or time jumps: the kernel on platforms that do just that.
#include <future>

#include "kernel_team.h"

namespace {

using namespace flashmoe;
using namespace flashmoe::test;

std::atomic<uint64_t> clock_ahead_ns{0};

// A host platform that loses what it is told to lose.
struct FaultyHost : HostPlatform {
  using HostPlatform::HostPlatform;
  std::optional<Traffic> lost;  // kind of the puts that never land …
  int lost_to = -1;             // … at this rank
  bool never_quiet = false;
  std::function<bool(int)> alive;
  std::chrono::milliseconds per_result{0};  // how long each run of results takes

  void commit(int pe, size_t offset, const std::byte* source, size_t bytes, size_t signal, uint64_t word, Traffic kind) {
    if (kind == Traffic::kResults) std::this_thread::sleep_for(per_result);
    if (lost != kind || pe != lost_to) HostPlatform::commit(pe, offset, source, bytes, signal, word, kind);
  }
  bool quiet() { return !never_quiet && HostPlatform::quiet(); }
  bool peer_alive(int pe) { return !alive || alive(pe); }
  static uint64_t now_ns() { return HostPlatform::now_ns() + clock_ahead_ns; }
};
static_assert(Platform<FaultyHost>);

constexpr Deadlines kShort{300'000'000, 600'000'000}, kLong{60'000'000'000, 60'000'000'000};

const Layer& tiny_layer() {
  static const Layer layer({.hidden_size = 8, .intermediate_size = 8, .num_experts = 6, .top_k = 2}, 1);
  return layer;
}

CallOfAll call_of(int ep_size) {
  CallOfAll call{&tiny_layer(), {}, std::nullopt};
  for (int r = 0; r < ep_size; ++r) call.tokens.push_back(draw_tokens(tiny_layer(), 100 + r, r));
  return call;
}

std::unique_ptr<FaultyHost> plain_host(int rank, const std::vector<std::byte*>& heaps) {
  return std::make_unique<FaultyHost>(rank, heaps, std::vector<int>(heaps.size(), 0), nullptr);
}

void check_status(const KernelOutcome& o, Failure failure, Phase phase, int peer, const std::string& what) {
  check(Failure(o.status.failure) == failure && Phase(o.status.phase) == phase && o.status.peer == peer,
        what + ": failure " + std::to_string(o.status.failure) + " (expected " + std::to_string(int(failure)) + "), phase " +
            std::to_string(o.status.phase) + " (expected " + std::to_string(int(phase)) + "), peer " + std::to_string(o.status.peer) +
            " (expected " + std::to_string(peer) + ")");
}

// The last rank's puts of one kind never reach rank 0.
std::vector<KernelOutcome> lose(int ep_size, Traffic kind) {
  return run_kernels<FaultyHost>(call_of(ep_size), kShort, [&](int rank, const std::vector<std::byte*>& heaps, const HeapLayout&) {
    auto platform = plain_host(rank, heaps);
    if (rank == ep_size - 1) platform->lost = kind, platform->lost_to = 0;
    return platform;
  });
}

void lost_transfers() {
  for (int ep_size : {2, 3}) {
    const int guilty = ep_size - 1;
    const auto header = lose(ep_size, Traffic::kHeader), rows = lose(ep_size, Traffic::kRows), results = lose(ep_size, Traffic::kResults);
    check_status(header[0], Failure::kTimeout, Phase::kHeader, guilty, "a lost header");
    check_status(rows[0], Failure::kTimeout, Phase::kChunk, guilty, "a lost chunk");
    check_status(results[0], Failure::kTimeout, Phase::kResults, guilty, "a lost result");
    check(results[0].status.expert >= 0 && results[0].status.expert < 6 / ep_size, "the expert whose result is lost");
    check(signal_epoch(header[0].status.seen) == 0 && signal_epoch(rows[0].status.seen) == 0, "the word that was there instead");
    // Rank 0 serves nobody before it knows all that was sent to it, so the others wait for its results.
    for (int r = 1; r < ep_size; ++r)
      for (const auto* outcome : {&header, &rows}) check_status((*outcome)[r], Failure::kTimeout, Phase::kResults, 0, "a rank beside it");
    check(results[guilty].status.failure == 0 && results[guilty].right, "the rank whose own results came is done");
    check(rows[0].seconds > 0.25 && rows[0].seconds < 5 && header[0].seconds > 0.55 && header[0].seconds < 5,
          "each phase its own deadline: " + std::to_string(rows[0].seconds) + " s, " + std::to_string(header[0].seconds) + " s");
  }
}

void never_quiet() {
  const auto o = run_kernels<FaultyHost>(call_of(2), kShort, [](int rank, const std::vector<std::byte*>& heaps, const HeapLayout&) {
    auto platform = plain_host(rank, heaps);
    platform->never_quiet = rank == 0;
    return platform;
  });
  check_status(o[0], Failure::kTimeout, Phase::kQuiet, 0, "puts that never land");
  check(o[0].right && o[1].right && o[1].status.failure == 0, "the results are there all the same");
}

// Every token needs the last expert of a slow peer, so nothing can be combined for longer than the deadline. But results
// keep coming in: that is progress.
void slow_peer_is_not_lost() {
  CallOfAll call{&tiny_layer(), {draw_tokens(tiny_layer(), 1280, 1), {}}, std::nullopt};
  for (size_t pair = 0; pair < call.tokens[0].ids.size(); ++pair) call.tokens[0].ids[pair] = pair % 2 ? 3 : 5;
  const auto o = run_kernels<FaultyHost>(call, kShort, [&](int rank, const std::vector<std::byte*>& heaps, const HeapLayout&) {
    auto platform = plain_host(rank, heaps);
    if (rank == 1) platform->per_result = std::chrono::milliseconds(60);
    return platform;
  });
  check(o[0].status.failure == 0 && o[0].right, "the call is completed: failure " + std::to_string(o[0].status.failure));
  check(o[0].seconds > 1, "it took several deadlines");
}

// A dead peer ends the wait long before any deadline, and is named even if others are waited for too.
void dead_peer() {
  for (int ep_size : {2, 3}) {
    const auto o = run_kernels<FaultyHost>(
        call_of(ep_size), kLong,
        [&](int rank, const std::vector<std::byte*>& heaps, const HeapLayout&) {
          auto platform = plain_host(rank, heaps);
          platform->alive = [&](int pe) { return pe != ep_size - 1; };
          return platform;
        },
        [&](int rank) { return rank != ep_size - 1; });
    for (int r = 0; r < ep_size - 1; ++r) {
      check_status(o[r], Failure::kPeerDied, Phase::kHeader, ep_size - 1, "a peer that died before it called");
      check(o[r].seconds < 5, "without a deadline");
    }
  }
}

// A peer may do its part and exit in the very moment between two looks at it. It has not been missed.
void peer_that_finishes_and_exits() {
  CallOfAll call = call_of(2);
  for (Tokens& t : call.tokens)
    for (int64_t& id : t.ids) id = 3 + id % 3;  // experts of rank 1: it needs nothing of rank 0 but rows
  std::promise<void> looked_at, ended;
  std::atomic<bool> first{true};
  const auto o = run_kernels<FaultyHost>(
      call, kLong,
      [&](int rank, const std::vector<std::byte*>& heaps, const HeapLayout&) {
        auto platform = plain_host(rank, heaps);
        if (rank == 0) platform->alive = [&](int) {
          if (first.exchange(false)) looked_at.set_value(), ended.get_future().wait();
          return false;
        };
        return platform;
      },
      [&](int rank) {
        if (rank == 1) looked_at.get_future().wait();
        return true;
      },
      [&](int rank) {
        if (rank == 1) ended.set_value();
      });
  check(o[1].right && o[1].status.failure == 0, "the peer did its part");
  check(o[0].status.failure == 0 && o[0].right, "so nobody misses it: failure " + std::to_string(o[0].status.failure));
}

// A process that was stopped and goes on finds its clock far ahead. Nobody was late.
void stopped_process() {
  clock_ahead_ns = 0;
  const auto o = run_kernels<FaultyHost>(
      call_of(2), {5'000'000'000, 5'000'000'000},
      [](int rank, const std::vector<std::byte*>& heaps, const HeapLayout&) { return plain_host(rank, heaps); },
      [](int rank) {
        if (rank == 0) return true;
        std::this_thread::sleep_for(std::chrono::milliseconds(100));
        clock_ahead_ns = 3'600'000'000'000;
        std::this_thread::sleep_for(std::chrono::milliseconds(100));
        return true;
      });
  for (int r = 0; r < 2; ++r) check(o[r].status.failure == 0 && o[r].right, "a clock that jumps is no deadline, rank " + std::to_string(r));
}

}  // namespace

int main() {
  run_test("DeadlineNamesPeerAndPhase", lost_transfers);
  run_test("DeadlineOfQuiet", never_quiet);
  run_test("SlowPeerIsNotLost", slow_peer_is_not_lost);
  run_test("DeadPeer", dead_peer);
  run_test("PeerThatFinishesAndExits", peer_that_finishes_and_exits);
  run_test("StoppedProcess", stopped_process);
  return finish();
}
