// The GPU's whole kernel among peers whose memory is not mapped, or only some of it: put-with-signal over a network
// that delays and reorders by seed (gpu/simt_remote.h), one call after another and back to back.
#include "simt_programs.h"

namespace {

using namespace flashmoe;
using namespace flashmoe::test;

// Every seed must end well, and with the bits of ranks that have all memory mapped.
void check_seeds(const Program& program, SimtOptions options, int seeds, const std::string& what, bool back_to_back = false) {
  options.ep_size = int(program[0].tokens.size());
  SimtOptions mapped = options;
  mapped.mapped_together = 0;
  const SimtOutcome by_address = run_simt(program, mapped, 1);
  for (int seed = 0; seed < num_seeds(seeds); ++seed) {
    const SimtOutcome o = run_simt<NvshmemPlatform>(program, options, uint64_t(seed) * 1000, back_to_back);
    const std::string name = what + ", seed " + std::to_string(seed), trouble = trouble_of(o, program);
    check(trouble.empty(), name + ": " + trouble);
    check(o.y == by_address.y, name + ": other bits than among mapped peers");
  }
}

// Of two to four ranks none or some reach each other by address.
struct Topology {
  int ep_size, mapped_together;
  std::string name() const { return std::to_string(ep_size) + " ranks, " + std::to_string(mapped_together) + " together"; }
};
constexpr Topology kTopologies[] = {{2, 1}, {3, 1}, {4, 1}, {3, 2}, {4, 2}, {4, 3}};

void unmapped_and_mixed_peers() {
  for (const Topology& t : kTopologies)
    for (int blocks : {1, 2})
      check_seeds(program_of(tiny_layer(), {std::vector<int>(t.ep_size, 21)}, 7), {.blocks_per_rank = blocks, .mapped_together = t.mapped_together},
                  16, t.name() + " of " + std::to_string(blocks) + " blocks");
}

// All mapped, and yet the kernel for those that are not: nothing is left for the transport.
void mapped_peers() { check_seeds(program_of(tiny_layer(), {{21, 21}}, 8), {.blocks_per_rank = 2, .mapped_together = 2}, 8, "all mapped"); }

void calls_back_to_back() {
  const Program two = program_of(tiny_layer(), {{33, 5}, {0, 70}, {1, 0}, {0, 0}, {12, 12}, {64, 3}}, 120);
  const Program three = program_of(tiny_layer(), {{9, 1, 20}, {0, 3, 0}, {30, 2, 2}, {0, 0, 0}, {1, 1, 40}}, 140, Skew::kZipf);
  const Program four = program_of(tiny_layer(), {{9, 1, 0, 20}, {0, 0, 3, 0}, {7, 30, 2, 2}, {0, 0, 0, 0}, {1, 1, 1, 40}}, 160, Skew::kZipf);
  for (bool back_to_back : {false, true}) {
    check_seeds(two, {.blocks_per_rank = 2, .mapped_together = 1}, 8, "two ranks", back_to_back);
    for (int mapped_together : {1, 2}) {
      check_seeds(three, {.mapped_together = mapped_together}, 8, "three ranks", back_to_back);
      check_seeds(four, {.mapped_together = mapped_together}, 6, "four ranks", back_to_back);
    }
  }
  check_seeds(two, {.last_epoch = kMaxEpoch - 2, .mapped_together = 1}, 4, "over the wrap of the epoch", true);
}

// Far more row blocks than ring slots, each of which stages rows again and again; several chunks; runs that cross blocks.
const Layer& narrow_layer() {
  static const Layer layer({.hidden_size = 8, .intermediate_size = 40, .num_experts = 4, .top_k = 2}, 6);
  return layer;
}
void ring_reuse() {
  for (uint32_t ring_blocks : {1u, 2u, 3u, 5u})
    for (int mapped_together : {1, 2})
      check_seeds(program_of(narrow_layer(), {{200, 150, 40}}, 200, Skew::kOneExpert),
                  {.blocks_per_rank = 2, .ring_blocks = ring_blocks, .mapped_together = mapped_together}, 6,
                  "ring of " + std::to_string(ring_blocks));
  // Row blocks in bundles, which want two slots at one time.
  check_seeds(program_of(narrow_layer(), {{900, 600}}, 210, Skew::kOneExpert), {.blocks_per_rank = 2, .ring_blocks = 8, .mapped_together = 1}, 3,
              "ring of 8");
}

void empty_ranks() {
  for (const std::vector<int>& tokens : {std::vector<int>{0, 30}, {17, 0}, {0, 0}, {0, 9, 0, 0}, {0, 0, 0, 0}})
    check_seeds(program_of(tiny_layer(), {tokens, tokens}, 90), {.blocks_per_rank = 2, .mapped_together = 1}, 8, "ranks without tokens", true);
  Program program = program_of(tiny_layer(), {{13, 12, 11}, {5, 0, 9}}, 95);
  for (CallOfAll& call : program) call.map = ExpertMap(6, 1);
  check_seeds(program, {.mapped_together = 1}, 8, "ranks without experts", true);
}

void dtypes() {
  for (DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    LayerShape shape = tiny_layer();
    shape.dtype = dtype, shape.bias = true;
    const Layer layer(shape, 3);
    check_seeds(program_of(layer, {{19, 7}}, 30), {.blocks_per_rank = 2, .mapped_together = 1}, 4,
                "dtype " + std::to_string(int(dtype)));
  }
}

}  // namespace

int main() {
  run_test("UnmappedAndMixedPeers", unmapped_and_mixed_peers);
  run_test("MappedPeers", mapped_peers);
  run_test("CallsBackToBack", calls_back_to_back);
  run_test("RingReuse", ring_reuse);
  run_test("EmptyRanks", empty_ranks);
  run_test("Dtypes", dtypes);
  return finish();
}
