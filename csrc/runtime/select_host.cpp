#include <vector>

#include "router/select_experts.h"
#include "runtime/select.h"

namespace flashmoe {

void select_on_host(const SelectCall& call) {
  const Selection& s = call.selection;
  std::vector<uint64_t> ranks(size_t(s.num_experts) + s.num_groups);
  for (size_t t = 0; t < size_t(call.num_tokens); ++t)
    select_experts(Alone{}, s, call.scores + t * s.num_experts, call.bias, ranks.data(), call.ids + t * s.top_k,
                   call.weights + t * s.top_k);
}

}  // namespace flashmoe
