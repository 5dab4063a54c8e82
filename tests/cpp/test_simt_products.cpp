// wgmma, mma.sync and ldmatrix on fibers against plain sums, the 16-bit floats, and misuse of accumulators and proxies.
#include <bit>
#include <cmath>

#include "simt_run.h"

namespace {

using namespace flashmoe;
using namespace flashmoe::test;
using gpu::Words4;

// Small integers: every product and sum is exact in every type, so a wrong place cannot hide in rounding.
float left_value(int row, int k) { return float((row * 7 + k * 5) % 13 - 6); }
float right_value(int column, int k) { return float((column * 3 + k * 11) % 11 - 5); }
float plain_sum(int row, int column, int first_k, int num_k) {
  float sum = 0;
  for (int k = first_k; k < first_k + num_k; ++k) sum += left_value(row, k) * right_value(column, k);
  return sum;
}

template <DType dtype>
uint32_t encode(float value) {
  if constexpr (dtype == DType::kFloat32) return std::bit_cast<uint32_t>(value);
  else return gpu::pack_pair<dtype>(value, 0) & 0xffff;
}

// An operand of `rows` rows of 128 bytes in shared memory, swizzled, by all threads.
template <DType dtype, class Value>
void fill(std::byte* tile, int rows, Value value) {
  constexpr int per_word = dtype == DType::kFloat32 ? 1 : 2;
  for (int i = gpu::thread_in_block(); i < rows * 8; i += gpu::block_threads()) {
    Words4 words;
    for (int w = 0; w < 4; ++w) {
      const int k = (i % 8 * 4 + w) * per_word;
      words.word[w] = encode<dtype>(value(i / 8, k));
      if (per_word == 2) words.word[w] |= encode<dtype>(value(i / 8, k + 1)) << 16;
    }
    gpu::store_shared(reinterpret_cast<Words4*>(tile + gpu::swizzle_128(i / 8, i % 8 * 16)), words);
  }
}

template <DType dtype, int N>
void warpgroup_product() {
  constexpr int kDepth = dtype == DType::kFloat32 ? 8 : 16;
  on_seeds(4, 1, 128, 8192 + N * 128 + 1024, [] {
    std::byte *a = gpu::shared_memory(), *b = a + (N % 16 ? 9216 : 8192);
    fill<dtype>(a, 64, left_value);
    fill<dtype>(b, N, right_value);
    gpu::fence_async_shared();
    gpu::sync_block();
    const int t = gpu::thread_in_block();
    float acc[N / 2];
    for (int i = 0; i < N / 2; ++i) acc[i] = float(t);
    gpu::wgmma_fence(acc);
    gpu::wgmma<dtype, N>(acc, gpu::wgmma_descriptor(a, 96), gpu::wgmma_descriptor(b, 96), true);
    gpu::wgmma_commit();
    gpu::wgmma_wait<0>(acc);
    for (int i = 0; i < N / 2; ++i)
      expect(acc[i] == float(t) + plain_sum(gpu::wgmma_row(t, i), gpu::wgmma_column(t, i), 3 * kDepth, kDepth));
    // The whole row in two commits; the first may be under way while the second is issued.
    gpu::wgmma_fence(acc);
    for (int byte = 0; byte < 128; byte += 32) {
      gpu::wgmma<dtype, N>(acc, gpu::wgmma_descriptor(a, byte), gpu::wgmma_descriptor(b, byte), byte > 0);
      gpu::wgmma_commit();
      if (byte == 64) gpu::wgmma_wait<1>(acc);
    }
    gpu::wgmma_wait<0>(acc);
    for (int i = 0; i < N / 2; ++i)
      expect(acc[i] == plain_sum(gpu::wgmma_row(t, i), gpu::wgmma_column(t, i), 0, 4 * kDepth));
  });
}
template <DType dtype>
void warpgroup_products() {
  warpgroup_product<dtype, 8>();
  warpgroup_product<dtype, 16>();
  warpgroup_product<dtype, 32>();
  warpgroup_product<dtype, 64>();
  warpgroup_product<dtype, 96>();
  warpgroup_product<dtype, 128>();
  warpgroup_product<dtype, 192>();
  warpgroup_product<dtype, 256>();
}

// Fragments by ldmatrix from plain rows, as an engine for sm_80 would: A 16 rows, B 8 rows, 32 bytes of each.
template <DType dtype>
void warp_products() {
  constexpr int kDepth = dtype == DType::kFloat32 ? 8 : 16;
  on_seeds(10, 1, 64, 24 * 128, [] {
    std::byte* tile = gpu::shared_memory();
    fill<dtype>(tile, 16, left_value);
    fill<dtype>(tile + 2048, 8, right_value);
    gpu::sync_block();
    const int l = gpu::lane();
    float acc[4] = {1, 2, 3, 4};
    for (int step = 0; step < 4; step += 2) {
      uint32_t a[2][4], b[4];
      for (int s = 0; s < 2; ++s)
        gpu::ldmatrix_x4(a[s], tile + gpu::swizzle_128(l % 16, (step + s) * 32 + l / 16 * 16));
      gpu::ldmatrix_x4(b, tile + 2048 + gpu::swizzle_128(l % 8, step * 32 + l / 8 * 16));
      gpu::mma_sync<dtype>(acc, a[0], {b[0], b[1]});
      gpu::mma_sync<dtype>(acc, a[1], {b[2], b[3]});
    }
    for (int i = 0; i < 4; ++i)
      expect(acc[i] == float(i + 1) + plain_sum(l / 4 + i / 2 * 8, l % 4 * 2 + i % 2, 0, 4 * kDepth));
  });
}

// Fragments of operands that have K as their rows: of each row A takes the elements from 16 on, B the first eight.
template <DType dtype>
void transposed_products() {
  on_seeds(10, 1, 64, 2 * 32 * 64, [] {
    constexpr int kDepth = 32, kWidth = 32;
    uint16_t *a_rows = reinterpret_cast<uint16_t*>(gpu::shared_memory()), *b_rows = a_rows + kDepth * kWidth;
    for (int i = gpu::thread_in_block(); i < kDepth * kWidth; i += gpu::block_threads()) {
      const int k = i / kWidth, at = i % kWidth;
      a_rows[i] = uint16_t(encode<dtype>(at >= 16 ? left_value(at - 16, k) : 77.0f));
      b_rows[i] = uint16_t(encode<dtype>(at < 8 ? right_value(at, k) : 99.0f));
    }
    gpu::sync_block();
    const int l = gpu::lane();
    float acc[4] = {1, 2, 3, 4};
    uint32_t b[4];
    gpu::ldmatrix_x4_trans(b, b_rows + l * kWidth);
    for (int step = 0; step < 2; ++step) {
      uint32_t a[4];
      gpu::ldmatrix_x4_trans(a, a_rows + (16 * step + l / 16 * 8 + l % 8) * kWidth + 16 + l / 8 % 2 * 8);
      gpu::mma_sync<dtype>(acc, a, {b[2 * step], b[2 * step + 1]});
    }
    for (int i = 0; i < 4; ++i)
      expect(acc[i] == float(i + 1) + plain_sum(l / 4 + i / 2 * 8, l % 4 * 2 + i % 2, 0, kDepth));
  });
}

// tf32 drops thirteen bits of an fp32; nothing is rounded.
void tf32_cuts() {
  const float value = 1.0f + 0x1p-10f + 0x1.fp-11f;
  check(gpu::simt::to_tf32(value) == 1.0f + 0x1p-10f && gpu::simt::to_tf32(-value) == -1.0f - 0x1p-10f, "tf32");
}

void tf32_rounds() {
  const auto rounded = [](float value) { return std::bit_cast<float>(gpu::round_to_tf32(std::bit_cast<uint32_t>(value))); };
  const float one = 1.0f, half = 0x1p-11f, below = 0x1.ffep-12f;
  check(rounded(one + half) == one + 2 * half && rounded(-one - half) == -one - 2 * half, "tf32: halves away from zero");
  check(rounded(one + below) == one && rounded(0x1.fffp9f) == 0x1p10f, "tf32: to the nearest");
  check(rounded(INFINITY) == INFINITY && std::isnan(rounded(std::bit_cast<float>(0x7fffffffu))), "tf32: not finite");
}

template <DType dtype>
void pairs(uint32_t infinity, uint32_t lowest_fraction) {
  const uint32_t one = gpu::pack_pair<dtype>(1, 0);
  check(gpu::pack_pair<dtype>(2, 1) >> 16 == one, "the second is the high half");
  for (uint32_t bits = 0; bits < infinity; ++bits) {
    const gpu::FloatPair value = gpu::unpack_pair<dtype>(bits | (bits | 0x8000) << 16);
    const uint32_t again = gpu::pack_pair<dtype>(value.first, value.second);
    if (value.second != -value.first || again != (bits | (bits | 0x8000) << 16)) {
      check(false, "bits " + std::to_string(bits) + " there and back");
      return;
    }
    if (bits + 1 == infinity) break;
    // Between two neighbours: halves go to the even one, anything else to the nearer.
    const float next = gpu::unpack_pair<dtype>(bits + 1).first, half = value.first / 2 + next / 2;
    const bool even = bits % 2 == 0;
    const uint32_t below = gpu::pack_pair<dtype>(std::nextafter(half, 0.0f), 0);
    const uint32_t above = gpu::pack_pair<dtype>(std::nextafter(half, INFINITY), 0);
    const bool exact = half != value.first && half != next;  // not where fp32 itself ends
    if (exact && (below != bits || above != bits + 1 || gpu::pack_pair<dtype>(half, 0) != bits + !even)) {
      check(false, "rounding between " + std::to_string(bits) + " and its neighbour");
      return;
    }
  }
  check(gpu::pack_pair<dtype>(INFINITY, -INFINITY) == (infinity | (infinity | 0x8000) << 16), "infinities");
  check(gpu::pack_pair<dtype>(3.4e38f, 0) == infinity, "overflow");
  check(std::isnan(gpu::unpack_pair<dtype>(gpu::pack_pair<dtype>(NAN, 0)).first), "not a number");
  check(gpu::unpack_pair<dtype>(1).first == std::ldexp(1.0f, -int(lowest_fraction)), "the smallest");
}

// A sound product in which one step may be spoilt.
struct Steps {
  bool fence_proxy = true, barrier = true, fence = true, commit = true, wait = true;
  bool lane_differs = false, touch = false, overwrite = false;
};
void small_product(const Steps& steps) {
  std::byte *a = gpu::shared_memory(), *b = a + 8192;
  fill<DType::kBFloat16>(a, 64, left_value);
  fill<DType::kBFloat16>(b, 8, right_value);
  if (steps.fence_proxy) gpu::fence_async_shared();
  if (steps.barrier) gpu::sync_block();
  float acc[4] = {};
  if (steps.fence) gpu::wgmma_fence(acc);
  for (int byte = 0; byte < 128; byte += 32) {
    const int mine = steps.lane_differs && gpu::thread_in_block() == 9 ? 0 : byte;
    gpu::wgmma<DType::kBFloat16, 8>(acc, gpu::wgmma_descriptor(a, mine), gpu::wgmma_descriptor(b, byte), byte > 0);
    if (steps.touch) acc[2] = 1;
  }
  if (steps.commit) gpu::wgmma_commit();
  if (steps.overwrite) gpu::store_shared(reinterpret_cast<uint32_t*>(a) + gpu::thread_in_block(), 0u);
  if (steps.wait) gpu::wgmma_wait<0>(acc);
  const int t = gpu::thread_in_block();
  for (int i = 0; i < 4; ++i) expect(acc[i] == plain_sum(gpu::wgmma_row(t, i), gpu::wgmma_column(t, i), 0, 64));
}

void misuse_is_named() {
  on_seeds(5, 1, 128, 9216, [] { small_product({}); });
  auto planted = [](const char* plant, const char* words, Steps steps) {
    check_misuse(plant, words, 1, 128, 9216, [steps] { small_product(steps); });
  };
  planted("no proxy fence before wgmma", "no fence_async_shared", {.fence_proxy = false});
  planted("no barrier before wgmma", "no wait or barrier", {.barrier = false});
  planted("no wgmma_fence", "no wgmma_fence", {.fence = false});
  planted("accumulators read before wgmma_wait", "wrong result", {.wait = false});
  planted("accumulators of no commit", "wrong result", {.commit = false});
  planted("lanes that name different operands", "differ", {.lane_differs = true});
  planted("accumulators touched in flight", "touched", {.touch = true});
  planted("an operand overwritten in flight", "nobody waited for", {.overwrite = true});
  check_misuse("half a warpgroup", "fewer than four warps", 1, 64, 9216, [] {
    float acc[4] = {};
    gpu::wgmma_fence(acc);
    gpu::wgmma<DType::kBFloat16, 8>(acc, 0, 0, false);
  });
  check_misuse("a descriptor of one's own", "not a descriptor", 1, 128, 9216, [] {
    float acc[4] = {};
    gpu::wgmma_fence(acc);
    gpu::wgmma<DType::kBFloat16, 8>(acc, 64, 64, false);
  });
  check_misuse("a tile at an odd place", "aligned to 1024", 1, 128, 9216,
               [] { gpu::wgmma_descriptor(gpu::shared_memory() + 128); });
  check_misuse("a tile that ends beyond shared memory", "outside", 1, 128, 8192, [] {
    float acc[128];
    gpu::wgmma_fence(acc);
    const uint64_t tile = gpu::wgmma_descriptor(gpu::shared_memory());
    gpu::wgmma<DType::kBFloat16, 256>(acc, tile, tile, false);
  });
  check_misuse("ldmatrix before cp_async landed", "no wait or barrier", 1, 32, 512, [] {
    alignas(16) static const uint32_t source[128] = {};
    gpu::cp_async_16(gpu::shared_memory() + gpu::lane() * 16, source + gpu::lane() * 4);
    gpu::cp_async_commit();
    uint32_t words[4];
    gpu::ldmatrix_x4(words, gpu::shared_memory() + gpu::lane() * 16);
  });
  check_misuse("a transposing ldmatrix of an address that is not its row's", "aligned to 16", 1, 32, 1024, [] {
    uint32_t words[4];
    gpu::ldmatrix_x4_trans(words, gpu::shared_memory() + gpu::lane() * 16 + 2);
  });
}

}  // namespace

int main() {
  run_test("WarpgroupProductsBFloat16", warpgroup_products<DType::kBFloat16>);
  run_test("WarpgroupProductsFloat16", warpgroup_products<DType::kFloat16>);
  run_test("WarpgroupProductsTf32", warpgroup_products<DType::kFloat32>);
  run_test("WarpProductsBFloat16", warp_products<DType::kBFloat16>);
  run_test("WarpProductsFloat16", warp_products<DType::kFloat16>);
  run_test("WarpProductsTf32", warp_products<DType::kFloat32>);
  run_test("TransposedProductsBFloat16", transposed_products<DType::kBFloat16>);
  run_test("TransposedProductsFloat16", transposed_products<DType::kFloat16>);
  run_test("Tf32Cuts", tf32_cuts);
  run_test("Tf32Rounds", tf32_rounds);
  run_test("PairsOfBFloat16", [] { pairs<DType::kBFloat16>(0x7f80, 133); });
  run_test("PairsOfFloat16", [] { pairs<DType::kFloat16>(0x7c00, 24); });
  run_test("MisuseIsNamed", misuse_is_named);
  return finish();
}
