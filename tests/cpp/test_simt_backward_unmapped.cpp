// Backward calls of the GPU's kernel among peers whose memory is not mapped, or only some of it: what travels is staged,
// also of more row blocks than the stage holds at one time.
#include "engine/sm80_backward.h"
#include "simt_gradients.h"

namespace {

using namespace flashmoe;
using namespace flashmoe::test;

using Engine = ExactBackwardEngine<kSimtWarps>;

const Layer& tiny_layer() {
  static const Layer layer({.hidden_size = 40, .intermediate_size = 24, .num_experts = 4, .top_k = 2, .bias = true}, 1);
  return layer;
}

// Every seed must end well, and with the bits of ranks that have all memory mapped.
template <class E = Engine>
void check_as_mapped(const BackwardProgram& program, SimtOptions options, int seeds, const std::string& what, bool back_to_back = false) {
  const BackwardOutcome o = check_seeds<E, NvshmemBackwardPlatform>(program, options, seeds, what, back_to_back);
  options.ep_size = int(program[0].tokens.size()), options.mapped_together = 0;
  check(run_backward<CudaBackwardPlatform, E>(program, options, 1).of == o.of, what + ": other bits than among mapped peers");
}

void unmapped_and_mixed_peers() {
  struct Topology {
    int ep_size, mapped_together;
  };
  for (const Topology t : {Topology{2, 1}, {3, 1}, {4, 1}, {3, 2}, {4, 2}, {4, 3}, {2, 2}})
    for (int blocks : {1, 2})
      check_as_mapped({backward_of(call_of(tiny_layer(), std::vector<int>(t.ep_size, 21), 7), 1)},
                      {.blocks_per_rank = blocks, .mapped_together = t.mapped_together}, 4,
                      std::to_string(t.ep_size) + " ranks, " + std::to_string(t.mapped_together) + " together, of " + std::to_string(blocks) + " blocks");
}

// The hidden rows of all blocks stay, while their results take turns on the stage.
void stage_reuse() {
  for (uint32_t ring_blocks : {1u, 2u, 3u})
    for (int mapped_together : {1, 2})
      check_as_mapped({backward_of(call_of(tiny_layer(), {200, 150, 40}, 200, Skew::kOneExpert), 2)},
                      {.blocks_per_rank = 2, .ring_blocks = ring_blocks, .mapped_together = mapped_together}, 3,
                      "a stage of " + std::to_string(ring_blocks) + " blocks");
  // Row blocks in bundles, which want two places at one time.
  check_as_mapped({backward_of(call_of(tiny_layer(), {500, 300}, 210, Skew::kOneExpert), 3)},
                  {.blocks_per_rank = 2, .ring_blocks = 8, .mapped_together = 1}, 2, "a stage of 8 blocks");
}

void calls_in_a_row() {
  BackwardProgram program;
  for (const std::vector<int>& tokens : {std::vector<int>{9, 1, 20}, {0, 3, 0}, {30, 2, 2}, {0, 0, 0}, {1, 1, 40}})
    program.push_back(backward_of(call_of(tiny_layer(), tokens, 140 + program.size(), Skew::kZipf), 4 + program.size()));
  for (bool back_to_back : {false, true})
    for (int mapped_together : {1, 2}) check_as_mapped(program, {.mapped_together = mapped_together}, 5, "calls in a row", back_to_back);
}

void tensor_cores() {
  for (DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    const Layer layer({.hidden_size = 72, .intermediate_size = 40, .num_experts = 4, .top_k = 2, .bias = true, .dtype = dtype}, 2);
    const BackwardProgram program{backward_of(call_of(layer, {90, 30}, 30, Skew::kOneExpert), 9)};
    const SimtOptions options{.blocks_per_rank = 2, .ring_blocks = 2, .mapped_together = 1};
    const std::string what = "dtype " + std::to_string(int(dtype));
    if (dtype == DType::kBFloat16) check_as_mapped<Sm80BackwardEngine<DType::kBFloat16>>(program, options, 1, what);
    else check_as_mapped<Sm80BackwardEngine<DType::kFloat16>>(program, options, 1, what);
  }
}

// A place on the stage is given to the next row block when its results are handed over, and not when they have landed.
struct PlaceGivenEarly : NvshmemBackwardPlatform {
  using NvshmemBackwardPlatform::NvshmemBackwardPlatform;
  void release_when_landed(uint32_t* word, uint32_t value) { store_release(word, value); }
};
// Nobody settles what is on its way.
struct NeverSettled : NvshmemBackwardPlatform {
  using NvshmemBackwardPlatform::NvshmemBackwardPlatform;
  template <class Lanes>
  void settle(const Lanes&, uint32_t, uint32_t) {}
};
void stage_misused() {
  const auto program = [](int num_tokens) {
    return BackwardProgram{backward_of(call_of(tiny_layer(), {num_tokens, num_tokens / 2}, 9, Skew::kOneExpert), 5)};
  };
  check_caught_on_seeds<PlaceGivenEarly, NvshmemBackwardPlatform>(
      program(300), {.blocks_per_rank = 2, .ring_blocks = 1, .mapped_together = 1}, 30, "a place on the stage given away before its rows landed");
  const std::string trouble = check_caught_on_seeds<NeverSettled, NvshmemBackwardPlatform>(
      program(200), {.ring_blocks = 2, .mapped_together = 1}, 3, "a stage that nobody settles");
  check(contains(trouble, "failed"), "the call ends by its deadline: " + trouble);
}

// What a rank says of released segments is a put like any other, and lost ones end the call by name.
struct LosesReleases : NvshmemBackwardPlatform {
  LosesReleases(const Call& call, const Peers& peers, const Workspace& ws) : NvshmemBackwardPlatform(call, peers, ws), rank(call.ep_rank) {}
  int rank;
  void commit(int pe, size_t offset, const std::byte* source, size_t bytes, size_t signal, uint64_t word, Traffic kind) {
    const bool abort = signal < size_t(8 * 2);
    if (kind == Traffic::kSignal && rank == 1 && !abort) return;
    NvshmemBackwardPlatform::commit(pe, offset, source, bytes, signal, word, kind);
  }
};
void lost_release() {
  const BackwardProgram program{backward_of(call_of(tiny_layer(), {20, 20}, 3), 6)};
  for (int seed = 0; seed < 3; ++seed) {
    const BackwardOutcome o = run_backward<LosesReleases>(program, {.ep_size = 2, .mapped_together = 1}, seed);
    const Status& s = o.status[0];
    const std::string what = "seed " + std::to_string(seed) + ": failure " + std::to_string(s.failure) + " of phase " +
                             std::to_string(s.phase) + ", peer " + std::to_string(s.peer) + " " + o.misuse;
    check(Failure(s.failure) == Failure::kTimeout && Phase(s.phase) == Phase::kRelease && s.peer == 1, what);
    for (float value : o.of[0][0][kX]) check(std::isnan(value), what + ": the gradient of x is given up");
  }
}

}  // namespace

int main() {
  run_test("UnmappedAndMixedPeers", unmapped_and_mixed_peers);
  run_test("StageReuse", stage_reuse);
  run_test("CallsInARow", calls_in_a_row);
  run_test("TensorCores", tensor_cores);
  run_test("StageMisused", stage_misused);
  run_test("LostRelease", lost_release);
  return finish();
}
