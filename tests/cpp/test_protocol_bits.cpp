// y is the same number for number whatever the ranks, the platform, the workers and the placement, and it is right:
// against a double-precision reference that shares nothing with the product.
#include "team.h"

namespace {

using namespace flashmoe;
using namespace flashmoe::test;

Program one_call(const Layer& layer, const std::vector<int>& num_tokens, uint64_t seed, Skew skew, std::optional<ExpertMap> map = std::nullopt) {
  Program program{{&layer, {}, std::move(map)}};
  for (int n : num_tokens) program[0].tokens.push_back(draw_tokens(layer, n, seed++, skew));
  return program;
}

std::string name(const LayerShape& l) {
  return "activation " + std::to_string(int(l.activation)) + (l.gated ? ", gated" : "") + (l.bias ? ", biases" : "") +
         ", " + std::to_string(dtype_bytes(l.dtype)) + " byte elements";
}

// The same 97 tokens, divided among 1 to 4 ranks in unequal parts: every row keeps its bits.
void bits_do_not_depend_on_w() {
  for (DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    const Layer layer({.hidden_size = 48, .intermediate_size = 32, .num_experts = 12, .top_k = 3, .dtype = dtype}, 1);
    const Tokens all = draw_tokens(layer, 97, 5, Skew::kZipf);
    const std::vector<std::vector<int>> divisions = {{97}, {60, 37}, {0, 97}, {1, 90, 6}, {13, 0, 80, 4}};
    std::vector<std::byte> first;
    for (const std::vector<int>& division : divisions) {
      Program program{{&layer, {}, std::nullopt}};
      size_t begin = 0;
      for (int n : division) {
        auto part = [&](const auto& v, size_t width) { return std::decay_t<decltype(v)>(v.begin() + begin * width, v.begin() + (begin + n) * width); };
        program[0].tokens.push_back({n, part(all.x, layer.hidden_size), part(all.ids, 3), part(all.weights, 3)});
        begin += n;
      }
      for (int workers : {1, 2})
        for (bool remote : {false, true}) {
          TeamOptions options{.ep_size = int(division.size()), .num_workers = workers};
          if (remote) options.remote_only_seed = 3;
          const Results results = run_program(make_team(program, options), program);
          check(results.ok(), "no error");
          check_against_reference(results, program, "divided among " + std::to_string(division.size()));
          std::vector<std::byte> y;
          for (const auto& part : results.y[0]) y.insert(y.end(), part.begin(), part.end());
          if (first.empty()) first = y;
          check(y == first, "bits with " + std::to_string(division.size()) + " ranks of " + std::to_string(workers) + " workers" +
                                (remote ? ", remote" : ", mapped"));
        }
    }
  }
}

void every_layer_kind() {
  for (DType dtype : {DType::kFloat32, DType::kBFloat16})
    for (Activation activation : {Activation::kSilu, Activation::kGelu, Activation::kGeluTanh, Activation::kRelu})
      for (bool gated : {false, true})
        for (bool bias : {false, true}) {
          const Layer layer({.hidden_size = 32, .intermediate_size = 16, .num_experts = 4, .top_k = 2, .gated = gated, .bias = bias,
                             .dtype = dtype, .activation = activation}, 2);
          check_program(one_call(layer, {20, 9}, 3, Skew::kUniform), {.ep_size = 2}, name(layer));
        }
}

// Owners that a hash might have drawn: uneven, scattered, and different at every size.
void uneven_placement() {
  const Layer layer({.hidden_size = 32, .intermediate_size = 32, .num_experts = 11, .top_k = 4}, 4);
  for (int ep_size : {2, 3, 4})
    for (uint64_t seed : {1, 2, 3}) {
      ExpertMap map;
      for (int e = 0; e < 11; ++e) map.push_back(int32_t((seed * 2654435761u + e * e * 40503u) >> 7) % ep_size);
      for (int32_t& owner : map) owner = (owner + ep_size) % ep_size;
      const Program program = one_call(layer, std::vector<int>(ep_size, 50 + int(seed)), seed, Skew::kZipf, map);
      check_program(program, {.ep_size = ep_size}, "uneven placement, mapped");
      check_program(program, {.ep_size = ep_size, .remote_only_seed = seed}, "uneven placement, remote");
    }
}

void rank_with_no_expert() {
  for (bool bias : {false, true}) {
    const Layer layer({.hidden_size = 16, .intermediate_size = 16, .num_experts = 3, .top_k = 2, .bias = bias}, 5);
    for (const ExpertMap& map : {ExpertMap{0, 0, 0}, ExpertMap{1, 1, 1}, ExpertMap{2, 0, 2}})
      for (const std::vector<int>& tokens : {std::vector<int>{30, 20, 10}, {0, 40, 0}, {70, 0, 0}, {0, 0, 0}}) {
        check_program(one_call(layer, tokens, 6, Skew::kUniform, map), {.ep_size = 3}, "a rank with no expert");
        check_program(one_call(layer, tokens, 6, Skew::kUniform, map), {.ep_size = 3, .remote_only_seed = 4}, "a rank with no expert, remote");
      }
  }
}

// Ids of -1 and of num_experts add nothing, and a token with none left is zero; so is y where everything was dropped.
void dropped_tokens() {
  const Layer layer({.hidden_size = 16, .intermediate_size = 16, .num_experts = 6, .top_k = 3}, 7);
  Program program = one_call(layer, {60, 45}, 8, Skew::kDropSome);
  Tokens& t = program[0].tokens[0];
  for (int j = 0; j < 3; ++j) t.ids[j] = -1, t.ids[3 + j] = 6;
  check_program(program, {.ep_size = 2}, "dropped tokens");
  const Results results = run_program(make_team(program, {.ep_size = 2}), program);
  const std::vector<float> y = decode(results.y[0][0], layer.dtype);
  bool zero = true, other = false;
  for (int i = 0; i < 2 * 16; ++i) zero = zero && y[i] == 0;
  for (float v : y) other = other || v != 0;
  check(zero && other, "a token whose experts were all dropped is zero, others are not");

  for (Tokens& all : program[0].tokens) all.ids.assign(all.ids.size(), -1);
  check_program(program, {.ep_size = 2}, "everything dropped");
}

// The same expert named twice by one token counts twice.
void expert_named_twice() {
  const Layer layer({.hidden_size = 16, .intermediate_size = 16, .num_experts = 2, .top_k = 4}, 9);
  check_program(one_call(layer, {80, 30}, 10, Skew::kOneExpert), {.ep_size = 2}, "top_k above num_experts");
}

// What the checks above would say of rows in a wrong place.
void can_fail() {
  const Layer layer({.hidden_size = 16, .intermediate_size = 16, .num_experts = 4, .top_k = 2}, 11);
  Program program = one_call(layer, {20, 20}, 12, Skew::kUniform);
  Results results = run_program(make_team(program, {.ep_size = 2}), program);
  std::vector<float> y = decode(results.y[0][1], layer.dtype);
  std::swap_ranges(y.begin(), y.begin() + 16, y.begin() + 16);
  check_caught(relative_error(y, reference_moe(layer, program[0].tokens[1])) > 1000 * tolerance(layer.dtype), "two rows swapped");
  results.y[0][1][0] ^= std::byte{1};
  check_caught(!same_bits(results, run_alone(program)), "one bit flipped");
}

}  // namespace

int main() {
  run_test("BitsDoNotDependOnW", bits_do_not_depend_on_w);
  run_test("EveryLayerKind", every_layer_kind);
  run_test("UnevenPlacement", uneven_placement);
  run_test("RankWithNoExpert", rank_with_no_expert);
  run_test("DroppedTokens", dropped_tokens);
  run_test("ExpertNamedTwice", expert_named_twice);
  run_test("WrongRowsAreSeen", can_fail);
  return finish();
}
