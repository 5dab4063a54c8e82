// cp.async and TMA on fibers: what lands where, and that nobody may look before he has waited.
#include <numeric>

#include "gpu/tensor_map.h"
#include "simt_run.h"

namespace {

using namespace flashmoe;
using namespace flashmoe::test;
using gpu::Barrier;

struct Source {
  alignas(16) std::array<uint32_t, 4096> word;
  Source() { std::iota(word.begin(), word.end(), 1u); }
};

uint32_t shared_word(int i) { return reinterpret_cast<const volatile uint32_t*>(gpu::shared_memory())[i]; }

void cp_async_groups() {
  const Source source;
  on_seeds(20, 1, 64, 64 * 48, [&] {
    const int t = gpu::thread_in_block();
    for (int group = 0; group < 3; ++group) {
      // The last group comes as 4, 0, 12 or 8 bytes and zeros.
      const int valid = group == 2 ? (t * 4 + 4) % 16 / 4 * 4 : 16;
      gpu::cp_async_16(gpu::shared_memory() + (group * 64 + t) * 16, &source.word[(group * 64 + t) * 4], valid);
      gpu::cp_async_commit();
    }
    auto word = [&](int group, int i) { return shared_word((group * 64 + t) * 4 + i); };
    gpu::cp_async_wait<2>();
    for (int i = 0; i < 4; ++i) expect(word(0, i) == uint32_t(t * 4 + i + 1));
    gpu::cp_async_wait<0>();
    for (int i = 0; i < 4; ++i) expect(word(1, i) == uint32_t((64 + t) * 4 + i + 1));
    for (int i = 0; i < 4; ++i)
      expect(word(2, i) == (i * 4 < (t * 4 + 4) % 16 ? uint32_t((128 + t) * 4 + i + 1) : 0));
  });
  auto early = [&](int seeds, auto wait) {
    return some_seed_fails(seeds, 1, 32, 512, [&] {
      gpu::cp_async_16(gpu::shared_memory() + gpu::lane() * 16, &source.word[gpu::lane() * 4]);
      wait();
      expect(shared_word(gpu::lane() * 4) == uint32_t(gpu::lane() * 4 + 1));
    });
  };
  check_caught(early(20, [] {}), "no wait for cp_async");
  check_caught(early(20, [] { gpu::cp_async_wait<0>(); }), "a wait for cp_async without a commit");
  check_caught(!early(20, [] { gpu::cp_async_commit(), gpu::cp_async_wait<0>(); }), "the sound twin of the two before");
}

void cp_async_arrivals() {
  const Source source;
  on_seeds(40, 1, 64, 1024 + 8, [&] {
    Barrier* barrier = reinterpret_cast<Barrier*>(gpu::shared_memory() + 1024);
    init_barriers(barrier, 1, 64);
    const int t = gpu::thread_in_block();
    gpu::cp_async_16(gpu::shared_memory() + t * 16, &source.word[t * 4]);
    barrier->cp_async_arrive();
    barrier->wait(0);
    for (int i = 0; i < 256; ++i) expect(shared_word(i) == uint32_t(i + 1));
  });
}

// Boxes at every edge of a tensor of odd sizes, swizzled and not, against the plain meaning.
void boxes(int dims, bool swizzle) {
  constexpr int kColumns = 88, kRows = 21, kMatrices = 3;
  std::vector<uint16_t> tensor(kColumns * kRows * kMatrices + 8);
  std::iota(tensor.begin(), tensor.end(), uint16_t(1));
  const uint16_t* data = reinterpret_cast<uint16_t*>((reinterpret_cast<uintptr_t>(tensor.data()) + 15) / 16 * 16);
  const uint32_t box_columns = swizzle ? 64 : 24;
  gpu::TensorMap map;
  const gpu::TensorBox box{DType::kBFloat16, data, dims, {80, kRows, kMatrices},
                           {kColumns * 2, kColumns * kRows * 2}, {box_columns, 16, 2}, swizzle};
  check(gpu::make_tensor_map(&map, box).empty(), "a lawful box");
  const int depth = dims == 3 ? 2 : 1;
  const uint32_t bytes = box_columns * 2 * 16 * depth;
  for (auto [x, y, z] : {std::array{0, 0, 0}, {16, 5, 1}, {-8, -3, 2}, {64, 16, -1}, {200, 0, 0}})
    on_seeds(6, 1, 32, 8192 + 8, [&, x = x, y = y, z = dims == 3 ? z : 0] {
      Barrier* barrier = reinterpret_cast<Barrier*>(gpu::shared_memory() + 8192);
      init_barriers(barrier, 1, 1);
      if (gpu::lane() == 0) {
        gpu::prefetch_tensor_map(&map);
        barrier->arrive_expect_tx(bytes);
        std::byte* to = gpu::shared_memory() + 1024;
        if (dims == 3) gpu::tma_load_3d(to, &map, x, y, z, barrier, gpu::CacheHint::kEvictFirst);
        else gpu::tma_load_2d(to, &map, x, y, barrier);
      }
      barrier->wait(0);
      for (int m = 0; m < depth; ++m)
        for (int r = 0; r < 16; ++r)
          for (int c = 0; c < int(box_columns); ++c) {
            const uint32_t row = uint32_t(m * 16 + r), byte = uint32_t(c) * 2;
            const size_t at = swizzle ? gpu::swizzle_128(row, byte) : row * box_columns * 2 + byte;
            uint16_t got;
            std::memcpy(&got, gpu::shared_memory() + 1024 + at, 2);
            auto within = [](int i, int size) { return i >= 0 && i < size; };
            const bool inside = within(x + c, 80) && within(y + r, kRows) && within(z + m, kMatrices);
            expect(got == (inside ? data[(z + m) * kColumns * kRows + (y + r) * kColumns + x + c] : 0));
          }
    });
}
void tma_boxes() {
  for (int dims : {2, 3})
    for (bool swizzle : {false, true}) boxes(dims, swizzle);
}

void lawless_boxes() {
  alignas(16) static std::array<float, 4096> data;
  const gpu::TensorBox good{DType::kFloat32, data.data(), 2, {64, 32, 0}, {256, 0}, {32, 8, 0}, true};
  auto refused = [&](auto spoil) {
    gpu::TensorBox box = good;
    spoil(box);
    gpu::TensorMap map;
    return !gpu::make_tensor_map(&map, box).empty();
  };
  check(!refused([](gpu::TensorBox&) {}), "the good box");
  check(refused([](auto& b) { b.dims = 4; }), "dimensions");
  check(refused([](auto& b) { b.data = reinterpret_cast<const char*>(data.data()) + 4; }), "alignment of the data");
  check(refused([](auto& b) { b.size[1] = 0; }), "an empty tensor");
  check(refused([](auto& b) { b.stride_bytes[0] = 260; }), "a stride of 260 bytes");
  check(refused([](auto& b) { b.box[1] = 257; }), "a box of 257 rows");
  check(refused([](auto& b) { b.box[0] = 16; }), "half a row, swizzled");
  check(refused([](auto& b) { b.swizzle = false, b.box[0] = 3; }), "a row of 12 bytes");
}

void misuse_is_named() {
  static const Source source;
  gpu::TensorMap map;
  const gpu::TensorBox box{DType::kFloat32, source.word.data(), 2, {64, 32, 0}, {256, 0}, {32, 8, 0}, true};
  check(gpu::make_tensor_map(&map, box).empty(), "a lawful box");
  // One box of 1024 bytes to `offset`, announced as `bytes`; the barrier lies behind.
  auto load = [&map](size_t offset, uint32_t bytes, int dims = 2, bool wait = true) {
    Barrier* barrier = reinterpret_cast<Barrier*>(gpu::shared_memory() + 4096);
    init_barriers(barrier, 1, 1);
    if (gpu::lane() == 0) {
      if (bytes) barrier->arrive_expect_tx(bytes);
      if (dims == 2) gpu::tma_load_2d(gpu::shared_memory() + offset, &map, 0, 0, barrier);
      else gpu::tma_load_3d(gpu::shared_memory() + offset, &map, 0, 0, 0, barrier);
      if (!bytes) barrier->arrive();
    }
    if (wait) barrier->wait(0);
  };
  check_misuse("a box at an address not aligned to it", "aligned to 1024", 1, 32, 4104, [&] { load(128, 1024); });
  check_misuse("a box beyond shared memory", "outside", 1, 32, 4104, [&] { load(4096, 1024); });
  check_misuse("a map of other dimensions", "2 dimensions", 1, 32, 4104, [&] { load(0, 1024, 3); });
  check_misuse("more bytes announced than sent", "Barrier::wait(0)", 1, 32, 4104, [&] { load(0, 2048); });
  check_misuse("fewer bytes announced than sent", "bytes more landed", 1, 32, 4104, [&] {
    load(0, 512);
    Barrier* barrier = reinterpret_cast<Barrier*>(gpu::shared_memory() + 4096);
    gpu::sync_warp();
    gpu::sleep_ns(1'000'000);  // the rest lands, in a phase that does not expect it
    if (gpu::lane() == 0) barrier->arrive();
    barrier->wait(1);
  });
  check_caught(some_seed_fails(20, 1, 32, 4104, [&] { load(0, 1024, 2, false); }), "a block that ends before its load");
  check_misuse("cp_async to an odd place", "aligned to 16", 1, 32, 64,
               [] { gpu::cp_async_16(gpu::shared_memory() + 8, source.word.data()); });
  check_misuse("cp_async from an odd place", "not aligned to 16", 1, 32, 64,
               [] { gpu::cp_async_16(gpu::shared_memory(), source.word.data() + 1); });
  check_misuse("cp_async of 17 bytes", "17 bytes", 1, 32, 64,
               [] { gpu::cp_async_16(gpu::shared_memory(), source.word.data(), 17); });
  check_misuse("cp_async beyond shared memory", "outside", 1, 32, 64,
               [] { gpu::cp_async_16(gpu::shared_memory() + 64, source.word.data()); });
  check_misuse("TMA over what store_shared wrote", "no fence_async_shared", 1, 32, 4104, [&] {
    if (gpu::lane() == 0) gpu::store_shared(reinterpret_cast<uint32_t*>(gpu::shared_memory()), 1u);
    gpu::sync_warp();
    load(0, 1024);
  });
}

}  // namespace

int main() {
  run_test("CpAsyncGroups", cp_async_groups);
  run_test("CpAsyncArrivals", cp_async_arrivals);
  run_test("TmaBoxes", tma_boxes);
  run_test("LawlessBoxes", lawless_boxes);
  run_test("MisuseIsNamed", misuse_is_named);
  return finish();
}
