// What a forward call keeps for its backward call: the sums of its up products, in fp32 and without bias, so that what is
// made of them has the same bits as if they were made again.
//
// The rows of an expert have one order in both calls, and so one division into row blocks. Which memory a block gets in
// the forward call depends on when its rows arrive; the backward call finds it by expert and place.
#pragma once

#include "protocol/workspace.h"

namespace flashmoe {

template <class P>
uint32_t& kept_place(const Context<P>& c, const RowBlock& block) {
  const KeptSums& kept = c.call.kept;
  return kept.place[size_t(block.local_expert) * kept.blocks_of_expert + block.row_begin / kBlockM];
}

// [kBlockM, up_rows], where a forward call's block in that ring slot leaves its sums; null if none are to be kept.
template <class P>
float* sums_to_keep(const Context<P>& c, uint32_t ring_slot) {
  if (!c.call.kept.sums) return nullptr;
  const RowBlock& block = c.ws.ring[ring_slot];
  return c.call.kept.sums + size_t(block.sequence) * kBlockM * c.call.up_rows();
}

// By one of the block's tiles.
template <class P>
void note_kept(const Context<P>& c, uint32_t ring_slot) {
  const RowBlock& block = c.ws.ring[ring_slot];
  kept_place(c, block) = block.sequence + 1;
}

// Of a backward call's block; null if they must be made again.
template <class P>
const float* kept_sums(const Context<P>& c, uint32_t ring_slot) {
  if (!c.call.kept.sums) return nullptr;
  const uint32_t place = kept_place(c, c.ws.ring[ring_slot]);
  return place ? c.call.kept.sums + size_t(place - 1) * kBlockM * c.call.up_rows() : nullptr;
}

}  // namespace flashmoe
