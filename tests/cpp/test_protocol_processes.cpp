// Ranks as processes over shared memory: the same bits as everywhere, and an end for every survivor when a peer is
// killed at any moment.
#include <csignal>
#include <random>

#include "process_team.h"

namespace {

using namespace flashmoe;
using namespace flashmoe::test;

constexpr int kOk = 0, kPeerError = 3, kWrong = 4, kVague = 5;

Program program_of(const Layer& layer, int ep_size, int calls) {
  Program program;
  for (int c = 0; c < calls; ++c) {
    program.push_back({&layer, {}, std::nullopt});
    for (int r = 0; r < ep_size; ++r) program.back().tokens.push_back(draw_tokens(layer, (31 * c + 17 * r) % 90, 100 * c + r));
  }
  return program;
}

void same_bits_as_threads() {
  const Layer layer({.hidden_size = 32, .intermediate_size = 32, .num_experts = 12, .top_k = 3, .bias = true}, 1);
  for (int ep_size : {2, 3}) {
    const Program program = program_of(layer, ep_size, 20);
    ProcessTeam team(limits_of(program, ep_size), 30);
    team.start([&](int rank, Group& group) {
      const Results alone = run_alone(program);
      for (size_t c = 0; c < program.size(); ++c) {
        RankArgs args(program[c], rank, ep_size);
        group.forward(args.args);
        if (args.y != alone.y[c][rank]) return kWrong;
      }
      return kOk;
    });
    const std::vector<int> status = team.wait(60);
    for (int r = 0; r < ep_size; ++r) check(status[r] == kOk, "rank " + std::to_string(r) + " ended with " + std::to_string(status[r]));
  }
}

// Calls without end until a peer is killed, at a moment that nobody chose. The survivors must not wait for a deadline.
void killed_peer() {
  const Layer layer({.hidden_size = 32, .intermediate_size = 32, .num_experts = 12, .top_k = 3}, 2);
  std::mt19937_64 random(7);
  for (int trial = 0; trial < 24; ++trial) {
    const int ep_size = 2 + trial % 2, victim = trial / 2 % ep_size;
    const Program program = program_of(layer, ep_size, 8);
    ProcessTeam team(limits_of(program, ep_size), 60);
    team.start([&](int rank, Group& group) {
      std::string error;
      try {
        for (size_t c = 0;; c = (c + 1) % program.size()) {
          RankArgs args(program[c], rank, ep_size);
          group.forward(args.args);
        }
      } catch (const PeerError& e) {
        error = e.what();
      }
      const std::string dead = "rank " + std::to_string(victim);
      const bool named = contains(error, "process of " + dead) || (contains(error, "a peer process that ended") && contains(error, "(" + dead + ")"));
      if (!named) std::fprintf(stderr, "  rank %d: %s\n", rank, error.c_str());
      try {
        RankArgs args(program[0], rank, ep_size);
        group.forward(args.args);
      } catch (const PeerError& e) {
        if (e.what() == error) return named ? kPeerError : kVague;
      }
      return kWrong;
    });
    usleep(1000 + random() % 30000);
    kill(team.pid(victim), SIGKILL);
    const std::vector<int> status = team.wait(10);
    for (int r = 0; r < ep_size; ++r)
      check(status[r] == (r == victim ? 128 + SIGKILL : kPeerError), "trial " + std::to_string(trial) + ": rank " + std::to_string(r) +
            " ended with " + std::to_string(status[r]) + " when rank " + std::to_string(victim) + " was killed");
  }
}

// A rank that has had its results may exit at once: what it sent stays readable, and nobody misses it.
void peer_that_leaves_early() {
  const Layer layer({.hidden_size = 32, .intermediate_size = 32, .num_experts = 12, .top_k = 3}, 3);
  for (int trial = 0; trial < 20; ++trial) {
    const Program program = program_of(layer, 3, 3);
    ProcessTeam team(limits_of(program, 3), 30);
    team.start([&](int rank, Group& group) {
      for (const CallOfAll& call : program) {
        RankArgs args(call, rank, 3);
        group.forward(args.args);
      }
      return kOk;
    });
    for (int status : team.wait(30)) check(status == kOk, "a rank ended with " + std::to_string(status));
  }
}

}  // namespace

int main() {
  run_test("BitsDoNotDependOnPlatform", same_bits_as_threads);
  run_test("KilledPeer", killed_peer);
  run_test("PeerThatLeavesEarly", peer_that_leaves_early);
  return finish();
}
