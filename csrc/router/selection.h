// What a router asks of each token: which experts, and with what weights.
#pragma once

#include <cstddef>
#include <cstdint>

namespace flashmoe {

struct Selection {
  int num_experts, top_k;
  int num_groups;      // of neighbouring experts; divides num_experts
  int open_groups;     // the best so many groups have a part; num_groups: all
  int best_of_group;   // 1 or 2: a group is worth the sum of its so many best
  bool in_each_group;  // top_k / num_groups experts in each group, in place of top_k among all
  // A chosen expert's weight is its score …
  bool softmax;      // … the softmax over the chosen …
  bool renormalize;  // … or divided by the sum of theirs and epsilon
  float epsilon;
  float scale;       // times this
};

// Of T tokens. Addresses of the machine that selects.
struct SelectCall {
  Selection selection;
  int num_tokens;
  const float* scores;  // [T, num_experts]
  const float* bias;    // [num_experts] added to the scores for the selection alone, or null
  int64_t* ids;         // [T, top_k]
  float* weights;       // [T, top_k]
};

}  // namespace flashmoe
