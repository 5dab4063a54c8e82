// One call of the whole kernel on a team of rank threads, over any platform: for faults that the product's own
// platform does not have.
#pragma once

#include "platform/host.h"
#include "protocol/moe_kernel.h"
#include "rank_call.h"
#include "tiny_engine.h"

namespace flashmoe::test {

struct KernelOutcome {
  Status status{};
  bool right = false;  // the bits that the engine alone computes
  double seconds = 0;
};

// make(rank, heaps, layout) → the rank's platform. `enter(rank)` runs before a rank's call; a rank for which it says
// false never calls. `left(rank)` runs when its call has ended.
template <class P>
std::vector<KernelOutcome> run_kernels(const CallOfAll& of_all, const Deadlines& deadlines,
                                       const std::function<std::unique_ptr<P>(int, const std::vector<std::byte*>&, const HeapLayout&)>& make,
                                       const std::function<bool(int)>& enter = nullptr, const std::function<void(int)>& left = nullptr) {
  const int ep_size = int(of_all.tokens.size());
  const HeapLayout layout(limits_of({of_all}, ep_size));
  std::vector<std::vector<uint64_t>> heaps(ep_size, std::vector<uint64_t>(layout.bytes / 8 + 1));
  std::vector<std::byte*> addresses;
  for (auto& heap : heaps) addresses.push_back(reinterpret_cast<std::byte*>(heap.data()));
  std::vector<std::unique_ptr<P>> platforms;
  for (int r = 0; r < ep_size; ++r) platforms.push_back(make(r, addresses, layout));

  std::vector<KernelOutcome> outcomes(ep_size);
  on_threads(ep_size, [&](int rank) {
    if (enter && !enter(rank)) return;
    RankCall rc(of_all, rank, ep_size, 1, layout, Machine{.staged = platforms[rank]->staged()});
    const TinyEngine engine;
    const uint64_t begin = HostPlatform::now_ns();
    const Context<P> context{rc.call, layout, *rc.workspace, *platforms[rank]};
    MoeKernel<P, TinyEngine>(context, engine, rc.shape, deadlines, nullptr).run();
    outcomes[rank].seconds = double(HostPlatform::now_ns() - begin) * 1e-9;
    outcomes[rank].status = *rc.workspace->status;
    outcomes[rank].right = rc.y() == TinyEngine::without_protocol(*of_all.layer, rc.tokens());
    if (left) left(rank);
  });
  return outcomes;
}

}  // namespace flashmoe::test
