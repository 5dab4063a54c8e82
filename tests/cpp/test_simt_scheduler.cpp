// What the scheduler publishes: in which order, in which bundles, and what it leaves waiting while ring slots are few.
// By one thread, as on the host, and by a warp on fibers, as on a GPU, whose lanes look at experts side by side.
#include <numeric>
#include <optional>

#include "kernel/thread_groups.h"
#include "platform/cuda.h"
#include "platform/host.h"
#include "protocol/scheduler.h"
#include "simt_run.h"

namespace {

using namespace flashmoe;
using namespace flashmoe::test;

constexpr uint32_t kRing = 16;
constexpr int kHidden = 4;

struct Published {
  int expert;
  uint32_t bundle;  // how many blocks it has

  bool operator==(const Published&) const = default;
};

// Rank 0's lists as its subscriber would have them: blocks[i][e] full row blocks of expert e from source i, of which
// those of source i are here if here[i].
class Lists {
 public:
  Lists(bool by_warp, const std::vector<std::vector<uint32_t>>& blocks, const std::vector<bool>& here, uint32_t num_workers = 1)
      : by_warp_(by_warp), experts_(int(blocks[0].size())), layout_(limits_of(blocks)), heap_(layout_.bytes) {
    const int sources = int(blocks.size());
    position_.resize(sources * experts_);
    std::iota(position_.begin(), position_.end(), 0);
    for (int d = 0; d <= sources; ++d) rank_begin_.push_back(d * experts_);
    call_.ep_size = sources, call_.epoch = 1, call_.num_experts = sources * experts_, call_.top_k = 1;
    call_.num_tokens = layout_.limits.max_tokens, call_.hidden_size = call_.intermediate_size = kHidden;
    call_.expert_position = position_.data(), call_.rank_begin = rank_begin_.data();
    const Machine machine{.max_ring_blocks = kRing, .num_workers = num_workers};
    memory_.resize(Workspace(call_, layout_, machine, nullptr).bytes / sizeof(Line) + 1);
    ws_.emplace(call_, layout_, machine, reinterpret_cast<std::byte*>(memory_.data()));
    ws_->reset(Alone{}, call_, 0);
    for (int i = 0; i < sources; ++i) {
      uint32_t* entry = ws_->entry_begin + i * (experts_ + 1);
      for (int e = 0; e < experts_; ++e) {
        entry[e + 1] = entry[e] + blocks[i][e] * kBlockM;
        ws_->row_offset[(i + 1) * experts_ + e] = ws_->row_offset[i * experts_ + e] + blocks[i][e] * kBlockM;
      }
      ws_->num_chunks[i] = 1, ws_->chunks_ready[i] = here[i];
    }
    ws_->counters->headers_known = sources;
  }

  // What one step publishes.
  std::vector<Published> step() {
    const uint32_t before = ws_->counters->up.published;
    std::byte* heaps[] = {heap_.data(), nullptr};
    const TileShape tiles(kHidden, kHidden, 1, 1);
    if (by_warp_) {
      const Peers peers{heaps, nullptr, nullptr};
      const std::string wrong = failure(before, 1, 32, 0, [&] {
        CudaPlatform platform(call_, peers, *ws_);
        Scheduler<CudaPlatform>({call_, layout_, *ws_, platform}, tiles).step(gpu::Warp{});
      });
      check(wrong.empty(), "a warp's step: " + wrong);
    } else {
      HostPlatform platform(0, {heaps[0], heaps[0]}, {0, 0}, nullptr);
      Scheduler<HostPlatform>({call_, layout_, *ws_, platform}, tiles).step(Alone{});
    }
    std::vector<Published> published;
    for (uint32_t sequence = before; sequence < ws_->counters->up.published; ++sequence) {
      const RowBlock& block = ws_->ring[sequence % kRing];
      const Bundle bundle = ws_->bundles[sequence % num_bundle_places(kRing)];
      check(block.sequence == sequence && bundle.first <= sequence && sequence < bundle.first + bundle.blocks, "a block and its bundle");
      published.push_back({block.local_expert, bundle.blocks});
    }
    return published;
  }
  // The oldest block is done.
  void free_slot() { ws_->ring_free[done_ % kRing] = done_ + kRing, ++done_; }
  void arrive(int source) { ws_->chunks_ready[source] = 1; }

 private:
  struct alignas(64) Line {
    uint32_t words[16] = {};
  };
  static Limits limits_of(const std::vector<std::vector<uint32_t>>& blocks) {
    uint32_t most = 1;
    for (const auto& source : blocks) most = std::max(most, std::accumulate(source.begin(), source.end(), 0u) * uint32_t(kBlockM));
    return {int(blocks.size()), int(most), kHidden * 4, 1, int(blocks.size() * blocks[0].size())};
  }

  bool by_warp_;
  int experts_;
  HeapLayout layout_;
  std::vector<std::byte> heap_;
  std::vector<int32_t> position_, rank_begin_;
  std::vector<Line> memory_;
  Call call_{};
  std::optional<Workspace> ws_;
  uint32_t done_ = 0;
};

using Blocks = std::vector<Published>;
Blocks times(size_t n, Published block) { return Blocks(n, block); }
Blocks operator+(Blocks a, const Blocks& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

// Where all known rows are here lanes publish together; where some are late, expert by expert.
template <class Body>
void each_way(const Body& body) {
  for (bool by_warp : {false, true})
    for (bool late : {false, true})
      body(std::string(by_warp ? "a warp" : "one thread") + (late ? ", rows late" : ""), by_warp, [&](std::vector<uint32_t> blocks) {
        std::vector<std::vector<uint32_t>> all{blocks};
        if (late) all.push_back(std::vector<uint32_t>(blocks.size(), 0)), all[1].back() = 1;
        return all;
      }, late ? std::vector<bool>{true, false} : std::vector<bool>{true});
}

void bundles_are_cut() {
  each_way([](const std::string& how, bool by_warp, auto lists, const std::vector<bool>& here) {
    const Blocks cut = times(4, {0, 4}) + times(2, {0, 2}) + times(1, {1, 1}) + times(4, {2, 4});
    check(Lists(by_warp, lists({6, 1, 4, 0}), here).step() == cut, how + ": bundles of up to four, of one expert each");
    const Blocks lone = times(6, {0, 1}) + times(1, {1, 1}) + times(4, {2, 1});
    check(Lists(by_warp, lists({6, 1, 4, 0}), here, 4 * kHidden).step() == lone, how + ": none where tiles are few beside workers");
  });
}

void nobody_overtakes() {
  each_way([](const std::string& how, bool by_warp, auto lists, const std::vector<bool>& here) {
    std::vector<uint32_t> blocks(40, 1);  // more than a warp has lanes
    blocks[0] = 28;
    Lists all(by_warp, lists(blocks), here);
    check(all.step() == times(16, {0, 4}), how + ": a ring's worth");
    for (int bundle = 0; bundle < 3; ++bundle)
      for (int slot = 1; slot <= 4; ++slot) {
        all.free_slot();
        check(all.step() == (slot < 4 ? Blocks{} : times(4, {0, 4})), how + ": the next bundle, once it has its slots");
      }
    all.free_slot();
    check(all.step() == times(1, {1, 1}), how + ": then the others");
  });
}

// An expert whose rows are late keeps nobody waiting for more slots than there are.
void late_rows_take_no_slots() {
  for (bool by_warp : {false, true}) {
    Lists lists(by_warp, {{0, 16, 1, 0}, {20, 0, 0, 0}}, {true, false});
    const std::string how = by_warp ? "a warp" : "one thread";
    check(lists.step() == times(16, {1, 4}), how + ": what is here");
    check(lists.step().empty(), how + ": no slot is free");
    lists.free_slot();
    check(lists.step() == times(1, {2, 1}), how + ": a lone block in the first slot");
    lists.arrive(1);
    for (int slot = 0; slot < 3; ++slot) lists.free_slot();
    check(lists.step().empty(), how + ": three slots for a bundle of four");
    lists.free_slot();
    check(lists.step() == times(4, {0, 4}), how + ": the bundle");
  }
}

}  // namespace

int main() {
  run_test("BundlesAreCut", bundles_are_cut);
  run_test("NobodyOvertakes", nobody_overtakes);
  run_test("LateRowsTakeNoSlots", late_rows_take_no_slots);
  return finish();
}
