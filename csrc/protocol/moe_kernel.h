// One call of the MoE operator on one rank. Read this first: who plays which role.
//
//   dispatcher   my tokens' rows  →  inboxes of the ranks that own their experts
//   subscriber   headers, chunks  →  tables of who sent what, and how much of it is here
//   scheduler    tables           →  runnable row blocks
//   processor    row blocks       →  tiles, results at their sources; results that are here  →  y
//
// Each role is a non-blocking step(). A worker (a host thread, a CTA) goes round its roles; only this outermost
// loop waits, and it always ends: with y, or with a status that says who was waited for and for what.
#pragma once

#include "protocol/dispatcher.h"
#include "protocol/processor.h"
#include "protocol/scheduler.h"
#include "protocol/subscriber.h"

namespace flashmoe {

// Until then a wait is taken for an ordinary one, and the peers' health is not looked at.
inline constexpr uint64_t kLookAtPeersAfterNs = 20'000'000;
// Two looks further apart than this were not made by a waiting thread: it was stopped in between.
inline constexpr uint64_t kLongestLookNs = 1'000'000'000;

struct Deadlines {
  uint64_t entered_ns;      // without progress, all peers having entered the epoch
  uint64_t not_entered_ns;  // without progress, while a peer's header is still missing
};

template <Platform P, TileEngine E>
class MoeKernel {
 public:
  FLASHMOE_HD MoeKernel(const Context<P>& context, const E& engine, const typename E::Problem& problem,
                        const Deadlines& deadlines, void* scratch)
      : c_(context),
        deadlines_(deadlines),
        dispatcher_(context),
        subscriber_(context),
        scheduler_(context, Processor<P, E>::up_tiles(problem), Processor<P, E>::down_tiles(problem)),
        processor_(context, engine, problem, scratch) {}

  // One worker's part of the call.
  FLASHMOE_HD void run() {
    uint32_t idle_rounds = 0;
    while (!P::load_acquire(&c_.ws.status->failure)) {
      bool progress = dispatcher_.step() == Step::kProgress;
      progress |= subscriber_.step() == Step::kProgress;
      progress |= scheduler_.step() == Step::kProgress;
      progress |= processor_.step() == Step::kProgress;
      if (progress) {
        idle_rounds = 0;
        P::store_release(&c_.ws.counters->last_progress_ns, P::now_ns());
        continue;
      }
      if (done()) return;
      P::pause(++idle_rounds);
      // A clock read and a look at the peers are dear beside a round of idle steps.
      if (idle_rounds % 64 == 0) look_for_trouble();
    }
  }

 private:
  // My results are in, every source of this epoch is served, and nothing of mine is still under way: a packet
  // without rows has no reply that would keep the next call's from overtaking it (design D5).
  FLASHMOE_HD bool done() {
    return dispatcher_.done() && subscriber_.done() && scheduler_.all_served() && processor_.all_combined() &&
           c_.platform.quiet();
  }

  FLASHMOE_HD void look_for_trouble() {
    for (int pe = 0; pe < c_.call.ep_size; ++pe) {
      if (pe == c_.call.ep_rank) continue;
      const uint64_t word = c_.platform.test_signal(c_.layout.abort_at(pe));
      if (word) return fail({Failure::kPeerAborted, Phase::kNone, pe, -1, word, 0});
    }
    const uint64_t waited = waited_ns();
    if (waited < kLookAtPeersAfterNs) return;
    // A peer that still returns rows is slow, not lost.
    const uint32_t runs_here = processor_.runs_here();
    if (runs_here != runs_here_) {
      runs_here_ = runs_here;
      return P::store_release(&c_.ws.counters->last_progress_ns, P::now_ns());
    }
    const bool all_entered = P::load_acquire(&c_.ws.counters->headers_known) == uint32_t(c_.call.ep_size);
    const bool too_late = waited > (all_entered ? deadlines_.entered_ns : deadlines_.not_entered_ns);
    // The cause is whoever is missed earliest in a call: one whose header is not here holds up the others, who
    // then wait as I do. I wait for myself only because of somebody else.
    Trouble cause{Failure::kNone, Phase::kQuiet, c_.call.ep_rank, -1, 0, waited};
    for (int i = 1; i <= c_.call.ep_size; ++i) {
      const int pe = (c_.call.ep_rank + i) % c_.call.ep_size;  // myself last
      Trouble t{Failure::kTimeout, Phase::kNone, pe, -1, 0, waited};
      if (!waits_for(pe, t)) continue;
      if (pe != c_.call.ep_rank && !c_.platform.peer_alive(pe)) {
        // It may have done its part between the two looks, and then ended: only what is still not here is missed.
        if (!waits_for(pe, t)) continue;
        t.failure = Failure::kPeerDied;
        return fail(t);
      }
      if (uint32_t(t.phase) < uint32_t(cause.phase)) cause = t;
    }
    cause.failure = Failure::kTimeout;
    if (too_late) fail(cause);
  }

  struct Trouble {
    Failure failure;
    Phase phase;
    int peer, expert;
    uint64_t seen, waited_ns;
  };

  FLASHMOE_HD bool waits_for(int pe, Trouble& t) const {
    return subscriber_.waits_for(pe, t.phase, t.seen) || processor_.waits_for(pe, t.phase, t.expert, t.seen);
  }

  // Time without progress of this rank, counted look by look: a process that was stopped for an hour, and goes on,
  // has not waited for an hour.
  FLASHMOE_HD uint64_t waited_ns() {
    const uint64_t now = P::now_ns(), progress = P::load_acquire(&c_.ws.counters->last_progress_ns);
    const uint64_t since = now > last_look_ns_ ? now - last_look_ns_ : 0;
    waited_ns_ = progress == last_progress_ns_ ? waited_ns_ + (since < kLongestLookNs ? since : kLongestLookNs) : 0;
    last_progress_ns_ = progress, last_look_ns_ = now;
    return waited_ns_;
  }

  FLASHMOE_HD void fail(const Trouble& t) {
    Status& status = *c_.ws.status;
    if (!P::compare_exchange(&status.claimed, 0, 1)) return;
    status.phase = uint32_t(t.phase), status.peer = t.peer, status.expert = t.expert;
    status.seen = t.seen, status.waited_ns = t.waited_ns;
    P::store_release(&status.failure, uint32_t(t.failure));
  }

  Context<P> c_;
  Deadlines deadlines_;
  Dispatcher<P> dispatcher_;
  Subscriber<P> subscriber_;
  Scheduler<P> scheduler_;
  Processor<P, E> processor_;
  uint64_t last_look_ns_ = 0, last_progress_ns_ = 0, waited_ns_ = 0;
  uint32_t runs_here_ = 0;  // at this worker's last look
};

}  // namespace flashmoe
