// Backward calls of the GPU's kernel with Ampere's engine, on fibers: each gradient against the chain rule in double
// precision, its bits under every order of events and number of blocks, and faults planted in the pipeline.
#include "engine/sm80_backward.h"
#include "simt_gradients.h"
#include "sm80_faults.h"

namespace {

using namespace flashmoe;
using namespace flashmoe::test;

// Narrow tiles, so that small layers have several of each kind, and few warps, since each of their threads is a fiber.
template <DType dtype, int kTileN = 64, int kStages = 5, template <int> class PipelineOf = Sm80Pipeline>
using Engine = Sm80BackwardEngine<dtype, kTileN, kStages, PipelineOf>;

template <class E>
BackwardOutcome run_on(const BackwardProgram& program, const SimtOptions& options, uint64_t seed, bool back_to_back = false) {
  return run_backward<CudaBackwardPlatform, E>(program, options, seed, back_to_back);
}

// Neither width a multiple of what a tile covers or a step takes.
template <DType dtype>
void activations_and_biases() {
  for (bool gated : {true, false})
    for (Activation activation : {Activation::kSilu, Activation::kGelu, Activation::kGeluTanh, Activation::kRelu})
      for (bool bias : {true, false}) {
        if (kAddressSanitizer && bias != gated) continue;
        const Layer layer({.hidden_size = 72, .intermediate_size = 40, .num_experts = 4, .top_k = 2, .gated = gated,
                           .bias = bias, .dtype = dtype, .activation = activation}, 2);
        check_seeds<Engine<dtype>>({backward_of(call_of(layer, {19, 7}, 30), 2)}, {}, bias ? 2 : 1,
                                   std::string(gated ? "gated" : "not gated") + (bias ? ", bias" : "") + ", activation " +
                                       std::to_string(int(activation)));
      }
}

void ranks_and_blocks() {
  const Layer layer({.hidden_size = 40, .intermediate_size = 72, .num_experts = 6, .bias = true, .dtype = DType::kBFloat16}, 1);
  for (int ep_size : {1, 2, 4}) {
    const BackwardProgram program{backward_of(call_of(layer, std::vector<int>(ep_size, 21), 7), 1)};
    BackwardOutcome first;
    for (int blocks : {1, 2}) {
      const std::string what = std::to_string(ep_size) + " ranks of " + std::to_string(blocks) + " blocks";
      BackwardOutcome o = check_seeds<Engine<DType::kBFloat16>>(program, {.blocks_per_rank = blocks}, 2, what);
      if (blocks == 1) first = std::move(o);
      else check(o.of == first.of, what + ": other bits than with one block");
    }
  }
}

// The tile that the product has, of several of each kind; sums of hidden columns far beyond the stages; the narrowest.
void tile_shapes() {
  struct Widths {
    int hidden_size, intermediate_size;
    bool gated;
  };
  for (const Widths w : {Widths{136, 152, true}, {264, 40, false}, {8, 8, true}}) {
    const Layer layer({.hidden_size = w.hidden_size, .intermediate_size = w.intermediate_size, .num_experts = 2, .gated = w.gated,
                       .bias = true, .dtype = DType::kBFloat16}, 5);
    const BackwardProgram program{backward_of(call_of(layer, {40, 31}, 70), 3)};
    const std::string what = std::to_string(w.hidden_size) + " by " + std::to_string(w.intermediate_size);
    check_seeds<Engine<DType::kBFloat16, 128>>(program, {}, 1, what);
    check_seeds<Engine<DType::kBFloat16, 64, 3>>(program, {}, 1, what + ", three stages");
  }
}

// Sums over several row blocks of an expert, of rows from several sources; dropped pairs, whose gradient is 0.
template <DType dtype>
void skew_and_dropped_pairs() {
  const Layer layer({.hidden_size = 24, .intermediate_size = 40, .num_experts = 5, .top_k = 4, .bias = true, .dtype = dtype}, 4);
  for (Skew skew : {Skew::kOneExpert, Skew::kDropSome, Skew::kZipf})
    check_seeds<Engine<dtype>>({backward_of(call_of(layer, {170, 130}, 50, skew), 4)}, {.blocks_per_rank = 2}, 1,
                               "skew " + std::to_string(int(skew)));
  check_seeds<Engine<dtype>>({backward_of(call_of(layer, {330}, 50, Skew::kOneExpert), 4)}, {.blocks_per_rank = 2}, 2, "three row blocks");
  check_seeds<Engine<dtype>>({backward_of(call_of(layer, {30, 80, 9, 50}, 60, Skew::kDropSome), 5)}, {}, 1, "four ranks");
}

// And experts that nobody asks for, whose gradients are 0.
void ranks_without_tokens_or_experts() {
  using E = Engine<DType::kFloat16>;
  const Layer layer({.hidden_size = 40, .intermediate_size = 40, .num_experts = 6, .bias = true, .dtype = DType::kFloat16}, 5);
  for (const std::vector<int>& tokens : {std::vector<int>{0, 9}, {17, 0}, {0, 0}, {0}, {2}, {0, 9, 0, 0}})
    check_seeds<E>({backward_of(call_of(layer, tokens, 90), 6)}, {.blocks_per_rank = 2}, 2, "ranks without tokens");
  CallOfAll call = call_of(layer, {13, 12, 11}, 95);
  call.map = ExpertMap(6, 1);
  check_seeds<E>({backward_of(call, 7)}, {}, 2, "ranks without experts");
}

// What one rank asks for is its own matter: it changes no bit of any other gradient. And calls in a row, in which a rank
// goes on while others still sum over its rows.
void gradients_not_asked_for() {
  using E = Engine<DType::kBFloat16>;
  const Layer layer({.hidden_size = 72, .intermediate_size = 40, .num_experts = 6, .bias = true, .dtype = DType::kBFloat16}, 7);
  BackwardProgram program{backward_of(call_of(layer, {20, 31, 7}, 70), 30)};
  const BackwardOutcome all = check_seeds<E>(program, {}, 1, "all asked for");
  for (const std::vector<bool>& asked : {std::vector<bool>{false, true, true}, {false, false, false}}) {
    program[0].asked = asked;
    const BackwardOutcome some = check_seeds<E>(program, {.blocks_per_rank = 2}, 1, "some asked for");
    bool same = true;
    for (int r = 0; r < 3; ++r)
      for (int i = 0; i < (asked[r] ? kOutputs : kGateUp); ++i) same = same && some.of[0][r][i] == all.of[0][r][i];
    check(same, "what others ask for changes gradients");
  }
  program.push_back(backward_of(call_of(layer, {0, 40, 3}, 80), 31));
  program.push_back(backward_of(call_of(layer, {9, 1, 12}, 90), 32));
  check_seeds<E>(program, {}, 2, "calls in a row", true);
}

// A token's gradients are its own: alone or in any company, on any number of ranks.
template <DType dtype>
void bits_of_tokens() {
  const Layer layer({.hidden_size = 72, .intermediate_size = 40, .num_experts = 6, .top_k = 2, .bias = true, .dtype = dtype}, 8);
  const BackwardOfAll whole = backward_of(call_of(layer, {150}, 300, Skew::kOneExpert), 40);
  const auto of_cuts = [&](const std::vector<int>& cuts, const BackwardOfAll& all) {
    const int ranks = int(cuts.size()) - 1;
    BackwardOfAll call{{&layer, {}, equal_blocks(layer.num_experts, ranks)}, {}, std::vector<bool>(ranks, false)};
    const auto part = [](const auto& values, int begin, int end, int each) {
      return std::remove_cvref_t<decltype(values)>(values.begin() + begin * each, values.begin() + end * each);
    };
    const Tokens& t = all.tokens[0];
    for (int r = 0; r < ranks; ++r) {
      const int begin = cuts[r], end = cuts[r + 1];
      call.tokens.push_back({end - begin, part(t.x, begin, end, layer.hidden_size), part(t.ids, begin, end, layer.top_k),
                             part(t.weights, begin, end, layer.top_k)});
      call.dy.push_back(part(all.dy[0], begin, end, layer.hidden_size));
    }
    const BackwardOutcome o = run_on<Engine<dtype>>({call}, {.ep_size = ranks}, 5);
    check(o.ok(), "bits: " + o.misuse);
    Outputs<float> joined;
    for (const Outputs<float>& of_rank : o.of[0])
      for (Output i : {kX, kTopkWeights}) joined[i].insert(joined[i].end(), of_rank[i].begin(), of_rank[i].end());
    return joined;
  };
  const auto same_rows = [&](const Outputs<float>& few, const Outputs<float>& all, int first, int begin, int end) {
    bool same = true;
    for (auto [i, each] : {std::pair{kX, layer.hidden_size}, {kTopkWeights, layer.top_k}})
      same = same && std::equal(few[i].begin() + (begin - first) * each, few[i].begin() + (end - first) * each, all[i].begin() + begin * each);
    return same;
  };
  const Outputs<float> together = of_cuts({0, 150}, whole);
  check(of_cuts({0, 13, 150}, whole) == together && of_cuts({0, 0, 31, 32, 150}, whole) == together, "bits on several ranks");
  for (int t = 0; t < 150; t += 45) check(same_rows(of_cuts({t, t + 3}, whole), together, t, t, t + 3), "bits of three tokens alone");
  BackwardOfAll poisoned = whole;
  for (int t = 1; t < 150; t += 2)
    for (auto* rows : {&poisoned.tokens[0].x, &poisoned.dy[0]}) std::fill_n(rows->begin() + t * layer.hidden_size, layer.hidden_size, NAN);
  const Outputs<float> beside_nan = of_cuts({0, 150}, poisoned);
  for (int t = 0; t < 150; t += 2) check(same_rows(beside_nan, together, 0, t, t + 1), "beside rows that are not numbers");
}

void unfit_calls_are_refused() {
  for (auto [hidden, inner] : {std::pair{36, 40}, {40, 36}}) {
    const Layer layer({.hidden_size = hidden, .intermediate_size = inner, .num_experts = 2, .dtype = DType::kBFloat16}, 7);
    std::string error;
    try {
      run_on<Engine<DType::kBFloat16>>({backward_of(call_of(layer, {3}, 90), 1)}, {.ep_size = 1}, 1);
    } catch (const std::runtime_error& e) {
      error = e.what();
    }
    check(contains(error, "multiple of 16 bytes"), "widths " + std::to_string(hidden) + " and " + std::to_string(inner) + ": " + error);
  }
  const int32_t rank_begin[] = {0, 1};
  alignas(16) std::byte rows[32];
  Call call{};
  call.dtype = DType::kBFloat16, call.hidden_size = call.intermediate_size = 8, call.rank_begin = rank_begin;
  check(why_not_sm80_backward(call).empty(), "a call that fits");
  const Gradients at_odd_places[] = {{rows + 8, {}, {}, {}, {}, {}}, {{}, {}, rows + 8, {}, {}, {}}, {{}, {}, {}, rows + 8, {}, {}},
                                     {{}, {}, {}, {}, rows + 8, {}}, {{}, {}, {}, {}, {}, rows + 8}};
  for (const Gradients& grad : at_odd_places) {
    call.grad = grad;
    check(contains(why_not_sm80_backward(call), "aligned to 16 bytes"), "a gradient at an odd place");
  }
}

// ---- Faults.
// In tiles of one kind alone, so that each kind of tile shows that it would be caught there.
template <WorkKind kKind, template <int> class PipelineOf>
struct FaultIn : Engine<DType::kBFloat16, 64, 4> {
  using Sound = Engine<DType::kBFloat16, 64, 4>;
  using Faulty = Engine<DType::kBFloat16, 64, 4, PipelineOf>;
  static_assert(std::is_same_v<typename Sound::Shared, typename Faulty::Shared>);
  template <class Group, class P>
  static void tile(const Group& group, const Context<P>& c, const TileShape& tiles, const Work& work, typename Sound::Shared& shared) {
    work.kind == kKind ? Faulty::tile(group, c, tiles, work, shared) : Sound::tile(group, c, tiles, work, shared);
  }
};

template <WorkKind kKind, template <int> class PipelineOf>
void check_called(const std::string& plant, int seeds = 6) {
  const Layer layer({.hidden_size = 136, .intermediate_size = 72, .num_experts = 2, .top_k = 1, .dtype = DType::kBFloat16}, 8);
  const BackwardProgram program{backward_of(call_of(layer, {180}, 95, Skew::kOneExpert), 9)};
  const Truth truth = truth_of(program);
  int called = 0;
  for (int seed = 0; seed < seeds && !called; ++seed) {
    const std::string trouble = trouble_of(run_on<FaultIn<kKind, PipelineOf>>(program, {.ep_size = 1}, seed), program, truth);
    const bool named = contains(trouble, "ldmatrix_x4") && contains(trouble, "no wait or barrier between");
    called += named;
    check(trouble.empty() || named, plant + ", seed " + std::to_string(seed) + ", called: " + trouble);
  }
  check_caught(called > 0, plant + ", in tiles of kind " + std::to_string(int(kKind)));
}

template <WorkKind kKind>
void planted_in() {
  check_called<kKind, LateByOne>("a wait for the stage before");
  check_called<kKind, TooFarAhead>("a stage filled while it is read");
  check_called<kKind, NoMeeting>("no meeting after the wait");
}

// Rows scaled twice, or not at all, are no near miss: what keeps the combine from scaling is under test too.
struct ScalesTwice : Engine<DType::kBFloat16> {
  template <class Group, class P>
  static void combine(const Group& group, const Context<P>& c, const Work& work) {
    combine_rows<DType::kBFloat16>(group, c, work);
    take_weight_gradients(group, c, work);
  }
};

void scaled_twice() {
  const Layer layer({.hidden_size = 24, .intermediate_size = 40, .num_experts = 2, .dtype = DType::kBFloat16}, 9);
  const BackwardProgram program{backward_of(call_of(layer, {20}, 97), 9)};
  const std::string trouble = trouble_of(run_on<ScalesTwice>(program, {.ep_size = 1}, 1), program, truth_of(program));
  check_caught(contains(trouble, "the gradient of x"), "rows that are scaled twice: " + trouble);
}

}  // namespace

int main() {
  run_test("BFloat16", activations_and_biases<DType::kBFloat16>);
  run_test("Float16", activations_and_biases<DType::kFloat16>);
  run_test("RanksAndBlocks", ranks_and_blocks);
  run_test("TileShapes", tile_shapes);
  run_test("SkewAndDroppedPairsBFloat16", skew_and_dropped_pairs<DType::kBFloat16>);
  run_test("SkewAndDroppedPairsFloat16", skew_and_dropped_pairs<DType::kFloat16>);
  run_test("RanksWithoutTokensOrExperts", ranks_without_tokens_or_experts);
  run_test("GradientsNotAskedFor", gradients_not_asked_for);
  run_test("BitsOfTokensDoNotDependOnCompany", bits_of_tokens<DType::kBFloat16>);
  run_test("BitsOfTokensInFloat16DoNotEither", bits_of_tokens<DType::kFloat16>);
  run_test("UnfitCallsAreRefused", unfit_calls_are_refused);
  run_test("ScaledTwice", scaled_twice);
  // What broken pipelines do to memory is no matter.
  if constexpr (!kAddressSanitizer) {
    run_test("FaultsPlantedInUpTiles", planted_in<WorkKind::kUpTile>);
    run_test("FaultsPlantedInDownTiles", planted_in<WorkKind::kDownTile>);
    run_test("FaultsPlantedInGradTiles", planted_in<WorkKind::kGradTile>);
  }
  return finish();
}
