// Whether the verbs place bytes and fragments as CuTe does, which knows the hardware: swizzle, descriptor, wgmma's
// accumulators, the fragments of mma.sync. Optional, since it needs CuTe's and CUDA's headers; no GPU, no nvcc.
//   pip install --no-deps nvidia-cutlass
//   g++ -std=c++20 -I csrc -I tests/cpp -isystem <site-packages>/cutlass_library/source/include
//       -isystem <cuda>/include tests/cuda/cute_layouts.cpp
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

#include "simt_run.h"

namespace {

using namespace flashmoe;
using namespace flashmoe::test;

// Where element (row, k) of a K-major operand lies.
template <class Atom, int kBytes>
void same_swizzle(const char* type) {
  const auto tile = cute::as_position_independent_swizzle_layout(
      cute::tile_to_shape(Atom{}, cute::make_shape(cute::Int<64>{}, cute::Int<128 / kBytes>{})));
  bool same = true;
  for (int row = 0; row < 64; ++row)
    for (int k = 0; k < 128 / kBytes; ++k) {
      const size_t ours = gpu::swizzle_128(uint32_t(row), uint32_t(k * kBytes));
      same &= size_t(tile(row, k)) * kBytes == ours && gpu::simt::swizzled(size_t(row * 128 + k * kBytes)) == ours;
    }
  check(same, std::string("swizzle of ") + type);
}

void swizzles() {
  same_swizzle<cute::GMMA::Layout_K_SW128_Atom<cute::bfloat16_t>, 2>("bf16");
  same_swizzle<cute::GMMA::Layout_K_SW128_Atom<cute::tfloat32_t>, 4>("tf32");
}

void descriptors() {
  for (uint32_t address : {0u, 1024u, 1024u * 37 + 32, 227u * 1024 - 928}) {
    cute::GmmaDescriptor theirs{};
    theirs.bitfield.layout_type_ = uint8_t(cute::GMMA::LayoutType::B128);
    theirs.bitfield.start_address_ = uint16_t(address >> 4);
    theirs.bitfield.leading_byte_offset_ = 1;
    theirs.bitfield.stride_byte_offset_ = 1024 >> 4;
    check(theirs.desc_ == gpu::wgmma_descriptor_bits(address), "descriptor of " + std::to_string(address));
  }
}

// CuTe numbers an element of an M × N tile m + n · M.
template <class Op, int N>
void same_accumulators() {
  const typename cute::MMA_Traits<Op>::CLayout layout;
  bool same = true;
  for (int t = 0; t < 128; ++t)
    for (int i = 0; i < N / 2; ++i) same &= layout(t, i) == gpu::wgmma_row(t, i) + gpu::wgmma_column(t, i) * 64;
  check(same, "accumulators of N = " + std::to_string(N));
}

void accumulators() {
  using cute::GMMA::Major;
  namespace ops = cute::SM90::GMMA;
  same_accumulators<ops::MMA_64x8x16_F32BF16BF16_SS<Major::K, Major::K>, 8>();
  same_accumulators<ops::MMA_64x96x16_F32F16F16_SS<Major::K, Major::K>, 96>();
  same_accumulators<ops::MMA_64x128x16_F32BF16BF16_SS<Major::K, Major::K>, 128>();
  same_accumulators<ops::MMA_64x256x8_F32TF32TF32_SS_TN<>, 256>();
}

// mma_sync on fragments that CuTe's layouts cut, against plain sums; its accumulators in CuTe's places.
template <class Op, DType dtype, int K>
void same_fragments() {
  const typename cute::MMA_Traits<Op>::ALayout a_layout;
  const typename cute::MMA_Traits<Op>::BLayout b_layout;
  const typename cute::MMA_Traits<Op>::CLayout c_layout;
  constexpr int per_word = dtype == DType::kFloat32 ? 1 : 2;
  auto a_value = [](int m, int k) { return float((m * 5 + k * 3) % 7 - 3); };
  auto b_value = [](int n, int k) { return float((n * 2 + k * 7) % 9 - 4); };
  auto word = [](float first, float second) {
    if constexpr (per_word == 1) return std::bit_cast<uint32_t>(first);
    else return gpu::pack_pair<dtype>(first, second);
  };
  on_seeds(2, 1, 32, 0, [&] {
    uint32_t a[4], b[2];
    auto a_at = [&](int i) { return a_value(a_layout(gpu::lane(), i) % 16, a_layout(gpu::lane(), i) / 16); };
    auto b_at = [&](int i) { return b_value(b_layout(gpu::lane(), i) % 8, b_layout(gpu::lane(), i) / 8); };
    for (int i = 0; i < 4; ++i) a[i] = word(a_at(i * per_word), per_word == 2 ? a_at(i * 2 + 1) : 0);
    for (int i = 0; i < 2; ++i) b[i] = word(b_at(i * per_word), per_word == 2 ? b_at(i * 2 + 1) : 0);
    float acc[4] = {};
    gpu::mma_sync<dtype>(acc, a, b);
    for (int i = 0; i < 4; ++i) {
      float sum = 0;
      const int m = c_layout(gpu::lane(), i) % 16, n = c_layout(gpu::lane(), i) / 16;
      for (int k = 0; k < K; ++k) sum += a_value(m, k) * b_value(n, k);
      expect(acc[i] == sum);
    }
  });
}

void fragments() {
  same_fragments<cute::SM80_16x8x16_F32BF16BF16F32_TN, DType::kBFloat16, 16>();
  same_fragments<cute::SM80_16x8x16_F32F16F16F32_TN, DType::kFloat16, 16>();
  same_fragments<cute::SM80_16x8x8_F32TF32TF32F32_TN, DType::kFloat32, 8>();
}

}  // namespace

int main() {
  run_test("Swizzles", swizzles);
  run_test("Descriptors", descriptors);
  run_test("Accumulators", accumulators);
  run_test("Fragments", fragments);
  return finish();
}
