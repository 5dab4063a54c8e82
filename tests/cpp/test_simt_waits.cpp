// A warp that looks for whom it waits comes to one answer, though what it looks at changes between its lanes' looks:
// lanes that parted here would wait for each other in different places, for ever.
#include "protocol/processor.h"
#include "simt_gradients.h"
#include "simt_run.h"

namespace {

using namespace flashmoe;
using namespace flashmoe::test;

constexpr uint64_t kEpoch = 5;

// Rank 0's call of two, planned, of which only the releases are still to come from rank 1.
class Waiting {
 public:
  Waiting()
      : layer_({.hidden_size = 8, .intermediate_size = 8, .num_experts = 80, .top_k = 4}, 1),
        all_(backward_of(call_of(layer_, {40, 40}, 7), 1)), layout_(limits()),
        rank_(all_, 0, 2, kEpoch, layout_, Machine{}), heap_(layout_.bytes / 8 + 1) {
    Workspace& ws = *rank_.workspace;
    plan_segments(Alone{}, rank_.call, ws);
    plan_slots(Alone{}, rank_.call, ws);
    ws.counters->plan_ready = 1;
    for (int p = 0; p < layer_.num_experts; ++p) {
      word(layout_.result_signal_at(ws.segment_signal[p])) = make_signal(kEpoch, kBlockM);
      if (p >= first_of_peer() && ws.segment_row[p + 1] != ws.segment_row[p]) awaited_.push_back(p);
    }
  }

  // One warp asks again and again, while another one's lane lets the releases come, the last expert's first.
  std::string ask(uint64_t seed) {
    for (int p : awaited_) word(layout_.release_signal_at(p)) = make_signal(kEpoch - 1, 0);
    std::byte* heaps[] = {reinterpret_cast<std::byte*>(heap_.data()), nullptr};
    const Peers peers{heaps, nullptr, nullptr};
    return failure(seed, 1, 64, 0, [&] {
      if (gpu::warp_in_block() == 0) {
        CudaBackwardPlatform platform(rank_.call, peers, *rank_.workspace);
        const Context<CudaBackwardPlatform> context{rank_.call, layout_, *rank_.workspace, platform};
        const Processor<CudaBackwardPlatform> processor(context, TileShape(8, 8, 8, 8));
        for (bool waits = true; waits;) {
          Phase phase = Phase::kNone;
          int expert = -1;
          uint64_t seen = 0;
          waits = processor.waits_for(gpu::Warp{}, 1, phase, expert, seen);
          expect(waits == gpu::shuffle(int(waits), 0) && expert == gpu::shuffle(expert, 0));
          expect(waits == (phase == Phase::kRelease) && (!waits || is_awaited(expert + first_of_peer())));
        }
      } else if (gpu::lane() == 0) {
        for (size_t i = awaited_.size(); i-- > 0; gpu::sleep_ns(40))
          gpu::store_release_system(&word(layout_.release_signal_at(awaited_[i])), make_signal(kEpoch, 0));
      }
    });
  }
  size_t num_awaited() const { return awaited_.size(); }

 private:
  Limits limits() const {
    Limits l = limits_of({all_}, 2);
    l.backward = true;
    return l;
  }
  int first_of_peer() const { return layer_.num_experts / 2; }
  bool is_awaited(int position) const {
    return std::find(awaited_.begin(), awaited_.end(), position) != awaited_.end();
  }
  uint64_t& word(size_t offset) { return heap_[offset / 8]; }

  const Layer layer_;
  const BackwardOfAll all_;
  const HeapLayout layout_;
  BackwardRankCall rank_;
  std::vector<uint64_t> heap_;
  std::vector<int> awaited_;  // positions of experts of the peer that have rows of mine
};

void lanes_agree_on_releases() {
  Waiting waiting;
  check(waiting.num_awaited() > 32, "more releases than a warp has lanes");
  for (int seed = 0; seed < num_seeds(40); ++seed) {
    const std::string wrong = waiting.ask(uint64_t(seed));
    check(wrong.empty(), "seed " + std::to_string(seed) + ": " + wrong);
  }
}

}  // namespace

int main() {
  run_test("LanesAgreeOnReleases", lanes_agree_on_releases);
  return finish();
}
