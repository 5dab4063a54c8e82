// The GPU's kernel among peers whose memory is not mapped, with a fault in how it uses the transport: each must show.
// And failures: whoever gives up tells the others, mapped or not.
#include "simt_programs.h"

namespace {

using namespace flashmoe;
using namespace flashmoe::test;

// Of these seeds at least one must end badly, and none where nothing is planted.
template <class P>
void check_caught_on_seeds(const Program& program, SimtOptions options, int seeds, const std::string& plant, bool back_to_back = false) {
  options.ep_size = int(program[0].tokens.size()), options.mapped_together = 1;
  for (int seed = 0; seed < 3; ++seed) {
    const std::string trouble = trouble_of(run_simt<NvshmemPlatform>(program, options, seed, back_to_back), program);
    check(trouble.empty(), "without a fault, seed " + std::to_string(seed) + ": " + trouble);
  }
  int seed = 0;
  while (seed < seeds && trouble_of(run_simt<P>(program, options, seed, back_to_back), program).empty()) ++seed;
  check_caught(seed < seeds, plant);
}

// Rank by rank what commit() needs to misuse the transport.
struct FaultyPlatform : NvshmemPlatform {
  FaultyPlatform(const Call& call, const Peers& p, const Workspace& ws) : NvshmemPlatform(call, p, ws), rank(call.ep_rank), peers(p) {}
  int rank;
  const Peers& peers;
  uint64_t* signal_at(int pe, size_t signal) const { return reinterpret_cast<uint64_t*>(peers.symmetric[pe] + signal); }
};

// Payload and signal as two puts, between which there is no order.
template <Traffic kFaulty>
struct SignalBeforePayload : FaultyPlatform {
  using FaultyPlatform::FaultyPlatform;
  void commit(int pe, size_t offset, const std::byte* source, size_t bytes, size_t signal, uint64_t word, Traffic kind) {
    if (kind != kFaulty || bytes == 0 || pe == rank) return FaultyPlatform::commit(pe, offset, source, bytes, signal, word, kind);
    uint64_t* unread = signal_at(pe, HeapLayout::kAlign - sizeof word);  // of the abort words, behind the last one
    gpu::remote_put_signal(peers.pes[rank], peers.pes[pe], peers.symmetric[pe] + offset, source, bytes, unread, 1);
    FaultyPlatform::commit(pe, 0, nullptr, 0, signal, word, kind);
  }
};

void signal_before_payload() {
  for (int ep_size : {2, 3}) {
    const Program program = program_of(ep_size, {70, 20}, 5, Skew::kZipf);
    check_caught_on_seeds<SignalBeforePayload<Traffic::kRows>>(program, {}, 20, "token rows after their signal");
    check_caught_on_seeds<SignalBeforePayload<Traffic::kResults>>(program, {}, 20, "results after their signal");
  }
}

// The word is read as any word: nothing makes what came before it visible.
struct SignalReadAsAnyWord : NvshmemPlatform {
  using NvshmemPlatform::NvshmemPlatform;
  uint64_t test_signal(size_t offset) const { return CudaPlatform::test_signal(offset); }
};

void signal_read_without_the_transport() {
  check_caught_on_seeds<SignalReadAsAnyWord>(program_of(2, {70, 20}, 5, Skew::kZipf), {}, 20, "a signal read without the transport's test");
}

// A ring slot comes free when its results are handed over, and not when they have landed.
struct SlotFreedEarly : NvshmemPlatform {
  using NvshmemPlatform::NvshmemPlatform;
  void release_when_landed(uint32_t* word, uint32_t value) { store_release(word, value); }
};
// The scheduler's question is answered at once.
struct SettledAtOnce : NvshmemPlatform {
  using NvshmemPlatform::NvshmemPlatform;
  SettledAtOnce(const Call& call, const Peers& peers, const Workspace& workspace)
      : NvshmemPlatform(call, peers, workspace), ws(workspace) {}
  const Workspace& ws;
  template <class Lanes>
  void settle(const Lanes& lanes, uint32_t, uint32_t) {
    for (uint32_t s = lanes.rank(); s < ws.ring_blocks; s += lanes.size()) {
      const uint32_t sent = load_acquire(&ws.ring_sent[s]);
      if (int32_t(sent - load_acquire(&ws.ring_free[s])) > 0) store_release(&ws.ring_free[s], sent);
    }
  }
};

void stage_reused_before_landing() {
  const Program program = program_of(2, {400, 300}, 9, Skew::kOneExpert);
  const SimtOptions options{.blocks_per_rank = 2, .ring_blocks = 1};
  check_caught_on_seeds<SlotFreedEarly>(program, options, 30, "a ring slot released before its rows landed");
  check_caught_on_seeds<SettledAtOnce>(program, options, 60, "a landing taken for granted");
}

// Nobody settles what is on its way.
struct NeverSettled : NvshmemPlatform {
  using NvshmemPlatform::NvshmemPlatform;
  template <class Lanes>
  void settle(const Lanes&, uint32_t, uint32_t) {}
};
// Settles only what the next row block waits for, where a bundle wants more slots than that.
struct SettledForOneBlock : NvshmemPlatform {
  using NvshmemPlatform::NvshmemPlatform;
  template <class Lanes>
  void settle(const Lanes& lanes, uint32_t first, uint32_t) {
    NvshmemPlatform::settle(lanes, first, 1);
  }
};
void nobody_asks() {
  check_caught_on_seeds<NeverSettled>(program_of(2, {400}, 9, Skew::kOneExpert), {.ring_blocks = 2}, 3, "a ring that nobody settles");
  check_caught_on_seeds<SettledForOneBlock>(program_of(2, {1900}, 9, Skew::kOneExpert), {.ring_blocks = 8}, 10, "a slot that nobody settles");
}

// Rank 2 loses what it sends of one kind to rank 0.
struct Lost {
  static inline Traffic kind;
};
struct LosingPlatform : FaultyPlatform {
  using FaultyPlatform::FaultyPlatform;
  void commit(int pe, size_t offset, const std::byte* source, size_t bytes, size_t signal, uint64_t word, Traffic kind) {
    if (kind == Lost::kind && rank == 2 && pe == 0) return;
    FaultyPlatform::commit(pe, offset, source, bytes, signal, word, kind);
  }
};

// Rank 0 finds out by itself, or hears it from one who waits for rank 0 for just that reason; then all know.
void lost_signal() {
  for (int mapped_together : {1, 2})
    for (auto [kind, phase] : {std::pair{Traffic::kHeader, Phase::kHeader}, {Traffic::kRows, Phase::kChunk}, {Traffic::kResults, Phase::kResults}}) {
      Lost::kind = kind;
      const SimtOutcome o = run_simt<LosingPlatform>(program_of(3, {20, 20}, 3), {.ep_size = 3, .blocks_per_rank = 2, .mapped_together = mapped_together}, 1);
      const Status& s = o.status[0];
      const std::string what = std::to_string(mapped_together) + " together, phase " + std::to_string(int(phase)) + ": failure " +
                               std::to_string(s.failure) + " of phase " + std::to_string(s.phase) + ", peer " + std::to_string(s.peer);
      check(o.misuse.empty(), what + "; " + o.misuse);
      const bool own = Failure(s.failure) == Failure::kTimeout && Phase(s.phase) == phase && s.peer == 2;
      const bool heard = Failure(s.failure) == Failure::kPeerAborted && abort_origin(s.seen) != 0;
      check(own || (heard && kind != Traffic::kResults), what);
      for (const Status& status : o.status) check(status.failure != 0, what + ": all ranks know");
      check(std::isnan(o.y[1][0][0]), what + ": y of the next call");
    }
}

// A bad id on one rank reaches those who cannot be written to directly, as an abort.
void bad_id() {
  for (int mapped_together : {1, 2})
    for (int seed = 0; seed < num_seeds(3); ++seed) {
      Program program = program_of(3, {20, 20}, 6);
      program[0].tokens[1].ids[5] = 77;
      const SimtOutcome o = run_simt<NvshmemPlatform>(program, {.ep_size = 3, .blocks_per_rank = 2, .mapped_together = mapped_together}, seed);
      const std::string what = "bad id, seed " + std::to_string(seed) + " " + o.misuse;
      check(o.misuse.empty() && Failure(o.status[1].failure) == Failure::kBadId, what);
      for (int rank : {0, 2}) check(Failure(o.status[rank].failure) == Failure::kPeerAborted, what + ": a peer");
      for (const auto& call : o.y)
        for (const auto& y : call) check(std::isnan(y[0]), what + ": y of all ranks, now and later");
    }
}

// What is put must come from the transport's memory.
struct PutFromElsewhere : FaultyPlatform {
  using FaultyPlatform::FaultyPlatform;
  void commit(int pe, size_t offset, const std::byte* source, size_t bytes, size_t signal, uint64_t word, Traffic kind) {
    static const std::byte elsewhere[1 << 16] = {};
    FaultyPlatform::commit(pe, offset, bytes && pe != rank ? elsewhere : source, bytes, signal, word, kind);
  }
};
void put_from_elsewhere() {
  check_caught_on_seeds<PutFromElsewhere>(program_of(2, {20}, 4), {}, 1, "a put from memory that the transport does not know");
}

}  // namespace

int main() {
  run_test("SignalBeforePayload", signal_before_payload);
  run_test("SignalReadWithoutTheTransport", signal_read_without_the_transport);
  run_test("StageReusedBeforeLanding", stage_reused_before_landing);
  run_test("NobodyAsks", nobody_asks);
  run_test("LostSignal", lost_signal);
  run_test("BadId", bad_id);
  run_test("PutFromElsewhere", put_from_elsewhere);
  return finish();
}
