// Hopper's matrix product on fibers. A product is in flight from its issue: the accumulators are not numbers until
// wgmma_wait, and its operands are read at any moment up to then.
#pragma once

#include "gpu/simt_element.h"
#include "gpu/simt_meeting.h"

namespace flashmoe::gpu {

namespace simt {

// The 128-byte swizzle as the hardware applies it: to the bits of an address.
constexpr size_t swizzled(size_t address) { return address ^ (address >> 7 & 7) << 4; }

struct Product : InFlight {
  DType dtype;
  int n;
  bool accumulate;
  size_t a, b;  // addresses of the first row's first byte
  int64_t commit;
  Warpgroup* group;
  uint32_t waited = 0;  // by which warps of the four
  std::array<std::shared_ptr<std::vector<float>>, 128> values;

  int depth() const { return dtype == DType::kFloat32 ? 8 : 16; }
  static constexpr size_t tile(size_t address) { return address / 1024 * 1024; }

  bool reads(size_t offset, size_t bytes) const {
    const auto overlap = [&](size_t begin, size_t size) { return offset < begin + size && begin < offset + bytes; };
    return overlap(tile(a), 64 * 128) || overlap(tile(b), size_t(n) * 128);
  }
  bool ready() const override { return group->products.front().get() == this; }

  // Row `row` of an operand, as floats.
  void load_row(size_t address, int row, float* to) const {
    for (int k = 0; k < depth(); ++k) {
      const size_t at = swizzled(address + size_t(row) * 128 + size_t(k) * dtype_bytes(dtype));
      uint32_t bits = 0;
      std::memcpy(&bits, block->shared.data() + at, size_t(dtype_bytes(dtype)));
      to[k] = dtype == DType::kFloat32    ? to_tf32(std::bit_cast<float>(bits))
              : dtype == DType::kBFloat16 ? from_bfloat16_bits(bits)
                                          : from_half_bits(bits);
    }
  }

  void land(Random&) override {
    std::vector<float> left(64 * 16), right(size_t(n) * 16);
    for (int row = 0; row < 64; ++row) load_row(a, row, &left[size_t(row) * 16]);
    for (int row = 0; row < n; ++row) load_row(b, row, &right[size_t(row) * 16]);
    for (int t = 0; t < 128; ++t)
      for (int i = 0; i < n / 2; ++i) {
        const float* l = &left[size_t(wgmma_row(t, i)) * 16];
        const float* r = &right[size_t(wgmma_column(t, i)) * 16];
        float sum = 0;
        for (int k = 0; k < 16; ++k) sum += l[k] * r[k];  // beyond depth() both are 0
        float& value = (*values[t])[i];
        value = accumulate ? value + sum : sum;
      }
    landed = true;
    group->products.pop_front();
    machine->progress();
  }
};

inline constexpr uint32_t kUnready = 0x7fc0dead;  // not a number, and ours

inline void poison(float* registers, size_t count) {
  for (size_t i = 0; i < count; ++i) std::memcpy(registers + i, &kUnready, 4);
}
inline bool poisoned(const float* registers, size_t count) {
  for (size_t i = 0; i < count; ++i)
    if (std::memcmp(registers + i, &kUnready, 4) != 0) return false;
  return true;
}

inline size_t descriptor_address(uint64_t descriptor, size_t rows) {
  const uint32_t address = uint32_t(descriptor & 0x3fff) << 4;
  if (descriptor != wgmma_descriptor_bits(address)) throw Misuse("wgmma: not a descriptor of wgmma_descriptor");
  my_block().shared.offset(my_block().shared.data() + Product::tile(address), rows * 128, 1024, "wgmma");
  return address;
}

inline Warpgroup& my_warpgroup() {
  const int group = self().index / 128;
  if (size_t(group + 1) * 128 > my_block().threads.size()) throw Misuse("a warpgroup verb by fewer than four warps");
  return my_block().warpgroups[group];
}

inline void issue(DType dtype, int n, float* registers, uint64_t a, uint64_t b, bool accumulate) {
  Warpgroup& group = my_warpgroup();
  Thread& me = self();
  const size_t count = size_t(n) / 2;
  if (!me.fenced) throw Misuse("wgmma: no wgmma_fence since this thread could last touch accumulators");
  auto mine = std::find_if(me.accumulators.begin(), me.accumulators.end(),
                           [&](const Accumulator& other) { return other.registers == registers; });
  if (mine == me.accumulators.end()) {
    me.accumulators.push_back({registers, std::make_shared<std::vector<float>>(registers, registers + count), 0});
    mine = me.accumulators.end() - 1;
  } else if (mine->values->size() != count || !poisoned(registers, count)) {
    throw Misuse("wgmma: accumulators were touched while a product into them was in flight");
  }
  poison(registers, count);
  mine->commit = me.product_commits;
  group.values[me.index % 128] = mine->values;

  const uint64_t shape = uint64_t(n) << 4 | uint64_t(dtype) << 1 | uint64_t(accumulate);
  const uint64_t digest = (a * 31 + b) * 1000003 + (shape << 32) + uint64_t(me.product_commits);
  meet(group.meeting, 128, me.index % 128, "wgmma", me.index / 128, digest, false, [&](std::vector<uint64_t>& digests) {
    if (std::any_of(digests.begin(), digests.end(), [&](uint64_t other) { return other != digest; }))
      throw Misuse("wgmma: threads of a warpgroup differ in operands, shape or commits");
    auto product = std::make_shared<Product>();
    product->block = &my_block(), product->group = &group, product->values = group.values;
    product->dtype = dtype, product->n = n, product->accumulate = accumulate, product->commit = me.product_commits;
    product->a = descriptor_address(a, 64), product->b = descriptor_address(b, size_t(n));
    // What every one of the 128 has waited for.
    Clock common = me.clock;
    for (int t = 0; t < 128; ++t) {
      const Clock& clock = my_block().threads[size_t(me.index / 128 * 128 + t)]->clock;
      for (size_t i = 0; i < common.size(); ++i) common[i] = std::min(common[i], clock[i]);
    }
    my_block().shared.check_read(Product::tile(product->a), 64 * 128, common, true, "wgmma");
    my_block().shared.check_read(Product::tile(product->b), size_t(n) * 128, common, true, "wgmma");
    group.products.push_back(product);
    group.unwaited.push_back(product);
    machine->launch(product);
  });
}

}  // namespace simt

FLASHMOE_DEVICE uint64_t wgmma_descriptor(const void* tile, int byte_in_row) {
  using namespace simt;
  if (byte_in_row % 32 || byte_in_row < 0 || byte_in_row > 96)
    throw Misuse("wgmma_descriptor: no product begins at byte " + std::to_string(byte_in_row) + " of a row");
  return wgmma_descriptor_bits(uint32_t(my_block().shared.offset(tile, 1024, 1024, "wgmma_descriptor")) + byte_in_row);
}

template <class... Accumulators>
FLASHMOE_DEVICE void wgmma_fence(Accumulators&...) {
  simt::machine->step();
  simt::self().fenced = true;
}

template <DType dtype, int N>
FLASHMOE_DEVICE void wgmma(float (&acc)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(N == 8 || N == 16 || N == 32 || N == 64 || N == 96 || N == 128 || N == 192 || N == 256);
  simt::issue(dtype, N, acc, a, b, accumulate);
}

FLASHMOE_DEVICE void wgmma_commit() {
  simt::machine->step();
  ++simt::self().product_commits;
}

template <int kNewest, class... Accumulators>
FLASHMOE_DEVICE void wgmma_wait(Accumulators&...) {
  using namespace simt;
  machine->step();
  const int64_t limit = self().product_commits - kNewest;
  Warpgroup& group = my_warpgroup();
  auto& products = group.products;
  while (!products.empty() && products.front()->commit < limit) products.front()->land(machine->random);
  std::erase_if(group.unwaited, [&](const auto& product) {
    if (product->commit < limit) product->waited |= 1u << self().index / 32 % 4;
    return product->waited == 0xf;
  });
  std::erase_if(self().accumulators, [&](const Accumulator& mine) {
    if (mine.commit >= limit) return false;
    if (!poisoned(mine.registers, mine.values->size()))
      throw Misuse("wgmma_wait: accumulators were written while a product into them was in flight");
    std::copy(mine.values->begin(), mine.values->end(), mine.registers);
    return true;
  });
  if (self().accumulators.empty()) self().fenced = false;
}

template <int kRegisters>
FLASHMOE_DEVICE void increase_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  simt::machine->step();
}
template <int kRegisters>
FLASHMOE_DEVICE void decrease_registers() {
  increase_registers<kRegisters>();
}

}  // namespace flashmoe::gpu
