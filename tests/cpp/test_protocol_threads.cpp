// Hazards on real threads, through the product's own interface: mapped peers and remote-only ones, where
// ThreadSanitizer sees every access. What each hazard breaks is shown in simulated time, in test_protocol_epochs and
// test_protocol_transfers.
#include <random>

#include "team.h"

namespace {

using namespace flashmoe;
using namespace flashmoe::test;

const LayerShape kSmall{.hidden_size = 32, .intermediate_size = 32, .num_experts = 8, .top_k = 3};

// A program with counts[call] tokens on every rank, or by a function of (call, rank).
Program program_of(const Layer& layer, int ep_size, int calls, const std::function<int(int, int)>& count, Skew skew = Skew::kUniform) {
  Program program;
  for (int c = 0; c < calls; ++c) {
    program.push_back({&layer, {}, std::nullopt});
    for (int r = 0; r < ep_size; ++r) program.back().tokens.push_back(draw_tokens(layer, count(c, r), 1000 * c + r, skew));
    if (layer.num_experts % ep_size) program.back().map = equal_blocks(layer.num_experts, ep_size);
  }
  return program;
}

// Both platforms, and several seeds of the one that has any.
void check_everywhere(const Program& program, TeamOptions options, int seeds, const std::string& what,
                      const std::function<void(int, int)>& before = nullptr) {
  check_program(program, options, what + ", mapped", before);
  for (int seed = 1; seed <= seeds; ++seed) {
    options.remote_only_seed = seed;
    check_program(program, options, what + ", remote seed " + std::to_string(seed), before);
  }
}

void sleep_us(int most, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::this_thread::sleep_for(std::chrono::microseconds(random() % most));
}

void reuse_before_consumption() {
  const Layer layer(kSmall, 1);
  const Program program = program_of(layer, 3, 25, [](int c, int r) { return (37 * c + 11 * r) % 90; });
  check_everywhere(program, {.ep_size = 3}, 3, "calls back to back");
  check_everywhere(program, {.ep_size = 3}, 1, "calls with pauses", [](int r, int c) { sleep_us(c % 3 == r ? 2000 : 50, 97 * c + r); });
}

void straggler() {
  const Layer layer(kSmall, 2);
  const Program program = program_of(layer, 3, 4, [](int c, int) { return 40 + c; });
  for (int late : {0, 1, 2})
    check_everywhere(program, {.ep_size = 3}, 1, "rank " + std::to_string(late) + " is late", [late](int r, int) {
      if (r == late) std::this_thread::sleep_for(std::chrono::milliseconds(40));
    });
}

void reordered_puts() {
  const Layer layer(kSmall, 3);
  const Program program = program_of(layer, 3, 3, [](int c, int r) { return 70 * c + 30 * r; }, Skew::kZipf);
  check_everywhere(program, {.ep_size = 3}, kThreadSanitizer ? 12 : 40, "reordered puts");
}

// Rank r's calls need its own experts alone: its peers get empty packets, and no reply keeps it from running ahead.
void empty_packets() {
  const Layer layer(kSmall, 4);
  for (int ep_size : {2, 4}) {
    Program program = program_of(layer, ep_size, 40, [](int c, int r) { return (c + r) % 4 ? 1 + r : 0; });
    for (size_t c = 0; c < program.size(); ++c)
      for (int r = 0; c % 5 != 4 && r < ep_size; ++r)
        for (int64_t& id : program[c].tokens[r].ids) id = id % (8 / ep_size) + r * (8 / ep_size);
    check_everywhere(program, {.ep_size = ep_size}, 3, std::to_string(ep_size) + " ranks");
    check_program(program, {.ep_size = ep_size, .last_epoch = (uint64_t(1) << 48) - 20}, "over the wrap of the epoch");
    check_program(program, {.ep_size = ep_size, .remote_only_seed = 9, .last_epoch = (uint64_t(1) << 48) - 3}, "remote, over the wrap");
  }
}

// All tokens of all ranks go to one expert: its owner has more row blocks than the ring has slots.
void ticket_and_ring_reuse() {
  const Layer layer({.hidden_size = 32, .intermediate_size = 16, .num_experts = 4, .top_k = 1}, 5);
  const Program program = program_of(layer, 2, 2, [](int, int) { return 1500; }, Skew::kOneExpert);
  check_everywhere(program, {.ep_size = 2, .num_workers = 2}, 2, "all to one expert");
}

void many_workers_per_rank() {
  const Layer layer({.hidden_size = 64, .intermediate_size = 48, .num_experts = 8, .top_k = 4}, 6);
  for (int workers : {1, 2, 3})
    for (int ep_size : {1, 4}) {
      // Enough work that the runtime lets the other workers take part.
      const Program program = program_of(layer, ep_size, 2, [](int c, int r) { return 60 + 10 * c + r; });
      check_everywhere(program, {.ep_size = ep_size, .num_workers = workers}, 1,
                       std::to_string(ep_size) + " ranks of " + std::to_string(workers) + " workers");
    }
}

// Layers of different widths, experts and dtypes take turns in one heap, so every byte of it changes its meaning.
void several_layers_one_group() {
  const Layer layers[] = {Layer({.hidden_size = 32, .intermediate_size = 48, .num_experts = 8, .top_k = 2, .layer = 0}, 7),
                          Layer({.hidden_size = 16, .intermediate_size = 16, .num_experts = 4, .top_k = 4, .bias = true, .layer = 1}, 8),
                          Layer({.hidden_size = 64, .intermediate_size = 16, .num_experts = 12, .top_k = 1, .gated = false,
                                 .dtype = DType::kBFloat16, .activation = Activation::kRelu, .layer = 2}, 9)};
  Program program;
  for (int c = 0; c < 24; ++c) {
    const Layer& layer = layers[(c * c + c / 3) % 3];
    program.push_back({&layer, {draw_tokens(layer, (c * 29) % 80, 10 * c), draw_tokens(layer, (c * 17) % 70, 10 * c + 1)}, std::nullopt});
  }
  check_everywhere(program, {.ep_size = 2, .num_workers = 2}, 3, "three layers");
}

}  // namespace

int main() {
  run_test("ReuseBeforeConsumption", reuse_before_consumption);
  run_test("Straggler", straggler);
  run_test("ReorderedPuts", reordered_puts);
  run_test("EmptyPackets", empty_packets);
  run_test("TicketAndRingReuse", ticket_and_ring_reuse);
  run_test("ManyWorkersPerRank", many_workers_per_rank);
  run_test("SeveralLayersOneGroup", several_layers_one_group);
  return finish();
}
