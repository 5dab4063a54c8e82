// The whole kernel with Ampere's engine, on fibers: against the layer's definition over shapes and seeds, row by row for
// its bits, and with faults planted in the pipeline, each of which must be called by its name.
#include "engine/sm80.h"
#include "simt_team.h"
#include "sm80_faults.h"

namespace {

using namespace flashmoe;
using namespace flashmoe::test;

// Narrow tiles, so that small layers have many of them, and few warps, since each of their threads is a fiber.
template <DType dtype, int kTileN = 64, int kStages = 4, template <int> class PipelineOf = Sm80Pipeline>
SimtOutcome run_on(const Program& program, const SimtOptions& options, uint64_t seed) {
  using Engine = Sm80Engine<dtype, kTileN, kStages, PipelineOf>;
  return SimtTeam<CudaPlatform, Engine, gpu::Crew<Engine::kCrewWarps>>(program, options).run(seed);
}

Program program_of(const Layer& layer, const std::vector<int>& num_tokens, uint64_t seed, Skew skew = Skew::kUniform) {
  Program program{{&layer, {}, equal_blocks(layer.num_experts, int(num_tokens.size()))}};
  for (int n : num_tokens) program[0].tokens.push_back(draw_tokens(layer, n, seed++, skew));
  return program;
}

// tf32 has ten bits of fraction, three more than bf16 and as many as fp16, and its sums are fp32's.
std::string trouble_with(const SimtOutcome& o, const Program& program) {
  const DType dtype = program[0].layer->dtype;
  return trouble_of(o, program, dtype == DType::kFloat32 ? 2e-3 : tolerance(dtype));
}

// Every seed must end well, and with the bits of the first.
template <DType dtype, int kTileN = 64, int kStages = 4>
void check_seeds(const Program& program, SimtOptions options, int seeds, const std::string& what) {
  options.ep_size = int(program[0].tokens.size());
  SimtOutcome first;
  for (int seed = 0; seed < num_seeds(seeds); ++seed) {
    const SimtOutcome o = run_on<dtype, kTileN, kStages>(program, options, uint64_t(seed) * 1000);
    const std::string trouble = trouble_with(o, program);
    check(trouble.empty(), what + ", seed " + std::to_string(seed) + ": " + trouble);
    if (seed == 0) first = o;
    check(o.y == first.y, what + ", seed " + std::to_string(seed) + ": other bits than with the first seed");
  }
}

template <DType dtype>
void dtypes_and_activations() {
  for (bool gated : {true, false})
    for (Activation activation : {Activation::kSilu, Activation::kGelu, Activation::kGeluTanh, Activation::kRelu})
      for (bool bias : {true, false}) {
        if (kAddressSanitizer && bias != gated) continue;
        // Neither width a multiple of what a tile covers or a step takes, and in fp32 not of eight columns.
        const int odd = dtype == DType::kFloat32 ? 4 : 8;
        const Layer layer({.hidden_size = 64 + odd, .intermediate_size = 96 + odd, .num_experts = 4, .top_k = 2, .gated = gated,
                           .bias = bias, .dtype = dtype, .activation = activation}, 2);
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
  const Layer wide({.hidden_size = 20, .intermediate_size = 36, .num_experts = 4}, 4);
  check_seeds<DType::kFloat32>(program_of(wide, {150, 20}, 62, Skew::kOneExpert), {.blocks_per_rank = 2, .ring_blocks = 2}, 1, "full blocks of tf32");
}

// The tile that the product has, and a wider one.
void tile_shapes() {
  const Layer layer({.hidden_size = 136, .intermediate_size = 152, .num_experts = 2, .bias = true, .dtype = DType::kBFloat16}, 5);
  const Program program = program_of(layer, {40, 31}, 70);
  check_seeds<DType::kBFloat16, 128, 6>(program, {}, 2, "128 weight rows a tile");
  check_seeds<DType::kBFloat16, 256, 3>(program, {}, 1, "256");
  const Layer fp32({.hidden_size = 140, .intermediate_size = 148, .num_experts = 2, .bias = true}, 5);
  check_seeds<DType::kFloat32, 128, 6>(program_of(fp32, {40, 31}, 70), {}, 1, "128 of tf32");
}

// A row's bits must not depend on the block's other rows, be they few, many or not numbers.
template <DType dtype>
void bits_do_not_depend_on_company() {
  const Layer layer({.hidden_size = 88, .intermediate_size = 72, .num_experts = 1, .top_k = 1, .dtype = dtype}, 6);
  const Tokens all = draw_tokens(layer, 70, 80);
  const auto y_of = [&](const Tokens& tokens, int begin, int end) {
    Tokens part{end - begin, {}, {}, {}};
    part.x.assign(tokens.x.begin() + begin * layer.hidden_size, tokens.x.begin() + end * layer.hidden_size);
    part.ids.assign(tokens.ids.begin() + begin, tokens.ids.begin() + end);
    part.weights.assign(tokens.weights.begin() + begin, tokens.weights.begin() + end);
    const SimtOutcome o = run_on<dtype>({{&layer, {part}, std::nullopt}}, {.ep_size = 1}, 9);
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
    check(contains(error, "multiple of 16 bytes"), "widths " + std::to_string(hidden) + " and " + std::to_string(inner) + ": " + error);
  }
}

// ---- Faults.
template <template <int> class PipelineOf>
void check_called(const std::string& plant, int seeds = 6) {
  const Layer layer({.hidden_size = 264, .intermediate_size = 40, .num_experts = 2, .dtype = DType::kBFloat16}, 8);
  const Program program = program_of(layer, {40}, 95);
  int called = 0;
  for (int seed = 0; seed < seeds; ++seed) {
    const std::string trouble = trouble_with(run_on<DType::kBFloat16, 64, 4, PipelineOf>(program, {.ep_size = 1}, seed), program);
    const bool named = contains(trouble, "ldmatrix_x4: reads") && contains(trouble, "no wait or barrier between");
    called += named;
    check(trouble.empty() || named, plant + ", seed " + std::to_string(seed) + ", called: " + trouble);
  }
  check_caught(called > 0, plant);
}

void planted_faults() {
  check_called<NoWait>("no wait for the stage");
  check_called<LateByOne>("a wait for the stage before");
  check_called<NoMeeting>("no meeting after the wait");
  check_called<TooFarAhead>("stage filled while it is read");
}

}  // namespace

int main() {
  run_test("BFloat16", dtypes_and_activations<DType::kBFloat16>);
  run_test("Float16", dtypes_and_activations<DType::kFloat16>);
  run_test("Float32AsTf32", dtypes_and_activations<DType::kFloat32>);
  run_test("RanksAndBlocks", ranks_and_blocks);
  run_test("LongSumsAndFullBlocks", long_sums_and_full_blocks);
  run_test("TileShapes", tile_shapes);
  run_test("BitsDoNotDependOnCompany", bits_do_not_depend_on_company<DType::kBFloat16>);
  run_test("BitsOfTf32DoNotDependOnCompany", bits_do_not_depend_on_company<DType::kFloat32>);
  run_test("UnfitWidthsAreRefused", unfit_widths_are_refused);
  // What broken pipelines do to memory is no matter.
  if constexpr (!kAddressSanitizer) run_test("PlantedFaults", planted_faults);
  return finish();
}
