// What the simt machine knows of each thread, warp, warpgroup and block.
#pragma once

#include <array>
#include <deque>
#include <map>
#include <memory>
#include <unordered_map>

#include "gpu/simt_fiber.h"
#include "gpu/simt_shared.h"

namespace flashmoe::gpu::simt {

struct Block;
struct Thread;
struct Product;       // simt_wgmma.h
struct BarrierState;  // simt_barrier.h

using WaitList = std::vector<Thread*>;

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
  }
  size_t below(size_t n) { return size_t(next() % n); }
  bool one_in(size_t n) { return below(n) == 0; }

 private:
  uint64_t state_;
};

// What runs beside the threads: a copy, a matrix product, an arrival that waits for copies.
struct InFlight {
  bool landed = false;
  Block* block = nullptr;
  virtual ~InFlight() = default;
  virtual bool ready() const { return true; }
  virtual void land(Random& random) = 0;  // some of it; sets `landed` with the last
  virtual bool outlives_threads() const { return true; }  // may still be under way when its block has ended
};

// Where `n` threads meet. None can come to the next meeting before all have left this one, so two boards are enough
// for what they show each other.
struct Meeting {
  int arrived = 0;
  uint64_t number = 0;
  const char* verb = nullptr;
  std::array<std::vector<uint64_t>, 2> board;
  std::vector<std::pair<uint64_t, uint64_t>> ways;  // by warp: which meeting, from 1 on, and which way (check_way)
  Clock clock;
  WaitList waiting;
};

struct Accumulator {
  float* registers;
  std::shared_ptr<std::vector<float>> values;  // what the registers will hold
  int64_t commit;                              // the last one that writes them
};

struct Thread {
  Block* block;
  int index;  // in the block
  std::unique_ptr<Fiber> fiber;
  Clock clock;
  bool slow = false, started = false;
  size_t place = 0;  // among the runnable
  const char* waits_in = nullptr;
  int64_t waits_on = 0;
  int verbs_since_poll = 1 << 20;
  uint32_t asked_for_warp = 0;  // how often: a shuffle on a GPU, so equally often by all lanes whenever they meet

  struct Copy {
    std::shared_ptr<InFlight> flight;
    size_t offset;
    int64_t commit;
  };
  std::vector<Copy> copies;  // cp_async that this thread has not waited for
  int64_t copy_commits = 0;

  std::vector<Accumulator> accumulators;  // of products under way
  int64_t product_commits = 0;
  bool fenced = false;

  uint32_t& count() { return clock[index]; }
};

struct NamedBarrier {
  int threads = 0, arrived = 0;
  uint64_t phase = 0;
  uint32_t warps = 0;
  Clock clock, published;
  WaitList waiting;
};
struct Warp {
  Meeting meeting;
  std::map<uint32_t, Meeting> partial;  // by mask
};
struct Warpgroup {
  Meeting meeting;
  std::array<std::shared_ptr<std::vector<float>>, 128> values;
  std::deque<std::shared_ptr<Product>> products;     // in flight, in the order of issue
  std::vector<std::shared_ptr<Product>> unwaited;    // whose operands may still be read, for all that anyone knows
};

struct Block {
  Block(int index, int num_threads, size_t shared_bytes)
      : index(index), live(num_threads), shared(shared_bytes), engine(uint32_t(num_threads)),
        warps(num_threads / 32), warpgroups((num_threads + 127) / 128) {}

  int index, live;
  SharedMemory shared;
  uint32_t engine;  // the copy engine's place in clocks
  uint32_t engine_count = 1;
  Meeting all;
  std::vector<Warp> warps;
  std::vector<Warpgroup> warpgroups;
  std::array<NamedBarrier, 16> named;
  std::unordered_map<const void*, std::shared_ptr<BarrierState>> barriers;
  std::unordered_map<const void*, Clock> words;  // what a release on this word published
  std::vector<std::unique_ptr<Thread>> threads;
};

}  // namespace flashmoe::gpu::simt
