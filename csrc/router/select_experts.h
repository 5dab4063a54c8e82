// One token's experts and weights, from its scores. By lanes of any number.
//
// A score and its index make one number that no other expert has, so the next best is the largest below the last:
// nothing is sorted, and nothing is marked as taken.
#pragma once

#include <cmath>
#include <cstring>

#include "protocol/group.h"
#include "router/selection.h"

namespace flashmoe {

// Orders as scores do, equal scores by the lowest index; NaN comes before all. Never 0, the rank of nobody.
FLASHMOE_HD inline uint64_t score_rank(float score, int index) {
  uint32_t bits;
  memcpy(&bits, &score, sizeof bits);
  bits = score != score ? ~1u : bits >> 31 ? ~bits : bits | 1u << 31;
  return uint64_t(bits) << 32 | uint32_t(~index);
}
FLASHMOE_HD inline int ranked_index(uint64_t rank) { return int(~uint32_t(rank)); }
FLASHMOE_HD inline float ranked_score(uint64_t rank) {
  const uint32_t high = uint32_t(rank >> 32), bits = high >> 31 ? high & ~(1u << 31) : ~high;
  float score;
  memcpy(&score, &bits, sizeof score);
  return score;
}
inline constexpr uint64_t kAboveAllRanks = ~uint64_t{0};

// The best of [begin, end) below `last`; 0: there is none.
template <LaneGroup Lanes>
FLASHMOE_ROLE uint64_t next_best(const Lanes& lanes, const uint64_t* ranks, int begin, int end, uint64_t last) {
  uint64_t best = 0;
  for (int i = begin + lanes.rank(); i < end; i += lanes.size()) {
    const uint64_t rank = ranks[i] < last ? ranks[i] : 0;
    best = rank > best ? rank : best;
  }
  return lanes.largest(best);
}

// Leaves no rank to the experts of all but the best groups. worth: [num_groups]
template <LaneGroup Lanes>
FLASHMOE_ROLE void close_groups(const Lanes& lanes, const Selection& s, uint64_t* ranks, uint64_t* worth) {
  const int size = s.num_experts / s.num_groups;
  for (int g = 0; g < s.num_groups; ++g) {
    float sum = 0.0f;
    uint64_t last = kAboveAllRanks;
    for (int i = 0; i < s.best_of_group && i < size; ++i) {
      last = next_best(lanes, ranks, g * size, (g + 1) * size, last);
      sum += ranked_score(last);
    }
    if (lanes.rank() == 0) worth[g] = score_rank(sum, g);
  }
  lanes.sync();
  uint64_t last = kAboveAllRanks;
  for (int i = 0; i < s.open_groups; ++i) last = next_best(lanes, worth, 0, s.num_groups, last);
  for (int g = 0; g < s.num_groups; ++g)
    for (int i = lanes.rank(); i < size && worth[g] < last; i += lanes.size()) ranks[g * size + i] = 0;
  lanes.sync();
}

// ranks: memory of the lanes' own, [num_experts + num_groups].
template <LaneGroup Lanes>
FLASHMOE_ROLE void select_experts(const Lanes& lanes, const Selection& s, const float* scores, const float* bias,
                                  uint64_t* ranks, int64_t* ids, float* weights) {
  for (int e = lanes.rank(); e < s.num_experts; e += lanes.size())
    ranks[e] = score_rank(bias ? scores[e] + bias[e] : scores[e], e);
  lanes.sync();
  if (s.open_groups < s.num_groups) close_groups(lanes, s, ranks, ranks + s.num_experts);

  const int ranges = s.in_each_group ? s.num_groups : 1, size = s.num_experts / ranges, share = s.top_k / ranges;
  float best = 0.0f, sum = 0.0f;
  for (int range = 0, j = 0; range < ranges; ++range) {
    uint64_t last = kAboveAllRanks;
    for (int i = 0; i < share; ++i, ++j) {
      last = next_best(lanes, ranks, range * size, (range + 1) * size, last);
      const float score = scores[ranked_index(last)];
      if (j == 0) best = score;
      sum += s.softmax ? expf(score - best) : score;
      if (lanes.rank() == 0) ids[j] = ranked_index(last);
    }
  }
  lanes.sync();
  const float divisor = s.softmax ? sum : s.renormalize ? sum + s.epsilon : 1.0f;
  for (int j = lanes.rank(); j < s.top_k; j += lanes.size()) {
    const float score = scores[ids[j]];
    weights[j] = (s.softmax ? expf(score - best) : score) / divisor * s.scale;
  }
}

}  // namespace flashmoe
