// Epochs instead of barriers: words of other epochs, ranks that run ahead, and the wrap of the counter, in simulated
// time, where each rule broken on purpose must show.
#include "sim_team.h"

namespace {

using namespace flashmoe;
using namespace flashmoe::test;

const Layer& tiny_layer() {
  static const Layer layer({.hidden_size = 8, .intermediate_size = 8, .num_experts = 6, .top_k = 2}, 1);
  return layer;
}

// Calls with changing token counts, from none to a few chunks.
Program changing_counts(int ep_size, int calls, uint64_t seed) {
  std::mt19937_64 random(seed);
  Program program;
  for (int c = 0; c < calls; ++c) {
    program.push_back({&tiny_layer(), {}, equal_blocks(6, ep_size)});
    for (int r = 0; r < ep_size; ++r)
      program.back().tokens.push_back(draw_tokens(tiny_layer(), random() % 3 ? int(random() % 140) : 0, random()));
  }
  return program;
}

// Each rank's tokens need experts of its own alone, or there are none: every pair of ranks is without rows. Every
// fourth call brings rows for everybody, so that an empty packet is followed by a full one.
Program empty_packets(int ep_size, int calls) {
  Program program;
  for (int c = 0; c < calls; ++c) {
    program.push_back({&tiny_layer(), {}, equal_blocks(6, ep_size)});
    for (int r = 0; r < ep_size; ++r) {
      Tokens t = draw_tokens(tiny_layer(), (c + r) % 3 == 0 ? 0 : 3 + r, 100 * c + r);
      if (c % 4 != 3)
        for (int64_t& id : t.ids) id = int64_t(r) * 6 / ep_size;
      program.back().tokens.push_back(t);
    }
  }
  return program;
}

// A word that an earlier call left is no word of this one: neither headers, chunks nor results are ever cleared.
void stale_epoch() {
  for (int ep_size : {2, 3}) {
    const Program program = changing_counts(ep_size, 6, 7 + ep_size);
    for (bool remote_only : {false, true}) {
      const SimOptions options{.ep_size = ep_size, .num_workers = 2, .remote_only = remote_only};
      check_simulated(program, options, 60, std::string("stale words, ") + (remote_only ? "remote" : "mapped"));
      check_fault_caught(program, options, Fault::kStaleChunks, 20, "a stale chunk word taken for this epoch's");
      check_fault_caught(program, options, Fault::kStaleReplies, 20, "a stale result word taken for this epoch's");
    }
    check_fault_caught(program, {.ep_size = ep_size, .remote_only = false}, Fault::kStaleHeaders, 20,
                       "a stale header taken for this epoch's");
  }
}

// A rank without rows for me may have gone on; its newer header says that there was nothing in my epoch.
void newer_epoch_with_zero_rows() {
  for (int ep_size : {2, 3}) {
    int ahead = 0;
    const SimOptions options{.ep_size = ep_size, .straggler = 0};
    check_simulated(empty_packets(ep_size, 12), options, 100, "ranks that run ahead", &ahead);
    check(ahead >= 1, "no rank ever ran ahead: the hazard did not occur");
    check_fault_caught(empty_packets(ep_size, 12), options, Fault::kNewerIsNotYet, 40, "a newer header that says nothing");
  }
}

// An empty packet has no reply, so nothing but quiet() keeps the next call's word from landing before it.
void empty_packets_overtaken() {
  for (int ep_size : {2, 3, 4}) {
    const SimOptions options{.ep_size = ep_size};
    check_simulated(empty_packets(ep_size, 12), options, 100, "empty packets");
    check_fault_caught(empty_packets(ep_size, 12), options, Fault::kQuietLies, 60, "a quiet() that lies");
  }
  Program nobody_calls_with_rows = empty_packets(3, 9);
  for (CallOfAll& call : nobody_calls_with_rows)
    for (Tokens& t : call.tokens) t = {};
  check_simulated(nobody_calls_with_rows, {.ep_size = 3}, 40, "no rows at all");
}

// The counter goes from its last value to 1, past 0, with stale words of the old lap lying about.
void epoch_wrap() {
  for (uint64_t before : {1, 2, 5}) {
    const SimOptions options{.ep_size = 3, .last_epoch = kMaxEpoch - before, .straggler = 1};
    check_simulated(empty_packets(3, 12), options, 40, "empty packets over the wrap");
    check_simulated(changing_counts(3, 6, 21), options, 20, "rows over the wrap");
    check_fault_caught(empty_packets(3, 12), options, Fault::kEpochsAsNumbers, 40, "epochs compared as numbers");
  }
}

}  // namespace

int main() {
  run_test("StaleEpoch", stale_epoch);
  run_test("NewerEpochWithZeroRows", newer_epoch_with_zero_rows);
  run_test("EmptyPackets", empty_packets_overtaken);
  run_test("EpochWrap", epoch_wrap);
  return finish();
}
