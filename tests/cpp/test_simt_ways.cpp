// Lanes of a warp that meet must have come the same way: a GPU lets them wait for each other where they stand, while a
// fiber cannot tell one shuffle from the next. This program is compiled so that it can (cmake/tests.cmake), and runs
// each kind of kernel once more.
#include "engine/sm80_backward.h"
#include "engine/sm90.h"
#include "simt_gradients.h"
#include "simt_programs.h"
#include "simt_run.h"

namespace {

using namespace flashmoe;
using namespace flashmoe::test;

void parted_lanes_are_named() {
  check_misuse("lanes shuffle in two places", "different places", 1, 32, 0,
               [] { gpu::lane() < 16 ? gpu::shuffle(1, 0) : gpu::shuffle(2, 0); });
  check_misuse("lanes are broadcast to by two callers", "different places", 1, 32, 0, [] {
    const gpu::Warp lanes;
    if (lanes.rank() == 0) lanes.broadcast(1u);
    else lanes.broadcast(2u);
  });
  check_misuse("a warp at two barriers of the block", "different places", 1, 64, 0, [] {
    if (gpu::lane() == 0) gpu::sync_block();
    else gpu::sync_block();
  });
  check_misuse("a warp at two named barriers", "different places", 1, 64, 0, [] {
    if (gpu::lane() == 0) gpu::named_barrier_sync(1, 64);
    else gpu::named_barrier_sync(1, 64);
  });
  // Warps may come from where they like.
  on_seeds(5, 1, 64, 0, [] {
    if (gpu::warp_in_block() == 0) gpu::sync_block();
    else gpu::sync_block();
    for (int i = 0; i < 3; ++i) gpu::shuffle(i, 0);
  });
}

template <class E, class P>
void forward(const Program& program, SimtOptions options, const std::string& what) {
  options.ep_size = int(program[0].tokens.size());
  for (uint64_t seed = 0; seed < 3; ++seed) {
    SimtTeam<P, E, gpu::Crew<E::kCrewWarps>> team(program, options);
    const std::string trouble = trouble_of(team.run(seed), program);
    check(trouble.empty(), what + ", seed " + std::to_string(seed) + ": " + trouble);
  }
}

const SimtOptions kMapped{.ring_blocks = 2}, kUnmapped{.ring_blocks = 2, .mapped_together = 1};

void forward_calls() {
  const Program exact = program_of(tiny_layer(), {{150, 21}, {0, 9}}, 7, Skew::kOneExpert);
  forward<ExactEngine<kSimtWarps>, CudaPlatform>(exact, kMapped, "exact");
  forward<ExactEngine<kSimtWarps>, NvshmemPlatform>(exact, kUnmapped, "exact, unmapped");
  LayerShape shape{.hidden_size = 72, .intermediate_size = 40, .num_experts = 4, .top_k = 2, .bias = true};
  shape.dtype = DType::kBFloat16;
  const Layer layer(shape, 2);
  const Program program = program_of(layer, {{19, 7}}, 30);
  forward<Sm80Engine<DType::kBFloat16>, CudaPlatform>(program, kMapped, "Ampere's");
  forward<Sm90Wide<DType::kBFloat16>, CudaPlatform>(program, kMapped, "Hopper's, wide");
  forward<Sm90Narrow<DType::kBFloat16>, NvshmemPlatform>(program, kUnmapped, "Hopper's, narrow, unmapped");
}

void backward_calls() {
  LayerShape shape{.hidden_size = 72, .intermediate_size = 40, .num_experts = 4, .top_k = 2, .bias = true};
  for (DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    shape.dtype = dtype;
    const Layer layer(shape, 3);
    const BackwardProgram program{backward_of(call_of(layer, {90, 30}, 30, Skew::kOneExpert), 9)};
    if (dtype == DType::kFloat32) {
      check_seeds(program, kMapped, 3, "exact");
      check_seeds<ExactBackwardEngine<kSimtWarps>, NvshmemBackwardPlatform>(program, kUnmapped, 3, "exact, unmapped");
    } else {
      using Ampere = Sm80BackwardEngine<DType::kBFloat16>;
      check_seeds<Ampere>(program, kMapped, 2, "Ampere's");
      check_seeds<Ampere, NvshmemBackwardPlatform>(program, kUnmapped, 2, "Ampere's, unmapped");
    }
  }
}

// Rank 1 keeps to itself what it has of one kind: the others' agents look for whom they miss until it is too late.
struct Kept {
  static inline Traffic kind;
};
struct KeepingPlatform : CudaBackwardPlatform {
  KeepingPlatform(const Call& call, const Peers& peers, const Workspace& ws)
      : CudaBackwardPlatform(call, peers, ws), rank(call.ep_rank) {}
  int rank;
  void commit(int pe, size_t offset, const std::byte* source, size_t bytes, size_t signal, uint64_t word, Traffic kind) {
    const bool abort = signal < size_t(8 * 2);
    if (kind == Kept::kind && rank == 1 && !abort) return;
    CudaBackwardPlatform::commit(pe, offset, source, bytes, signal, word, kind);
  }
};

void calls_that_fail() {
  const Layer layer({.hidden_size = 24, .intermediate_size = 40, .num_experts = 6, .top_k = 2}, 4);
  for (Traffic kind : {Traffic::kHeader, Traffic::kRows, Traffic::kResults, Traffic::kSignal}) {
    Kept::kind = kind;
    const BackwardProgram program{backward_of(call_of(layer, {5, 5}, 3), 4)};
    const SimtOptions options{.ep_size = 2, .deadlines = {25'000'000, 30'000'000}};
    const BackwardOutcome o = run_backward<KeepingPlatform>(program, options, 1);
    const std::string what = "what rank 1 keeps, kind " + std::to_string(int(kind));
    check(o.misuse.empty(), what + ": " + o.misuse);
    check(Failure(o.status[0].failure) != Failure::kNone, what + ": rank 0 gives up");
  }
}

}  // namespace

int main() {
  run_test("PartedLanesAreNamed", parted_lanes_are_named);
  run_test("ForwardCalls", forward_calls);
  run_test("BackwardCalls", backward_calls);
  run_test("CallsThatFail", calls_that_fail);
  return finish();
}
