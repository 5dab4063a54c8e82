// What the transport counted against what the routing says must travel: each row once per destination, each result
// once, headers without padding, one signal per header, chunk and run, and of a backward call one per release, and
// nothing else.
#include "expected_bytes.h"
#include "gradient_team.h"

namespace {

using namespace flashmoe;
using namespace flashmoe::test;

Bytes counted(const Group& group) {
  const GroupStats s = group.stats();
  return {s.header, s.rows, s.results, s.signals, s.tokens_per_expert};
}

void byte_counts_match_plan() {
  const Layer layer({.hidden_size = 24, .intermediate_size = 16, .num_experts = 12, .top_k = 4}, 1);
  const Layer halves({.hidden_size = 16, .intermediate_size = 16, .num_experts = 12, .top_k = 3, .dtype = DType::kBFloat16}, 2);
  bool dedup_matters = false;
  for (int ep_size : {1, 2, 3, 4})
    for (bool remote_only : {false, true})
      for (int variant = 0; variant < 6; ++variant) {
        const Layer& l = variant % 2 ? halves : layer;
        CallOfAll call{&l, {}, std::nullopt};
        if (variant >= 2) {
          call.map.emplace();
          for (int e = 0; e < 12; ++e) call.map->push_back(e * e % 7 % ep_size);
        }
        for (int r = 0; r < ep_size; ++r)
          call.tokens.push_back(draw_tokens(l, variant == 4 && r == 0 ? 0 : 100 + 61 * r, variant * 10 + r, variant >= 4 ? Skew::kDropSome : Skew::kZipf));
        TeamOptions options{.ep_size = ep_size};
        if (remote_only) options.remote_only_seed = variant;
        for (bool backward : {false, true}) {
          // The other kind first, for these are the counts of the last call.
          const PassOfAll other = backward ? PassOfAll{call} : backward_of(call, 1);
          const Passes passes{other, backward ? backward_of(call, 1) : PassOfAll{call}};
          options.backward = true;
          const Team team = make_team(calls_of(passes), options);
          check(run_passes(team, passes).ok(), "the calls end well");
          for (int r = 0; r < ep_size; ++r) {
            const Bytes want = expected(call, r, true, backward), got = counted(*team[r]);
            check(got == want, std::to_string(ep_size) + " ranks, rank " + std::to_string(r) + (backward ? ", backward" : "") +
                                   "\n    counted  " + text(got) + "\n    expected " + text(want));
            dedup_matters = dedup_matters || !(got == expected(call, r, false, backward));
          }
        }
      }
  check_caught(dedup_matters, "a row that travels once per expert");
}

}  // namespace

int main() {
  run_test("ByteCountsMatchPlan", byte_counts_match_plan);
  return finish();
}
