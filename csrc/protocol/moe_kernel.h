// One call of the MoE operator on one rank. Read this first: who plays which role.
//
//   dispatcher   my tokens' rows  →  inboxes of the ranks that own their experts
//   subscriber   headers, chunks  →  tables of who sent what, and how much of it is here
//   scheduler    tables           →  runnable row blocks
//   processor    row blocks       →  tiles, results at their sources; results that are here  →  y
//
// A role decides without waiting what to do next (next(), or a step() that is over at once), and what it decided is
// performed by a crew. A worker goes round its roles; only this outermost loop waits, and it always ends: with y, or
// with a status that says who was waited for and for what.
//
// A backward call is the same with two rows for one, and with weight gradients besides (protocol/backward.h).
//
// Here a worker is a host thread: agent and crew in one. On a GPU it is a block, whose agent is a warp that runs ahead
// of its crew (kernel/worker.h).
#pragma once

#include "protocol/agent.h"
#include "protocol/crew.h"
#include "protocol/trace.h"

namespace flashmoe {

template <Platform P, TileEngine E, class Crew = CrewOfOne<P, E>>
class MoeKernel {
 public:
  MoeKernel(const Context<P>& context, const E& engine, const typename E::Problem& problem, const Deadlines& deadlines,
            void* scratch, TraceBuffer* trace = nullptr)
      : crew_(context, engine, problem, scratch), agent_(context, crew_.tiles(), deadlines), tracer_(context, trace) {}

  // One worker's part of the call.
  void run() {
    const Alone me;
    uint32_t idle_rounds = 0;
    while (!agent_.failed()) {
      bool progress = perform_next(agent_.dispatcher);
      if (agent_.subscriber.step(me)) tracer_.arrived(), progress = true;
      const uint64_t since = tracer_.now();
      if (agent_.scheduler.step(me)) tracer_.published(since), progress = true;
      progress |= perform_next(agent_.processor);
      if (progress) {
        idle_rounds = 0;
        agent_.note_progress();
        continue;
      }
      if (agent_.done(me)) return;
      P::pause(++idle_rounds);
      // A clock read and a look at the peers are dear beside a round of idle steps.
      if (idle_rounds % 64 == 0) agent_.look_for_trouble(me);
    }
  }

 private:
  template <class Role>
  bool perform_next(Role& role) {
    Work work;
    if (!role.next(Alone{}, work)) return false;
    tracer_.begins(work);
    crew_.perform(work);
    tracer_.ends();
    crew_.finish(work);
    return true;
  }

  Crew crew_;
  Agent<P> agent_;
  Tracer<P> tracer_;
};

}  // namespace flashmoe
