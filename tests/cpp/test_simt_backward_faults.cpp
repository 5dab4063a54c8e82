// Backward calls of the GPU's kernel with a fault in them: each must show, as the failure that names it or as what the
// tests of the sound kernel would call wrong.
#include <sys/wait.h>
#include <unistd.h>

#include "runtime/failure_report.h"
#include "simt_gradients.h"

namespace {

using namespace flashmoe;
using namespace flashmoe::test;

using Engine = ExactBackwardEngine<kSimtWarps>;

// Several tiles of each kind.
const Layer& tiny_layer() {
  static const Layer layer({.hidden_size = 72, .intermediate_size = 70, .num_experts = 4, .top_k = 2, .bias = true}, 1);
  return layer;
}

// num_tokens[call] on each rank
BackwardProgram program_of(int ep_size, const std::vector<int>& num_tokens, Skew skew = Skew::kUniform) {
  BackwardProgram program;
  for (int n : num_tokens) {
    CallOfAll call{&tiny_layer(), {}, equal_blocks(4, ep_size)};
    for (int r = 0; r < ep_size; ++r) call.tokens.push_back(draw_tokens(tiny_layer(), n, 10 * program.size() + r, skew));
    program.push_back(backward_of(call, program.size()));
  }
  return program;
}

// Weight gradients that begin long after all rows have been replied to.
struct GradientsLate : Engine {
  template <class Group, class P>
  static void tile(const Group& group, const Context<P>& c, const TileShape& tiles, const Work& work, Shared& shared) {
    if (work.kind == WorkKind::kGradTile && group.rank() == 0)
      for (int i = 0; i < 100; ++i) gpu::sleep_ns(100);
    group.sync();
    Engine::tile(group, c, tiles, work, shared);
  }
};

// A source that takes every segment for released goes on to its next call, and writes over what is still summed.
struct NeverAwaitsRelease : CudaBackwardPlatform {
  NeverAwaitsRelease(const Call& call, const Peers& peers, const Workspace& ws) : CudaBackwardPlatform(call, peers, ws), epoch(call.epoch) {}
  static inline const HeapLayout* layout;
  uint64_t epoch;
  uint64_t test_signal(size_t offset) const {
    const bool release = offset >= layout->release_signal && offset < layout->header;
    return release ? make_signal(epoch, 0) : CudaBackwardPlatform::test_signal(offset);
  }
};

void release_not_awaited() {
  const BackwardProgram program = program_of(2, {30, 30});
  Limits limits = limits_of({program[0], program[1]}, 2);
  limits.backward = true;
  const HeapLayout layout(limits);
  NeverAwaitsRelease::layout = &layout;
  const std::string trouble = check_caught_on_seeds<NeverAwaitsRelease, CudaBackwardPlatform, GradientsLate>(
      program, {.ep_size = 2}, 20, "a source that does not wait for the release", true);
  check(contains(trouble, "call 0"), "its own rows are summed, and not those of the next call: " + trouble);
}

// Rank 1 says nothing of what it has summed.
struct NeverReleases : CudaBackwardPlatform {
  NeverReleases(const Call& call, const Peers& peers, const Workspace& ws) : CudaBackwardPlatform(call, peers, ws), rank(call.ep_rank) {}
  int rank;
  void commit(int pe, size_t offset, const std::byte* source, size_t bytes, size_t signal, uint64_t word, Traffic kind) {
    const bool abort = signal < size_t(8 * 2);
    if (kind == Traffic::kSignal && rank == 1 && !abort) return;
    CudaBackwardPlatform::commit(pe, offset, source, bytes, signal, word, kind);
  }
};

bool all_nan(const std::vector<float>& values) {
  return std::all_of(values.begin(), values.end(), [](float value) { return std::isnan(value); });
}

// Who waits for it says so, and nobody takes what the failed call left for gradients.
void release_that_never_comes() {
  const BackwardProgram program = program_of(2, {20});
  for (int seed = 0; seed < 4; ++seed) {
    const BackwardOutcome o = run_backward<NeverReleases>(program, {.ep_size = 2, .blocks_per_rank = 2}, seed);
    const Status& s = o.status[0];
    const std::string what = "seed " + std::to_string(seed) + ": failure " + std::to_string(s.failure) + " of phase " +
                             std::to_string(s.phase) + ", peer " + std::to_string(s.peer) + " " + o.misuse;
    check(Failure(s.failure) == Failure::kTimeout && Phase(s.phase) == Phase::kRelease && s.peer == 1 && s.expert >= 0 && s.expert < 2, what);
    for (int i = 0; i < kOutputs; ++i)
      check(!o.of[0][0][i].empty() && all_nan(o.of[0][0][i]), what + ": the gradient of " + name(Output(i)) + " is given up");
  }
}

// More rows than there is memory for end the call of every rank by that name, and no gradient is left; as many as there
// is memory for are served.
void more_rows_than_memory() {
  const BackwardProgram program = program_of(2, {100}, Skew::kOneExpert);
  const Truth truth = truth_of(program);
  const auto rows_of = [&](int rank) {
    std::vector<uint32_t> rows(tiny_layer().num_experts);
    for (const Tokens& t : program[0].tokens)
      for (int32_t id : t.ids)
        if (id >= 0 && id < tiny_layer().num_experts && (*program[0].map)[id] == rank) ++rows[id];
    return rows;
  };
  uint32_t blocks[2] = {}, all = 0;
  for (int rank : {0, 1})
    for (uint32_t rows : rows_of(rank)) blocks[rank] += ceil_div<uint32_t>(rows, kBlockM);
  const int busy = blocks[1] > blocks[0];
  for (uint32_t rows : rows_of(busy)) all += rows;
  check(blocks[busy] > blocks[1 - busy], "one rank has more row blocks than the other");
  SimtOptions options{.ep_size = 2, .blocks_per_rank = 2};
  for (int seed = 0; seed < 12; ++seed) {
    options.ring_blocks = 1 + seed % 4;  // that wait for others to end are not too many
    options.backward_blocks = blocks[busy];
    const std::string trouble = trouble_of(run_backward(program, options, seed), program, truth);
    check(trouble.empty(), "just enough memory, seed " + std::to_string(seed) + ": " + trouble);

    options.backward_blocks = blocks[busy] - 1;
    const BackwardOutcome o = run_backward(program, options, seed);
    const Status &s = o.status[busy], &other = o.status[1 - busy];
    const std::string what = "seed " + std::to_string(seed) + ": failures " + std::to_string(s.failure) + " and " +
                             std::to_string(other.failure) + ", " + std::to_string(s.seen) + " rows " + o.misuse;
    check(Failure(s.failure) == Failure::kNoRoom && s.peer == busy && s.room == options.backward_blocks * kBlockM, what);
    check(s.seen > kBlockM && s.seen <= all, what);
    check(Failure(other.failure) == Failure::kPeerAborted && abort_origin(other.seen) == busy &&
              Failure(abort_failure(other.seen)) == Failure::kNoRoom, what);
    const std::string told = describe_failure(GroupOptions{}, busy, s, "");
    check(contains(told, std::to_string(s.seen) + " rows or more have come to its experts, and a backward call has memory for " +
                             std::to_string(s.room) + " there"), told);
    check(contains(describe_failure(GroupOptions{}, 1 - busy, other, ""), "aborted because of more rows of a backward call"), what);
    for (int rank : {0, 1})
      for (int i = 0; i < kOutputs; ++i) check(all_nan(o.of[0][rank][i]), what + ": the gradient of " + name(Output(i)) + " is given up");
  }
}

// Whoever counts one tile twice hands a row block on while a tile of it is still being computed.
struct MiscountingPlatform : CudaBackwardPlatform {
  using CudaBackwardPlatform::CudaBackwardPlatform;
  static uint32_t fetch_sub(uint32_t* word, uint32_t n) {
    const uint32_t before = CudaBackwardPlatform::fetch_sub(word, n);
    return before == 2 ? 1 : before == 1 ? 2 : before;
  }
};
void block_handed_on_early() {
  const std::string trouble = check_caught_on_seeds<MiscountingPlatform, CudaBackwardPlatform>(
      program_of(2, {60}, Skew::kOneExpert), {.ep_size = 2, .blocks_per_rank = 3}, 40, "a row block handed on before its last tile");
  check(contains(trouble, "the gradient of"), "gradients are wrong: " + trouble);
}

// Sums begin as soon as all headers are known, whether or not the rows have been through their up tiles. Of one rank, so
// that there are no other counters at the same distance.
struct GradientsEarly : CudaBackwardPlatform {
  static inline const uint32_t *ready = nullptr, *rows = nullptr;  // of each expert
  GradientsEarly(const Call& call, const Peers& peers, const Workspace& ws) : CudaBackwardPlatform(call, peers, ws) {
    ready = ws.of_backward(call).blocks_ready, rows = ws.row_offset + call.num_local_experts();
  }
  template <class T>
  static T load_acquire(const T* word) {
    const T value = CudaBackwardPlatform::load_acquire(word);
    if constexpr (sizeof(T) == 4)
      if (word >= ready && word < ready + tiny_layer().num_experts) return ceil_div<uint32_t>(rows[word - ready], kBlockM);
    return value;
  }
};
void gradients_before_their_rows() {
  const std::string trouble = check_caught_on_seeds<GradientsEarly, CudaBackwardPlatform>(
      program_of(1, {100}), {.ep_size = 1, .blocks_per_rank = 3}, 20, "a grad tile that does not wait for its expert's row blocks");
  check(contains(trouble, "_proj") || contains(trouble, "_bias"), "it is the weights' gradients that are wrong: " + trouble);
}

// The crew's barrier does nothing in one kind of tile.
template <WorkKind kKind>
struct DoesNotMeet : Engine {
  template <class Group>
  struct Apart : Group {
    static void sync() {}
  };
  template <class Group, class P>
  static void tile(const Group& group, const Context<P>& c, const TileShape& tiles, const Work& work, Shared& shared) {
    if (work.kind == kKind) return Engine::tile(Apart<Group>{}, c, tiles, work, shared);
    Engine::tile(group, c, tiles, work, shared);
  }
};

// In a process of its own, for it may follow addresses that nobody has written.
template <WorkKind kKind>
bool ends_badly() {
  const BackwardProgram program = program_of(1, {20});
  const Truth truth = truth_of(program);
  const int pid = fork();
  if (pid == 0) {
    const auto o = run_backward<CudaBackwardPlatform, DoesNotMeet<kKind>>(program, {.ep_size = 1}, 1);
    _exit(trouble_of(o, program, truth).empty() ? 0 : 1);
  }
  int status = 0;
  check(pid > 0 && waitpid(pid, &status, 0) == pid, "a process for the fault");
  return status != 0;
}
void missing_barrier() {
  check(!ends_badly<WorkKind::kNone>(), "a crew whose barrier does its work");
  check_caught(ends_badly<WorkKind::kUpTile>(), "a crew whose barrier does nothing in up tiles");
  check_caught(ends_badly<WorkKind::kDownTile>(), "a crew whose barrier does nothing in down tiles");
  check_caught(ends_badly<WorkKind::kGradTile>(), "a crew whose barrier does nothing in grad tiles");
}

}  // namespace

int main() {
  run_test("ReleaseNotAwaited", release_not_awaited);
  run_test("ReleaseThatNeverComes", release_that_never_comes);
  run_test("MoreRowsThanMemory", more_rows_than_memory);
  run_test("BlockHandedOnEarly", block_handed_on_early);
  run_test("GradientsBeforeTheirRows", gradients_before_their_rows);
  run_test("MissingBarrier", missing_barrier);
  return finish();
}
