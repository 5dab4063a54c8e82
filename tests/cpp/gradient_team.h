// Programs of forward and backward calls on a team of rank threads, through the interface that the product has.
#pragma once

#include <array>

#include "reference_gradients.h"
#include "runtime/kept_sums.h"
#include "team.h"

namespace flashmoe::test {

// What comes out of a call: y or the gradient of x, and of a backward call the other gradients.
enum Output { kX, kTopkWeights, kGateUp, kGateUpBias, kDown, kDownBias, kOutputs };
inline const char* name(Output o) {
  static const char* const names[] = {"x", "topk_weights", "gate_up_proj", "gate_up_bias", "down_proj", "down_bias"};
  return names[o];
}
using Outputs = std::array<std::vector<std::byte>, kOutputs>;
inline constexpr unsigned kAllAsked = ~0u;

// One call of all ranks, forward or backward.
struct PassOfAll {
  CallOfAll call;
  bool backward = false;
  std::vector<std::vector<float>> dy = {};  // by rank
  std::vector<unsigned> asked = {};         // by rank, 1 << Output of each gradient of weights; none: all
  std::vector<std::shared_ptr<Kept>> kept = {};  // by rank, what a forward call fills and a backward call reads
  Kept* kept_by(int rank) const { return kept.empty() ? nullptr : kept[rank].get(); }
  unsigned asked_by(int rank) const { return asked.empty() ? kAllAsked : asked[rank]; }
};
using Passes = std::vector<PassOfAll>;

inline PassOfAll backward_of(const CallOfAll& call, uint64_t seed) {
  PassOfAll pass{.call = call, .backward = true};
  for (const Tokens& t : call.tokens) {
    std::mt19937_64 random(++seed * 104729);
    pass.dy.push_back(call.layer->values(random, t.x.size(), 1.0f));
  }
  return pass;
}

inline Program calls_of(const Passes& passes) {
  Program program;
  for (const PassOfAll& pass : passes) program.push_back(pass.call);
  return program;
}

inline Outputs run_pass(Group& group, const PassOfAll& pass, int rank, int ep_size) {
  RankArgs args(pass.call, rank, ep_size);
  Outputs out;
  if (pass.backward) {
    const std::vector<std::byte> dy = encode(pass.dy[rank], pass.call.layer->dtype);
    std::vector<float> topk_weights(args.tokens.weights.size(), -77.0f);
    const auto like = [&](Output o, const std::vector<std::byte>& weight) -> std::byte* {
      const bool absent = !pass.call.layer->bias && (o == kGateUpBias || o == kDownBias);
      if (absent || !(pass.asked_by(rank) & 1u << o)) return nullptr;
      out[o].assign(weight.size(), std::byte{0x3c});
      return out[o].empty() ? reinterpret_cast<std::byte*>(&args) : out[o].data();  // asked for, of no expert
    };
    group.backward(args.args, {dy.data(), topk_weights.data(), like(kGateUp, args.gate_up), like(kGateUpBias, args.gate_up_bias),
                               like(kDown, args.down), like(kDownBias, args.down_bias)}, pass.kept_by(rank));
    out[kTopkWeights] = encode(topk_weights, DType::kFloat32);
  } else {
    group.forward(args.args, pass.kept_by(rank));
  }
  out[kX] = args.y;
  return out;
}

struct PassResults {
  std::vector<std::vector<Outputs>> of;  // [pass][rank]
  std::vector<std::string> errors;       // by rank
  bool ok() const { return std::all_of(errors.begin(), errors.end(), [](const std::string& e) { return e.empty(); }); }
};

// `before(rank, pass)` runs on the rank's thread before each of its calls.
inline PassResults run_passes(const Team& team, const Passes& passes, const std::function<void(int, int)>& before = nullptr) {
  const int ep_size = int(team.size());
  PassResults results{std::vector(passes.size(), std::vector<Outputs>(ep_size)), std::vector<std::string>(ep_size)};
  on_threads(ep_size, [&](int rank) {
    try {
      for (size_t p = 0; p < passes.size(); ++p) {
        if (before) before(rank, int(p));
        results.of[p][rank] = run_pass(*team[rank], passes[p], rank, ep_size);
      }
    } catch (const std::exception& e) {
      results.errors[rank] = e.what();
    }
  });
  return results;
}

// Each rank's tokens alone on one rank that owns every expert: the bits of y and of the tokens' gradients in any team.
inline PassResults run_passes_alone(const Passes& passes) {
  PassResults results;
  const auto group = make_local_group(1);
  for (const PassOfAll& pass : passes) {
    results.of.emplace_back();
    for (size_t rank = 0; rank < pass.call.tokens.size(); ++rank) {
      PassOfAll alone{.call = {pass.call.layer, {pass.call.tokens[rank]}, std::nullopt}, .backward = pass.backward, .asked = {0}};
      if (pass.backward) alone.dy = {pass.dy[rank]};
      results.of.back().push_back(run_pass(*group, alone, 0, 1));
    }
  }
  return results;
}

inline void check_gradients(const PassOfAll& pass, const std::vector<Outputs>& got, const std::string& what) {
  const Layer& l = *pass.call.layer;
  const int ep_size = int(pass.call.tokens.size());
  const ExpertMap owner = pass.call.map ? *pass.call.map : equal_blocks(l.num_experts, ep_size);
  WeightGradients all(l);
  std::vector<TokenGradients> of_tokens;
  for (int r = 0; r < ep_size; ++r) of_tokens.push_back(add_reference_gradients(l, pass.call.tokens[r], pass.dy[r], all));
  for (int r = 0; r < ep_size; ++r) {
    const auto compare = [&](Output o, const std::vector<double>& truth, DType dtype) {
      if (o >= kGateUp && !(pass.asked_by(r) & 1u << o)) return;
      // Those of topk_weights stay in fp32, whatever the dtype.
      const double error = relative_error(decode(got[r][o], dtype), truth);
      check(error <= tolerance(dtype), what + ", rank " + std::to_string(r) + ": the gradient of " + name(o) + " is off by " +
                                           std::to_string(error / tolerance(dtype)) + " tolerances");
    };
    compare(kX, of_tokens[r].x, l.dtype), compare(kTopkWeights, of_tokens[r].weights, DType::kFloat32);
    compare(kGateUp, of_rank(all.gate_up, owner, r), l.dtype), compare(kGateUpBias, of_rank(all.gate_up_bias, owner, r), l.dtype);
    compare(kDown, of_rank(all.down, owner, r), l.dtype), compare(kDownBias, of_rank(all.down_bias, owner, r), l.dtype);
  }
}

// The questions asked of every healthy run; returns what came out, whose bits other runs must repeat.
inline PassResults check_passes(const Passes& passes, TeamOptions options, const std::string& what,
                                const std::function<void(int, int)>& before = nullptr) {
  options.backward = true;
  PassResults results = run_passes(make_team(calls_of(passes), options), passes, before);
  for (const std::string& error : results.errors)
    if (!error.empty()) check(false, what + ": " + error);
  if (!results.ok()) return results;
  const PassResults alone = run_passes_alone(passes);
  bool same_tokens = true;
  for (size_t p = 0; p < passes.size(); ++p) {
    // ThreadSanitizer watches double-precision loops that no other thread sees; the plain run holds them to the truth.
    if (passes[p].backward && !kThreadSanitizer) check_gradients(passes[p], results.of[p], what + ", pass " + std::to_string(p));
    for (size_t r = 0; r < results.of[p].size(); ++r)
      for (Output o : {kX, kTopkWeights}) same_tokens = same_tokens && results.of[p][r][o] == alone.of[p][r][o];
  }
  check(same_tokens, what + ": bits of one rank alone, of y and the gradients of tokens");
  return results;
}

// Both platforms and several seeds of the one that has any: all with the same bits, those of weights included.
inline void check_passes_everywhere(const Passes& passes, TeamOptions options, int seeds, const std::string& what,
                                    const std::function<void(int, int)>& before = nullptr) {
  const PassResults mapped = check_passes(passes, options, what + ", mapped", before);
  for (int seed = 1; seed <= seeds; ++seed) {
    options.remote_only_seed = seed, options.backward = true;
    const PassResults remote = run_passes(make_team(calls_of(passes), options), passes, before);
    for (const std::string& error : remote.errors)
      if (!error.empty()) check(false, what + ", remote seed " + std::to_string(seed) + ": " + error);
    check(remote.of == mapped.of, what + ", remote seed " + std::to_string(seed) + ": gradients do not repeat bit by bit");
  }
}

}  // namespace flashmoe::test
