// Puts through UCX: the payload before its signal, nothing outside of the memory, and an end to every wait when a peer
// goes; then the layer over them.
#include <unistd.h>

#include <cstring>
#include <random>

#include "ucx_team.h"

namespace {

using namespace flashmoe;
using namespace flashmoe::test;

bool eventually(const std::function<bool()>& condition, double seconds = 20) {
  const uint64_t give_up = HostPlatform::now_ns() + uint64_t(seconds * 1e9);
  for (uint32_t rounds = 0; !condition(); HostPlatform::pause(++rounds))
    if (HostPlatform::now_ns() > give_up) return false;
  return true;
}

// Puts of all sizes from several threads at once, from empty ones to those that UCX takes apart.
void payload_before_signal() {
  constexpr int kThreads = 3;
  constexpr size_t kSlot = size_t(3) << 20, kSignals = 4096;
  const std::vector<size_t> sizes = {0, 8, 100, 8000, 70'000, size_t(1) << 20, kSlot};
  UcxRanks ranks(kSignals + 2 * kThreads * kSlot, {0, 1, 2});
  UcxNetwork network(ranks.fabrics[1], {{0, 0}, {1, 0}, {2, 0}}), other(ranks.fabrics[2], {{0, 0}, {1, 0}, {2, 0}});
  const auto signal_of = [](int sender, int thread) { return 64 * size_t(sender * kThreads + thread); };
  const auto offset_of = [&](int sender, int thread) { return kSignals + kSlot * (sender * kThreads + thread); };
  std::atomic<int> wrong{0}, late{0};
  on_threads(4 * kThreads, [&](int i) {
    const int thread = i / 2 % kThreads, sender = i % 2;
    std::mt19937_64 random(10 * sender + thread);
    std::vector<std::byte> payload(kSlot);
    for (uint64_t call = 1; call <= (kThreadSanitizer ? 30u : 120u) && !late; ++call) {
      const size_t bytes = sizes[random() % sizes.size()];
      const size_t signal = signal_of(sender, thread), offset = offset_of(sender, thread), reply = 2048 + signal;
      if (i < 2 * kThreads) {
        std::memset(payload.data(), int(call % 251), bytes);
        (sender ? other : network).put({0, offset, payload.data(), bytes, signal, call});
        // The next put goes to the same place: not before the reader has looked.
        const uint64_t* word = ranks.word(1 + sender, reply);
        if (!eventually([&] { return HostPlatform::load_acquire(word) == call; })) ++late;
      } else {
        if (!eventually([&] { return HostPlatform::load_acquire(ranks.word(0, signal)) == call; })) ++late;
        std::memset(payload.data(), int(call % 251), bytes);
        wrong += std::memcmp(ranks.heap(0) + offset, payload.data(), bytes) != 0;
        std::atomic<uint64_t> last{0};
        ranks.fabrics[0]->put(1 + sender, {.signal = reply, .word = call}, nullptr, 0, last);
      }
    }
  });
  check(late == 0, "every signal comes");
  check(wrong == 0, "all of the payload is there before its signal, wrong: " + std::to_string(wrong));
  check(eventually([&] { return network.quiet() && other.quiet(); }), "everything lands");
}

void released_when_landed() {
  UcxRanks ranks(1 << 20, {0, 1});
  UcxNetwork network(ranks.fabrics[0], {{0, 0}, {1, 0}});
  uint32_t word = 0;
  network.release_when_landed(&word, 1);
  check(word == 1, "nothing is under way");
  std::vector<std::byte> payload(1 << 19, std::byte{7});
  for (uint64_t call = 1; call <= 50; ++call) {
    network.put({1, 4096, payload.data(), payload.size(), 0, call});
    network.release_when_landed(&word, uint32_t(1 + call));
    check(eventually([&] { return HostPlatform::load_acquire(&word) == 1 + call; }), "a release comes");
    check(HostPlatform::load_acquire(ranks.word(1, 0)) == call, "a release comes after the signal");
  }
}

void memory_is_guarded() {
  UcxRanks ranks(1 << 16, {0, 1});
  UcxNetwork network(ranks.fabrics[0], {{0, 0}, {1, 0}});
  const size_t end = 1 << 16;
  std::vector<std::byte> payload(end + 8, std::byte{9});
  network.put({1, end - 8, payload.data(), 16, 0, 1});
  network.put({1, size_t(0) - 8, payload.data(), 16, 0, 1});
  network.put({1, 0, payload.data(), end + 8, 0, 1});
  network.put({1, 0, nullptr, 0, end, 1});
  network.put({1, 0, nullptr, 0, end - 4, 1});
  network.put({1, 0, nullptr, 0, 12, 1});
  network.put({1, 4096, payload.data(), 8, 64, 5});
  check(eventually([&] { return HostPlatform::load_acquire(ranks.word(1, 64)) == 5; }), "what fits arrives");
  check(*ranks.word(1, 0) == 0 && *ranks.word(1, end - 8) == 0 && *ranks.word(1, 8) == 0, "what does not fit is dropped, whole");

  auto memory = std::make_shared<std::vector<uint64_t>>(8);
  UcxFabric stranger(FLASHMOE_UCX_LIBRARY, memory, reinterpret_cast<std::byte*>(memory->data()), 64, 1, 2);
  UcxFabric::Address guessed = ranks.fabrics[0]->address();
  guessed.key ^= 1;
  stranger.connect({guessed, std::nullopt}, 0.05);
  std::atomic<uint64_t> last{0};
  stranger.put(0, {.offset = 0, .signal = 128, .word = 3}, payload.data(), 64, last);
  UcxNetwork back(ranks.fabrics[1], {{0, 0}, {1, 0}});
  back.put({0, 0, nullptr, 0, 256, 4});
  check(eventually([&] { return HostPlatform::load_acquire(ranks.word(0, 256)) == 4; }), "a rank still gets through");
  usleep(50'000);
  check(*ranks.word(0, 128) == 0 && *ranks.word(0, 0) == 0, "who does not know the key writes nothing");
}

// A rank that leaves is missed at once, and nothing is under way to it any more.
void peer_that_leaves() {
  for (bool midst : {false, true}) {
    UcxRanks ranks(8 << 20, {0, 1});
    UcxNetwork network(ranks.fabrics[0], {{0, 0}, {1, 0}});
    std::vector<std::byte> payload(4 << 20);
    uint32_t word = 0;
    if (midst)
      for (int i = 0; i < 20; ++i) network.put({1, 4096, payload.data(), payload.size(), 0, 1});
    ranks.fabrics[1]->close();
    check(eventually([&] { return !network.alive(1); }, 5), "it is missed");
    network.put({1, 4096, payload.data(), payload.size(), 0, 2});
    network.release_when_landed(&word, 1);
    check(eventually([&] { return network.quiet() && HostPlatform::load_acquire(&word) == 1; }, 5), "nothing is under way to it");
    // A connection that is closed with rows unread is reset, and the reset may overtake the goodbye.
    if (!midst) check(!ranks.fabrics[0]->failed(1), "it said goodbye");
    ranks.fabrics[0]->close(), ranks.fabrics[0]->close();
    network.put({1, 4096, payload.data(), 8, 0, 3});
    check(network.quiet(), "a closed network is quiet");
  }
}

Program program_of(const Layer& layer, int ep_size, int calls) {
  Program program;
  for (int c = 0; c < calls; ++c) {
    program.push_back({&layer, {}, std::nullopt});
    for (int r = 0; r < ep_size; ++r)
      program.back().tokens.push_back(draw_tokens(layer, (31 * c + 17 * r) % 90, 100 * c + r, c % 2 ? Skew::kZipf : Skew::kUniform));
  }
  return program;
}

// All ranks apart, and two hosts of two and one, and of two and two.
void same_bits_as_alone() {
  const Layer layer({.hidden_size = 32, .intermediate_size = 32, .num_experts = 12, .top_k = 3, .bias = true}, 1);
  for (const std::vector<int>& hosts : {std::vector{0, 1}, {0, 1, 2}, {0, 0, 1}, {0, 1, 0, 1}}) {
    const int ep_size = int(hosts.size());
    const Program program = program_of(layer, ep_size, kThreadSanitizer ? 6 : 20);
    const Limits limits = limits_of(program, ep_size);
    UcxRanks ranks(memory_for(limits), hosts);
    const Results results = run_program(make_ucx_team(ranks, limits, 30, 1 + ep_size % 2), program);
    for (const std::string& error : results.errors) check(error.empty(), error);
    check(same_bits(results, run_alone(program)), std::to_string(ep_size) + " ranks: bits of one rank alone");
  }
}

// A rank that goes in the midst of the others' call ends it, long before the deadline.
void peer_that_leaves_a_call() {
  const Layer layer({.hidden_size = 32, .intermediate_size = 32, .num_experts = 12, .top_k = 3}, 2);
  const Program program = program_of(layer, 3, 4);
  const Limits limits = limits_of(program, 3);
  UcxRanks ranks(memory_for(limits), {0, 1, 2});
  const Team team = make_ucx_team(ranks, limits, 30);
  const uint64_t begin = HostPlatform::now_ns();
  const Results results = run_program(team, program, [&](int rank, int call) {
    if (rank != 2 || call != 2) return;
    ranks.fabrics[2]->close();
    throw std::runtime_error("gone");
  });
  check(double(HostPlatform::now_ns() - begin) < 10e9, "in time");
  for (int r = 0; r < 2; ++r) {
    const std::string& error = results.errors[r];
    check(contains(error, "the network to rank 2 broke") || (contains(error, "a peer process that ended") && contains(error, "(rank 2)")), error);
    check(team[r]->failed() == error, "the failure stays");
  }
}

void arrivals_in_any_order() {
  std::mt19937_64 random(3);
  for (int trial = 0; trial < 100; ++trial) {
    std::vector<uint64_t> numbers(20);
    for (size_t i = 0; i < numbers.size(); ++i) numbers[i] = i;
    std::shuffle(numbers.begin(), numbers.end(), random);
    Arrivals arrivals;
    std::vector<bool> here(numbers.size() + 1);
    for (uint64_t n : numbers) {
      arrivals.add(n), here[n] = true;
      uint64_t complete = 0;
      while (here[complete]) ++complete;
      check(arrivals.complete() == complete, "all below the first that is missing");
    }
  }
}

}  // namespace

// What a failed group leaves behind on purpose, because peers and the network may still use it, is no leak.
extern "C" __attribute__((visibility("default"), used)) const char* __lsan_default_suppressions() {
  return "leak:flashmoe::Group::Impl\n";
}

int main() {
  run_test("ArrivalsInAnyOrder", arrivals_in_any_order);
  run_test("PayloadBeforeSignal", payload_before_signal);
  run_test("ReleasedWhenLanded", released_when_landed);
  run_test("MemoryIsGuarded", memory_is_guarded);
  run_test("PeerThatLeaves", peer_that_leaves);
  run_test("BitsDoNotDependOnNetwork", same_bits_as_alone);
  run_test("PeerThatLeavesACall", peer_that_leaves_a_call);
  return finish();
}
