// A status word turned into a sentence: which rank waited for whom, for what, and what was there instead.
#pragma once

#include <sstream>
#include <string>
#include <vector>

#include "protocol/signal.h"
#include "protocol/workspace.h"
#include "runtime/moe.h"

namespace flashmoe {

inline std::string describe_tag(const CallTag& t) {
  static constexpr const char* kDTypes[] = {"float32", "bfloat16", "float16"};
  static constexpr const char* kActivations[] = {"silu", "gelu", "gelu_tanh", "relu"};
  std::ostringstream s;
  s << (t.backward() ? "the backward pass of " : "") << "layer " << t.layer << " (hidden_size " << t.hidden_size << ", intermediate_size " << t.intermediate_size
    << ", num_experts " << t.num_experts << ", " << kDTypes[t.dtype % 3] << ", " << (t.gated() ? "gated " : "")
    << kActivations[t.activation % 4] << ", biases " << int(t.has_bias) << ", placement " << std::hex << t.placement << ")";
  return s.str();
}

// Ranks of the group, as their users call them.
struct RankNames {
  const std::vector<int>& global_ranks;
  std::string operator()(int rank) const {
    return "rank " + std::to_string(rank < 0 || size_t(rank) >= global_ranks.size() ? rank : global_ranks[rank]);
  }
};

inline std::string describe_wait(const Status& status, int rank, const RankNames& name) {
  std::ostringstream s;
  const uint64_t epoch = signal_epoch(status.seen);
  switch (Phase(status.phase)) {
    case Phase::kHeader: s << "the packet header of " << name(status.peer); break;
    case Phase::kChunk: s << "token rows of " << name(status.peer); break;
    case Phase::kResults: s << "results of " << name(status.peer) << ", its expert " << status.expert; break;
    case Phase::kRelease: s << "the weight gradients of " << name(status.peer) << ", its expert " << status.expert; break;
    case Phase::kQuiet: return "its own transfers to " + (status.peer == rank ? "land" : name(status.peer) + " to land");
    case Phase::kNone: return "nothing";
  }
  s << " (expected epoch " << status.epoch << ", seen " << epoch << ")";
  return s.str();
}

inline std::string describe_bad_id(const Status& s) {
  const int experts = s.tag.num_experts;
  std::ostringstream text;
  text << "topk_ids must lie in [0, " << experts << ") (" << experts << " or -1: dropped), got " << int64_t(s.seen)
       << " for token " << s.token << ", choice " << s.choice;
  return text.str();
}

inline bool is_far(const GroupOptions& group, int rank) {
  return group.network && rank >= 0 && size_t(rank) < group.heaps.size() && !group.heaps[rank];
}

// Of `rank`, in a group of that name and of those ranks. The report ends with what can be done about it.
inline std::string describe_failure(const GroupOptions& group, int rank, const Status& status, const char* remedy) {
  const RankNames name{group.global_ranks};
  std::ostringstream s;
  s << "flashmoe group '" << group.name << "', " << name(rank) << ", call " << status.epoch << " of "
    << describe_tag(status.tag) << ": ";
  const double seconds = double(status.waited_ns) * 1e-9;
  switch (Failure(status.failure)) {
    case Failure::kTimeout:
      s << "no progress for " << seconds << " s while waiting for " << describe_wait(status, rank, name)
        << "; FLASHMOE_TIMEOUT_S and FLASHMOE_ENTRY_TIMEOUT_S set the limits";
      break;
    case Failure::kPeerDied:
      s << (is_far(group, status.peer) ? "the network to " : "the process of ") << name(status.peer)
        << (is_far(group, status.peer) ? " broke, or its process ended," : " ended") << " while this rank was waiting for "
        << describe_wait(status, rank, name);
      break;
    case Failure::kPeerAborted: {
      static constexpr const char* kWhy[] = {"", "a deadline that passed", "a peer process that ended", "",
                                             "ranks that call different layers", "an expert's id out of range",
                                             "more rows of a backward call than it has memory for"};
      s << name(abort_origin(status.seen)) << " aborted because of " << kWhy[abort_failure(status.seen) % 7]
        << " (" << name(abort_about(status.seen)) << ")";
      break;
    }
    case Failure::kOtherCall:
      s << name(status.peer) << " is calling another layer";
      if (status.has_peer_tag)
        s << ": " << describe_tag(status.peer_tag);
      else
        s << " (call digest " << (signal_payload(status.seen) >> 1) << ", expected " << tag_digest(status.tag) << ")";
      break;
    case Failure::kBadId: s << describe_bad_id(status); break;
    case Failure::kNoRoom:
      s << status.seen << " rows or more have come to its experts, and a backward call has memory for " << status.room
        << " there, in blocks of one expert each; FLASHMOE_BACKWARD_MIB sets how much";
      break;
    case Failure::kNone: break;
  }
  s << ". " << remedy;
  return s.str();
}

}  // namespace flashmoe
