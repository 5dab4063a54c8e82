// A row block seen through the tables of the subscriber: which rows of which packets it is made of.
#pragma once

#include "protocol/workspace.h"

namespace flashmoe {

// One piece of a row block: rows of a single source.
struct Run {
  int source_index;       // in canonical order
  uint32_t row_in_block;  // first row
  uint32_t num_rows;
  uint32_t row_in_segment;
  uint32_t entry;  // in the source's packet, of the first row
};

// Calls f(run) for each source that has rows among rows [row_in_block, row_in_block + rows) of the block. A block is
// formed from decided sources only, and a decided source's tables never change.
template <class F>
FLASHMOE_ROLE void for_each_run(const Call& call, const Workspace& ws, const RowBlock& block, uint32_t row_in_block,
                                uint32_t rows, F&& f) {
  const int experts = call.num_local_experts(), expert = block.local_expert;
  const uint32_t begin = block.row_begin + row_in_block;
  for (int i = 0; i < block.num_sources; ++i) {
    const uint32_t* entry_begin = ws.entry_begin + i * (experts + 1) + expert;
    const uint32_t first = ws.row_offset[i * experts + expert], last = ws.row_offset[(i + 1) * experts + expert];
    const uint32_t from = first > begin ? first : begin;
    const uint32_t to = last < begin + rows ? last : begin + rows;
    if (from < to) f(Run{i, from - block.row_begin, to - from, from - first, entry_begin[0] + from - first});
  }
}

// The slots of a packet's entries: rows of x for my own packet, rows of the source's inbox otherwise.
template <class P>
FLASHMOE_ROLE const uint32_t* packet_slots_of(const Context<P>& c, int source_index) {
  if (source_index == 0) return c.ws.row_slot + c.ws.packet_row[0];
  const int source = c.call.canonical_source(source_index);
  return header_entry_slot(c.platform.heap() + c.layout.header_at(c.call.ep_rank, source), c.call.num_local_experts());
}

// The top-k weights of the same entries, in a backward call.
template <class P>
FLASHMOE_ROLE const float* packet_weights_of(const Context<P>& c, int source_index) {
  if (source_index == 0) return c.backward_tables().row_weight + c.ws.packet_row[0];
  const int experts = c.call.num_local_experts();
  const uint32_t entries = c.ws.entry_begin[source_index * (experts + 1) + experts];
  return reinterpret_cast<const float*>(packet_slots_of(c, source_index) + entries);
}

}  // namespace flashmoe
