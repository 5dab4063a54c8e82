// The combine of every GPU engine: a token's rows, weighted and summed in fp32.
#pragma once

#include "engine/exact_element.h"
#include "protocol/tile.h"

namespace flashmoe {

// Rows are loaded several at a time: each is a walk to memory. kWeighted: else they have been weighted where they come
// from.
template <DType dtype, int kElements, bool kWeighted, class P>
FLASHMOE_DEVICE void combine_piece(const Context<P>& c, int token, int at) {
  constexpr int kAtOnce = 4;
  const Call& call = c.call;
  const int end = (token + 1) * call.top_k;
  float sum[kElements] = {};
  for (int first = token * call.top_k; first < end; first += kAtOnce) {
    const std::byte* row[kAtOnce];
    float value[kAtOnce][kElements] = {};
    FLASHMOE_UNROLL
    for (int i = 0; i < kAtOnce; ++i) row[i] = first + i < end ? returned_row(c, first + i) : nullptr;
    FLASHMOE_UNROLL
    for (int i = 0; i < kAtOnce; ++i)
      if (row[i]) load_elements<dtype>(row[i], at, value[i]);
    FLASHMOE_UNROLL
    for (int i = 0; i < kAtOnce; ++i)
      for (int e = 0; row[i] && e < kElements; ++e)
        sum[e] = kWeighted ? fmaf(call.topk_weights[first + i], value[i][e], sum[e]) : sum[e] + value[i][e];
  }
  store_elements<dtype>(call.y + size_t(token) * call.row_bytes(), at, sum);
}

template <DType dtype, int kElements, bool kWeighted, class Group, class P>
FLASHMOE_DEVICE void combine_rows_by(const Group& group, const Context<P>& c, const TokenRange& tokens) {
  const auto lanes = group.lanes();
  const int width = lanes.size() * kElements, pieces = ceil_div(c.call.hidden_size, width);
  for (int i = group.warp(); i < (tokens.end - tokens.begin) * pieces; i += group.num_warps()) {
    const int at = i % pieces * width + lanes.rank() * kElements;
    if (at < c.call.hidden_size) combine_piece<dtype, kElements, kWeighted>(c, tokens.begin + i / pieces, at);
  }
}

// A token's rows are summed in the order of its routing, whatever the order of their arrival. Warps take pieces of
// tokens, so that few tokens, or a single one, keep all of them busy.
template <DType dtype, bool kWeighted = true, class Group, class P>
FLASHMOE_DEVICE void combine_rows(const Group& group, const Context<P>& c, const Work& work) {
  const TokenRange tokens = combine_tokens(c.call, work.index);
  has_whole_pieces(c.call) ? combine_rows_by<dtype, kPerPiece<dtype>, kWeighted>(group, c, tokens)
                           : combine_rows_by<dtype, 1, kWeighted>(group, c, tokens);
}

}  // namespace flashmoe
