// A reply does not mean consumed in a backward call: weight gradients are sums over packets that were replied to long
// ago. What keeps the next call out of their inboxes is the release, on a network that brings about the worst order.
#include <cstring>

#include "gradient_team.h"
#include "platform/host.h"
#include "protocol/signal.h"

namespace {

using namespace flashmoe;
using namespace flashmoe::test;

// What the three ranks' networks have in common.
struct Wires {
  std::vector<std::vector<uint64_t>> memory;
  std::vector<std::byte*> heaps;
  HeapLayout layout;
  bool forged = false;      // rank 2 is told of rank 1's release at once: as if it did not wait for it
  bool lost = false;        // rank 1's release never reaches rank 2
  bool held_back = false;   // rank 0's header for rank 1 waits until rank 2 has sent its next packet, or is too long in coming
  std::atomic<int> next_puts{0};
  bool overtaken = false;   // and it was sent

  explicit Wires(const Limits& limits) : layout(limits) {
    for (int r = 0; r < limits.ep_size; ++r) memory.emplace_back(layout.bytes / sizeof(uint64_t));
    for (auto& heap : memory) heaps.push_back(reinterpret_cast<std::byte*>(heap.data()));
  }
};

// One rank's network, whose puts land at once but for those that are lost or held back.
class Wire final : public HostNetwork {
 public:
  Wire(int rank, Wires& all) : rank_(rank), all_(all) {}

  void put(const Put& put) override {
    const HeapLayout& h = all_.layout;
    if (all_.lost && rank_ == 1 && put.pe == 2 && put.signal == h.release_signal_at(kItsExpert)) return;
    if (all_.held_back && rank_ == 0 && put.pe == 1 && put.signal == h.header_signal_at(0) && signal_epoch(put.word) == 1) {
      held_ = put, since_ns_ = HostPlatform::now_ns();
      return;
    }
    land(put);
    if (rank_ != 2 || put.pe != 1) return;
    if (signal_epoch(put.word) == 2) all_.next_puts.fetch_add(1);
    if (all_.forged && put.signal == h.header_signal_at(2))
      store(all_.heaps[2] + h.release_signal_at(kItsExpert), make_signal(signal_epoch(put.word), 0));
  }
  bool quiet() override {
    if (!held_) return true;
    constexpr int kHeaderAndChunks = 3;
    const bool sent = all_.next_puts.load() == kHeaderAndChunks;
    if (!sent && HostPlatform::now_ns() - since_ns_ < 300'000'000) return false;
    all_.overtaken = sent;
    land(*held_);
    held_.reset();
    return true;
  }
  void release_when_landed(uint32_t* word, uint32_t value) override { HostPlatform::store_release(word, value); }
  bool alive(int) override { return true; }
  std::optional<int> awaited() override { return std::nullopt; }

 private:
  static void store(std::byte* word, uint64_t value) { HostPlatform::store_release(reinterpret_cast<uint64_t*>(word), value); }
  void land(const Put& put) {
    if (put.bytes) std::memcpy(all_.heaps[put.pe] + put.offset, put.from, put.bytes);
    store(all_.heaps[put.pe] + put.signal, put.word);
  }

  static constexpr int kItsExpert = 1;  // rank 1's: each rank has one

  int rank_;
  Wires& all_;
  std::optional<Put> held_;
  uint64_t since_ns_ = 0;
};

Limits limits_of(const Passes& passes) {
  Limits limits = flashmoe::test::limits_of(calls_of(passes), 3);
  limits.backward = true;
  return limits;
}

Team far_apart(Wires& wires, double timeout_s) {
  Team team;
  for (int r = 0; r < 3; ++r) {
    GroupOptions o;
    o.name = "wires", o.ep_rank = r, o.limits = wires.layout.limits, o.network = std::make_shared<Wire>(r, wires);
    o.heaps.assign(3, nullptr), o.heaps[r] = wires.heaps[r], o.pids.assign(3, 0);
    o.timeout_s = o.entry_timeout_s = timeout_s;
    team.push_back(std::make_shared<Group>(std::move(o)));
  }
  return team;
}

// Rank 2 sends one full row block to rank 1, which can return it before it has heard of rank 0. Only then can it sum.
Passes rows_for_one(const Layer& layer) {
  Passes passes;
  for (uint64_t seed : {1, 2}) {
    Tokens tokens = draw_tokens(layer, kBlockM, seed);
    for (int64_t& id : tokens.ids) id = 1;
    passes.push_back(backward_of({&layer, {{}, {}, tokens}, std::nullopt}, seed));
  }
  return passes;
}

void next_call_overwrites_what_is_summed(const Layer& layer) {
  const Passes passes = rows_for_one(layer);
  const PassResults truth = check_passes(passes, {.ep_size = 3}, "an ordinary team");
  for (bool next_is_backward : {true, false})
    for (bool forged : {false, true}) {
      Passes program = passes;
      if (!next_is_backward) program[1] = {passes[1].call};
      Wires wires(limits_of(passes));
      wires.held_back = true, wires.forged = forged;
      const PassResults results = run_passes(far_apart(wires, 20), program);
      for (const std::string& error : results.errors) check(error.empty(), error);
      if (!results.ok()) continue;
      check(results.of[0][2] == truth.of[0][2], "the gradients of tokens came with the reply");
      const bool right = results.of[0][1] == truth.of[0][1];
      if (forged) {
        check(wires.overtaken, "rank 2 went on to its next call: else nothing was tried");
        check_caught(!right, "a source that does not wait for the release");
      } else {
        check(!wires.overtaken, "rank 2 waits in its call until rank 1 has summed");
        check(right, "weight gradients are those of an ordinary team");
        if (next_is_backward) check(results.of == truth.of, "and so are the next call's");
      }
    }
}

void peer_that_never_releases(const Layer& layer) {
  const Passes passes = rows_for_one(layer);
  Wires wires(limits_of(passes));
  wires.lost = true;
  const PassResults results = run_passes(far_apart(wires, 0.4), {passes[0]});
  check(contains(results.errors[2], "rank 2, call 1 of the backward pass of layer 0 ") &&
            contains(results.errors[2], "while waiting for the weight gradients of rank 1, its expert 0 (expected epoch 1, seen 0)"),
        "who is waited for, and for what: " + results.errors[2]);
  check(results.errors[0].empty() && results.errors[1].empty(), "the others have all they need");
}

}  // namespace

// What a failed group leaves behind on purpose, because peers and the network may still use it, is no leak.
extern "C" __attribute__((visibility("default"), used)) const char* __lsan_default_suppressions() {
  return "leak:flashmoe::Group::Impl\n";
}

int main() {
  const Layer layer({.hidden_size = 32, .intermediate_size = 32, .num_experts = 3, .top_k = 1}, 2);
  run_test("NextCallOverwritesWhatIsSummed", [&] { next_call_overwrites_what_is_summed(layer); });
  run_test("PeerThatNeverReleases", [&] { peer_that_never_releases(layer); });
  return finish();
}
