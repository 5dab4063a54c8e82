// Backward calls on real threads, through the product's own interface: mapped peers and remote-only ones, where
// ThreadSanitizer sees every access, against the chain rule in double precision.
#include <random>

#include "gradient_team.h"

namespace {

using namespace flashmoe;
using namespace flashmoe::test;

const LayerShape kSmall{.hidden_size = 32, .intermediate_size = 32, .num_experts = 8, .top_k = 3};

CallOfAll call_of(const Layer& layer, int ep_size, uint64_t seed, const std::function<int(int)>& count, Skew skew = Skew::kUniform) {
  CallOfAll call{&layer, {}, std::nullopt};
  for (int r = 0; r < ep_size; ++r) call.tokens.push_back(draw_tokens(layer, count(r), 1000 * seed + r, skew));
  if (layer.num_experts % ep_size) call.map = equal_blocks(layer.num_experts, ep_size);
  return call;
}

// The truth is one: the derivative of the definition that forward calls are held to, by differences of it.
void reference_is_the_derivative() {
  for (Activation activation : {Activation::kSilu, Activation::kGelu, Activation::kGeluTanh, Activation::kRelu})
    for (bool gated : {false, true}) {
      Layer layer({.hidden_size = 5, .intermediate_size = 4, .num_experts = 3, .top_k = 2, .gated = gated, .bias = true, .activation = activation}, 3);
      Tokens tokens = draw_tokens(layer, 6, 1, Skew::kDropSome);
      const PassOfAll pass = backward_of({&layer, {tokens}, std::nullopt}, 4);
      WeightGradients weights(layer);
      const TokenGradients of_tokens = add_reference_gradients(layer, tokens, pass.dy[0], weights);
      const auto loss = [&] {
        double sum = 0;
        const std::vector<double> y = reference_moe(layer, tokens);
        for (size_t i = 0; i < y.size(); ++i) sum += y[i] * pass.dy[0][i];
        return sum;
      };
      double worst = 0;
      const auto compare = [&](std::vector<float>& values, const std::vector<double>& gradient) {
        check(values.size() == gradient.size(), "a gradient of another size");
        for (size_t i = 0; i < values.size(); ++i) {
          const float value = values[i], above = value + 0x1p-12f, below = value - 0x1p-12f;
          values[i] = above;
          const double up = loss();
          values[i] = below;
          const double difference = (up - loss()) / (double(above) - below);
          values[i] = value;
          worst = std::max(worst, std::fabs(difference - gradient[i]) / (1 + std::fabs(gradient[i])));
        }
      };
      compare(tokens.x, of_tokens.x), compare(tokens.weights, of_tokens.weights);
      compare(layer.gate_up, weights.gate_up), compare(layer.gate_up_bias, weights.gate_up_bias);
      compare(layer.down, weights.down), compare(layer.down_bias, weights.down_bias);
      check(worst < 1e-6, "differences are off by " + std::to_string(worst));
    }
}

void gradients() {
  uint64_t seed = 0;
  for (int ep_size : {1, 2, 3, 4})
    for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16})
      for (Skew skew : {Skew::kZipf, Skew::kDropSome}) {
        ++seed;
        const Layer layer({.hidden_size = 40, .intermediate_size = 24, .num_experts = 12, .top_k = 3, .gated = seed % 2 == 0, .bias = seed % 3 != 0,
                           .dtype = dtype, .activation = Activation(seed % 4)}, seed);
        const PassOfAll pass = backward_of(call_of(layer, ep_size, seed, [](int r) { return 90 + 50 * r; }, skew), seed);
        check_passes_everywhere({pass}, {.ep_size = ep_size}, num_seeds(4), std::to_string(ep_size) + " ranks of " + std::to_string(int(dtype)));
      }
}

// Some have no tokens, some no experts, some neither; an expert nobody asks for has a gradient of zero.
void ranks_without_tokens_or_experts() {
  LayerShape shape = kSmall;
  shape.bias = true;
  const Layer layer(shape, 2);
  const ExpertMap maps[] = {{2, 0, 2, 0, 0, 2, 2, 0}, {1, 1, 1, 1, 1, 1, 1, 1}, {0, 1, 2, 2, 1, 0, 0, 0}};
  for (const ExpertMap& map : maps)
    for (int without : {0, 1, 2}) {
      CallOfAll call = call_of(layer, 3, without, [&](int r) { return r == without ? 0 : 80; }, Skew::kDropSome);
      for (Tokens& t : call.tokens)
        for (int64_t& id : t.ids) id = id == 7 ? 6 : id;
      call.map = map;
      check_passes_everywhere({backward_of(call, 5), {call}, backward_of(call, 6)}, {.ep_size = 3}, 2, "no tokens of rank " + std::to_string(without));
    }
  CallOfAll nobody = call_of(layer, 2, 1, [](int) { return 0; });
  check_passes_everywhere({backward_of(nobody, 1), backward_of(nobody, 2)}, {.ep_size = 2}, 2, "no tokens at all");
}

// Token counts that change, and calls of both kinds in turn: inboxes, headers and results change their meaning.
Passes changing_passes(const Layer& layer, int ep_size, int calls) {
  Passes passes;
  for (int c = 0; c < calls; ++c) {
    const CallOfAll call = call_of(layer, ep_size, c, [&](int r) { return (37 * c + 11 * r) % 90; }, c % 3 ? Skew::kUniform : Skew::kDropSome);
    passes.push_back(c % 5 < 3 ? backward_of(call, c) : PassOfAll{call});
  }
  return passes;
}

void back_to_back() {
  const Layer layer(kSmall, 3);
  for (int ep_size : {2, 3, 4}) {
    const Passes passes = changing_passes(layer, ep_size, kThreadSanitizer ? 12 : 20);
    const std::string what = std::to_string(ep_size) + " ranks, ";
    check_passes_everywhere(passes, {.ep_size = ep_size}, num_seeds(3), what + "back to back");
    check_passes_everywhere(passes, {.ep_size = ep_size}, 1, what + "with pauses", [](int r, int c) {
      std::this_thread::sleep_for(std::chrono::microseconds(c % 3 == r ? 2000 : 50 * r));
    });
    check_passes_everywhere(passes, {.ep_size = ep_size, .last_epoch = (uint64_t(1) << 48) - 9}, 1, what + "over the wrap of the epoch");
  }
}

// Rows of one's own experts alone: no reply and no release keeps a rank from running ahead.
void empty_packets() {
  const Layer layer(kSmall, 4);
  for (int ep_size : {2, 4}) {
    Passes passes = changing_passes(layer, ep_size, 25);
    for (size_t c = 0; c < passes.size(); ++c)
      for (int r = 0; c % 5 != 4 && r < ep_size; ++r)
        for (int64_t& id : passes[c].call.tokens[r].ids) id = (id + 8) % (8 / ep_size) + r * (8 / ep_size);
    check_passes_everywhere(passes, {.ep_size = ep_size}, num_seeds(3), std::to_string(ep_size) + " ranks apart");
  }
}

void straggler() {
  const Layer layer(kSmall, 5);
  Passes passes;
  for (int c = 0; c < 3; ++c) passes.push_back(backward_of(call_of(layer, 3, c, [c](int) { return 150 + c; }), c));
  for (int late : {0, 1, 2})
    check_passes_everywhere(passes, {.ep_size = 3}, 1, "rank " + std::to_string(late) + " is late", [late](int r, int) {
      if (r == late) std::this_thread::sleep_for(std::chrono::milliseconds(30));
    });
}

// Far more row blocks of one expert than the forward pass' ring has, and gradients of several tiles in each direction.
void many_blocks_and_tiles() {
  const Layer one({.hidden_size = 32, .intermediate_size = 16, .num_experts = 4, .top_k = 1}, 6);
  check_passes_everywhere({backward_of(call_of(one, 2, 1, [](int) { return 1500; }, Skew::kOneExpert), 1)}, {.ep_size = 2, .num_workers = 2}, 2,
                          "all to one expert");
  const Layer wide({.hidden_size = 290, .intermediate_size = 270, .num_experts = 4, .top_k = 2, .bias = true}, 7);
  check_passes_everywhere({backward_of(call_of(wide, 2, 2, [](int r) { return 40 + r; }), 2)}, {.ep_size = 2, .num_workers = 2}, 1, "several tiles");
}

void many_workers_per_rank() {
  const Layer layer({.hidden_size = 64, .intermediate_size = 48, .num_experts = 8, .top_k = 4}, 8);
  for (int ep_size : {1, 4}) {
    Passes passes;  // of enough work that the runtime lets the other workers take part
    for (int c = 0; c < 2; ++c) passes.push_back(backward_of(call_of(layer, ep_size, c, [c](int r) { return 60 + 10 * c + r; }), c));
    const PassResults one = check_passes(passes, {.ep_size = ep_size}, "one worker");
    for (int workers : {2, 3})
      for (int repeat = 0; repeat < num_seeds(4); ++repeat) {
        const PassResults many = check_passes(passes, {.ep_size = ep_size, .num_workers = workers}, std::to_string(workers) + " workers");
        check(many.of == one.of, "gradients depend on the number of workers, " + std::to_string(workers));
      }
  }
}

// What a forward call keeps changes no bit of its y nor of the gradients, whoever keeps; what is of another call, or of one
// that never was, is passed over.
void kept_sums() {
  const auto fresh = [](int ranks) {
    std::vector<std::shared_ptr<Kept>> kept;
    for (int r = 0; r < ranks; ++r) kept.push_back(std::make_shared<Kept>());
    return kept;
  };
  uint64_t seed = 0;
  for (int ep_size : {1, 2, 4})
    for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
      ++seed;
      const LayerShape shape{.hidden_size = 40, .intermediate_size = 150, .num_experts = 8, .top_k = 3, .gated = seed % 2 == 0,
                             .bias = seed % 3 != 0, .dtype = dtype, .activation = Activation(seed % 4)};
      LayerShape other_shape = shape;
      other_shape.intermediate_size = 40, other_shape.layer = 1;
      const Layer layer(shape, seed), other_layer(other_shape, seed);
      const auto count = [](int r) { return 190 + 40 * r; };
      const CallOfAll call = call_of(layer, ep_size, seed, count, Skew::kOneExpert), other = call_of(other_layer, ep_size, seed, count);
      Passes passes{{call}, {call}, {other}, backward_of(call, 1), backward_of(call, 1), backward_of(call, 1), backward_of(call, 1)};
      passes[1].kept = passes[4].kept = fresh(ep_size);
      passes[2].kept = passes[5].kept = fresh(ep_size);  // of the other layer
      passes[6].kept = passes[1].kept;
      if (ep_size > 1) passes[6].kept[1] = std::make_shared<Kept>();
      for (std::optional<uint64_t> remote_only : {std::optional<uint64_t>(), std::optional<uint64_t>(seed)}) {
        const std::string what = std::to_string(ep_size) + " ranks, dtype " + std::to_string(int(dtype)) + ": ";
        const PassResults o = check_passes(passes, {.ep_size = ep_size, .num_workers = 2, .remote_only_seed = remote_only}, what);
        check(o.of[1] == o.of[0], what + "y of a call that keeps");
        for (int p : {4, 5, 6}) check(o.of[p] == o.of[3], what + "gradients of pass " + std::to_string(p));
      }
    }
}

// What one rank asks for is its own matter: others get the same, and its call is as long as it needs to be.
void gradients_not_asked_for() {
  LayerShape shape = kSmall;
  shape.bias = true;
  const Layer layer(shape, 9);
  PassOfAll pass = backward_of(call_of(layer, 3, 1, [](int r) { return 70 + r; }), 1);
  const PassResults all = check_passes({pass}, {.ep_size = 3}, "all asked for");
  const unsigned matrices = 1u << kGateUp | 1u << kDown, up = 1u << kGateUp | 1u << kGateUpBias, down = 1u << kDown | 1u << kDownBias;
  for (const std::vector<unsigned>& asked :
       {std::vector{0u, kAllAsked, kAllAsked}, {kAllAsked, 0u, 0u}, {0u, 0u, 0u}, {up, down, matrices}}) {
    pass.asked = asked;
    const PassResults some = check_passes({pass, pass}, {.ep_size = 3}, "some asked for");
    for (int r = 0; r < 3 && some.ok(); ++r)
      for (int o = 0; o < kOutputs; ++o)
        if (o < kGateUp || asked[r] & 1u << o)
          check(some.of[0][r][o] == all.of[0][r][o],
                "rank " + std::to_string(r) + ": what others ask for changes the gradient of " + name(Output(o)));
  }
}

// Layers of different widths, dtypes and experts take turns in one heap.
void several_layers_one_group() {
  const Layer layers[] = {Layer({.hidden_size = 32, .intermediate_size = 48, .num_experts = 8, .top_k = 2, .layer = 0}, 7),
                          Layer({.hidden_size = 15, .intermediate_size = 17, .num_experts = 4, .top_k = 4, .bias = true, .layer = 1}, 8),
                          Layer({.hidden_size = 63, .intermediate_size = 16, .num_experts = 12, .top_k = 1, .gated = false,
                                 .dtype = DType::kBFloat16, .activation = Activation::kRelu, .layer = 2}, 9)};
  Passes passes;
  for (int c = 0; c < 24; ++c) {
    const CallOfAll call = call_of(layers[(c * c + c / 3) % 3], 2, c, [c](int r) { return c * (r ? 17 : 29) % 75; });
    passes.push_back(c % 3 ? backward_of(call, c) : PassOfAll{call});
  }
  check_passes_everywhere(passes, {.ep_size = 2, .num_workers = 2}, num_seeds(3), "three layers");
}

// The heap of a lone rank follows its calls, and knows both kinds from the start.
void local_group_grows() {
  LayerShape shape = kSmall;
  shape.bias = true;
  const Layer small(shape, 10), wide({.hidden_size = 200, .intermediate_size = 24, .num_experts = 20, .top_k = 5, .gated = false}, 11);
  Passes passes;
  for (int c = 0; c < 12; ++c) {
    const CallOfAll call = call_of(c % 4 == 3 ? wide : small, 1, c, [c](int) { return 300 * c % 700; });
    passes.push_back(c % 3 ? backward_of(call, c) : PassOfAll{call});
  }
  const PassResults results = run_passes({make_local_group(2)}, passes);
  check(results.ok(), results.errors[0]);
  for (size_t p = 0; p < passes.size() && results.ok(); ++p)
    if (passes[p].backward && !kThreadSanitizer) check_gradients(passes[p], results.of[p], "local group, pass " + std::to_string(p));
}

}  // namespace

int main() {
  run_test("ReferenceIsTheDerivative", reference_is_the_derivative);
  run_test("Gradients", gradients);
  run_test("RanksWithoutTokensOrExperts", ranks_without_tokens_or_experts);
  run_test("BackToBack", back_to_back);
  run_test("EmptyPackets", empty_packets);
  run_test("Straggler", straggler);
  run_test("ManyBlocksAndTiles", many_blocks_and_tiles);
  run_test("ManyWorkersPerRank", many_workers_per_rank);
  run_test("GradientsNotAskedFor", gradients_not_asked_for);
  run_test("KeptSums", kept_sums);
  run_test("SeveralLayersOneGroup", several_layers_one_group);
  run_test("LocalGroupGrows", local_group_grows);
  return finish();
}
