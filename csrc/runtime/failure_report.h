// A status word turned into a sentence: which rank waited for whom, for what, and what was there instead.
#pragma once

#include <sstream>
#include <string>

#include "protocol/signal.h"
#include "protocol/workspace.h"

namespace flashmoe {

inline std::string describe_tag(const CallTag& t) {
  static constexpr const char* kDTypes[] = {"float32", "bfloat16", "float16"};
  static constexpr const char* kActivations[] = {"silu", "gelu", "gelu_tanh", "relu"};
  std::ostringstream s;
  s << "layer " << t.layer << " (hidden_size " << t.hidden_size << ", intermediate_size " << t.intermediate_size
    << ", num_experts " << t.num_experts << ", " << kDTypes[t.dtype % 3] << ", " << (t.gated ? "gated " : "")
    << kActivations[t.activation % 4] << ", biases " << int(t.has_bias) << ", placement " << std::hex << t.placement << ")";
  return s.str();
}

inline std::string describe_wait(const Call& call, const Status& status) {
  std::ostringstream s;
  const uint64_t epoch = signal_epoch(status.seen);
  switch (Phase(status.phase)) {
    case Phase::kHeader: s << "the packet header of rank " << status.peer; break;
    case Phase::kChunk: s << "token rows of rank " << status.peer; break;
    case Phase::kResults: s << "results of rank " << status.peer << ", its expert " << status.expert; break;
    case Phase::kQuiet: return "its own transfers to land";
    case Phase::kNone: return "nothing";
  }
  s << " (expected epoch " << call.epoch << ", seen " << epoch << ")";
  return s.str();
}

inline std::string describe_failure(const std::string& group, const Call& call, const Status& status) {
  std::ostringstream s;
  s << "flashmoe group '" << group << "', rank " << call.ep_rank << ", call " << call.epoch << " of "
    << describe_tag(call.tag) << ": ";
  const double seconds = double(status.waited_ns) * 1e-9;
  switch (Failure(status.failure)) {
    case Failure::kTimeout:
      s << "no progress for " << seconds << " s while waiting for " << describe_wait(call, status)
        << "; FLASHMOE_TIMEOUT_S and FLASHMOE_ENTRY_TIMEOUT_S set the limits";
      break;
    case Failure::kPeerDied:
      s << "the process of rank " << status.peer << " ended while this rank was waiting for "
        << describe_wait(call, status);
      break;
    case Failure::kPeerAborted: {
      static constexpr const char* kWhy[] = {"", "a deadline that passed", "a peer process that ended", "",
                                             "ranks that call different layers"};
      s << "rank " << abort_origin(status.seen) << " aborted because of " << kWhy[abort_failure(status.seen) % 5]
        << " (rank " << abort_about(status.seen) << ")";
      break;
    }
    case Failure::kOtherCall:
      s << "rank " << status.peer << " is calling another layer";
      if (status.has_peer_tag)
        s << ": " << describe_tag(status.peer_tag);
      else
        s << " (call digest " << (signal_payload(status.seen) >> 1) << ", expected " << tag_digest(call.tag) << ")";
      break;
    case Failure::kNone: break;
  }
  s << ". The group cannot be used any more; flashmoe.distributed.init() makes a new one.";
  return s.str();
}

}  // namespace flashmoe
