// How a call begins on a GPU: by one block for each rank, before the kernel of the call.
#pragma once

#include "kernel/rank_state.h"
#include "kernel/thread_groups.h"
#include "protocol/plan.h"

namespace flashmoe::gpu {

// Expert ids as the caller has them: int32 or int64, -1 or num_experts for dropped.
struct GivenIds {
  const void* ids;  // [num_tokens, top_k]
  int bytes;        // of one: 4 or 8
  int32_t* taken;   // as the protocol knows them: the call's topk_ids

  FLASHMOE_DEVICE int64_t at(int pair) const {
    return bytes == 8 ? static_cast<const int64_t*>(ids)[pair] : int64_t(static_cast<const int32_t*>(ids)[pair]);
  }
};

// Returns the first of this thread's pairs whose id is no expert's, or the number of pairs.
template <class Group>
FLASHMOE_DEVICE int take_ids(const Group& group, const Call& call, const GivenIds& given) {
  const int pairs = call.num_tokens * call.top_k;
  int first_bad = pairs;
  load_and_store(
      group, 0, uint32_t(pairs), [&](uint32_t pair) { return given.at(int(pair)); },
      [&](uint32_t pair, int64_t id) {
        if ((id < -1 || id > call.num_experts) && int(pair) < first_bad) first_bad = int(pair);
        given.taken[pair] = id < 0 || id >= call.num_experts ? -1 : int32_t(id);
      });
  return first_bad;
}

// The next epoch, and counters at zero. After a failure there is no next epoch: the call fails at once, as the last
// one did. A call with a bad id has failed before its kernel begins, which then sees to y, to the peers and to the
// report.
template <class Group>
FLASHMOE_DEVICE void begin_call(const Group& group, RankState& rank, const Call& call, const Workspace& workspace,
                                const GivenIds& given) {
  Workspace ws = workspace;
  Call next = call;
  const int pairs = call.num_tokens * call.top_k, bad = take_ids(group, call, given);
  const Failure earlier = Failure(rank.failure.failure);
  // Nobody else holds anything of a lone rank's call, so a bad id was that call's trouble alone.
  const bool failed = earlier != Failure::kNone && !(earlier == Failure::kBadId && call.ep_size == 1);
  next.epoch = failed ? rank.last_epoch : next_epoch(rank.last_epoch);
  ws.reset(group, next, now_ns());
  group.sync();
  uint32_t& pairs_from_bad = ws.counters->pairs_from_bad_id;
  for (uint32_t most = 0; uint32_t(pairs - bad) > most;) {
    if (compare_exchange(&pairs_from_bad, most, uint32_t(pairs - bad))) break;
    most = load_relaxed(&pairs_from_bad);
  }
  group.sync();
  if (group.rank() != 0) return;
  if (failed) {
    *ws.status = rank.failure;
  } else {
    rank.failure = Status{};
    if (const uint32_t left = load_relaxed(&pairs_from_bad)) {
      const int pair = pairs - int(left);
      Status& status = *ws.status;
      status.token = pair / call.top_k, status.choice = pair % call.top_k, status.seen = uint64_t(given.at(pair));
      status.peer = call.ep_rank, status.expert = -1;
      status.claimed = 1, status.failure = uint32_t(Failure::kBadId);
    }
  }
  rank.last_epoch = next.epoch, rank.call = next, rank.workspace = ws;
}

}  // namespace flashmoe::gpu
