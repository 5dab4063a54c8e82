// A tile's operands: what is multiplied by what, and where the products go. Every thread can find any row of them by
// itself, so an engine is free in how it divides a tile among its threads.
#pragma once

#include "protocol/platform.h"
#include "protocol/row_block.h"
#include "protocol/work.h"

namespace flashmoe {

// hidden[0:num_rows, begin:end) = activation(rows · gate_up^T + bias) of one row block.
struct UpTile {
  int num_rows, begin, end;
  const std::byte* gate_up;  // of the block's expert
  const std::byte* bias;     // of the block's expert, or null
  float* hidden;             // [kBlockM, hidden_stride]
};

// results[0:num_rows, begin:end) = hidden · down^T + bias.
struct DownTile {
  int num_rows, begin, end;
  const std::byte* down;
  const std::byte* bias;
  const float* hidden;
};

template <class P>
FLASHMOE_ROLE UpTile up_tile(const Context<P>& c, const TileShape& tiles, const Work& work) {
  const Call& call = c.call;
  const RowBlock& block = c.ws.ring[work.index];
  const size_t expert = block.local_expert, rows = call.up_rows();
  const int begin = work.part * tiles.up_cols, end = begin + tiles.up_cols;
  return {int(block.num_rows), begin, end < call.intermediate_size ? end : call.intermediate_size,
          call.gate_up_proj + expert * rows * call.row_bytes(),
          call.gate_up_bias ? call.gate_up_bias + expert * rows * dtype_bytes(call.dtype) : nullptr,
          c.ws.hidden + size_t(work.index) * kBlockM * c.ws.hidden_stride};
}

template <class P>
FLASHMOE_ROLE DownTile down_tile(const Context<P>& c, const TileShape& tiles, const Work& work) {
  const Call& call = c.call;
  const RowBlock& block = c.ws.ring[work.index];
  const size_t expert = block.local_expert;
  const int begin = work.part * tiles.down_cols, end = begin + tiles.down_cols;
  return {int(block.num_rows), begin, end < call.hidden_size ? end : call.hidden_size,
          call.down_proj + expert * call.row_bytes() * call.intermediate_size,
          call.down_bias ? call.down_bias + expert * call.row_bytes() : nullptr,
          c.ws.hidden + size_t(work.index) * kBlockM * c.ws.hidden_stride};
}

// Calls f(row in block, address) for rows [begin, begin + num) of the block in ring slot `ring_slot`: canonical rows
// are read where they lie, my own in x, the others' in their inboxes. Nobody merges lists. A backward call's slots hold
// more (for_each_gradient_row).
template <class P, class F>
FLASHMOE_ROLE void for_each_token_row(const Context<P>& c, uint32_t ring_slot, uint32_t begin, uint32_t num, F&& f) {
  const Call& call = c.call;
  const size_t row_bytes = call.row_bytes();
  for_each_run(call, c.ws, c.ws.ring[ring_slot], begin, num, [&](const Run& run) {
    const int source = call.canonical_source(run.source_index);
    const std::byte* base =
        run.source_index == 0 ? call.x : c.platform.heap() + c.layout.inbox_at(call.ep_rank, source, 0, row_bytes);
    const uint32_t* slot = packet_slots_of(c, run.source_index) + run.entry;
    for (uint32_t r = 0; r < run.num_rows; ++r) f(run.row_in_block + r, base + slot[r] * row_bytes);
  });
}

template <class P>
FLASHMOE_ROLE size_t result_offset(const Context<P>& c, const Run& run) {
  return c.layout.result_at(c.ws.packet_row[run.source_index] + run.entry, c.result_bytes());
}
template <class P>
FLASHMOE_ROLE std::byte* result_window(const Context<P>& c, const Run& run, uint32_t ring_slot) {
  const uint32_t slot = c.backward() ? ring_slot % c.blocks_in_flight() : ring_slot;
  const size_t row = size_t(slot) * kBlockM + run.row_in_block;
  std::byte* stage = c.ws.result_stage ? c.ws.result_stage + row * c.result_bytes() : nullptr;
  return c.platform.window(c.call.canonical_source(run.source_index), result_offset(c, run), stage);
}

// The same for where the block's results are written.
template <class P, class F>
FLASHMOE_ROLE void for_each_result_row(const Context<P>& c, uint32_t ring_slot, uint32_t begin, uint32_t num, F&& f) {
  for_each_run(c.call, c.ws, c.ws.ring[ring_slot], begin, num, [&](const Run& run) {
    std::byte* to = result_window(c, run, ring_slot);
    for (uint32_t r = 0; r < run.num_rows; ++r) f(run.row_in_block + r, to + r * c.result_bytes());
  });
}

// One row, for a thread that needs no other.
template <class P>
FLASHMOE_ROLE const std::byte* token_row(const Context<P>& c, uint32_t ring_slot, uint32_t row) {
  const std::byte* address = nullptr;
  for_each_token_row(c, ring_slot, row, 1, [&](uint32_t, const std::byte* a) { address = a; });
  return address;
}
template <class P>
FLASHMOE_ROLE std::byte* result_row(const Context<P>& c, uint32_t ring_slot, uint32_t row) {
  std::byte* address = nullptr;
  for_each_result_row(c, ring_slot, row, 1, [&](uint32_t, std::byte* a) { address = a; });
  return address;
}

// Tokens of a combine task.
struct TokenRange {
  int begin, end;
};
FLASHMOE_HD inline TokenRange combine_tokens(const Call& call, int task) {
  const int begin = task * kCombineTokens, end = begin + kCombineTokens;
  return {begin, end < call.num_tokens ? end : call.num_tokens};
}

// The row that came back for a (token, expert) pair, or null if the pair was dropped.
template <class P>
FLASHMOE_ROLE const std::byte* returned_row(const Context<P>& c, int pair) {
  const int32_t row = c.ws.result_row[pair];
  return row < 0 ? nullptr : c.platform.heap() + c.layout.result_at(size_t(row), c.result_bytes());
}

}  // namespace flashmoe
