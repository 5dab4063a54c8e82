// Backward calls on the GPU's kernel, on fibers, with the exact engine: each gradient against the chain rule in double
// precision, and its bits under every order of events, number of blocks and, of tokens' gradients, number of ranks.
#include "simt_gradients.h"

namespace {

using namespace flashmoe;
using namespace flashmoe::test;

// Several up tiles, the last a short one, and the same of down and grad tiles.
const LayerShape kSmall{.hidden_size = 72, .intermediate_size = 40, .num_experts = 6, .top_k = 2, .bias = true};

void ranks_and_blocks() {
  const Layer layer(kSmall, 1);
  for (int ep_size : {1, 2, 4}) {
    const BackwardProgram program{backward_of(call_of(layer, std::vector<int>(ep_size, 21), 7), 1)};
    BackwardOutcome first;
    for (int blocks : {1, 2, 3}) {
      const std::string what = std::to_string(ep_size) + " ranks of " + std::to_string(blocks) + " blocks";
      BackwardOutcome o = check_seeds(program, {.blocks_per_rank = blocks}, 3, what);
      if (blocks == 1) first = std::move(o);
      else check(o.of == first.of, what + ": other bits than with one block");
    }
  }
}

void dtypes_activations_and_widths() {
  // Rows of whole pieces of 16 bytes, then of none: of an odd number of elements.
  struct Widths {
    int hidden_size, intermediate_size;
  };
  for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16})
    for (const Widths w : {Widths{40, 72}, {33, 17}})
      for (bool gated : {true, false})
        for (Activation activation : {Activation::kSilu, Activation::kGelu, Activation::kGeluTanh, Activation::kRelu}) {
          if (kAddressSanitizer && int(activation) % 2 != gated) continue;
          const Layer layer({.hidden_size = w.hidden_size, .intermediate_size = w.intermediate_size, .num_experts = 4, .top_k = 2,
                             .gated = gated, .bias = int(activation) % 2 == 0, .dtype = dtype, .activation = activation}, 2);
          check_seeds({backward_of(call_of(layer, {19, 7}, 30), 2)}, {.blocks_per_rank = 2}, 2,
                      std::string(gated ? "gated" : "not gated") + ", dtype " + std::to_string(int(dtype)) + ", activation " +
                          std::to_string(int(activation)) + ", " + std::to_string(w.hidden_size) + " wide");
        }
  for (const Widths w : {Widths{1, 1}, {136, 24}, {6, 102}}) {
    const Layer layer({.hidden_size = w.hidden_size, .intermediate_size = w.intermediate_size, .num_experts = 4, .top_k = 2, .bias = true,
                       .dtype = DType::kBFloat16}, 3);
    check_seeds({backward_of(call_of(layer, {13}, 40), 3)}, {.blocks_per_rank = 2}, 2, std::to_string(w.hidden_size) + " wide");
  }
}

// Sums over several row blocks of an expert, of rows from several sources; dropped pairs, whose gradient is 0.
void skew_and_dropped_pairs() {
  LayerShape shape{.hidden_size = 24, .intermediate_size = 40, .num_experts = 5, .top_k = 4, .bias = true};
  for (DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    shape.dtype = dtype;
    const Layer layer(shape, 4);
    for (Skew skew : {Skew::kOneExpert, Skew::kDropSome, Skew::kZipf})
      check_seeds({backward_of(call_of(layer, {170, 130}, 50, skew), 4)}, {.blocks_per_rank = 2}, 2,
                  "skew " + std::to_string(int(skew)) + ", dtype " + std::to_string(int(dtype)));
    check_seeds({backward_of(call_of(layer, {30, 80, 9, 50}, 60, Skew::kDropSome), 5)}, {.blocks_per_rank = 2}, 2, "four ranks");
  }
}

// And experts that nobody asks for, whose gradients are 0.
void ranks_without_tokens_or_experts() {
  const Layer layer(kSmall, 5);
  for (const std::vector<int>& tokens : {std::vector<int>{0, 9}, {17, 0}, {0, 0}, {0}, {2}, {0, 9, 0, 0}})
    check_seeds({backward_of(call_of(layer, tokens, 90), 6)}, {.blocks_per_rank = 2}, 4, "ranks without tokens");
  CallOfAll call = call_of(layer, {13, 12, 11}, 95);
  call.map = ExpertMap(6, 1);
  check_seeds({backward_of(call, 7)}, {}, 4, "ranks without experts");
}

// A rank goes on to its next call while others still sum over its rows.
void calls_in_a_row() {
  const Layer layer({.hidden_size = 24, .intermediate_size = 40, .num_experts = 6, .top_k = 3}, 6);
  BackwardProgram two, four;
  for (const std::vector<int>& tokens : {std::vector<int>{33, 5}, {0, 40}, {1, 0}, {0, 0}, {12, 12}})
    two.push_back(backward_of(call_of(layer, tokens, 120 + two.size()), 10 + two.size()));
  for (const std::vector<int>& tokens : {std::vector<int>{9, 1, 0, 20}, {0, 0, 3, 0}, {7, 30, 2, 2}})
    four.push_back(backward_of(call_of(layer, tokens, 160 + four.size(), Skew::kZipf), 20 + four.size()));
  two[4].asked = {false, true};
  for (bool back_to_back : {false, true}) {
    check_seeds(two, {.blocks_per_rank = 2}, 6, "two ranks", back_to_back);
    check_seeds(four, {}, 6, "four ranks", back_to_back);
    check_seeds(four, {.last_epoch = kMaxEpoch - 1}, 2, "over the wrap of the epoch", back_to_back);
  }
}

// What one rank asks for is its own matter: it changes no bit of any other gradient.
void gradients_not_asked_for() {
  const Layer layer(kSmall, 7);
  BackwardProgram program{backward_of(call_of(layer, {20, 31, 7}, 70), 30)};
  const BackwardOutcome all = check_seeds(program, {.blocks_per_rank = 2}, 2, "all asked for");
  for (const std::vector<bool>& asked : {std::vector<bool>{false, true, true}, {true, false, false}, {false, false, false}}) {
    program[0].asked = asked;
    const BackwardOutcome some = check_seeds(program, {.blocks_per_rank = 2}, 2, "some asked for");
    bool same = true;
    for (int r = 0; r < 3; ++r)
      for (int i = 0; i < (asked[r] ? kOutputs : kGateUp); ++i) same = same && some.of[0][r][i] == all.of[0][r][i];
    check(same, "what others ask for changes gradients");
  }
}

// A token's gradients are its own: alone or in any company, on any number of ranks.
void bits_of_tokens() {
  for (DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    LayerShape shape = kSmall;
    shape.dtype = dtype;
    const Layer layer(shape, 8);
    const BackwardOfAll whole = backward_of(call_of(layer, {150}, 300, Skew::kOneExpert), 40);
    const auto of_cuts = [&](const std::vector<int>& cuts) {
      BackwardOfAll call{{&layer, {}, equal_blocks(layer.num_experts, int(cuts.size()) - 1)}, {}, std::vector<bool>(cuts.size() - 1, false)};
      const auto part = [](const auto& all, int begin, int end, int each) {
        return std::remove_cvref_t<decltype(all)>(all.begin() + begin * each, all.begin() + end * each);
      };
      const Tokens& all = whole.tokens[0];
      for (size_t r = 0; r + 1 < cuts.size(); ++r) {
        const int begin = cuts[r], end = cuts[r + 1];
        call.tokens.push_back({end - begin, part(all.x, begin, end, layer.hidden_size), part(all.ids, begin, end, layer.top_k),
                               part(all.weights, begin, end, layer.top_k)});
        call.dy.push_back(part(whole.dy[0], begin, end, layer.hidden_size));
      }
      const BackwardOutcome o = run_backward({call}, {.ep_size = int(cuts.size()) - 1}, 5);
      Outputs<float> joined;
      for (const Outputs<float>& of_rank : o.of[0])
        for (Output i : {kX, kTopkWeights}) joined[i].insert(joined[i].end(), of_rank[i].begin(), of_rank[i].end());
      return joined;
    };
    const Outputs<float> together = of_cuts({0, 150});
    check(of_cuts({0, 13, 150}) == together && of_cuts({0, 0, 31, 32, 150}) == together,
          "bits on several ranks, dtype " + std::to_string(int(dtype)));
    bool same = true;
    for (int t = 0; t < 150; t += 30) {
      const Outputs<float> three = of_cuts({t, t + 3});
      for (auto [i, each] : {std::pair{kX, layer.hidden_size}, {kTopkWeights, layer.top_k}})
        same = same && std::equal(three[i].begin(), three[i].end(), together[i].begin() + t * each);
    }
    check(same, "bits of three tokens alone, dtype " + std::to_string(int(dtype)));
  }
}

void bits_under_other_numbers_of_threads() {
  const Layer layer(kSmall, 9);
  const BackwardProgram program{backward_of(call_of(layer, {150, 21}, 400, Skew::kOneExpert), 50)};
  const BackwardOutcome two = check_seeds(program, {}, 1, "two warps");
  check(run_backward<CudaBackwardPlatform, ExactBackwardEngine<4>>(program, {}, 1).of == two.of, "four warps: other bits than with two");
}

}  // namespace

int main() {
  run_test("RanksAndBlocks", ranks_and_blocks);
  run_test("DtypesActivationsAndWidths", dtypes_activations_and_widths);
  run_test("SkewAndDroppedPairs", skew_and_dropped_pairs);
  run_test("RanksWithoutTokensOrExperts", ranks_without_tokens_or_experts);
  run_test("CallsInARow", calls_in_a_row);
  run_test("GradientsNotAskedFor", gradients_not_asked_for);
  run_test("BitsOfTokensDoNotDependOnCompany", bits_of_tokens);
  run_test("BitsUnderOtherNumbersOfThreads", bits_under_other_numbers_of_threads);
  return finish();
}
