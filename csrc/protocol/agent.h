// The agent: one thread or warp of a worker that plays all roles' deciding part. It waits for nothing, and sees to it
// that the call ends: with everything done, or with a status that says who was waited for and for what.
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
// Progress is noted no more often than this: all workers of a rank write the same word.
inline constexpr uint64_t kNoteProgressEveryNs = 100'000;

struct Deadlines {
  uint64_t entered_ns;      // without progress, all peers having entered the epoch
  uint64_t not_entered_ns;  // without progress, while a peer's header is still missing
};

template <Platform P>
class Agent {
 public:
  FLASHMOE_ROLE Agent(const Context<P>& context, const TileShape& tiles, const Deadlines& deadlines)
      : dispatcher(context), subscriber(context), scheduler(context, tiles), processor(context, tiles), c_(context),
        deadlines_(deadlines) {}

  Dispatcher<P> dispatcher;
  Subscriber<P> subscriber;
  Scheduler<P> scheduler;
  Processor<P> processor;

  FLASHMOE_ROLE bool failed() const { return P::load_acquire(&c_.ws.status->failure); }

  // My results are in, every source of this epoch is served, and in a backward call my weight gradients are made and my
  // packets released; and nothing of mine is still under way: a packet
  // without rows has no reply that would keep the next call's from overtaking it (design D5).
  template <LaneGroup Lanes>
  FLASHMOE_ROLE bool done(const Lanes& lanes) {
    const bool done = lanes.rank() == 0 && dispatcher.done() && subscriber.done() && scheduler.all_served() &&
                      processor.all_combined() && processor.all_released() && c_.platform.quiet();
    return lanes.broadcast(uint32_t(done));
  }

  // By one thread.
  FLASHMOE_ROLE void note_progress() {
    const uint64_t now = P::now_ns();
    if (now - noted_ns_ < kNoteProgressEveryNs) return;
    noted_ns_ = now;
    P::store_release(&c_.ws.counters->last_progress_ns, now);
  }

  // After fruitless rounds: has a peer given up or died, or is it too late?
  template <LaneGroup Lanes>
  FLASHMOE_ROLE void look_for_trouble(const Lanes& lanes) {
    bool aborted = false;
    for (int pe = lanes.rank(); pe < c_.call.ep_size && !aborted; pe += lanes.size()) {
      const uint64_t word = pe == c_.call.ep_rank ? 0 : c_.platform.test_signal(c_.layout.abort_at(pe));
      aborted = word != 0;
      if (aborted) fail({Failure::kPeerAborted, Phase::kNone, pe, -1, word, 0});
    }
    if (!lanes.all(!aborted)) return;
    const uint64_t waited = lanes.broadcast(lanes.rank() == 0 ? waited_ns() : 0);
    if (waited < kLookAtPeersAfterNs) return;
    // A peer that still returns rows is slow, not lost.
    const uint32_t runs_here = processor.runs_here(lanes);
    if (runs_here != runs_here_) {
      runs_here_ = runs_here;
      if (lanes.rank() == 0) P::store_release(&c_.ws.counters->last_progress_ns, P::now_ns());
      return;
    }
    // The cause is whoever is missed earliest in a call: one whose header is not here holds up the others, who
    // then wait as I do. I wait for myself only because of somebody else.
    Trouble cause{Failure::kNone, Phase::kQuiet, c_.call.ep_rank, -1, 0, waited};
    for (int i = 1; i <= c_.call.ep_size; ++i) {
      const int pe = (c_.call.ep_rank + i) % c_.call.ep_size;  // myself last
      Trouble t{Failure::kTimeout, Phase::kNone, pe, -1, 0, waited};
      if (!waits_for(lanes, pe, t)) continue;
      const bool dead = lanes.rank() == 0 && pe != c_.call.ep_rank && !c_.platform.peer_alive(pe);
      if (lanes.broadcast(uint32_t(dead))) {
        // It may have done its part between the two looks, and then ended: only what is still not here is missed.
        if (!waits_for(lanes, pe, t)) continue;
        t.failure = Failure::kPeerDied;
        if (lanes.rank() == 0) fail(t);
        return;
      }
      if (uint32_t(t.phase) < uint32_t(cause.phase)) cause = t;
    }
    if (lanes.rank() != 0) return;
    const bool all_entered = P::load_acquire(&c_.ws.counters->headers_known) == uint32_t(c_.call.ep_size);
    cause.failure = Failure::kTimeout;
    if (waited > (all_entered ? deadlines_.entered_ns : deadlines_.not_entered_ns)) fail(cause);
  }

 private:
  struct Trouble {
    Failure failure;
    Phase phase;
    int peer, expert;
    uint64_t seen, waited_ns;
  };

  // What is missed is written into the first lane's `t`.
  template <LaneGroup Lanes>
  FLASHMOE_ROLE bool waits_for(const Lanes& lanes, int pe, Trouble& t) const {
    const bool packet = lanes.rank() == 0 && subscriber.waits_for(pe, t.phase, t.seen);
    return lanes.broadcast(uint32_t(packet)) || processor.waits_for(lanes, pe, t.phase, t.expert, t.seen);
  }

  // Time without progress of this rank, counted look by look: a process that was stopped for an hour, and goes on,
  // has not waited for an hour.
  FLASHMOE_ROLE uint64_t waited_ns() {
    const uint64_t now = P::now_ns(), progress = P::load_acquire(&c_.ws.counters->last_progress_ns);
    const uint64_t since = now > last_look_ns_ ? now - last_look_ns_ : 0;
    waited_ns_ = progress == last_progress_ns_ ? waited_ns_ + (since < kLongestLookNs ? since : kLongestLookNs) : 0;
    last_progress_ns_ = progress, last_look_ns_ = now;
    return waited_ns_;
  }

  FLASHMOE_ROLE void fail(const Trouble& t) {
    fail_call(c_, t.failure, [&](Status& status) {
      status.phase = uint32_t(t.phase), status.peer = t.peer, status.expert = t.expert;
      status.seen = t.seen, status.waited_ns = t.waited_ns;
    });
  }

  Context<P> c_;
  Deadlines deadlines_;
  uint64_t noted_ns_ = 0, last_look_ns_ = 0, last_progress_ns_ = 0, waited_ns_ = 0;
  uint32_t runs_here_ = 0;  // at this worker's last look
};

// A failed call cannot be completed, so nothing that peers hold of this group can be trusted again: tells every one of
// them. By one thread, once the call has failed.
template <Platform P>
FLASHMOE_ROLE void abort_peers(const Context<P>& c) {
  const Status& status = *c.ws.status;
  const uint64_t word = Failure(status.failure) == Failure::kPeerAborted
                            ? status.seen
                            : abort_word(c.call.ep_rank, status.peer, status.failure);
  for (int pe = 0; pe < c.call.ep_size; ++pe)
    if (pe != c.call.ep_rank) c.platform.commit(pe, 0, nullptr, 0, c.layout.abort_at(c.call.ep_rank), word, Traffic::kSignal);
}

}  // namespace flashmoe
