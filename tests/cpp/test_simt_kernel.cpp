// The GPU's whole kernel, its own source, on fibers: roles, agent and crew, the exact engine, W virtual ranks as one
// grid; over many seeds against the layer's definition.
#include "simt_programs.h"
#include "simt_run.h"

namespace {

using namespace flashmoe;
using namespace flashmoe::test;

const LayerShape kSmall{.hidden_size = 40, .intermediate_size = 48, .num_experts = 6, .top_k = 2};

// Every seed must end well, and with the bits of the first.
void check_seeds(const Program& program, SimtOptions options, int seeds, const std::string& what, bool back_to_back = false) {
  options.ep_size = int(program[0].tokens.size());
  SimtOutcome first;
  for (int seed = 0; seed < num_seeds(seeds); ++seed) {
    const SimtOutcome o = run_simt(program, options, uint64_t(seed) * 1000, back_to_back);
    const std::string trouble = trouble_of(o, program);
    check(trouble.empty(), what + ", seed " + std::to_string(seed) + ": " + trouble);
    if (seed == 0) first = o;
    check(o.y == first.y, what + ", seed " + std::to_string(seed) + ": other bits than with the first seed");
  }
}

void ranks_and_blocks() {
  const Layer layer(kSmall, 1);
  for (int ep_size : {1, 2, 4})
    for (int blocks : {1, 2, 3})
      check_seeds(program_of(layer, {std::vector<int>(ep_size, 21)}, 7), {.blocks_per_rank = blocks}, 8,
                  std::to_string(ep_size) + " ranks of " + std::to_string(blocks) + " blocks");
}

void dtypes_and_activations() {
  for (DType dtype : {DType::kFloat32, DType::kBFloat16})
    for (bool gated : {true, false})
      for (Activation activation : {Activation::kSilu, Activation::kGelu, Activation::kGeluTanh, Activation::kRelu}) {
        LayerShape shape = kSmall;
        shape.dtype = dtype, shape.gated = gated, shape.activation = activation, shape.bias = int(activation) % 2;
        // Neither width a multiple of what a tile covers or a step takes.
        shape.intermediate_size = 72, shape.hidden_size = 88;
        const Layer layer(shape, 2);
        check_seeds(program_of(layer, {{19, 7}}, 30), {.blocks_per_rank = 2}, 4,
                    std::string(gated ? "gated" : "not gated") + ", dtype " + std::to_string(int(dtype)) + ", activation " + std::to_string(int(activation)));
      }
}

void skew_and_many_experts_per_token() {
  LayerShape shape = kSmall;
  shape.num_experts = 40, shape.top_k = 8;
  const Layer layer(shape, 3);
  for (Skew skew : {Skew::kUniform, Skew::kZipf, Skew::kOneExpert, Skew::kDropSome})
    for (int ep_size : {1, 2, 4})
      check_seeds(program_of(layer, {std::vector<int>(ep_size, 25)}, 50, skew), {.blocks_per_rank = 2}, 2,
                  "skew " + std::to_string(int(skew)) + ", " + std::to_string(ep_size) + " ranks");
}

void empty_ranks() {
  const Layer layer(kSmall, 4);
  for (const std::vector<int>& tokens : {std::vector<int>{0, 30}, {17, 0}, {0, 0}, {0}, {0, 9, 0, 0}, {0, 0, 0, 0}})
    check_seeds(program_of(layer, {tokens}, 90), {.blocks_per_rank = 2}, 10, "ranks without tokens");
  // Ranks without experts.
  Program program = program_of(layer, {{13, 12, 11}}, 95);
  program[0].map = ExpertMap(6, 1);
  check_seeds(program, {}, 10, "ranks without experts");
}

void calls_in_a_row() {
  const Layer layer(kSmall, 5);
  const Program two = program_of(layer, {{33, 5}, {0, 70}, {1, 0}, {0, 0}, {12, 12}, {64, 3}}, 120);
  const Program four = program_of(layer, {{9, 1, 0, 20}, {0, 0, 3, 0}, {7, 30, 2, 2}, {0, 0, 0, 0}, {1, 1, 1, 40}}, 160, Skew::kZipf);
  for (bool back_to_back : {false, true}) {
    check_seeds(two, {.blocks_per_rank = 2}, 8, "two ranks", back_to_back);
    check_seeds(four, {}, 8, "four ranks", back_to_back);
    check_seeds(four, {.last_epoch = kMaxEpoch - 2}, 4, "over the wrap of the epoch", back_to_back);
  }
}

// Far more row blocks than ring slots, several chunks, and runs that cross row blocks.
void ring_reuse() {
  const Layer layer({.hidden_size = 8, .intermediate_size = 72, .num_experts = 4, .top_k = 2}, 6);
  for (uint32_t ring_blocks : {1u, 2u, 3u})
    check_seeds(program_of(layer, {{200, 150}}, 200, Skew::kOneExpert), {.blocks_per_rank = 2, .ring_blocks = ring_blocks}, 4,
                "ring of " + std::to_string(ring_blocks));
  // Row blocks in bundles, which want two slots at one time.
  check_seeds(program_of(layer, {{900, 600}}, 210, Skew::kOneExpert), {.blocks_per_rank = 2, .ring_blocks = 8}, 2, "ring of 8");
}

// A token's bits are its own: alone or in any company, on any number of ranks.
void bits() {
  for (DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    LayerShape shape = kSmall;
    shape.dtype = dtype;
    const Layer layer(shape, 7);
    const Tokens all = draw_tokens(layer, 70, 300);
    auto part = [&](int begin, int end) {
      Tokens t{end - begin, {}, {}, {}};
      t.x.assign(all.x.begin() + begin * layer.hidden_size, all.x.begin() + end * layer.hidden_size);
      t.ids.assign(all.ids.begin() + begin * layer.top_k, all.ids.begin() + end * layer.top_k);
      t.weights.assign(all.weights.begin() + begin * layer.top_k, all.weights.begin() + end * layer.top_k);
      return t;
    };
    auto y_of = [&](const std::vector<int>& cuts) {
      CallOfAll call{&layer, {}, equal_blocks(layer.num_experts, int(cuts.size()) - 1)};
      for (size_t r = 0; r + 1 < cuts.size(); ++r) call.tokens.push_back(part(cuts[r], cuts[r + 1]));
      const SimtOutcome o = run_simt({call}, {.ep_size = int(cuts.size()) - 1}, 5);
      std::vector<float> y;
      for (const auto& rank : o.y[0]) y.insert(y.end(), rank.begin(), rank.end());
      return y;
    };
    const std::vector<float> together = y_of({0, 70});
    check(y_of({0, 13, 70}) == together && y_of({0, 0, 31, 32, 70}) == together, "bits on several ranks, dtype " + std::to_string(int(dtype)));
    bool same = true;
    for (int t = 0; t < 70; t += 3) {
      const std::vector<float> alone = run_simt({{&layer, {part(t, t + 1)}, std::nullopt}}, {.ep_size = 1}, 6).y[0][0];
      same = same && std::equal(alone.begin(), alone.end(), together.begin() + t * layer.hidden_size);
    }
    check(same, "bits of a token alone, dtype " + std::to_string(int(dtype)));
  }
}

// An agent learns that a piece of work is wanted when it has been asked for, and not before.
void work_is_asked_for() {
  int asked_for = 0;  // pieces
  on_seeds(20, 1, 64, sizeof(gpu::WorkRing), [&] {
    auto& ring = *reinterpret_cast<gpu::WorkRing*>(gpu::shared_memory());
    if (gpu::thread_in_block() == 0) ring.init(1), asked_for = 1;
    gpu::sync_block();
    for (int n = 0; n < 6; ++n) {
      if (gpu::warp_in_block() == 1) {
        while (!ring.is_wanted(uint32_t(n))) gpu::sleep_ns(20);
        if (gpu::lane() == 0) expect(asked_for == n + 1);  // who then posts
        while (!ring.post(uint32_t(n), {WorkKind::kUpTile, n, 0})) gpu::sleep_ns(20);
        continue;
      }
      expect(ring.take(uint32_t(n)).index == n);
      if (gpu::lane() == 0) ++asked_for, ring.ask();
    }
  });
}

}  // namespace

int main() {
  run_test("WorkIsAskedFor", work_is_asked_for);
  run_test("RanksAndBlocks", ranks_and_blocks);
  run_test("DtypesAndActivations", dtypes_and_activations);
  run_test("SkewAndManyExpertsPerToken", skew_and_many_experts_per_token);
  run_test("EmptyRanks", empty_ranks);
  run_test("CallsInARow", calls_in_a_row);
  run_test("RingReuse", ring_reuse);
  run_test("BitsDoNotDependOnCompany", bits);
  return finish();
}
