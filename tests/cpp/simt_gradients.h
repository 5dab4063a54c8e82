// Backward calls of the GPU's kernel on fibers, and what must come out of them.
#pragma once

#include <array>

#include "engine/exact_backward.h"
#include "reference_gradients.h"
#include "simt_team.h"

namespace flashmoe::test {

// One backward call of all ranks.
struct BackwardOfAll : CallOfAll {
  std::vector<std::vector<float>> dy;  // by rank
  std::vector<bool> asked;             // by rank: for the gradients of its weights
};
using BackwardProgram = std::vector<BackwardOfAll>;

inline BackwardOfAll backward_of(const CallOfAll& call, uint64_t seed) {
  BackwardOfAll backward{call, {}, std::vector<bool>(call.tokens.size(), true)};
  for (const Tokens& t : call.tokens) {
    std::mt19937_64 random(++seed * 104729);
    backward.dy.push_back(call.layer->values(random, t.x.size(), 1.0f));
  }
  return backward;
}

enum Output { kX, kTopkWeights, kGateUp, kGateUpBias, kDown, kDownBias, kOutputs };
inline const char* name(Output o) {
  static const char* const names[] = {"x", "topk_weights", "gate_up_proj", "gate_up_bias", "down_proj", "down_bias"};
  return names[o];
}
template <class T>
using Outputs = std::array<std::vector<T>, kOutputs>;

// What comes in and goes out besides a forward call's.
class GradientArrays {
 public:
  GradientArrays(const BackwardOfAll& call, int rank, int ep_size) : dy_(encode(call.dy[rank], call.layer->dtype)) {
    const Layer& l = *call.layer;
    const ExpertMap owner = call.map ? *call.map : equal_blocks(l.num_experts, ep_size);
    topk_weights_.assign(call.tokens[rank].weights.size(), -77.0f);
    if (!call.asked[rank]) return;
    const std::vector<float>* like[] = {&l.gate_up, &l.gate_up_bias, &l.down, &l.down_bias};
    for (int i = 0; i < 4; ++i) weights_[i].assign(slice(l, *like[i], owner, rank).size(), std::byte{0x3c});
  }

  void amend(Call& call) {
    call.tag.kind |= 2;
    const auto of = [&](int i) { return weights_[i].empty() ? nullptr : weights_[i].data(); };
    call.grad = {dy_.data(), topk_weights_.data(), of(0), of(1), of(2), of(3)};
  }

  Outputs<float> outputs(const std::vector<float>& x, DType dtype) const {
    Outputs<float> out{x, topk_weights_};
    for (int i = 0; i < 4; ++i) out[kGateUp + i] = decode(weights_[i], dtype);
    return out;
  }

 private:
  std::vector<std::byte> dy_, weights_[4];
  std::vector<float> topk_weights_;
};

class BackwardRankCall : private GradientArrays, public RankCall {
 public:
  using OfAll = BackwardOfAll;
  static constexpr bool kBackward = true;

  BackwardRankCall(const BackwardOfAll& of_all, int rank, int ep_size, uint64_t epoch, const HeapLayout& layout, const Machine& machine)
      : GradientArrays(of_all, rank, ep_size),
        RankCall(of_all, rank, ep_size, epoch, layout, machine, [this](Call& call) { amend(call); }) {}

  Outputs<float> outputs() const { return GradientArrays::outputs(y(), shape.dtype); }
};

struct BackwardOutcome : SimtOutcome {
  std::vector<std::vector<Outputs<float>>> of;  // [call][rank]
};

template <class P = CudaBackwardPlatform, class E = ExactBackwardEngine<kSimtWarps>>
BackwardOutcome run_backward(const BackwardProgram& program, const SimtOptions& options, uint64_t seed, bool back_to_back = false) {
  SimtTeam<P, E, gpu::Crew<E::kCrewWarps>, BackwardRankCall> team(program, options);
  BackwardOutcome o{back_to_back ? team.run_back_to_back(seed) : team.run(seed), {}};
  for (size_t c = 0; c < program.size(); ++c) {
    o.of.emplace_back();
    for (int r = 0; r < options.ep_size; ++r) o.of.back().push_back(team.call(c, r).outputs());
  }
  return o;
}

// By the chain rule: [call][rank]
using Truth = std::vector<std::vector<Outputs<double>>>;
inline Truth truth_of(const BackwardProgram& program) {
  Truth truth;
  for (const BackwardOfAll& call : program) {
    const Layer& l = *call.layer;
    const int ep_size = int(call.tokens.size());
    const ExpertMap owner = call.map ? *call.map : equal_blocks(l.num_experts, ep_size);
    WeightGradients all(l);
    std::vector<TokenGradients> of_tokens;
    for (int r = 0; r < ep_size; ++r) of_tokens.push_back(add_reference_gradients(l, call.tokens[r], call.dy[r], all));
    truth.emplace_back();
    for (int r = 0; r < ep_size; ++r) {
      Outputs<double> out{of_tokens[r].x, of_tokens[r].weights};
      const std::vector<double>* weights[] = {&all.gate_up, &all.gate_up_bias, &all.down, &all.down_bias};
      for (int i = 0; i < 4 && call.asked[r]; ++i) out[kGateUp + i] = of_rank(*weights[i], owner, r);
      truth.back().push_back(out);
    }
  }
  return truth;
}

// What is wrong with an outcome, or nothing.
inline std::string trouble_of(const BackwardOutcome& o, const BackwardProgram& program, const Truth& truth) {
  if (const std::string failure = failure_of(o); !failure.empty()) return failure;
  for (size_t c = 0; c < program.size(); ++c)
    for (size_t r = 0; r < truth[c].size(); ++r)
      for (int i = 0; i < kOutputs; ++i) {
        // Those of topk_weights stay in fp32, whatever the dtype.
        const double allowed = tolerance(i == kTopkWeights ? DType::kFloat32 : program[c].layer->dtype);
        const double error = relative_error(o.of[c][r][i], truth[c][r][i]) / allowed;
        if (!(error <= 1))
          return "call " + std::to_string(c) + ", rank " + std::to_string(r) + ": the gradient of " + name(Output(i)) + " is off by " +
                 std::to_string(error) + " tolerances";
      }
  return miscount_of(o, program.back(), true);
}

inline CallOfAll call_of(const Layer& layer, const std::vector<int>& num_tokens, uint64_t seed, Skew skew = Skew::kUniform) {
  CallOfAll call{&layer, {}, equal_blocks(layer.num_experts, int(num_tokens.size()))};
  for (int n : num_tokens) call.tokens.push_back(draw_tokens(layer, n, seed++, skew));
  return call;
}

// Every seed must end well, and with the bits of the first. Returns what came out under that.
template <class E = ExactBackwardEngine<kSimtWarps>, class P = CudaBackwardPlatform>
BackwardOutcome check_seeds(const BackwardProgram& program, SimtOptions options, int seeds, const std::string& what,
                            bool back_to_back = false) {
  options.ep_size = int(program[0].tokens.size());
  const Truth truth = truth_of(program);
  BackwardOutcome first;
  for (int seed = 0; seed < num_seeds(seeds); ++seed) {
    BackwardOutcome o = run_backward<P, E>(program, options, uint64_t(seed), back_to_back);
    const std::string trouble = trouble_of(o, program, truth);
    check(trouble.empty(), what + ", seed " + std::to_string(seed) + ": " + trouble);
    if (seed == 0) first = std::move(o);
    else check(o.of == first.of, what + ", seed " + std::to_string(seed) + ": other bits than with the first seed");
  }
  return first;
}

// Of these seeds at least one must end badly on P, and none on Sound. Returns what it said.
template <class P, class Sound, class E = ExactBackwardEngine<kSimtWarps>>
std::string check_caught_on_seeds(const BackwardProgram& program, const SimtOptions& options, int seeds, const std::string& plant,
                                  bool back_to_back = false) {
  const Truth truth = truth_of(program);
  for (int seed = 0; seed < 3; ++seed) {
    const std::string trouble = trouble_of(run_backward<Sound, E>(program, options, seed, back_to_back), program, truth);
    check(trouble.empty(), plant + ", not planted, seed " + std::to_string(seed) + ": " + trouble);
  }
  std::string trouble;
  for (int seed = 0; seed < seeds && trouble.empty(); ++seed)
    trouble = trouble_of(run_backward<P, E>(program, options, seed, back_to_back), program, truth);
  check_caught(!trouble.empty(), plant);
  return trouble;
}

}  // namespace flashmoe::test
