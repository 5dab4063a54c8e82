// Whole calls of a layer so small that their fixed cost is all that is seen: an epoch of the protocol.
#pragma once

#include "../cpp/tiny_call.h"
#include "stretch.h"

namespace flashmoe::micro {

// Seconds of each of `n` calls of rank 0 and one of the numbers that they compute, all of which are the same. Ranks are
// threads of one worker each that send `num_tokens` tokens to the next rank's experts; with a seed, by the rehearsal
// network.
inline std::pair<double, float> tiny_calls(int ep_size, int num_tokens, std::optional<uint64_t> remote_only_seed,
                                           int n) {
  GroupOptions options;
  options.name = "tiny calls", options.limits = {ep_size, 8, kHidden * 4, kTopK, kExperts};
  options.remote_only_seed = remote_only_seed, options.timeout_s = options.entry_timeout_s = 20;
  const auto team = ep_size == 1 ? std::vector{make_local_group(1)} : make_local_team(options);
  float y = 0;
  const double seconds = together(ep_size, [&](int rank) {
    TinyCall call(num_tokens, ep_size, (rank + 1) % ep_size * (kExperts / ep_size));
    team[rank]->forward(call.args);  // the first call's memory is no cost of every call
    const double each = seconds_each(n, [&](int) { team[rank]->forward(call.args); });
    if (rank == 0 && num_tokens) y = call.y.back();
    return each;
  });
  return {seconds, y};
}

}  // namespace flashmoe::micro
