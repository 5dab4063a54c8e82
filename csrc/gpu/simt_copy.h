// Copies that do not wait, on fibers: cp.async and TMA. What they will overwrite is not a number from the moment of
// issue, and the bytes come at any later moment.
#pragma once

#include "gpu/simt_barrier.h"
#include "gpu/simt_wgmma.h"
#include "gpu/tensor_box.h"

namespace flashmoe::gpu {

struct TensorMap {
  TensorBox box;
};

namespace simt {

// Shared memory that a verb is about to change.
inline void check_no_reader(size_t offset, size_t bytes, const char* verb) {
  for (const Warpgroup& group : my_block().warpgroups)
    for (const auto& product : group.unwaited)
      if (product->reads(offset, bytes))
        throw Misuse(std::string(verb) + ": overwrites shared+" + std::to_string(offset) +
                     ", which a wgmma that nobody waited for reads");
}

struct AsyncCopy : InFlight {
  std::byte* to;
  const std::byte* from;
  size_t valid;

  void land(Random&) override {
    std::memset(to, 0, 16);
    if (valid) std::memcpy(to, from, valid);
    landed = true;
    machine->progress();
  }
};

// The arrival of cp.async.mbarrier.arrive: in flight until the copies before it have landed.
struct CopyArrival : InFlight {
  Thread* thread;
  std::shared_ptr<BarrierState> barrier;
  std::vector<Thread::Copy> copies;

  bool ready() const override {
    return std::all_of(copies.begin(), copies.end(), [](const auto& copy) { return copy.flight->landed; });
  }
  void land(Random&) override {
    const uint32_t count = ++thread->count();
    for (const Thread::Copy& copy : copies) block->shared.publish(copy.offset, 16, uint32_t(thread->index), count);
    barrier->clock.resize(thread->clock.size());
    barrier->clock[thread->index] = std::max(barrier->clock[thread->index], count);
    landed = true;
    barrier->arrive();
  }
};

// A box, row by row. A row outside the tensor is zeros, and so are elements beyond a row's end.
struct BoxCopy : InFlight {
  TensorBox box;
  int64_t first[3];
  size_t offset;
  std::shared_ptr<BarrierState> barrier;
  uint32_t next_row = 0;

  size_t row_bytes() const { return size_t(box.box[0]) * dtype_bytes(box.dtype); }
  uint32_t rows() const { return box.box[1] * (box.dims == 3 ? box.box[2] : 1); }
  bool outlives_threads() const override { return false; }

  void land(Random& random) override {
    const uint32_t now = 1 + uint32_t(random.below(rows() - next_row));
    for (uint32_t i = 0; i < now; ++i) copy_row(next_row++);
    landed = next_row == rows();
    if (landed) {
      block->shared.publish(offset, rows() * row_bytes(), block->engine, ++block->engine_count);
      barrier->clock.resize(block->threads.size() + 1);
      barrier->clock[block->engine] = block->engine_count;
    }
    barrier->land_bytes(int64_t(now * row_bytes()));
  }

  void copy_row(uint32_t row) {
    const int element = dtype_bytes(box.dtype);
    const int64_t y = first[1] + row % box.box[1], z = box.dims == 3 ? first[2] + row / box.box[1] : 0;
    const bool inside = y >= 0 && y < int64_t(box.size[1]) && (box.dims == 2 || (z >= 0 && z < int64_t(box.size[2])));
    const std::byte* from = static_cast<const std::byte*>(box.data);
    if (inside) from += y * int64_t(box.stride_bytes[0]) + (box.dims == 3 ? z * int64_t(box.stride_bytes[1]) : 0);
    for (uint32_t i = 0; i < box.box[0]; ++i) {
      size_t to = offset + row * row_bytes() + i * element;
      if (box.swizzle) to = swizzled(to);
      const int64_t x = first[0] + i;
      if (inside && x >= 0 && x < int64_t(box.size[0]))
        std::memcpy(block->shared.data() + to, from + x * element, element);
      else
        std::memset(block->shared.data() + to, 0, element);
    }
  }
};

inline void tma_load(void* shared, const TensorMap* map, const std::array<int64_t, 3>& first, int dims,
                     Barrier* barrier, const char* verb) {
  machine->step();
  if (std::string error = tensor_box_error(map->box); !error.empty()) throw Misuse(std::string(verb) + ": " + error);
  if (map->box.dims != dims)
    throw Misuse(std::string(verb) + " with a map of " + std::to_string(map->box.dims) + " dimensions");
  auto copy = std::make_shared<BoxCopy>();
  copy->block = &my_block(), copy->box = map->box;
  std::copy(first.begin(), first.end(), copy->first);
  copy->barrier = barrier_at(barrier, verb);
  if (!copy->barrier->fenced) throw Misuse(std::string(verb) + ": no fence_barrier_init after the barrier's init");
  const size_t bytes = copy->rows() * copy->row_bytes();
  copy->offset = my_block().shared.offset(shared, bytes, map->box.swizzle ? 1024 : 128, verb);
  my_block().shared.check_async_write(copy->offset, bytes, verb);
  check_no_reader(copy->offset, bytes, verb);
  std::memset(shared, 0xff, bytes);
  my_block().shared.write(copy->offset, bytes, my_block().engine, SharedMemory::kUnderWay, false);
  machine->launch(copy);
}

}  // namespace simt

FLASHMOE_DEVICE void cp_async_16(void* shared, const void* global, int bytes_valid) {
  using namespace simt;
  machine->step();
  if (bytes_valid < 0 || bytes_valid > 16) throw Misuse("cp_async_16 of " + std::to_string(bytes_valid) + " bytes");
  if (reinterpret_cast<uintptr_t>(global) % 16) throw Misuse("cp_async_16 from an address not aligned to 16 bytes");
  const size_t offset = my_block().shared.offset(shared, 16, 16, "cp_async_16");
  check_no_reader(offset, 16, "cp_async_16");
  std::memset(shared, 0xff, 16);
  my_block().shared.write(offset, 16, uint32_t(self().index), SharedMemory::kUnderWay, true);
  auto copy = std::make_shared<AsyncCopy>();
  copy->block = &my_block(), copy->to = static_cast<std::byte*>(shared), copy->valid = size_t(bytes_valid);
  copy->from = static_cast<const std::byte*>(global);
  self().copies.push_back({copy, offset, self().copy_commits});
  machine->launch(copy);
}

FLASHMOE_DEVICE void cp_async_commit() {
  simt::machine->step();
  ++simt::self().copy_commits;
}

template <int kNewest>
FLASHMOE_DEVICE void cp_async_wait() {
  using namespace simt;
  machine->step();
  std::erase_if(self().copies, [](const Thread::Copy& copy) {
    if (copy.commit >= self().copy_commits - kNewest) return false;
    if (!copy.flight->landed) copy.flight->land(machine->random);
    my_block().shared.publish(copy.offset, 16, uint32_t(self().index), self().count());
    return true;
  });
}

FLASHMOE_DEVICE void Barrier::cp_async_arrive() {
  using namespace simt;
  machine->step();
  auto arrival = std::make_shared<CopyArrival>();
  arrival->barrier = barrier_at(this, "Barrier::cp_async_arrive");
  arrival->block = &my_block(), arrival->thread = &self(), arrival->copies = self().copies;
  machine->launch(arrival);
}

template <class T>
FLASHMOE_DEVICE void store_shared(T* to, T value) {
  using namespace simt;
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  machine->step();
  const size_t offset = my_block().shared.offset(to, sizeof(T), sizeof(T), "store_shared");
  check_no_reader(offset, sizeof(T), "store_shared");
  my_block().shared.write(offset, sizeof(T), uint32_t(self().index), self().count(), true);
  *to = value;
}

FLASHMOE_DEVICE void prefetch_tensor_map(const TensorMap*) { simt::machine->step(); }
FLASHMOE_DEVICE void tma_load_2d(void* shared, const TensorMap* map, int x, int y, Barrier* barrier, CacheHint) {
  simt::tma_load(shared, map, {x, y, 0}, 2, barrier, "tma_load_2d");
}
FLASHMOE_DEVICE void tma_load_3d(void* shared, const TensorMap* map, int x, int y, int z, Barrier* barrier, CacheHint) {
  simt::tma_load(shared, map, {x, y, z}, 3, barrier, "tma_load_3d");
}

}  // namespace flashmoe::gpu
