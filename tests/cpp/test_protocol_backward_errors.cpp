// Backward calls that cannot be: without memory for them, against a forward call, without a peer.
#include <chrono>

#include "gradient_team.h"

namespace {

using namespace flashmoe;
using namespace flashmoe::test;

const LayerShape kSmall{.hidden_size = 16, .intermediate_size = 16, .num_experts = 12, .top_k = 2, .layer = 3};

PassOfAll one_pass(const Layer& layer, int ep_size, int num_tokens) {
  CallOfAll call{&layer, {}, std::nullopt};
  for (int r = 0; r < ep_size; ++r) call.tokens.push_back(draw_tokens(layer, num_tokens, r));
  return backward_of(call, 1);
}

TeamOptions impatient(int ep_size, bool remote_only, double timeout_s) {
  TeamOptions options{.ep_size = ep_size, .timeout_s = timeout_s, .entry_timeout_s = timeout_s, .backward = true};
  if (remote_only) options.remote_only_seed = 11;
  return options;
}

template <class Error>
std::string raised(Group& group, const PassOfAll& pass, int rank, int ep_size) {
  try {
    run_pass(group, pass, rank, ep_size);
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

// std::invalid_argument: nothing was sent, and the group goes on as if nothing had been asked.
void no_memory_for_backward_calls() {
  const Layer layer(kSmall, 1);
  for (int ep_size : {1, 2}) {
    const PassOfAll pass = one_pass(layer, ep_size, 20);
    const Program program{pass.call};
    const Team team = make_team(program, {.ep_size = ep_size});
    on_threads(ep_size, [&](int r) {
      const std::string error = raised<std::invalid_argument>(*team[r], pass, r, ep_size);
      check(contains(error, "'team' has no memory for backward calls"), "the group is named: " + error);
    });
    const size_t bytes = HeapLayout(limits_of(program, ep_size)).bytes;
    for (const std::byte* heap : team[0]->options().heaps)
      check(std::all_of(heap, heap + bytes, [](std::byte b) { return b == std::byte{0}; }), "something was sent");
    const Results results = run_program(team, program);
    check(results.ok() && same_bits(results, run_alone(program)), "the forward call that follows");
  }
}

// All hear of it, in moments, and the one that calls backward is told apart from the others.
void forward_meets_backward(int ep_size, int num_tokens, bool remote_only) {
  const Layer layer(kSmall, 2);
  for (int apart : {0, ep_size - 1})
    for (bool backward : {false, true}) {
      const PassOfAll pass = one_pass(layer, ep_size, num_tokens);
      const Team team = make_team({pass.call}, impatient(ep_size, remote_only, 20));
      std::vector<std::string> errors(ep_size);
      const auto begin = std::chrono::steady_clock::now();
      on_threads(ep_size, [&](int r) {
        errors[r] = raised<PeerError>(*team[r], (r == apart) == backward ? pass : PassOfAll{pass.call}, r, ep_size);
      });
      check(std::chrono::steady_clock::now() - begin < std::chrono::seconds(10), "no deadline had to pass");
      bool named = false;
      for (int r = 0; r < ep_size; ++r) {
        const std::string own = (r == apart) == backward ? " of the backward pass of layer 3 (" : " of layer 3 (";
        const std::string other = (r == apart) == backward ? "is calling another layer: layer 3 (" : "is calling another layer: the backward pass of layer 3 (";
        check(contains(errors[r], "rank " + std::to_string(r) + ", call 1" + own), "names itself and its pass: " + errors[r]);
        check(contains(errors[r], "is calling") || contains(errors[r], "ranks that call different layers"), "says what is wrong: " + errors[r]);
        named = named || contains(errors[r], other);
      }
      // An empty packet carries a digest alone.
      if (num_tokens) check(named, "somebody names the other pass: " + errors[0]);
    }
}

void deadline_names_who_never_called(int ep_size, bool remote_only) {
  const Layer layer(kSmall, 3);
  const PassOfAll pass = one_pass(layer, ep_size, 30);
  const Team team = make_team({pass.call}, impatient(ep_size, remote_only, 0.3));
  const int missing = ep_size - 1;
  const std::string its_name = "rank " + std::to_string(missing);
  std::vector<std::string> errors(ep_size);
  on_threads(missing, [&](int r) { errors[r] = raised<PeerError>(*team[r], pass, r, ep_size); });
  bool named = false;
  for (int r = 0; r < missing; ++r) {
    check(contains(errors[r], "of the backward pass of layer 3 "), "of which pass: " + errors[r]);
    check(contains(errors[r], "header of " + its_name) || contains(errors[r], "(" + its_name + ")"), "who never called: " + errors[r]);
    named = named || contains(errors[r], "header of " + its_name + " (expected epoch 1, seen 0)");
  }
  check(named, "somebody names the phase and the epochs: " + errors[0]);
  check(contains(raised<PeerError>(*team[missing], pass, missing, ep_size), "aborted"), "the latecomer is told");
}

}  // namespace

// What a failed group leaves mapped on purpose, because peers may still write to it, is no leak.
extern "C" __attribute__((visibility("default"), used)) const char* __lsan_default_suppressions() {
  return "leak:flashmoe::Group::Impl\n";
}

int main() {
  run_test("NoMemoryForBackwardCalls", no_memory_for_backward_calls);
  run_test("ForwardMeetsBackward", [] {
    for (int ep_size : {2, 3})
      for (int num_tokens : {0, 20})
        for (bool remote_only : {false, true}) forward_meets_backward(ep_size, num_tokens, remote_only);
  });
  run_test("DeadlineNamesWhoNeverCalled", [] {
    for (int ep_size : {2, 3})
      for (bool remote_only : {false, true}) deadline_names_who_never_called(ep_size, remote_only);
  });
  return finish();
}
