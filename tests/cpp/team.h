// Runs programs of calls on a team of ranks, each rank a thread, through the interface that the product has.
#pragma once

#include <memory>
#include <optional>
#include <string>

#include "harness.h"
#include "problem.h"
#include "reference_moe.h"
#include "runtime/moe.h"

namespace flashmoe::test {

// One call of all ranks.
struct CallOfAll {
  const Layer* layer;
  std::vector<Tokens> tokens;     // by rank
  std::optional<ExpertMap> map;   // none: equal contiguous blocks, and no map is passed
};

// What one rank passes in: its share of the weights, bytes rather than floats.
struct RankArgs {
  Tokens tokens;
  std::optional<ExpertMap> map;
  std::vector<std::byte> x, gate_up, gate_up_bias, down, down_bias, y;
  ForwardArgs args;

  RankArgs(const RankArgs&) = delete;  // args points into the rest
  RankArgs(const CallOfAll& call, int rank, int ep_size) : tokens(call.tokens[rank]), map(call.map) {
    const Layer& l = *call.layer;
    const Tokens& t = tokens;
    const ExpertMap owner = map ? *map : equal_blocks(l.num_experts, ep_size);
    x = encode(t.x, l.dtype), gate_up = slice(l, l.gate_up, owner, rank), down = slice(l, l.down, owner, rank);
    gate_up_bias = slice(l, l.gate_up_bias, owner, rank), down_bias = slice(l, l.down_bias, owner, rank);
    y.assign(x.size(), std::byte{0x7f});  // no sum of ours
    int local = 0;
    for (int32_t o : owner) local += o == rank;
    // A rank without experts has empty biases, which is not the same as none.
    auto bias = [&](const std::vector<std::byte>& b) -> const void* { return !l.bias ? nullptr : b.empty() ? this : (const void*)b.data(); };
    args = {x.data(), t.ids.data(), 8, t.weights.data(), gate_up.data(), bias(gate_up_bias), down.data(), bias(down_bias),
            y.data(), map ? map->data() : nullptr, t.num_tokens, l.top_k, l.hidden_size, l.intermediate_size,
            l.num_experts, local, l.layer, l.dtype, l.activation, l.gated};
  }
};

using Team = std::vector<std::shared_ptr<Group>>;
using Program = std::vector<CallOfAll>;

struct TeamOptions {
  int ep_size = 2, num_workers = 1;
  std::optional<uint64_t> remote_only_seed = std::nullopt;
  uint64_t last_epoch = 0;
  double timeout_s = 30, entry_timeout_s = 30;
  bool backward = false;
};

// Limits that just hold the program.
inline Limits limits_of(const Program& program, int ep_size) {
  Limits l{ep_size, 1, 1, 1, 1};
  for (const CallOfAll& call : program) {
    const Layer& layer = *call.layer;
    for (const Tokens& t : call.tokens) l.max_tokens = std::max(l.max_tokens, t.num_tokens);
    l.max_wire_bytes = std::max(l.max_wire_bytes, layer.hidden_size * dtype_bytes(layer.dtype));
    l.max_top_k = std::max(l.max_top_k, layer.top_k), l.max_experts = std::max(l.max_experts, layer.num_experts);
  }
  return l;
}

inline Team make_team(const Program& program, const TeamOptions& options) {
  GroupOptions o;
  o.name = "team", o.limits = limits_of(program, options.ep_size), o.num_workers = options.num_workers;
  o.remote_only_seed = options.remote_only_seed, o.last_epoch = options.last_epoch;
  o.timeout_s = options.timeout_s, o.entry_timeout_s = options.entry_timeout_s;
  o.limits.backward = options.backward;
  return make_local_team(o);
}

// [call][rank] the bytes of y, and what each rank raised, if it did.
struct Results {
  std::vector<std::vector<std::vector<std::byte>>> y;
  std::vector<std::string> errors;
  bool ok() const {
    for (const std::string& e : errors)
      if (!e.empty()) return false;
    return true;
  }
};

// `before(rank, call)` runs on the rank's thread before each of its calls.
inline Results run_program(const Team& team, const Program& program, const std::function<void(int, int)>& before = nullptr) {
  const int ep_size = int(team.size());
  Results results;
  results.y.assign(program.size(), std::vector<std::vector<std::byte>>(ep_size));
  results.errors.resize(ep_size);
  on_threads(ep_size, [&](int rank) {
    try {
      for (size_t c = 0; c < program.size(); ++c) {
        if (before) before(rank, int(c));
        RankArgs args(program[c], rank, ep_size);
        team[rank]->forward(args.args);
        results.y[c][rank] = args.y;
      }
    } catch (const std::exception& e) {
      results.errors[rank] = e.what();
    }
  });
  return results;
}

// Each rank's tokens alone on one rank that owns every expert: the bits that any team must return.
inline Results run_alone(const Program& program) {
  Results results;
  const auto group = make_local_group(1);
  for (const CallOfAll& call : program) {
    results.y.emplace_back();
    for (const Tokens& tokens : call.tokens) {
      RankArgs args({call.layer, {tokens}, std::nullopt}, 0, 1);
      group->forward(args.args);
      results.y.back().push_back(args.y);
    }
  }
  return results;
}

inline bool same_bits(const Results& a, const Results& b) { return a.y == b.y; }

inline void check_against_reference(const Results& results, const Program& program, const std::string& what) {
  double worst = 0;
  for (size_t c = 0; c < program.size(); ++c)
    for (size_t rank = 0; rank < program[c].tokens.size(); ++rank) {
      const Layer& l = *program[c].layer;
      const double error = relative_error(decode(results.y[c][rank], l.dtype), reference_moe(l, program[c].tokens[rank]));
      worst = std::max(worst, error / tolerance(l.dtype));
    }
  check(worst <= 1, what + ": error is " + std::to_string(worst) + " times the tolerance");
}

// The two questions asked of every healthy run.
inline void check_program(const Program& program, const TeamOptions& options, const std::string& what,
                          const std::function<void(int, int)>& before = nullptr) {
  const Results results = run_program(make_team(program, options), program, before);
  for (const std::string& error : results.errors)
    if (!error.empty()) check(false, what + ": " + error);
  if (!results.ok()) return;
  // ThreadSanitizer watches double-precision loops that no other thread sees; the plain run holds them to the truth.
  if (!kThreadSanitizer) check_against_reference(results, program, what);
  check(same_bits(results, run_alone(program)), what + ": bits of one rank alone");
}

}  // namespace flashmoe::test
