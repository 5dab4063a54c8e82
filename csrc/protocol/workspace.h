// A rank's own memory for one call: nothing here is ever touched by a peer. One table, as for the heap.
#pragma once

#include "protocol/heap_layout.h"
#include "protocol/platform.h"
#include "protocol/task.h"

namespace flashmoe {

// Why a call ended early. The first to notice writes it; everyone leaves the loop.
enum class Phase : uint32_t { kNone, kHeader, kChunk, kResults, kRelease, kQuiet };
enum class Failure : uint32_t { kNone, kTimeout, kPeerDied, kPeerAborted, kOtherCall, kBadId, kNoRoom };

struct Status {
  uint32_t claimed;  // 0 → 1 by the one who fills in the rest
  uint32_t failure;  // Failure, published last
  uint32_t phase;
  int32_t peer;
  int32_t expert;  // local to `peer`, or -1
  uint64_t epoch;  // of the call
  CallTag tag;     // of the call
  uint64_t seen;   // the word that was there instead; kBadId: the id; kNoRoom: rows that came
  uint64_t waited_ns;
  CallTag peer_tag;  // kOtherCall, where the packet had rows
  uint32_t has_peer_tag;
  int32_t token, choice;  // kBadId: of whom
  uint64_t room;          // kNoRoom: for so many rows
};

// What the machine that computes the call adds to its shapes.
struct Machine {
  bool staged = false;            // some peers' memory is not mapped here
  std::byte* stage = nullptr;     // where what travels to them lies until then, if the transport takes no other memory
  uint32_t max_ring_blocks = 16;  // published and not yet returned at one time: bounds the memory under any skew
  uint32_t max_backward_blocks = ~uint32_t(0);  // in all of a backward call, which ends with kNoRoom if it needs more
  uint32_t num_workers = 1;       // that take tiles at one time
  int plan_warps = 1;             // of the group that plans
  int hidden_bytes = 4;           // of an element of `hidden`, whose type is the engine's choice
};

// The counters that start every call at zero.
struct Counters {
  uint32_t plan_claimed, plan_ready;
  uint32_t send_tasks;  // written by the plan
  uint32_t send_head, sends_done;
  uint32_t subscriber_lock, headers_known, subscriber_done;
  uint32_t scheduler_lock, scheduler_done;
  uint32_t blocks_done;
  uint32_t combine_head, combine_done;
  uint32_t grad_head, experts_released;  // of a backward call
  uint32_t stopped;            // workers, where they do not end together
  uint32_t pairs_from_bad_id;  // to the last, where ids are only read as the call begins; 0 if none is bad
  uint32_t quiet, settling;             // where all workers share a transport: how far they have come with asking it …
  uint64_t quiet_ticket, settle_ticket;  // … and what they asked
  uint64_t last_progress_ns;
  UpQueue up;
  DownQueue down;
};

// Memory of what travels to peers that are not mapped here, until it has landed: packets by peer, results by ring slot.
FLASHMOE_HD inline size_t packet_stage_bytes(const HeapLayout& layout) {
  return size_t(layout.limits.ep_size - 1) * (layout.header_stride + layout.inbox_stride);
}
FLASHMOE_HD inline size_t stage_bytes(const HeapLayout& layout, uint32_t ring_blocks) {
  return packet_stage_bytes(layout) + size_t(ring_blocks) * kBlockM * layout.max_result_bytes();
}

// Where a row of a backward call came from: what an engine may keep, so that it need not be looked up again.
struct RowOrigin {
  const std::byte *x, *dy;
  float weight;
};

// Elements of one row of `hidden` in a backward call, of the engine's type: the gradients of gate and up, the activated
// hidden row, and parts of its product with their gradient. These are floats, of 16 columns or more each where elements
// are floats. Where elements are half as large, of 32 or more; and there is room behind them for the row's origin.
FLASHMOE_HD inline size_t floats_of_dots(const Call& call) {
  return round_up(ceil_div(call.intermediate_size, 32), 16 / sizeof(float));
}
FLASHMOE_HD inline size_t backward_hidden_width(const Call& call) {
  return size_t(call.up_rows()) + call.intermediate_size + 2 * floats_of_dots(call) + sizeof(RowOrigin) / 2;
}

// What a backward call needs besides. Each expert's row blocks are a list, by sequence number.
struct BackwardTables {
  uint32_t* first_block;   // [num_local_experts]
  uint32_t* last_block;    // [num_local_experts] published so far
  uint32_t* blocks_ready;  // [num_local_experts] those whose up tiles have ended
  uint32_t* grads_done;    // [num_local_experts] grad tiles that have
  uint32_t* following;     // [ring_blocks] the expert's next block
  float* row_weight;       // [num_tokens · top_k] top-k weight of each result row
};

// Under the worst routing.
FLASHMOE_HD inline size_t most_row_blocks(const Call& call, const HeapLayout& layout) {
  const size_t rows = size_t(call.num_tokens) * call.top_k + size_t(call.ep_size - 1) * layout.max_result_rows;
  const size_t local = call.num_local_experts();
  return rows / kBlockM + (local < rows ? local : rows) + 1;
}

struct Workspace {
  Counters* counters;
  Status* status;

  uint64_t* sent;  // [ep_size, kTrafficKinds] bytes handed to the transport, where the platform counts them here

  // The plan of my own tokens (dispatcher). Position and row arrays are result rows, packet by packet.
  uint32_t* segment_row;     // [num_experts + 1] first result row of each position
  uint32_t* segment_signal;  // [num_experts + 1] first result signal of each position
  int32_t* result_row;       // [num_tokens, top_k] result row of each pair, or -1
  uint32_t* row_token;       // [num_tokens · top_k] token of each result row
  uint32_t* row_slot;        // [num_tokens · top_k] its slot in the destination's inbox
  uint32_t* slot_token;      // [min(ep_size, top_k) · num_tokens] token of each slot, destination by destination
  uint32_t* slot_begin;      // [ep_size] place in slot_token of each destination's first slot
  uint32_t* num_slots;       // [ep_size] distinct tokens that travel to each destination
  uint32_t* dealt;           // [plan_warps, num_experts] scratch: rows of each position that lie before the warp's next
  uint32_t* slots_before;    // [num_tokens · top_k + 1] scratch: slots of all destinations before that of each row


  // What the sources sent (subscriber). Sources in canonical order.
  uint32_t* entry_begin;   // [ep_size, num_local_experts + 1] the packets' own prefix sums
  uint32_t* row_offset;    // [ep_size + 1, num_local_experts] where a source's rows begin in the canonical list;
                           // row i is written once, before headers_known says i
  uint32_t* run_signal;    // [ep_size, num_local_experts] first result signal of the segment, at the source
  uint32_t* packet_row;    // [ep_size] results row of the packet's entry 0, at the source
  uint32_t* num_chunks;    // [ep_size]
  uint32_t* chunks_ready;  // [ep_size] leading chunks that are here

  // Row blocks (scheduler, processors).
  uint32_t* next_block;    // [num_local_experts] blocks published so far
  RowBlock* ring;          // [ring_blocks]
  uint32_t* ring_free;     // [blocks_in_flight] sequence number of the block that may be published next
  Bundle* bundles;         // [num_bundle_places] of each block
  uint64_t* down_entries;  // [num_down_places]
  float* hidden;           // [ring_blocks, kBlockM, hidden_stride] activated up-tile outputs, of the engine's type; of
                           // a backward call see protocol/backward.h, and its tables lie behind them

  // Only where peers are not mapped: which blocks' results are on their way, and what travels, until it has landed.
  uint32_t* ring_sent;      // [blocks_in_flight] the number that ring_free will have once the results have landed
  uint32_t* ring_landing;   // [blocks_in_flight] what ring_sent was when the transport was last asked
  std::byte* packet_stage;  // [ep_size − 1, header_stride + inbox_stride]
  std::byte* result_stage;  // [blocks_in_flight, kBlockM, row_bytes]

  // Row blocks that have been published and whose results have not yet left, and those that have room in `hidden`: in a
  // forward call the same.
  uint32_t blocks_in_flight, ring_blocks, num_workers;
  size_t hidden_stride;  // floats, also where an element is smaller
  size_t bytes;

  // Lays the table out from `base`; with a null base it only measures (`bytes`).
  FLASHMOE_HD Workspace(const Call& call, const HeapLayout& layout, const Machine& machine, std::byte* base) : bytes(0) {
    const size_t ep_size = call.ep_size, local = call.num_local_experts(), experts = call.num_experts;
    const size_t tokens = call.num_tokens, pairs = tokens * call.top_k;
    const size_t most_blocks = most_row_blocks(call, layout);
    // Weight gradients are sums over all rows of an expert: what they are made of stays until the end of the call.
    const bool backward = call.tag.backward();
    const auto at_most = [&](uint32_t bound) { return bound < most_blocks ? bound : uint32_t(most_blocks); };
    ring_blocks = at_most(backward ? machine.max_backward_blocks : machine.max_ring_blocks);
    blocks_in_flight = ring_blocks < machine.max_ring_blocks ? ring_blocks : machine.max_ring_blocks;
    num_workers = machine.num_workers;
    const size_t width = backward ? backward_hidden_width(call) : call.intermediate_size;
    hidden_stride = round_up(width * machine.hidden_bytes, 64) / sizeof(float);

    auto region = [&]<class T>(T*& pointer, size_t count) {
      pointer = base ? reinterpret_cast<T*>(base + bytes) : nullptr;
      bytes += round_up(count * sizeof(T), 64);
    };
    region(counters, 1);
    region(status, 1);
    region(sent, ep_size * kTrafficKinds);
    region(segment_row, experts + 1);
    region(segment_signal, experts + 1);
    region(result_row, pairs);
    region(row_token, pairs);
    region(row_slot, pairs);
    region(slot_token, tokens * (ep_size < size_t(call.top_k) ? ep_size : call.top_k));
    region(slot_begin, ep_size);
    region(num_slots, ep_size);
    region(dealt, machine.plan_warps * experts);
    region(slots_before, pairs + 1);
    region(entry_begin, ep_size * (local + 1));
    region(row_offset, (ep_size + 1) * local);
    region(run_signal, ep_size * local);
    region(packet_row, ep_size);
    region(num_chunks, ep_size);
    region(chunks_ready, ep_size);
    region(next_block, local);
    region(ring, ring_blocks);
    region(ring_free, blocks_in_flight);
    region(bundles, num_bundle_places(ring_blocks));
    region(down_entries, num_down_places(ring_blocks));
    region(hidden, hidden_floats() + (backward ? 4 * local + ring_blocks + pairs : 0));
    ring_sent = ring_landing = nullptr, packet_stage = result_stage = nullptr;
    if (!machine.staged) return;
    region(ring_sent, blocks_in_flight);
    region(ring_landing, blocks_in_flight);
    if (machine.stage) {
      packet_stage = machine.stage, result_stage = machine.stage + packet_stage_bytes(layout);
    } else {
      region(packet_stage, packet_stage_bytes(layout));
      region(result_stage, blocks_in_flight * kBlockM * call.result_bytes());
    }
  }

  FLASHMOE_HD size_t hidden_floats() const { return ring_blocks * kBlockM * hidden_stride; }
  // They have no pointers here: all of a workspace's are in registers where a GPU's call begins, and forward calls have
  // no use for these.
  FLASHMOE_HD BackwardTables of_backward(const Call& call) const {
    const size_t local = call.num_local_experts();
    uint32_t* first = reinterpret_cast<uint32_t*>(hidden + hidden_floats());
    uint32_t* following = first + 4 * local;
    return {first, first + local, first + 2 * local, first + 3 * local, following,
            reinterpret_cast<float*>(following + ring_blocks)};
  }

  // Before the first worker enters the call.
  template <class Group>
  FLASHMOE_ROLE void reset(const Group& group, const Call& call, uint64_t now_ns) {
    if (group.rank() == 0) {
      *counters = Counters{};
      counters->last_progress_ns = now_ns;
      *status = Status{};
      status->epoch = call.epoch, status->tag = call.tag;
    }
    for (int i = group.rank(); i < call.ep_size; i += group.size()) num_chunks[i] = chunks_ready[i] = 0;
    for (int i = group.rank(); i < call.ep_size * kTrafficKinds; i += group.size()) sent[i] = 0;
    for (int e = group.rank(); e < call.num_local_experts(); e += group.size()) row_offset[e] = next_block[e] = 0;
    for (int e = group.rank(); call.tag.backward() && e < call.num_local_experts(); e += group.size()) {
      const BackwardTables tables = of_backward(call);
      tables.blocks_ready[e] = tables.grads_done[e] = 0;
    }
    for (uint32_t r = group.rank(); r < blocks_in_flight; r += group.size()) {
      ring_free[r] = r;
      if (ring_sent) ring_sent[r] = r;
    }
    for (uint32_t p = group.rank(); p < num_down_places(ring_blocks); p += group.size()) down_entries[p] = 0;
  }
};

// Everything a role works on.
template <class P>
struct Context {
  const Call& call;
  const HeapLayout& layout;
  Workspace& ws;
  P& platform;

  FLASHMOE_HD bool backward() const {
    if constexpr (P::kBackward) return call.tag.backward();
    return false;
  }
  // In a forward call all that the ring holds.
  FLASHMOE_HD uint32_t blocks_in_flight() const { return backward() ? ws.blocks_in_flight : ws.ring_blocks; }
  FLASHMOE_HD BackwardTables backward_tables() const { return ws.of_backward(call); }
  FLASHMOE_HD size_t slot_bytes() const { return backward() ? call.slot_bytes() : call.row_bytes(); }
  FLASHMOE_HD size_t result_bytes() const { return backward() ? call.result_bytes() : call.row_bytes(); }

  FLASHMOE_HD std::byte* header_stage(int pe) const {
    if (!ws.packet_stage || pe == call.ep_rank) return nullptr;
    return ws.packet_stage + HeapLayout::peer_index(call.ep_rank, pe) * (layout.header_stride + layout.inbox_stride);
  }
  FLASHMOE_HD std::byte* inbox_stage(int pe, size_t slot) const {
    std::byte* stage = header_stage(pe);
    return stage ? stage + layout.header_stride + slot * slot_bytes() : nullptr;
  }
};

// Ends the call: who first finds that it cannot be completed says why, and fill(status) what is known. By one thread.
template <class P, class F>
FLASHMOE_ROLE void fail_call(const Context<P>& c, Failure failure, F&& fill) {
  Status& status = *c.ws.status;
  if (!P::compare_exchange(&status.claimed, 0, 1)) return;
  fill(status);
  P::store_release(&status.failure, uint32_t(failure));
}

}  // namespace flashmoe
