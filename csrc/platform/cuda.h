// The GPU platform: a worker is a block, and every peer's heap is mapped here, be it on this GPU or, by NVLink or
// PCIe, on another. Written with the GPU's verbs, so it runs on fibers too.
//
// Words that peers write are read and written at system scope; a rank's own counters at the scope of its GPU.
#pragma once

#include "gpu/verbs.h"
#include "protocol/peers.h"
#include "protocol/platform.h"
#include "protocol/workspace.h"

namespace flashmoe {

class CudaPlatform {
 public:
  static constexpr bool kBackward = false;

  FLASHMOE_DEVICE CudaPlatform(const Call& call, const Peers& peers, const Workspace& workspace)
      : ep_rank_(call.ep_rank), heaps_(peers.heaps), ws_(workspace) {}

  template <class T>
  FLASHMOE_DEVICE static T load_acquire(const T* word) {
    return gpu::load_acquire(word);
  }
  FLASHMOE_DEVICE static void store_release(uint32_t* word, uint32_t value) { gpu::store_release(word, value); }
  FLASHMOE_DEVICE static void store_release(uint64_t* word, uint64_t value) { gpu::store_release(word, value); }
  FLASHMOE_DEVICE static uint32_t load_relaxed(const uint32_t* word) { return gpu::load_relaxed(word); }
  FLASHMOE_DEVICE static uint32_t fetch_add_relaxed(uint32_t* word, uint32_t n) { return gpu::fetch_add_relaxed(word, n); }
  FLASHMOE_DEVICE static uint32_t fetch_add(uint32_t* word, uint32_t n) { return gpu::fetch_add(word, n); }
  FLASHMOE_DEVICE static uint32_t fetch_sub(uint32_t* word, uint32_t n) { return gpu::fetch_sub(word, n); }
  FLASHMOE_DEVICE static bool compare_exchange(uint32_t* word, uint32_t expected, uint32_t desired) {
    return gpu::compare_exchange(word, expected, desired);
  }

  // In pieces of 16 bytes where both ends and the size allow it, else of 4, else of 2: no element is smaller.
  template <class Group>
  FLASHMOE_DEVICE static void copy(const Group& group, void* to, const void* from, size_t bytes) {
    const uintptr_t bits = reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from) | bytes;
    if (bits % 16 == 0)
      copy_as<gpu::Words4>(group, to, from, bytes);
    else if (bits % 4 == 0)
      copy_as<uint32_t>(group, to, from, bytes);
    else
      copy_as<uint16_t>(group, to, from, bytes);
  }

  FLASHMOE_DEVICE std::byte* heap() const { return heaps_[ep_rank_]; }
  FLASHMOE_DEVICE std::byte* window(int pe, size_t offset, std::byte*) const { return heaps_[pe] + offset; }

  FLASHMOE_DEVICE void commit(int pe, size_t, const std::byte*, size_t bytes, size_t signal, uint64_t word, Traffic kind) {
    count(pe, bytes, kind);
    // Pairs with the acquire of the reader's test_signal.
    gpu::store_release_system(reinterpret_cast<uint64_t*>(heaps_[pe] + signal), word);
  }
  FLASHMOE_DEVICE uint64_t test_signal(size_t offset) const {
    return gpu::load_acquire_system(reinterpret_cast<const uint64_t*>(heap() + offset));
  }
  FLASHMOE_DEVICE bool quiet() { return true; }
  FLASHMOE_DEVICE void release_when_landed(uint32_t* word, uint32_t value) { store_release(word, value); }
  template <class Lanes>
  FLASHMOE_DEVICE void settle(const Lanes&, uint32_t, uint32_t) {}
  FLASHMOE_DEVICE bool peer_alive(int) { return true; }  // a GPU cannot tell; the deadline will

  FLASHMOE_DEVICE static uint64_t now_ns() { return gpu::now_ns(); }
  FLASHMOE_DEVICE static void pause(uint32_t rounds) { gpu::sleep_ns(rounds < 64 ? 20 : 200); }

 protected:
  FLASHMOE_DEVICE void count(int pe, size_t bytes, Traffic kind) const {
    if (pe == ep_rank_) return;
    uint64_t* sent = ws_.sent + pe * kTrafficKinds;
    gpu::fetch_add_relaxed(sent + int(kind), uint64_t(bytes));
    gpu::fetch_add_relaxed(sent + int(Traffic::kSignal), uint64_t(sizeof(uint64_t)));
  }

 private:
  template <class Piece, class Group>
  FLASHMOE_DEVICE static void copy_as(const Group& group, void* to, const void* from, size_t bytes) {
    constexpr int kAtOnce = 4;  // each load is a walk to memory: these walk together
    const size_t pieces = bytes / sizeof(Piece), step = group.size();
    for (size_t first = group.rank(); first < pieces; first += kAtOnce * step) {
      Piece loaded[kAtOnce];
      FLASHMOE_UNROLL
      for (int i = 0; i < kAtOnce; ++i)
        loaded[i] = static_cast<const Piece*>(from)[first + i * step < pieces ? first + i * step : first];
      FLASHMOE_UNROLL
      for (int i = 0; i < kAtOnce; ++i)
        if (first + i * step < pieces) static_cast<Piece*>(to)[first + i * step] = loaded[i];
    }
  }

  int ep_rank_;
  std::byte* const* heaps_;

 protected:
  const Workspace& ws_;
};

// For kernels of backward calls: those of forward calls are free of what these need.
class CudaBackwardPlatform : public CudaPlatform {
 public:
  static constexpr bool kBackward = true;
  using CudaPlatform::CudaPlatform;
};

static_assert(Platform<CudaPlatform> && Platform<CudaBackwardPlatform>);

}  // namespace flashmoe
