// The whole kernel with the Hopper engine, on fibers: against the layer's definition over shapes and seeds, row by row
// for its bits, and with faults planted in the pipeline, each of which must be called by its name.
#include "engine/sm90.h"
#include "simt_team.h"

namespace {

using namespace flashmoe;
using namespace flashmoe::test;

// Narrow tiles, so that small layers have many of them.
template <DType dtype, int kTileN = 64, int kStages = 4, int kMathGroups = 2, template <int, int, int> class PipelineOf = Sm90Pipeline>
SimtOutcome run_on(const Program& program, const SimtOptions& options, uint64_t seed) {
  using Engine = Sm90Engine<dtype, kTileN, kStages, kMathGroups, PipelineOf>;
  return SimtTeam<CudaPlatform, Engine, gpu::Crew<Engine::kCrewWarps>>(program, options).run(seed);
}

Program program_of(const Layer& layer, const std::vector<int>& num_tokens, uint64_t seed, Skew skew = Skew::kUniform) {
  Program program{{&layer, {}, equal_blocks(layer.num_experts, int(num_tokens.size()))}};
  for (int n : num_tokens) program[0].tokens.push_back(draw_tokens(layer, n, seed++, skew));
  return program;
}

// Every seed must end well, and with the bits of the first.
template <DType dtype, int kTileN = 64, int kStages = 4, int kMathGroups = 2>
SimtOutcome check_seeds(const Program& program, SimtOptions options, int seeds, const std::string& what) {
  options.ep_size = int(program[0].tokens.size());
  SimtOutcome first;
  for (int seed = 0; seed < num_seeds(seeds); ++seed) {
    const SimtOutcome o = run_on<dtype, kTileN, kStages, kMathGroups>(program, options, uint64_t(seed) * 1000);
    const std::string trouble = trouble_of(o, program);
    check(trouble.empty(), what + ", seed " + std::to_string(seed) + ": " + trouble);
    if (seed == 0) first = o;
    check(o.y == first.y, what + ", seed " + std::to_string(seed) + ": other bits than with the first seed");
  }
  return first;
}

template <DType dtype>
void dtypes_and_activations() {
  for (bool gated : {true, false})
    for (Activation activation : {Activation::kSilu, Activation::kGelu, Activation::kGeluTanh, Activation::kRelu}) {
      // Neither width a multiple of what a tile covers or a step takes; biases with every second.
      const Layer layer({.hidden_size = 72, .intermediate_size = 104, .num_experts = 4, .top_k = 2, .gated = gated,
                         .bias = int(activation) % 2 == int(gated), .dtype = dtype, .activation = activation}, 2);
      check_seeds<dtype>(program_of(layer, {19, 7}, 30), {}, 2,
                         std::string(gated ? "gated" : "not gated") + ", activation " + std::to_string(int(activation)));
    }
}

void ranks_and_blocks() {
  const Layer layer({.hidden_size = 40, .intermediate_size = 48, .num_experts = 6, .bias = true, .dtype = DType::kBFloat16}, 1);
  for (int ep_size : {1, 2})
    for (int blocks : {1, 2})
      check_seeds<DType::kBFloat16>(program_of(layer, std::vector<int>(ep_size, 21), 7), {.blocks_per_rank = blocks}, 5,
                                    std::to_string(ep_size) + " ranks of " + std::to_string(blocks) + " blocks");
}

// Steps far beyond the stages; blocks full and not, more of them than ring slots.
void long_sums_and_full_blocks() {
  const Layer deep({.hidden_size = 520, .intermediate_size = 328, .num_experts = 2, .top_k = 1, .dtype = DType::kFloat16}, 3);
  check_seeds<DType::kFloat16>(program_of(deep, {9, 6}, 60), {}, 2, "deep");
  const Layer flat({.hidden_size = 24, .intermediate_size = 40, .num_experts = 4, .dtype = DType::kBFloat16}, 4);
  check_seeds<DType::kBFloat16>(program_of(flat, {150, 20}, 61, Skew::kOneExpert), {.blocks_per_rank = 2, .ring_blocks = 2}, 2, "full blocks");
}

// The tiles that the product has.
void tile_shapes() {
  const Layer layer({.hidden_size = 136, .intermediate_size = 152, .num_experts = 2, .bias = true, .dtype = DType::kBFloat16}, 5);
  const Program program = program_of(layer, {40, 31}, 70);
  check_seeds<DType::kBFloat16, 256>(program, {}, 2, "256 weight rows a tile");
  check_seeds<DType::kBFloat16, 192>(program, {}, 1, "192");
  check_seeds<DType::kBFloat16, 128, 6>(program, {}, 1, "128");
}

// The tiles for few rows: in one pass, in two where a block has more, and with the bits of the wide ones.
void narrow_and_wide() {
  const Layer layer({.hidden_size = 200, .intermediate_size = 136, .num_experts = 3, .bias = true, .dtype = DType::kBFloat16}, 9);
  for (int num_tokens : {1, 9, 97}) {
    const Program program = program_of(layer, {num_tokens, 5}, 100, Skew::kOneExpert);
    const std::string what = std::to_string(num_tokens) + " tokens";
    const SimtOutcome narrow = check_seeds<DType::kBFloat16, 64, 13, 1>(program, {.blocks_per_rank = 2}, 2, "narrow, " + what);
    const SimtOutcome wide = check_seeds<DType::kBFloat16, 256>(program, {}, 1, "wide, " + what);
    check(narrow.y == wide.y, "narrow and wide, bits of " + what);
  }
}

// A row's bits must not depend on the block's other rows, be they few, many or not numbers.
void bits_do_not_depend_on_company() {
  const Layer layer({.hidden_size = 88, .intermediate_size = 72, .num_experts = 1, .top_k = 1, .dtype = DType::kBFloat16}, 6);
  const Tokens all = draw_tokens(layer, 70, 80);
  const auto y_of = [&](const Tokens& tokens, int begin, int end) {
    Tokens part{end - begin, {}, {}, {}};
    part.x.assign(tokens.x.begin() + begin * layer.hidden_size, tokens.x.begin() + end * layer.hidden_size);
    part.ids.assign(tokens.ids.begin() + begin, tokens.ids.begin() + end);
    part.weights.assign(tokens.weights.begin() + begin, tokens.weights.begin() + end);
    const SimtOutcome o = run_on<DType::kBFloat16>({{&layer, {part}, std::nullopt}}, {.ep_size = 1}, 9);
    check(o.ok(), "bits: " + o.misuse);
    return o.y[0][0];
  };
  const auto equal_rows = [&](const std::vector<float>& rows, const std::vector<float>& of_all, int begin) {
    return std::equal(rows.begin(), rows.end(), of_all.begin() + begin * layer.hidden_size);
  };
  const std::vector<float> together = y_of(all, 0, 70);
  for (int begin : {0, 5, 30, 63, 64, 69}) check(equal_rows(y_of(all, begin, begin + 1), together, begin), "alone, row " + std::to_string(begin));
  check(equal_rows(y_of(all, 3, 50), together, 3), "shifted within the block");
  Tokens poisoned = all;
  for (int t = 1; t < 70; t += 2) std::fill_n(poisoned.x.begin() + t * layer.hidden_size, layer.hidden_size, NAN);
  const std::vector<float> beside_nan = y_of(poisoned, 0, 70);
  for (int t = 0; t < 70; t += 2)
    check(std::equal(together.begin() + t * layer.hidden_size, together.begin() + (t + 1) * layer.hidden_size,
                     beside_nan.begin() + t * layer.hidden_size), "beside rows that are not numbers, row " + std::to_string(t));
}

void unfit_widths_are_refused() {
  for (auto [hidden, inner] : {std::pair{36, 40}, {40, 36}}) {
    const Layer layer({.hidden_size = hidden, .intermediate_size = inner, .num_experts = 2, .dtype = DType::kBFloat16}, 7);
    std::string error;
    try {
      run_on<DType::kBFloat16>(program_of(layer, {3}, 90), {.ep_size = 1}, 1);
    } catch (const std::runtime_error& e) {
      error = e.what();
    }
    check(error.find("multiple of 16 bytes") != std::string::npos, "widths " + std::to_string(hidden) + " and " + std::to_string(inner) + ": " + error);
  }
}

// ---- Faults.
template <int kStages, int kGatherWarps, int kMathWarps>
struct OtherParity : Sm90Pipeline<kStages, kGatherWarps, kMathWarps> {
  using Base = Sm90Pipeline<kStages, kGatherWarps, kMathWarps>;
  void wait_full(typename Base::Turn turn) { turn.parity ^= 1, Base::wait_full(turn); }
};
template <int kStages, int kGatherWarps, int kMathWarps>
struct NoWaitForEmpty : Sm90Pipeline<kStages, kGatherWarps, kMathWarps> {
  void wait_empty(const Sm90Turn<kStages>&) {}
};
// Lets go of a stage with the products that read it still in flight.
template <int kStages, int kGatherWarps, int kMathWarps>
struct SumsTooEarly : Sm90Pipeline<kStages, kGatherWarps, kMathWarps> {
  template <class Sums>
  static void wait_products(Sums&) {}
};
template <int kStages, int kGatherWarps, int kMathWarps>
struct NoFence : Sm90Pipeline<kStages, kGatherWarps, kMathWarps> {
  using Base = Sm90Pipeline<kStages, kGatherWarps, kMathWarps>;
  void rows_are_here(const typename Base::Turn& turn) {
    gpu::sync_warp();
    if (gpu::lane() == 0) this->full_[turn.stage].arrive();
  }
};

// One table of result rows, which the next tile's rows overwrite while this tile's are stored.
template <int kStages, int kGatherWarps, int kMathWarps>
struct OneTable : Sm90Pipeline<kStages, kGatherWarps, kMathWarps> {
  static uint32_t table_of(uint32_t) { return 0; }
};

template <template <int, int, int> class PipelineOf>
void check_called(const std::string& plant, const std::vector<std::string>& names, int seeds = 6) {
  const Layer layer({.hidden_size = 264, .intermediate_size = 40, .num_experts = 2, .dtype = DType::kBFloat16}, 8);
  const Program program = program_of(layer, {12}, 95);
  int called = 0;
  for (int seed = 0; seed < seeds; ++seed) {
    const std::string trouble = trouble_of(run_on<DType::kBFloat16, 64, 4, 2, PipelineOf>(program, {.ep_size = 1}, seed), program);
    const bool named = std::any_of(names.begin(), names.end(), [&](const std::string& name) { return trouble.find(name) != std::string::npos; });
    called += named;
    check(trouble.empty() || named, plant + ", seed " + std::to_string(seed) + ", called: " + trouble);
  }
  check_caught(called > 0, plant);
}

void planted_faults() {
  check_called<OtherParity>("wrong parity of a phase", {"wgmma: reads"});
  check_called<NoFence>("no fence after the gather", {"no fence_async_shared between"});
  check_called<NoWaitForEmpty>("stage used again before the math let go of it", {"which a wgmma that nobody waited for reads", "no wait or barrier between", "more arrivals at"});
  check_called<SumsTooEarly>("sums taken before wgmma_wait", {"times the tolerance", "accumulators were", "which a wgmma that nobody waited for reads"});
  check_called<OneTable>("result rows of the next tile over those of this one", {"times the tolerance"});
}

}  // namespace

int main() {
  run_test("BFloat16", dtypes_and_activations<DType::kBFloat16>);
  run_test("Float16", dtypes_and_activations<DType::kFloat16>);
  run_test("RanksAndBlocks", ranks_and_blocks);
  run_test("LongSumsAndFullBlocks", long_sums_and_full_blocks);
  run_test("TileShapes", tile_shapes);
  run_test("NarrowAndWide", narrow_and_wide);
  run_test("BitsDoNotDependOnCompany", bits_do_not_depend_on_company);
  run_test("UnfitWidthsAreRefused", unfit_widths_are_refused);
  // What broken pipelines do to memory is no matter.
  if constexpr (!kAddressSanitizer) run_test("PlantedFaults", planted_faults);
  return finish();
}
