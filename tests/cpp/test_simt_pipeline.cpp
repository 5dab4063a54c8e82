// A whole kernel in the manner of the Hopper engine, on fibers: a producer warpgroup gathers rows of A by cp.async and
// loads boxes of B by TMA into a ring of stages; a consumer warpgroup multiplies them by wgmma; the result leaves
// through shared memory. It is right under every seed, and each fault that is planted in it is caught.
#include "gpu/tensor_map.h"
#include "simt_run.h"

namespace {

using namespace flashmoe;
using namespace flashmoe::test;
using gpu::Barrier;

constexpr int kM = 64, kN = 128, kStepK = 64, kStages = 3;
constexpr size_t kBytesA = kM * 128, kBytesB = kN * 128, kStageBytes = kBytesA + kBytesB;
constexpr size_t kStaging = kStages * kStageBytes, kBarriers = kStaging + 32 * (kN + 4) * 4;
constexpr size_t kSharedBytes = kBarriers + 2 * kStages * sizeof(Barrier);

enum class Plant {
  kNone,
  kNoFullWait,
  kWrongParity,
  kNoProxyFence,
  kNoCopyWait,
  kNoCopyFill,
  kNoNamedBarrier,
  kNoWgmmaWait,
  kNoEmptyWait,
  kEarlyRelease,
  kFewBytes,
  kManyBytes,
  kNoInitFence,
};
// Who makes the rows of A visible to wgmma: the producer, once it has waited for them, or the consumer, where the
// copies themselves arrive at the barrier.
enum class Handover { kProducerFences, kCopiesArrive };

struct Problem {
  int num_rows, depth;
  Handover handover;
  const uint16_t* x;  // rows of `depth` bf16
  const int* row;     // [num_rows] of x; rows beyond are zeros
  gpu::TensorMap weights;
  float* y;  // [kM, kN]
};

FLASHMOE_DEVICE void produce(const Problem& p, Barrier* full, Barrier* empty, Plant plant) {
  const int t = gpu::thread_in_block(), steps = p.depth / kStepK;
  auto hand_over = [&](int step) {
    if (plant != Plant::kNoProxyFence) gpu::fence_async_shared();
    full[step % kStages].arrive();
  };
  for (int step = 0; step < steps; ++step) {
    const int stage = step % kStages;
    std::byte* a = gpu::shared_memory() + stage * kStageBytes;
    if (plant != Plant::kNoEmptyWait) empty[stage].wait(step / kStages % 2 ^ 1);
    if (t == 0) {
      const int wrong = plant == Plant::kFewBytes ? -128 : plant == Plant::kManyBytes ? 128 : 0;
      full[stage].arrive_expect_tx(uint32_t(int(kBytesB) + wrong));
      gpu::tma_load_2d(a + kBytesA, &p.weights, step * kStepK, 0, &full[stage], gpu::CacheHint::kEvictFirst);
    }
    for (int piece = t; piece < kM * 8; piece += 128) {
      const int row = piece / 8, column = piece % 8;
      const uint16_t* from = p.x + (row < p.num_rows ? p.row[row] : 0) * p.depth + step * kStepK + column * 8;
      gpu::cp_async_16(a + gpu::swizzle_128(row, column * 16), from, row < p.num_rows ? 16 : 0);
    }
    if (p.handover == Handover::kCopiesArrive) {
      full[stage].cp_async_arrive();
      continue;
    }
    gpu::cp_async_commit();
    if (step == 0) continue;
    if (plant != Plant::kNoCopyWait) gpu::cp_async_wait<1>();
    hand_over(step - 1);
  }
  if (p.handover == Handover::kCopiesArrive) return;
  if (plant != Plant::kNoCopyFill) gpu::cp_async_wait<0>();
  hand_over(steps - 1);
}

FLASHMOE_DEVICE void consume(const Problem& p, Barrier* full, Barrier* empty, Plant plant) {
  const int t = gpu::thread_in_block() - 128, steps = p.depth / kStepK;
  float acc[kN / 2];
  for (int step = 0; step < steps; ++step) {
    const int stage = step % kStages;
    const std::byte* a = gpu::shared_memory() + stage * kStageBytes;
    const uint32_t parity = step / kStages % 2;
    if (plant != Plant::kNoFullWait) full[stage].wait(plant == Plant::kWrongParity ? parity ^ 1 : parity);
    if (p.handover == Handover::kCopiesArrive && plant != Plant::kNoProxyFence) gpu::fence_async_shared();
    gpu::wgmma_fence(acc);
    for (int byte = 0; byte < 128; byte += 32)
      gpu::wgmma<DType::kBFloat16, kN>(acc, gpu::wgmma_descriptor(a, byte), gpu::wgmma_descriptor(a + kBytesA, byte),
                                       step + byte > 0);
    gpu::wgmma_commit();
    // The products of the step before are done, those of this step may go on.
    gpu::wgmma_wait<1>(acc);
    if (plant == Plant::kEarlyRelease) empty[stage].arrive();
    else if (step > 0) empty[(step - 1) % kStages].arrive();
  }
  if (plant != Plant::kNoWgmmaWait) gpu::wgmma_wait<0>(acc);

  // Half the tile at a time through shared memory, so that each warp stores whole rows.
  float* staging = reinterpret_cast<float*>(gpu::shared_memory() + kStaging);
  for (int half = 0; half < 2; ++half) {
    for (int i = 0; i < kN / 2; ++i) {
      const int row = gpu::wgmma_row(t, i);
      if (row / 32 == half) staging[row % 32 * (kN + 4) + gpu::wgmma_column(t, i)] = acc[i];
    }
    if (plant != Plant::kNoNamedBarrier) gpu::named_barrier_sync(1, 128);
    for (int row = t / 32; row < 32; row += 4)
      for (int column = t % 32; column < kN; column += 32)
        if (half * 32 + row < p.num_rows)
          p.y[(half * 32 + row) * kN + column] = *const_cast<volatile float*>(&staging[row * (kN + 4) + column]);
    if (plant != Plant::kNoNamedBarrier) gpu::named_barrier_sync(1, 128);
  }
}

FLASHMOE_DEVICE void gather_gemm(const Problem& p, Plant plant) {
  Barrier* full = reinterpret_cast<Barrier*>(gpu::shared_memory() + kBarriers);
  Barrier* empty = full + kStages;
  if (gpu::thread_in_block() == 0) {
    for (int stage = 0; stage < kStages; ++stage) full[stage].init(128 + 1), empty[stage].init(128);
    if (plant != Plant::kNoInitFence) gpu::fence_barrier_init();
  }
  gpu::sync_block();
  if (gpu::warp_in_block() < 4) {
    gpu::decrease_registers<40>();
    produce(p, full, empty, plant);
  } else {
    gpu::increase_registers<232>();
    consume(p, full, empty, plant);
  }
}

// Small integers, exact in bf16, so that the sums are exact too.
struct Data {
  Data(int num_rows, int depth, uint64_t seed) : num_rows(num_rows), depth(depth) {
    gpu::simt::Random random(seed);
    auto draw = [&](std::vector<uint16_t>& v, size_t n) {
      v.resize(n);
      for (uint16_t& e : v) e = uint16_t(gpu::pack_pair<DType::kBFloat16>(float(random.below(7)) - 3, 0));
    };
    draw(x_store, size_t(kTokens) * depth + 8);
    draw(w_store, size_t(kN) * depth + 8);
    for (int i = 0; i < num_rows; ++i) row.push_back(int(random.below(kTokens)));
  }
  static const uint16_t* aligned(const std::vector<uint16_t>& v) {
    return reinterpret_cast<const uint16_t*>((reinterpret_cast<uintptr_t>(v.data()) + 15) / 16 * 16);
  }
  float plain(int i, int n) const {
    auto value = [](uint16_t bits) { return gpu::unpack_pair<DType::kBFloat16>(bits).first; };
    float sum = 0;
    for (int k = 0; k < depth; ++k)
      sum += value(aligned(x_store)[row[i] * depth + k]) * value(aligned(w_store)[n * depth + k]);
    return sum;
  }
  static constexpr int kTokens = 200;
  int num_rows, depth;
  std::vector<uint16_t> x_store, w_store;
  std::vector<int> row;
};

// Empty, or what was wrong under this seed.
std::string run(const Data& data, Handover handover, uint64_t seed, Plant plant) {
  std::vector<float> y(kM * kN, -1.0f);
  Problem p{data.num_rows, data.depth, handover, Data::aligned(data.x_store), data.row.data(), {}, y.data()};
  const gpu::TensorBox box{DType::kBFloat16, Data::aligned(data.w_store), 2, {uint64_t(data.depth), kN, 0},
                           {uint64_t(data.depth) * 2, 0}, {kStepK, kN, 0}, true};
  if (const std::string error = gpu::make_tensor_map(&p.weights, box); !error.empty()) return error;
  if (const std::string error = failure(seed, 1, 256, kSharedBytes, [&] { gather_gemm(p, plant); }); !error.empty())
    return error;
  for (int i = 0; i < kM; ++i)
    for (int n = 0; n < kN; ++n)
      if (!(y[i * kN + n] == (i < data.num_rows ? data.plain(i, n) : -1.0f)))
        return "wrong result at " + std::to_string(i) + ", " + std::to_string(n);
  return {};
}

void sound_on_every_seed() {
  for (Handover handover : {Handover::kProducerFences, Handover::kCopiesArrive})
    for (int steps : {1, 2, 5, 8}) {
      const Data data(steps == 5 ? 37 : kM, steps * kStepK, uint64_t(steps));
      for (uint64_t seed = 0; seed < 12; ++seed) {
        const std::string wrong = run(data, handover, seed, Plant::kNone);
        check(wrong.empty(), std::to_string(steps) + " steps, seed " + std::to_string(seed) + ": " + wrong);
      }
    }
}

// `every`: caught whatever the seed. The others need an unlucky order.
void planted(Plant plant, const char* name, const char* words, bool every,
             Handover handover = Handover::kProducerFences) {
  const Data data(kM, 5 * kStepK, 1);
  int caught = 0, named = 0;
  constexpr int seeds = 8;
  std::string said;
  for (uint64_t seed = 100; seed < 100 + seeds; ++seed) {
    const std::string wrong = run(data, handover, seed, plant);
    caught += !wrong.empty();
    named += contains(wrong, words);
    if (!wrong.empty() && !contains(wrong, words)) said = wrong;
  }
  if (!check_caught(caught > 0 && (!every || caught == seeds), name) || !check_caught(named == caught, name))
    std::printf("  caught %d, named %d of %d, said \"%s\"\n", caught, named, seeds, said.c_str());
}

}  // namespace

int main() {
  run_test("SoundOnEverySeed", sound_on_every_seed);
  run_test("MissingFullWait", [] { planted(Plant::kNoFullWait, "no wait for a full stage", "no wait", true); });
  run_test("WrongPhaseParity", [] { planted(Plant::kWrongParity, "the wrong parity", "", true); });
  run_test("MissingProxyFence", [] {
    planted(Plant::kNoProxyFence, "no fence by the producer", "no fence_async_shared", true);
    planted(Plant::kNoProxyFence, "no fence by the consumer", "no fence_async_shared", true, Handover::kCopiesArrive);
  });
  run_test("MissingCopyWait", [] {
    planted(Plant::kNoCopyWait, "no wait for cp_async", "no wait or barrier", true);
    planted(Plant::kNoCopyFill, "no wait for the last cp_async", "no wait or barrier", true);
  });
  run_test("MissingNamedBarrier", [] { planted(Plant::kNoNamedBarrier, "no named barrier", "wrong result", true); });
  run_test("MissingWgmmaWait", [] { planted(Plant::kNoWgmmaWait, "no wgmma_wait", "wrong result", true); });
  run_test("MissingEmptyWait", [] { planted(Plant::kNoEmptyWait, "no wait for an empty stage", "", true); });
  run_test("EarlyRelease", [] { planted(Plant::kEarlyRelease, "a stage released too early", "", false); });
  run_test("WrongByteCount", [] {
    planted(Plant::kFewBytes, "too few bytes announced", "", true);
    planted(Plant::kManyBytes, "too many bytes announced", "Barrier::wait", true);
  });
  run_test("MissingInitFence", [] { planted(Plant::kNoInitFence, "no fence after init", "fence_barrier_init", true); });
  return finish();
}
