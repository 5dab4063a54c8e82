// Every wait ends and says whom it was for and what for; an abort is for good; ranks that call different layers are
// told so; and what fails before anything was sent leaves the group as it was.
#include <sys/resource.h>

#include <fstream>
#include <new>

#include "team.h"

namespace {

using namespace flashmoe;
using namespace flashmoe::test;

const LayerShape kSmall{.hidden_size = 16, .intermediate_size = 16, .num_experts = 12, .top_k = 2, .layer = 3};

Program one_call(const Layer& layer, int ep_size, int num_tokens) {
  Program program{{&layer, {}, std::nullopt}};
  for (int r = 0; r < ep_size; ++r) program[0].tokens.push_back(draw_tokens(layer, num_tokens, r));
  return program;
}

// What forward raises on this rank; empty if nothing, "another exception: …" if it is no PeerError.
std::string raised(Group& group, const CallOfAll& call, int rank, int ep_size) {
  RankArgs args(call, rank, ep_size);
  try {
    group.forward(args.args);
  } catch (const PeerError& e) {
    return e.what();
  } catch (const std::exception& e) {
    return std::string("another exception: ") + e.what();
  }
  return "";
}

std::string rank_name(int rank) { return "rank " + std::to_string(rank); }

double seconds_of(const std::function<void()>& f) {
  const auto begin = std::chrono::steady_clock::now();
  f();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

// The last rank never calls. All others must name it: itself, or as the rank that another's abort is about.
void deadline_names_who_never_called(int ep_size, bool remote_only) {
  const Layer layer(kSmall, 1);
  const Program program = one_call(layer, ep_size, 30);
  TeamOptions options{.ep_size = ep_size, .timeout_s = 0.2, .entry_timeout_s = 0.4};
  if (remote_only) options.remote_only_seed = 5;
  const Team team = make_team(program, options);
  const int missing = ep_size - 1;
  std::vector<std::string> errors(ep_size);
  const double seconds = seconds_of([&] { on_threads(missing, [&](int r) { errors[r] = raised(*team[r], program[0], r, ep_size); }); });
  check(seconds > 0.35 && seconds < 5, "the entry deadline ends the wait, after " + std::to_string(seconds) + " s");
  bool named = false;
  for (int r = 0; r < missing; ++r) {
    check(contains(errors[r], "header of " + rank_name(missing)) || contains(errors[r], "(" + rank_name(missing) + ")"),
          "rank " + std::to_string(r) + " names the rank that never called: " + errors[r]);
    check(contains(errors[r], "layer 3 ") && contains(errors[r], rank_name(r)), "it says who is speaking and of which call: " + errors[r]);
    named = named || (contains(errors[r], "header of " + rank_name(missing)) && contains(errors[r], "expected epoch 1, seen 0"));
  }
  check(named, "somebody names the phase and the epochs: " + errors[0]);
  // The latecomer finds the group aborted, and does not wait for a deadline of its own.
  const double late = seconds_of([&] { errors[missing] = raised(*team[missing], program[0], missing, ep_size); });
  check(contains(errors[missing], "aborted") && late < 0.35, "the latecomer is told at once: " + errors[missing]);
}

// A rank may enter later than the deadline for peers that have entered: compilers take their time.
void late_entry_is_forgiven() {
  const Layer layer(kSmall, 2);
  const Program program = one_call(layer, 2, 30);
  check_program(program, {.ep_size = 2, .timeout_s = 0.1, .entry_timeout_s = 20}, "a rank that enters late", [](int rank, int) {
    if (rank == 1) std::this_thread::sleep_for(std::chrono::milliseconds(500));
  });
}

// Somebody who never wants a deadline asks for more seconds than nanoseconds can be counted.
void endless_deadline_is_none() {
  const Layer layer(kSmall, 10);
  check_program(one_call(layer, 2, 30), {.ep_size = 2, .timeout_s = 1e12, .entry_timeout_s = 1e300}, "an endless deadline",
                [](int rank, int) {
                  if (rank == 1) std::this_thread::sleep_for(std::chrono::milliseconds(200));
                });
}

// After the first failure every later call raises the same, at once, and no call of the right kind helps.
void sticky_abort() {
  const Layer layer(kSmall, 3);
  const Program program = one_call(layer, 2, 10);
  const Team team = make_team(program, {.ep_size = 2, .entry_timeout_s = 0.3});
  const std::string first = raised(*team[0], program[0], 0, 2);
  check(!first.empty() && team[0]->failed() == first, "the group keeps its failure");
  check(!team[1]->failed(), "a rank that has not called knows of nothing yet");
  for (int again = 0; again < 3; ++again) {
    std::string later[2];
    const double seconds = seconds_of([&] { on_threads(2, [&](int r) { later[r] = raised(*team[r], program[0], r, 2); }); });
    check(later[0] == first, "the same again: " + later[0]);
    check(contains(later[1], "rank 0 aborted"), "the other rank too: " + later[1]);
    check(seconds < 0.25, "without waiting again");
  }
}

// Every rank gets an error that names itself and its layer, and a rank that calls another one.
void other_call_is_refused(int ep_size, int num_tokens, bool remote_only) {
  LayerShape mine = kSmall, other = kSmall;
  mine.layer = 41, other.layer = 57;
  const Layer layers[] = {Layer(mine, 4), Layer(other, 4)};
  const Program programs[] = {one_call(layers[0], ep_size, num_tokens), one_call(layers[1], ep_size, num_tokens)};
  TeamOptions options{.ep_size = ep_size, .timeout_s = 20, .entry_timeout_s = 20};
  if (remote_only) options.remote_only_seed = 11;
  const Team team = make_team(programs[0], options);
  std::vector<std::string> errors(ep_size);
  const double seconds = seconds_of([&] {
    on_threads(ep_size, [&](int r) { errors[r] = raised(*team[r], programs[r == ep_size - 1][0], r, ep_size); });
  });
  check(seconds < 10, "no deadline had to pass");
  const std::string what = (num_tokens ? "with rows, " : "empty packets, ") + std::to_string(ep_size) + " ranks: ";
  bool both_layers = false;
  for (int r = 0; r < ep_size; ++r) {
    const std::string own = r == ep_size - 1 ? "layer 57 " : "layer 41 ", theirs = r == ep_size - 1 ? "layer 41 " : "layer 57 ";
    check(contains(errors[r], rank_name(r) + ", call 1 of " + own), what + "names itself and its layer: " + errors[r]);
    check(contains(errors[r], "is calling") || contains(errors[r], "ranks that call different layers"), what + "says what is wrong: " + errors[r]);
    bool names_another = false;
    for (int o = 0; o < ep_size; ++o) names_another = names_another || (o != r && contains(errors[r], rank_name(o)));
    check(names_another, what + "names another rank: " + errors[r]);
    both_layers = both_layers || contains(errors[r], theirs);
  }
  // An empty packet carries a digest alone; one with rows says which layer it is of.
  if (num_tokens) check(both_layers, what + "somebody names both layers: " + errors[0]);
}

// A call that fails for want of memory has sent nothing, and the next one finds the group as it was.
void memory_error_of_a_lone_rank() {
  const Layer layer(kSmall, 5);
  const Program program = one_call(layer, 1, 12);
  const auto group = make_local_group(1);
  RankArgs before(program[0], 0, 1);
  group->forward(before.args);
  // 2^48 bytes of results: more than an address space has, so nothing of it is ever touched.
  std::vector<int64_t> ids(1024 * 256, 0);
  std::vector<float> weights(ids.size());
  ForwardArgs huge = before.args;
  huge.num_tokens = 1024, huge.top_k = 256, huge.topk_ids = ids.data(), huge.topk_weights = weights.data();
  huge.hidden_size = 1 << 28;
  bool no_memory = false;
  try {
    group->forward(huge);
  } catch (const std::bad_alloc&) {
    no_memory = true;
  }
  check(no_memory, "a call beyond the address space is a bad_alloc");
  for (int again = 0; again < 3; ++again) {
    RankArgs after(program[0], 0, 1);
    group->forward(after.args);
    check(after.y == before.y, "the same bits after it");
  }
}

// Many narrow rows in one call and a few wide ones in another ask for little; many wide rows were never there.
void lone_rank_takes_what_its_calls_need() {
  const auto group = make_local_group(1);
  const LayerShape narrow{.hidden_size = 1, .intermediate_size = 1, .num_experts = 2, .top_k = 1};
  const LayerShape wide{.hidden_size = 4096, .intermediate_size = 1, .num_experts = 2, .top_k = 16};
  const Layer layers[] = {Layer(narrow, 8), Layer(wide, 8)};
  const Program few_rows = one_call(layers[0], 1, 30), many_rows = one_call(layers[0], 1, 20'000);
  const Program wide_rows = one_call(layers[1], 1, 2);
  rusage before{}, after{};
  getrusage(RUSAGE_SELF, &before);
  for (const Program* program : {&few_rows, &wide_rows, &many_rows, &wide_rows, &few_rows}) {
    RankArgs args((*program)[0], 0, 1);
    group->forward(args.args);
    check(args.y == run_alone(*program).y[0][0], "the bits of a group that has seen no other call");
  }
  getrusage(RUSAGE_SELF, &after);
  const long grown_kib = after.ru_maxrss - before.ru_maxrss;  // 20,000 rows of 16 · 16 KiB would be 5 GiB
  check(grown_kib < 512 * 1024, "memory grew by " + std::to_string(grown_kib) + " KiB");
}

void memory_error_of_one_rank() {
  int overcommit = 0;
  std::ifstream("/proc/sys/vm/overcommit_memory") >> overcommit;
  if (overcommit == 1) return (void)std::printf("  skipped: this system grants any memory that is asked for\n");
  LayerShape shape = kSmall;
  shape.gated = false;
  const Layer layer(shape, 6);
  const Program program = one_call(layer, 2, 40);
  const Team team = make_team(program, {.ep_size = 2, .timeout_s = 1, .entry_timeout_s = 1});
  RankArgs huge(program[0], 0, 2);
  huge.args.intermediate_size = 1 << 30;  // terabytes of activations
  bool no_memory = false;
  try {
    team[0]->forward(huge.args);
  } catch (const std::bad_alloc&) {
    no_memory = true;
  }
  check(no_memory, "a call beyond the machine's memory is a bad_alloc");
  const Results results = run_program(team, program);
  check(results.ok(), "nothing was sent, so the ranks still meet: " + results.errors[0] + results.errors[1]);
  if (results.ok()) check(same_bits(results, run_alone(program)), "with the right bits");
}

// Counts that 32 bits do not hold are refused before a pointer is followed.
void counts_beyond_their_words() {
  const Layer layer(kSmall, 9);
  const Program program = one_call(layer, 1, 12);
  const auto group = make_local_group(1);
  const RankArgs good(program[0], 0, 1);
  const auto refused = [&](const std::function<void(ForwardArgs&)>& spoil, const std::string& name) {
    ForwardArgs args = good.args;
    spoil(args);
    std::string error = "nothing";
    try {
      group->forward(args);
    } catch (const std::invalid_argument& e) {
      error = e.what();
    }
    check(contains(error, name) && contains(error, "must be at most 1073741824"), name + " raised " + error);
  };
  refused([](ForwardArgs& a) { a.num_tokens = 1 << 23, a.top_k = 256; }, "number of tokens times top_k");
  refused([](ForwardArgs& a) { a.hidden_size = 1 << 29; }, "bytes of one row of x");
  refused([](ForwardArgs& a) { a.intermediate_size = 1 << 30, a.gated = true; }, "rows of one expert's gate_up_proj");
}

// std::invalid_argument: nothing was sent, and the rank may call again in the same epoch.
void bad_argument_is_no_abort() {
  const Layer layer(kSmall, 7);
  const Program program = one_call(layer, 2, 20);
  const Team team = make_team(program, {.ep_size = 2, .entry_timeout_s = 5});
  const Results results = run_program(team, program, [&](int rank, int) {
    if (rank == 1) return;
    CallOfAll bad = program[0];
    bad.tokens[0].ids[5] = 13;
    const std::string error = raised(*team[0], bad, 0, 2);
    check(contains(error, "topk_ids") && contains(error, "got 13") && contains(error, "token 2, choice 1"), "names the id: " + error);
    bad = program[0], bad.tokens[0] = draw_tokens(layer, 21, 1);
    check(contains(raised(*team[0], bad, 0, 2), "at most 20"), "names the limit");
  });
  check(results.ok() && same_bits(results, run_alone(program)), "the call that follows is the one its peer is waiting for");
}

}  // namespace

// An allocation beyond all bounds must be an exception here, as without a sanitizer; and what a failed group leaves
// mapped on purpose, because peers may still write to it, is no leak.
#define FLASHMOE_SANITIZER_ASKS extern "C" __attribute__((visibility("default"), used)) const char*
FLASHMOE_SANITIZER_ASKS __asan_default_options() { return "allocator_may_return_null=1"; }
FLASHMOE_SANITIZER_ASKS __tsan_default_options() { return "allocator_may_return_null=1"; }
FLASHMOE_SANITIZER_ASKS __lsan_default_suppressions() { return "leak:flashmoe::Group::Impl\n"; }

int main() {
  run_test("DeadlineNamesPeerAndPhase", [] {
    for (int ep_size : {2, 3, 4})
      for (bool remote_only : {false, true}) deadline_names_who_never_called(ep_size, remote_only);
  });
  run_test("LateEntryIsForgiven", late_entry_is_forgiven);
  run_test("EndlessDeadlineIsNone", endless_deadline_is_none);
  run_test("StickyAbort", sticky_abort);
  run_test("OtherCallIsRefused", [] {
    for (int ep_size : {2, 3})
      for (int num_tokens : {0, 20})
        for (bool remote_only : {false, true}) other_call_is_refused(ep_size, num_tokens, remote_only);
  });
  run_test("LoneRankTakesWhatItsCallsNeed", lone_rank_takes_what_its_calls_need);
  run_test("MemoryErrorOfALoneRank", memory_error_of_a_lone_rank);
  run_test("MemoryErrorOfOneRank", memory_error_of_one_rank);
  run_test("CountsBeyondTheirWords", counts_beyond_their_words);
  run_test("BadArgumentIsNoAbort", bad_argument_is_no_abort);
  return finish();
}
