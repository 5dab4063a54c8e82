// Where everything that a peer may write lies: one table from region to offset in a rank's symmetric heap.
// All ranks of a group use the same table, so an offset names the same thing everywhere.
//
// Regions written by a peer are indexed by that peer; results are placed by their reader (design D4).
#pragma once

#include "protocol/packet.h"

namespace flashmoe {

struct HeapLayout {
  static constexpr size_t kAlign = 128;  // a signal never shares its line with rows

  Limits limits;
  size_t max_chunks, max_result_rows, max_result_signals;
  size_t header_stride, inbox_stride;
  // offsets in the heap
  size_t abort, header_signal, chunk_signal, result_signal, release_signal, header, inbox, results;
  size_t bytes;

  FLASHMOE_HD explicit HeapLayout(const Limits& l) : limits(l) {
    const size_t ep_size = size_t(l.ep_size), peers = ep_size - 1;
    max_chunks = ceil_div<size_t>(l.max_tokens, kChunkRows);
    max_result_rows = size_t(l.max_tokens) * l.max_top_k;
    const size_t max_segments = max_result_rows < size_t(l.max_experts) ? max_result_rows : l.max_experts;
    max_result_signals = ceil_div<size_t>(max_result_rows, kBlockM) + 2 * max_segments;
    header_stride = round_up(header_bytes(l.max_experts, max_result_rows, l.backward), kAlign);
    inbox_stride = round_up(size_t(l.max_tokens) * l.max_wire_bytes * (l.backward ? 2 : 1), kAlign);

    size_t end = 0;
    auto region = [&end](size_t size) {
      const size_t begin = end;
      end += round_up(size, kAlign);
      return begin;
    };
    abort = region(sizeof(uint64_t) * ep_size);
    header_signal = region(sizeof(uint64_t) * ep_size);
    chunk_signal = region(sizeof(uint64_t) * ep_size * max_chunks);
    result_signal = region(sizeof(uint64_t) * max_result_signals);
    release_signal = region(l.backward ? sizeof(uint64_t) * l.max_experts : 0);
    header = region(header_stride * peers);
    inbox = region(inbox_stride * peers);
    results = region(max_result_rows * max_result_bytes());
    bytes = end;
  }

  FLASHMOE_HD size_t max_result_bytes() const {
    return limits.backward ? backward_result_bytes(limits.max_wire_bytes) : limits.max_wire_bytes;
  }
  FLASHMOE_HD size_t abort_at(int from) const { return abort + sizeof(uint64_t) * from; }
  FLASHMOE_HD size_t header_signal_at(int source) const { return header_signal + sizeof(uint64_t) * source; }
  FLASHMOE_HD size_t chunk_signal_at(int source, uint32_t chunk) const {
    return chunk_signal + sizeof(uint64_t) * (source * max_chunks + chunk);
  }
  FLASHMOE_HD size_t result_signal_at(uint32_t index) const { return result_signal + sizeof(uint64_t) * index; }
  FLASHMOE_HD size_t release_signal_at(int position) const { return release_signal + sizeof(uint64_t) * position; }
  FLASHMOE_HD size_t header_at(int owner, int source) const {
    return header + header_stride * peer_index(owner, source);
  }
  FLASHMOE_HD size_t inbox_at(int owner, int source, size_t slot, size_t slot_bytes) const {
    return inbox + inbox_stride * peer_index(owner, source) + slot * slot_bytes;
  }
  FLASHMOE_HD size_t result_at(size_t row, size_t result_bytes) const { return results + row * result_bytes; }

  // A rank keeps no inbox for itself: the other ranks are numbered without it.
  FLASHMOE_HD static size_t peer_index(int owner, int peer) { return size_t(peer < owner ? peer : peer - 1); }
};

}  // namespace flashmoe
