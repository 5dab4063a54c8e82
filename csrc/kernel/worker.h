// One worker of a rank on a GPU: a block. Its last warp is the agent, who decides; its other warps are the crew, who
// perform. The agent runs ahead, so that what it decides never holds up what they do.
//
// Every wait ends: the agent's, because a failure or the end of the call ends its loop; the crew's, because the agent
// then posts kStop.
#pragma once

#include <cstring>

#include "kernel/rank_state.h"
#include "kernel/work_ring.h"
#include "protocol/backward.h"

namespace flashmoe::gpu {

// What an engine must offer here: tiles by the whole crew, whose threads find their rows by tile.h.
//   kCrewWarps, Shared with init(), Operands, up_cols(gated), down_cols(gated)
//   tile(group, context, tiles, work, shared), up or down as the work says; combine(group, context, work)
//   where the platform runs backward calls, kGradRows and kGradCols, and grad tiles among the tiles
// All threads have read the shared memory of one tile before any of them writes that of the next.
//
// It may have loaders, warps that see all the work and fetch for the crew, ahead of it: kLoaderWarps, and if any
//   load(loader, context, tiles, work, shared, operands, ask): one thread of them all calls ask(), when it is time to
//       look for the next piece of work
//   prefetch(operands), by each of their warps before all else
//   kPiecesAhead: of work, that it allows them to be ahead of the crew
//   crew_begins(), others_begin(), where registers may move: the loaders and the agent fill whole warpgroups
// Each thread keeps an engine of its own for the whole call, to remember where it is in what they share.
template <class P, class E, class CrewGroup = Crew<E::kCrewWarps>>
class Worker {
 public:
  static constexpr int kAgentWarp = E::kCrewWarps + E::kLoaderWarps;
  static constexpr int kThreads = 32 * (kAgentWarp + 1);
  static constexpr uint32_t kLookEveryRounds = 16;  // idle ones: a round is long beside a look
  static constexpr int kNearExperts = 256;          // as many the plan counts in shared memory
  using Operands = typename E::Operands;
  static constexpr bool pieces_ahead_are_allowed() {
    if constexpr (E::kLoaderWarps > 0) return WorkRing::kDepth <= E::kPiecesAhead;
    return true;
  }
  static_assert(pieces_ahead_are_allowed());

  struct Shared {
    typename E::Shared engine;
    WorkRing ring;
    uint32_t dealt[E::kCrewWarps * kNearExperts];
    uint32_t gives_up;  // its results
    alignas(16) std::byte rank[round_up(sizeof(RankState), 16)];
    BlockTrace trace;
  };

  // The whole call, by every thread of every block. Blocks are dealt to the ranks of this GPU in equal stretches.
  FLASHMOE_DEVICE static void run(RankState* ranks, int num_ranks, std::byte* shared_bytes, const Operands* operands) {
    const int blocks = num_blocks() / num_ranks;
    Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
    // Of the rank's state a copy lies near: it does not change during the call.
    RankState& home = ranks[block() / blocks];
    for (size_t i = 4 * thread_in_block(); i < sizeof(RankState); i += 4 * block_threads())
      memcpy(shared.rank + i, reinterpret_cast<const std::byte*>(&home) + i, 4);
    if (thread_in_block() == 0) {
      shared.ring.init(kAgentWarp);
      shared.engine.init();
    }
    sync_block();
    RankState& rank = *reinterpret_cast<RankState*>(shared.rank);
    if (thread_in_block() == 0) {
      if (rank.call.num_experts <= kNearExperts) rank.workspace.dealt = shared.dealt;
      shared.trace.init(rank.trace, block() % blocks, blocks);
    }
    sync_block();
    P platform(rank.call, rank.peers, rank.workspace);
    const Context<P> context{rank.call, rank.layout, rank.workspace, platform};
    Worker worker(context, shared, block() % blocks, blocks);
    if (warp_in_block() < E::kCrewWarps) {
      if constexpr (E::kLoaderWarps > 0) E::crew_begins();
      return worker.perform();
    }
    if constexpr (E::kLoaderWarps > 0) {
      E::others_begin();
      if (warp_in_block() < kAgentWarp) return worker.load(operands + block() / blocks);
    }
    worker.decide(home);
  }

 private:
  FLASHMOE_DEVICE Worker(const Context<P>& context, Shared& shared, int block_of_rank, int blocks)
      : c_(context), shared_(shared), tiles_(context.call.intermediate_size, context.call.hidden_size,
                                             E::up_cols(context.call.gated), E::down_cols(context.call.gated)),
        block_of_rank_(block_of_rank), blocks_(blocks) {
    if constexpr (P::kBackward)
      if (const uint32_t tiles = GradTiles(context.call, E::kGradRows, E::kGradCols).count()) tiles_.grad_tiles = tiles;
  }

  // The agent's warp.
  FLASHMOE_DEVICE void decide(RankState& home) {
    const Warp lanes;
    Agent<P> agent(c_, tiles_, home.deadlines);
    Tracer<P> arrivals = tracer(BlockTrace::kSubscriber), publications = tracer(BlockTrace::kScheduler);
    // Any worker could play the subscriber and the scheduler; one of each is enough, and spares the others' polling.
    const bool subscribes = block_of_rank_ == 0, schedules = block_of_rank_ == blocks_ - 1;
    Work work;
    uint32_t posted = 0, idle_rounds = 0;
    // Asked by those who have nothing else to do, which sooner or later is everybody.
    const auto failed = [&] { return lanes.broadcast(uint32_t(lanes.rank() == 0 && agent.failed())) != 0; };
    for (bool ended = failed(); !ended;) {
      bool progress = subscribes && agent.subscriber.step(lanes);
      if (progress && lanes.rank() == 0) arrivals.arrived();
      const uint64_t since = schedules ? publications.now() : 0;
      if (schedules && agent.scheduler.step(lanes)) {
        if (lanes.rank() == 0) publications.published(since);
        progress = true;
      }
      const bool wanted = shared_.ring.is_wanted(posted);
      const bool decided = work.kind != WorkKind::kNone ||
                           (wanted && (agent.dispatcher.next(lanes, work) || agent.processor.next(lanes, work)));
      if (decided && shared_.ring.post(posted, work)) work = {}, ++posted, progress = true;
      if (progress) {
        idle_rounds = 0;
        if (lanes.rank() == 0) agent.note_progress();
        continue;
      }
      ended = failed() || (wanted && !decided && agent.done(lanes));
      if (ended) break;
      P::pause(++idle_rounds);
      if (subscribes && idle_rounds % kLookEveryRounds == 0) agent.look_for_trouble(lanes);
    }
    while (!shared_.ring.post(posted, {WorkKind::kStop, 0, 0})) {
    }
    if (subscribes && lanes.rank() == 0) shared_.trace.end(BlockTrace::kSubscriber);
    if (schedules && lanes.rank() == 0) shared_.trace.end(BlockTrace::kScheduler);
    if (block_of_rank_ == 0 && lanes.rank() == 0 && agent.failed()) keep_failure(home);
  }

  FLASHMOE_DEVICE void keep_failure(RankState& home) {
    if (home.failure.failure) return;  // it failed earlier, and everyone has been told
    abort_peers(c_);
    home.failure = *c_.ws.status;
    if (!home.report_failure) return;
    *home.report_failure = home.failure;
    store_release_system(&home.report_failure->claimed, 2u);  // all of it is there
  }

  // The loaders' warps.
  FLASHMOE_DEVICE void load(const Operands* operands) {
    E engine;
    if (c_.call.num_local_experts() > 0) E::prefetch(operands);  // else there are no maps
    for (uint32_t n = 0;; ++n) {
      const Work work = shared_.ring.take(n);
      if (work.kind == WorkKind::kStop) return;
      if (warp_in_block() == kAgentWarp - 1 && lane() == 0) shared_.trace.note_loads(n);
      engine.load(warp_in_block() - E::kCrewWarps, c_, tiles_, work, shared_.engine, operands,
                  [&] { shared_.ring.ask(); });
    }
  }

  // The crew's warps.
  FLASHMOE_DEVICE void perform() {
    const CrewGroup group;
    E engine;
    Dispatcher<P> dispatcher(c_);
    Processor<P> processor(c_, tiles_);
    for (uint32_t n = 0;; ++n) {
      const Work work = shared_.ring.take(n);
      const bool speaks = group.rank() == 0;  // for the crew
      if (E::kLoaderWarps == 0 && speaks) shared_.ring.ask();
      if (speaks) tracer(BlockTrace::kCrew).begins(work);
      bool loaded_ahead = false;
      switch (work.kind) {
        case WorkKind::kStop: return stop(group);
        case WorkKind::kPlan:
        case WorkKind::kSendChunk: dispatcher.perform(group, work); break;
        case WorkKind::kUpTile:
        case WorkKind::kDownTile:
          engine.tile(group, c_, tiles_, work, shared_.engine);
          loaded_ahead = E::kLoaderWarps > 0;
          break;
        default:
          is_grad_tile(work) ? engine.tile(group, c_, tiles_, work, shared_.engine) : engine.combine(group, c_, work);
      }
      group.sync();
      if (!speaks) continue;
      tracer(BlockTrace::kCrew).ends(loaded_ahead ? shared_.trace.loads_ns(n) : 0);
      is_of_dispatcher(work.kind) ? dispatcher.finish(work) : processor.finish(work);
    }
  }

  FLASHMOE_DEVICE static bool is_grad_tile(const Work& work) {
    if constexpr (P::kBackward) return work.kind == WorkKind::kGradTile;
    return false;
  }

  FLASHMOE_DEVICE void stop(const CrewGroup& group) {
    if (group.rank() == 0) shared_.trace.end(BlockTrace::kCrew);
    give_up_results(group);
  }

  FLASHMOE_DEVICE Tracer<P> tracer(BlockTrace::Writer writer) { return Tracer<P>(c_, shared_.trace.of(writer)); }

  // Nobody shall take what a failed call left in y, or in gradients, for its result: the last block to stop, after
  // which none writes, overwrites it with NaN.
  FLASHMOE_DEVICE void give_up_results(const CrewGroup& group) {
    group.sync();
    if (group.rank() == 0)
      shared_.gives_up = P::fetch_add(&c_.ws.counters->stopped, 1) + 1 == uint32_t(blocks_) &&
                         P::load_acquire(&c_.ws.status->failure);
    group.sync();
    if (!shared_.gives_up) return;
    const Call& call = c_.call;
    give_up(group, call.y, call.num_tokens * call.row_bytes());
    if constexpr (P::kBackward) {
      const Gradients& grad = call.grad;
      const size_t experts = call.num_local_experts(), up_rows = call.up_rows(), element = dtype_bytes(call.dtype);
      give_up(group, reinterpret_cast<std::byte*>(grad.topk_weights), sizeof(float) * call.num_tokens * call.top_k);
      give_up(group, grad.gate_up_proj, experts * up_rows * call.row_bytes());
      give_up(group, grad.gate_up_bias, experts * up_rows * element);
      give_up(group, grad.down_proj, experts * call.row_bytes() * call.intermediate_size);
      give_up(group, grad.down_bias, experts * call.row_bytes());
    }
  }
  FLASHMOE_DEVICE static void give_up(const CrewGroup& group, std::byte* results, size_t bytes) {
    if (P::kBackward && !results) return;  // not asked for
    // Two bytes at a time, since rows may be of any width: all ones is no number in each of the dtypes.
    uint16_t* halves = reinterpret_cast<uint16_t*>(results);
    for (size_t i = group.rank(); i < bytes / 2; i += group.size()) halves[i] = 0xffff;
  }

  Context<P> c_;
  Shared& shared_;
  TileShape tiles_;
  int block_of_rank_, blocks_;
};

}  // namespace flashmoe::gpu
