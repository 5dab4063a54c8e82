// The GPU's kernel with a fault in it: each must show, as the failure that names it or as what the tests of the sound
// kernel would call wrong.
#include <sys/wait.h>
#include <unistd.h>

#include "simt_programs.h"

namespace {

using namespace flashmoe;
using namespace flashmoe::test;

// Of these seeds at least one must end badly, and none where nothing is planted. Returns what went wrong first.
template <class P, class Group = gpu::Crew<kSimtWarps>>
std::string check_caught_on_seeds(const Program& program, const SimtOptions& options, int seeds, const std::string& plant, bool back_to_back = false) {
  for (int seed = 0; seed < 3; ++seed) {
    const std::string trouble = trouble_of(run_simt(program, options, seed, back_to_back), program);
    check(trouble.empty(), "without a fault, seed " + std::to_string(seed) + ": " + trouble);
  }
  std::string trouble;
  for (int seed = 0; seed < seeds && trouble.empty(); ++seed)
    trouble = trouble_of(run_simt<P, Group>(program, options, seed, back_to_back), program);
  check_caught(!trouble.empty(), plant);
  return trouble;
}

bool all_nan(const std::vector<float>& y) {
  return std::all_of(y.begin(), y.end(), [](float value) { return std::isnan(value); });
}

// The first bad id of a call is told, and its y is NaN. A lone rank goes on to its next call; of several none does.
void bad_ids() {
  for (int64_t id : {int64_t{7}, int64_t{-2}, int64_t{1} << 33})
    for (int seed = 0; seed < 2; ++seed) {
      const std::string what = "bad id " + std::to_string(id) + ", seed " + std::to_string(seed);
      Program program = program_of(1, {90, 20}, 5);
      program[0].tokens[0].ids[2 * 71] = 9;
      program[0].tokens[0].ids[2 * 33 + 1] = id;
      const auto first = SimtOptions{.ep_size = 1};
      const SimtOutcome alone = run_simt({program[0]}, first, seed);
      const Status& s = alone.status[0];
      check(Failure(s.failure) == Failure::kBadId && int64_t(s.seen) == id && s.token == 33 && s.choice == 1, what + ": is told");
      check(alone.misuse.empty() && all_nan(alone.y[0][0]), what + ": y");
      const SimtOutcome both = run_simt(program, first, seed);
      check(both.ok() && relative_error(both.y[1][0], reference_moe(tiny_layer(), program[1].tokens[0])) < tolerance(DType::kFloat32),
            what + ": the next call " + both.misuse);

      program = program_of(2, {20, 20}, 6);
      program[0].tokens[1].ids[5] = id;
      const SimtOutcome o = run_simt(program, {.ep_size = 2, .blocks_per_rank = 2}, seed);
      check(o.misuse.empty() && Failure(o.status[1].failure) == Failure::kBadId && Failure(o.status[0].failure) == Failure::kPeerAborted,
            what + " of one of two ranks " + o.misuse);
      for (const auto& call : o.y)
        for (const auto& y : call) check(all_nan(y), what + ": y of all ranks, now and later");
    }
}

// Rank `from` loses what it sends of one kind to rank 0.
struct Lost {
  static inline Traffic kind;
  static inline int from;
};
struct LosingPlatform : CudaPlatform {
  LosingPlatform(const Call& call, const Peers& peers, const Workspace& ws) : CudaPlatform(call, peers, ws), rank(call.ep_rank) {}
  int rank;
  void commit(int pe, size_t offset, const std::byte* source, size_t bytes, size_t signal, uint64_t word, Traffic kind) {
    if (kind == Lost::kind && rank == Lost::from && pe == 0) return;
    CudaPlatform::commit(pe, offset, source, bytes, signal, word, kind);
  }
};

void lost_signal() {
  for (int ep_size : {2, 4})
    for (auto [kind, phase] : {std::pair{Traffic::kHeader, Phase::kHeader}, {Traffic::kRows, Phase::kChunk}, {Traffic::kResults, Phase::kResults}})
      for (int seed = 0; seed < num_seeds(2); ++seed) {
        Lost::kind = kind, Lost::from = ep_size - 1;
        const Program program = program_of(ep_size, {20, 20}, 3);
        const SimtOutcome o = run_simt<LosingPlatform>(program, {.ep_size = ep_size, .blocks_per_rank = 2}, seed);
        const Status& s = o.status[0];
        const std::string what = "seed " + std::to_string(seed) + ", phase " + std::to_string(int(phase)) + ": failure " +
                                 std::to_string(s.failure) + " of phase " + std::to_string(s.phase) + ", peer " + std::to_string(s.peer);
        check(o.misuse.empty(), what + "; " + o.misuse);
        // Rank 0 finds out by itself, or hears it from one who waits for rank 0 for just that reason.
        const bool own = Failure(s.failure) == Failure::kTimeout && Phase(s.phase) == phase && s.peer == ep_size - 1;
        const bool heard = Failure(s.failure) == Failure::kPeerAborted && abort_origin(s.seen) != 0;
        check(own || (heard && kind != Traffic::kResults), what);
        if (own && kind == Traffic::kResults) check(s.expert >= 0 && s.expert < 6 / ep_size + 1, what + ": expert");
        // Sticky: the second call fails as the first did; and nobody takes y for a result.
        check(std::isnan(o.y[1][0][0]), what + ": y of the next call");
      }
}

// A block that combines long after the call has failed, and after all others have stopped.
struct CombinesLate : ExactEngine<kSimtWarps> {
  template <class Group, class P>
  static void combine(const Group& group, const Context<P>& c, const Work& work) {
    if (group.rank() == 0) {
      while (!P::load_acquire(&c.ws.status->failure)) gpu::sleep_ns(10'000);
      for (int i = 0; i < 1000; ++i) gpu::sleep_ns(100);
    }
    group.sync();
    ExactEngine::combine(group, c, work);
  }
};

void nothing_is_left_of_a_failed_call() {
  const Program program = program_of(1, {10}, 13);
  for (int seed = 0; seed < 4; ++seed) {
    SimtTeam<CudaPlatform, CombinesLate, gpu::Crew<kSimtWarps>> team(program, {.ep_size = 1, .blocks_per_rank = 3});
    const SimtOutcome o = team.run(uint64_t(seed));
    check(o.misuse.empty() && Failure(o.status[0].failure) == Failure::kTimeout, "a call that does not end: " + o.misuse);
    const auto& y = o.y[0][0];
    check(all_nan(y), "y of a failed call, combined late, seed " + std::to_string(seed));
  }
}

// Whoever counts one tile twice hands a row block on while a tile of it is still being computed.
struct MiscountingPlatform : CudaPlatform {
  using CudaPlatform::CudaPlatform;
  static uint32_t fetch_sub(uint32_t* word, uint32_t n) {
    const uint32_t before = CudaPlatform::fetch_sub(word, n);
    return before == 2 ? 1 : before == 1 ? 2 : before;
  }
};

// A block of a single tile would never be handed on: this layer's have two of either kind.
void block_handed_on_early() {
  const Layer layer({.hidden_size = 72, .intermediate_size = 40, .num_experts = 6, .top_k = 2}, 1);
  const std::string trouble =
      check_caught_on_seeds<MiscountingPlatform>(program_of(layer, {{90, 90}}, 5, Skew::kOneExpert), {.blocks_per_rank = 3, .ring_blocks = 2},
                                                 40, "a row block handed on before its last tile");
  check(contains(trouble, "times the tolerance"), "its results are wrong, and not only late: " + trouble);
}

// A source that takes the last call's replies for this one's goes on, and writes over what is still being read.
struct StalePlatform : CudaPlatform {
  using CudaPlatform::CudaPlatform;
  static inline const HeapLayout* layout;
  static inline uint64_t epoch_of_all;
  uint64_t test_signal(size_t offset) const {
    const uint64_t word = CudaPlatform::test_signal(offset);
    const bool reply = offset >= layout->result_signal && offset < layout->header;
    return reply && word ? make_signal(epoch_of_all, signal_payload(word)) : word;
  }
};

void early_reuse() {
  // Epochs 1 and 2; of the second call every reply that was ever there counts.
  const Program program = program_of(2, {40, 40}, 9);
  const HeapLayout layout(limits_of(program, 2));
  StalePlatform::layout = &layout, StalePlatform::epoch_of_all = 2;
  SimtOptions options{.ep_size = 2};
  check_caught_on_seeds<StalePlatform>(program, options, 20, "a source that does not wait for this epoch's replies", true);
}

// The crew's barrier does nothing.
struct CrewThatDoesNotMeet : gpu::Crew<kSimtWarps> {
  static void sync() {}
};

// In a process of its own, for it may follow addresses that nobody has written.
void missing_barrier() {
  const Program program = program_of(1, {20}, 11);
  const int pid = fork();
  if (pid == 0) _exit(trouble_of(run_simt<CudaPlatform, CrewThatDoesNotMeet>(program, {.ep_size = 1}, 1), program).empty() ? 0 : 1);
  int status = 0;
  check(pid > 0 && waitpid(pid, &status, 0) == pid, "a process for the fault");
  check_caught(status != 0, "a crew whose barrier does nothing");
}

}  // namespace

int main() {
  run_test("BadIds", bad_ids);
  run_test("LostSignal", lost_signal);
  run_test("NothingIsLeftOfAFailedCall", nothing_is_left_of_a_failed_call);
  run_test("BlockHandedOnEarly", block_handed_on_early);
  run_test("EarlyReuse", early_reuse);
  run_test("MissingBarrier", missing_barrier);
  return finish();
}
