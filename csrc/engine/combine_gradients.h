// What a combine of a backward call does besides summing rows.
#pragma once

#include "gpu/verbs.h"
#include "protocol/backward.h"
#include "protocol/tile.h"

namespace flashmoe {

// The gradients of the tokens' top-k weights, which came with the rows.
template <class Group, class P>
FLASHMOE_DEVICE void take_weight_gradients(const Group& group, const Context<P>& c, const Work& work) {
  const Call& call = c.call;
  const TokenRange tokens = combine_tokens(call, work.index);
  for (int pair = tokens.begin * call.top_k + group.rank(); pair < tokens.end * call.top_k; pair += group.size()) {
    const std::byte* row = returned_row(c, pair);
    call.grad.topk_weights[pair] =
        row ? gpu::load_coherent(reinterpret_cast<const float*>(row + weight_gradient_at(call))) : 0.0f;
  }
}

}  // namespace flashmoe
