// The GPU platform of a group in which some peers' memory is not mapped: those are reached by put-with-signal, from
// staging that the transport knows, and the others by their addresses, as on platform/cuda.h.
//
// The transport can only be asked about all puts of this GPU at once, and asking is dear. So nobody asks for one row
// block: blocks whose results are on their way gather, and when ring slots run short the scheduler asks for all of
// them. Packets are staged by peer and need no asking: the peer's results say that they have been read, and the end of
// the call asks once for all that has no reply (design D5).
#pragma once

#include "gpu/remote_verbs.h"
#include "platform/cuda.h"
#include "protocol/signal.h"

namespace flashmoe {

class NvshmemPlatform : public CudaPlatform {
 public:
  FLASHMOE_DEVICE NvshmemPlatform(const Call& call, const Peers& peers, const Workspace& workspace)
      : CudaPlatform(call, peers, workspace), peers_(peers), epoch_(call.epoch),
        my_pe_(peers.pes[call.ep_rank]) {}

  FLASHMOE_DEVICE std::byte* window(int pe, size_t offset, std::byte* stage) const {
    return peers_.heaps[pe] ? peers_.heaps[pe] + offset : stage;
  }

  FLASHMOE_DEVICE void commit(int pe, size_t offset, const std::byte* source, size_t bytes, size_t signal,
                              uint64_t word, Traffic kind) {
    if (peers_.heaps[pe]) return CudaPlatform::commit(pe, offset, source, bytes, signal, word, kind);
    count(pe, bytes, kind);
    std::byte* there = peers_.symmetric[pe];
    gpu::remote_put_signal(my_pe_, peers_.pes[pe], there + offset, source, bytes,
                           reinterpret_cast<uint64_t*>(there + signal), word);
    results_on_their_way_ |= kind == Traffic::kResults;
  }

  // Of an older epoch nothing is read but the word itself, so the transport need not be asked.
  FLASHMOE_DEVICE uint64_t test_signal(size_t offset) const {
    const uint64_t word = CudaPlatform::test_signal(offset);
    if (signal_epoch(word) != epoch_) return word;
    return gpu::remote_test(reinterpret_cast<uint64_t*>(heap() + offset), word) ? word : 0;
  }

  // One worker at a time asks, for all of them: each has made its puts before any comes here.
  FLASHMOE_DEVICE bool quiet() {
    Counters& n = *ws_.counters;
    const uint32_t state = load_acquire(&n.quiet);
    if (state == kIsQuiet) return true;
    if (state == kBusy || !compare_exchange(&n.quiet, state, uint32_t(kBusy))) return false;
    if (state == kNotAsked) n.quiet_ticket = gpu::remote_quiet_begin(my_pe_);
    const bool quiet = gpu::remote_quiet_done(my_pe_, n.quiet_ticket);
    store_release(&n.quiet, uint32_t(quiet ? kIsQuiet : kAsked));
    return quiet;
  }

  FLASHMOE_DEVICE void release_when_landed(uint32_t* word, uint32_t value) {
    store_release(results_on_their_way_ ? ws_.ring_sent + (word - ws_.ring_free) : word, value);
    results_on_their_way_ = false;
  }

  // Asked early, when half the ring has been used since: the other half is room until the answer.
  template <class Lanes>
  FLASHMOE_DEVICE void settle(const Lanes& lanes, uint32_t first, uint32_t num) {
    enum : uint32_t { kNothing, kAsk, kRelease };
    Counters& n = *ws_.counters;
    const uint32_t slots = ws_.blocks_in_flight;
    bool missing = lanes.rank() == 0 && is_on_its_way(first + slots / 2);
    for (uint32_t b = lanes.rank(); b < num; b += lanes.size()) missing = missing || is_on_its_way(first + b);
    missing = !lanes.all(!missing);
    uint32_t todo = kNothing;
    if (lanes.rank() == 0) {
      if (n.settling)
        todo = gpu::remote_quiet_done(my_pe_, n.settle_ticket) ? kRelease : kNothing;
      else if (missing)
        todo = kAsk;
    }
    todo = lanes.broadcast(todo);
    if (todo == kNothing) return;
    for (uint32_t s = lanes.rank(); s < slots; s += lanes.size()) {
      uint32_t& landing = ws_.ring_landing[s];
      if (todo == kAsk)
        landing = load_acquire(&ws_.ring_sent[s]);
      else if (int32_t(landing - load_acquire(&ws_.ring_free[s])) > 0)
        store_release(&ws_.ring_free[s], landing);
    }
    lanes.sync();
    if (lanes.rank() != 0) return;
    n.settling = todo == kAsk;
    if (n.settling) n.settle_ticket = gpu::remote_quiet_begin(my_pe_);
  }

 private:
  enum Quiet : uint32_t { kNotAsked, kAsked, kIsQuiet, kBusy };

  // Whether the ring slot that row block `sequence` is to have waits for results to land, and for nothing else.
  FLASHMOE_DEVICE bool is_on_its_way(uint32_t sequence) const {
    const uint32_t slot = sequence % ws_.blocks_in_flight;
    return load_acquire(&ws_.ring_sent[slot]) == sequence && load_acquire(&ws_.ring_free[slot]) != sequence;
  }

  const Peers& peers_;
  uint64_t epoch_;
  int my_pe_;
  bool results_on_their_way_ = false;  // of the row block in hand
};

class NvshmemBackwardPlatform : public NvshmemPlatform {
 public:
  static constexpr bool kBackward = true;
  using NvshmemPlatform::NvshmemPlatform;
};

static_assert(Platform<NvshmemPlatform> && Platform<NvshmemBackwardPlatform>);

}  // namespace flashmoe
