// The packet of one (source, destination) pair, and the way its results are numbered on the way back.
//
// header   PacketHeader, entry_begin[num_local_experts + 1], entry_slot[num_entries];
//          of a backward call also entry_weight[num_entries], the pairs' top-k weights
//          entry j of the packet is one (token, expert) pair: expert-major, tokens in order inside an expert
// chunks   the distinct token rows, slot by slot; slots are ordered by the first expert that needs them.
//          Of a backward call a slot holds the row of x, then that of y's gradient
// results  entry j comes back as row result_row + j of the source's results region
//
// An expert's entries in one packet are a *segment*. The destination merges the segments of all sources into
// the expert's canonical list and cuts that list into row blocks, so a segment comes back in *runs*: pieces of
// it that lie in one row block. Each run has one signal at the source.
#pragma once

#include "protocol/config.h"

namespace flashmoe {

struct PacketHeader {
  CallTag tag;
  uint32_t num_slots;
  uint32_t num_entries;
  uint32_t result_row;     // at the source: results row of entry 0
  uint32_t result_signal;  // at the source: index of the first result signal of this packet
};

// Result signals set aside for a segment of n rows: the first run may be cut short by the row block it
// shares with other sources, all further ones begin at a row block.
FLASHMOE_HD constexpr uint32_t max_runs(uint32_t rows) {
  return rows == 0 ? 0 : ceil_div<uint32_t>(rows, kBlockM) + 1;
}

// Rows of the first run of a segment that begins at `offset` of the canonical list.
FLASHMOE_HD constexpr uint32_t first_run_rows(uint32_t offset, uint32_t rows) {
  const uint32_t room = kBlockM - offset % kBlockM;
  return rows < room ? rows : room;
}

// Which run of its segment a row is in. The source learns `first_run` from the payload of run 0's signal,
// and so needs to know nothing of other sources' counts.
FLASHMOE_HD constexpr uint32_t run_of_row(uint32_t row_in_segment, uint32_t first_run) {
  return row_in_segment < first_run ? 0 : 1 + (row_in_segment - first_run) / kBlockM;
}

FLASHMOE_HD inline uint32_t* header_entry_begin(std::byte* header) {
  return reinterpret_cast<uint32_t*>(header + sizeof(PacketHeader));
}
FLASHMOE_HD inline const uint32_t* header_entry_begin(const std::byte* header) {
  return reinterpret_cast<const uint32_t*>(header + sizeof(PacketHeader));
}
FLASHMOE_HD inline uint32_t* header_entry_slot(std::byte* header, int num_local_experts) {
  return header_entry_begin(header) + num_local_experts + 1;
}
FLASHMOE_HD inline const uint32_t* header_entry_slot(const std::byte* header, int num_local_experts) {
  return header_entry_begin(header) + num_local_experts + 1;
}
FLASHMOE_HD inline float* header_entry_weight(std::byte* header, int num_local_experts, uint32_t num_entries) {
  return reinterpret_cast<float*>(header_entry_slot(header, num_local_experts) + num_entries);
}
FLASHMOE_HD constexpr size_t header_bytes(size_t num_local_experts, size_t num_entries, bool backward) {
  return sizeof(PacketHeader) + sizeof(uint32_t) * (num_local_experts + 1 + (backward ? 2 : 1) * num_entries);
}

}  // namespace flashmoe
