// Ampere's matrix product and the load of its operands, on fibers. The lane that comes last does the work of all.
#pragma once

#include "gpu/simt_element.h"
#include "gpu/simt_warp.h"

namespace flashmoe::gpu {

namespace simt {

struct MmaLane {
  float* acc;
  const uint32_t *a, *b;
};

// Element k of a row: which lane of the row's four, which register (of those for that row), which half.
template <DType dtype>
float mma_element(const std::vector<uint64_t>& lanes, bool left, int row, int k) {
  constexpr bool wide = dtype == DType::kFloat32;
  const int q = wide ? k % 4 : k % 8 / 2, step = wide ? k / 4 : k / 8;
  const MmaLane& lane = *reinterpret_cast<const MmaLane*>(lanes[size_t(row % 8 * 4 + q)]);
  const uint32_t word = left ? lane.a[step * 2 + row / 8] : lane.b[step];
  if constexpr (wide) return to_tf32(std::bit_cast<float>(word));
  const FloatPair pair = unpack_pair<wide ? DType::kBFloat16 : dtype>(word);
  return k % 2 ? pair.second : pair.first;
}

}  // namespace simt

template <DType dtype>
FLASHMOE_DEVICE void mma_sync(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  using namespace simt;
  constexpr int depth = dtype == DType::kFloat32 ? 8 : 16;
  const MmaLane mine{acc, a, b};
  meet_warp("mma_sync", reinterpret_cast<uint64_t>(&mine), [](const std::vector<uint64_t>& lanes) {
    for (int row = 0; row < 16; ++row)
      for (int column = 0; column < 8; ++column) {
        float sum = 0;
        for (int k = 0; k < depth; ++k)
          sum += mma_element<dtype>(lanes, true, row, k) * mma_element<dtype>(lanes, false, column, k);
        const MmaLane& owner = *reinterpret_cast<const MmaLane*>(lanes[size_t(row % 8 * 4 + column / 2)]);
        owner.acc[row / 8 * 2 + column % 2] += sum;
      }
  });
}

FLASHMOE_DEVICE uint32_t round_to_tf32(uint32_t fp32) {
  const bool finite = (fp32 & 0x7f800000) != 0x7f800000;
  return finite ? (fp32 + 0x1000) & ~0x1fffu : fp32;
}

namespace simt {

// The addresses of the rows of four matrices, eight each.
inline const std::vector<uint64_t>& ldmatrix_rows(const void* mine, const char* verb) {
  const size_t offset = my_block().shared.offset(mine, 16, 16, verb);
  my_block().shared.check_read(offset, 16, self().clock, false, verb);
  return meet_warp(verb, reinterpret_cast<uint64_t>(mine));
}

}  // namespace simt

FLASHMOE_DEVICE void ldmatrix_x4(uint32_t (&words)[4], const void* shared_row) {
  const std::vector<uint64_t>& rows = simt::ldmatrix_rows(shared_row, "ldmatrix_x4");
  for (int i = 0; i < 4; ++i) {
    const auto* row = reinterpret_cast<const std::byte*>(rows[size_t(i * 8 + simt::my_lane() / 4)]);
    std::memcpy(&words[i], row + simt::my_lane() % 4 * 4, 4);
  }
}

FLASHMOE_DEVICE void ldmatrix_x4_trans(uint32_t (&words)[4], const void* shared_row) {
  const std::vector<uint64_t>& rows = simt::ldmatrix_rows(shared_row, "ldmatrix_x4_trans");
  for (int i = 0; i < 4; ++i) {
    uint16_t pair[2];
    for (int k = 0; k < 2; ++k) {
      const auto* row = reinterpret_cast<const std::byte*>(rows[size_t(i * 8 + simt::my_lane() % 4 * 2 + k)]);
      std::memcpy(&pair[k], row + simt::my_lane() / 4 * 2, 2);
    }
    words[i] = pair[0] | uint32_t{pair[1]} << 16;
  }
}

}  // namespace flashmoe::gpu
