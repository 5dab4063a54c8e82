// The product of a tile: rows of activations times rows of weights, in dot form. For cpu_kernels.cpp alone,
// like cpu_vector.h.
#pragma once

#include "engine/cpu_kernels.h"
#include "engine/cpu_vector.h"

namespace flashmoe::FLASHMOE_ISA_NAMESPACE {
namespace {

// Rows of a register tile: kTileRows × kPanelRows accumulators and one vector per row and per weight must fit
// the registers (16 or, with AVX-512, 32).
constexpr int kTileRows = kLanes == 16 ? 6 : 3;
constexpr int kStep = cpu::kMaxLanes;  // elements of K per iteration: one cache line of fp32
constexpr int kVectorsPerStep = kStep / kLanes;
// Up to this many rows, 16-bit weights are widened in registers; above, once per panel into scratch.
constexpr int kRegisterWidenRows = 12;

constexpr int round_up_to(int n, int unit) { return (n + unit - 1) / unit * unit; }

// Equal stretches of K (but for the last), multiples of kStep, none longer than kMaxKBlock.
inline int k_block(int k) {
  const int blocks = (k + cpu::kMaxKBlock - 1) / cpu::kMaxKBlock;
  return round_up_to((k + blocks - 1) / blocks, kStep);
}

// The weight rows of a tile: `cols` rows from `first` in each of `sections` (gate and up), grouped in panels.
template <class T>
struct WeightRows {
  const T* weights;  // row-major, k columns
  int k;
  int first, cols;
  int sections, section_rows;

  int panels_per_section() const { return (cols + cpu::kPanelRows - 1) / cpu::kPanelRows; }
  int panels() const { return sections * panels_per_section(); }
  // The last panel repeats the last row instead of reading past it; what that computes is never used.
  const T* row(int panel, int i) const {
    const int in_section = panel % panels_per_section() * cpu::kPanelRows + i;
    const int index = panel / panels_per_section() * section_rows + first + (in_section < cols ? in_section : cols - 1);
    return weights + ptrdiff_t(index) * k;
  }
  // Where the panel's products stand in a row of Scratch::product.
  int product_col(int panel) const {
    return panel / panels_per_section() * (cpu::kMaxTileRows / sections) +
           panel % panels_per_section() * cpu::kPanelRows;
  }
};

// A panel's stretch of one K block, as the register tile reads it: where the weights lie ...
template <class T>
struct PanelInPlace {
  using Element = T;  // as it lies in memory, and as the next panel will be fetched
  const T* rows[cpu::kPanelRows];
  FLASHMOE_INLINE Vector load(int row, ptrdiff_t vector) const { return widen(rows[row] + vector * kLanes); }
};

// ... or widened in scratch, interleaved by vectors so that it is a single stream.
template <class T>
struct PanelInScratch {
  using Element = T;
  const float* panel;
  FLASHMOE_INLINE Vector load(int row, ptrdiff_t vector) const {
    return widen(panel + (vector * cpu::kPanelRows + row) * kLanes);
  }
};

// A part of the next panel that one register tile brings to the L2 cache while it computes: a stretch of the
// panel's rows laid end to end, at `step` bytes per iteration. It may run from one row into the following one.
struct PrefetchStretch {
  const char *row, *following;
  ptrdiff_t offset, row_bytes;
  int step;
};

// product[0:kRows, 0:kPanelRows) (+)= the dot products over one K block of kRows packed rows with a panel.
template <int kRows, int kStretches, class Panel>
__attribute__((noinline)) void register_tile(const float* rows, const Panel panel, const float* panel_tail, int k,
                                             const PrefetchStretch* prefetch, bool add, float* product) {
  constexpr int kCols = cpu::kPanelRows;
  Vector sum[kRows][kCols] = {};
  const auto multiply = [&](const float* a, auto load) __attribute__((always_inline)) {
    Vector row[kRows];
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) row[m] = load_as<Vector>(a + m * kLanes);
#pragma GCC unroll 8
    for (int n = 0; n < kCols; ++n) {
      const Vector weight = load(n);
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m) sum[m][n] += row[m] * weight;
    }
  };

  ptrdiff_t offset = kStretches == 1 ? prefetch->offset : 0;
  const int vectors = k / kLanes;
  int vector = 0;
  for (; vector + kVectorsPerStep <= vectors; vector += kVectorsPerStep) {
    if constexpr (kStretches == 1) {
      const ptrdiff_t beyond = offset - prefetch->row_bytes;
      __builtin_prefetch(beyond < 0 ? prefetch->row + offset : prefetch->following + beyond, 0, 2);
      offset += prefetch->step;
    } else {  // whole rows
      constexpr ptrdiff_t kElementBytes = sizeof(typename Panel::Element);
#pragma GCC unroll 8
      for (int i = 0; i < kStretches; ++i)
        __builtin_prefetch(prefetch[i].row + vector * kLanes * kElementBytes, 0, 2);
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVectorsPerStep; ++v) {
      multiply(rows, [&](int n) __attribute__((always_inline)) { return panel.load(n, vector + v); });
      rows += kRows * kLanes;
    }
  }
  for (; vector < vectors; ++vector, rows += kRows * kLanes)
    multiply(rows, [&](int n) __attribute__((always_inline)) { return panel.load(n, vector); });
  if (k % kLanes != 0)
    multiply(rows, [&](int n) __attribute__((always_inline)) { return widen(panel_tail + n * kLanes); });

#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
    float* out = product + m * cpu::kMaxTileRows;
    const QuadVector total = sum_lanes(sum[m][0], sum[m][1], sum[m][2], sum[m][3]);
    const QuadVector sofar = add ? load_as<QuadVector>(out) : QuadVector{};
    const QuadVector result = sofar + total;
    memcpy(out, &result, sizeof result);
  }
}

// The rows of a tile in groups as equal as can be, of kTileRows at most: no group of one beside full ones.
struct RowGroups {
  int count, small, large;  // the first `large` groups have small + 1 rows
  explicit RowGroups(int num_rows)
      : count((num_rows + kTileRows - 1) / kTileRows), small(num_rows / count), large(num_rows % count) {}
  int size(int group) const { return small + (group < large); }
};

// rows[0:num_rows)[k0:k0+k) widened, each group's rows interleaved by vectors, the last vector filled with zeros:
// one stream for the register tile, however the rows lie.
template <class Row>
void pack_rows(const Row& row, const RowGroups& groups, int k0, int k, float* out) {
  for (int group = 0, first = 0; group < groups.count; first += groups.size(group++)) {
    const int size = groups.size(group);
    for (int i = 0; i < size; ++i) {
      const auto* from = row(first + i) + k0;
      float* to = out + i * kLanes;
      int c = 0;
      for (; c + kLanes <= k; c += kLanes, to += size * kLanes) narrow(widen(from + c), to);
      if (c < k) narrow(widen_part(from + c, k - c), to);
    }
    out += size * round_up_to(k, kLanes);
  }
}

template <int kStretches, class Panel>
FLASHMOE_INLINE void register_tile_of(int num_rows, const float* rows, const Panel& panel, const float* panel_tail,
                                      int k, const PrefetchStretch* prefetch, bool add, float* product) {
  switch (num_rows) {
    case 1: return register_tile<1, kStretches>(rows, panel, panel_tail, k, prefetch, add, product);
    case 2: return register_tile<2, kStretches>(rows, panel, panel_tail, k, prefetch, add, product);
    case 3: return register_tile<3, kStretches>(rows, panel, panel_tail, k, prefetch, add, product);
#if FLASHMOE_LANES == 16
    case 4: return register_tile<4, kStretches>(rows, panel, panel_tail, k, prefetch, add, product);
    case 5: return register_tile<5, kStretches>(rows, panel, panel_tail, k, prefetch, add, product);
    case 6: return register_tile<6, kStretches>(rows, panel, panel_tail, k, prefetch, add, product);
#endif
  }
}

// What group `group` fetches of the next panel, so that memory is asked for the same amount at any time: an equal
// stretch each or, where there are fewer groups than rows, whole rows. Returns the number of stretches.
FLASHMOE_INLINE int share_prefetch(const char* const* next, ptrdiff_t row_bytes, int line_bytes, int group, int groups,
                                   PrefetchStretch* out) {
  constexpr int kPanelRows = cpu::kPanelRows;
  if (groups >= kPanelRows) {
    const ptrdiff_t begin = group * kPanelRows * row_bytes / groups;
    const int row = int(begin / row_bytes), following = row + 1 < kPanelRows ? row + 1 : row;
    const int step = (kPanelRows * line_bytes + groups - 1) / groups;
    out[0] = {next[row], next[following], begin - row * row_bytes, row_bytes, step};
    return 1;
  }
  const int first = (group * kPanelRows + groups - 1) / groups;
  const int last = ((group + 1) * kPanelRows + groups - 1) / groups;
  for (int row = first; row < last; ++row) out[row - first] = {next[row], next[row], 0, row_bytes, line_bytes};
  return last - first;
}

// One panel times all row groups over one K block, while the next panel (null after the last) comes nearer.
template <class Panel>
void panel_times_rows(const float* rows, const RowGroups& groups, const Panel& panel, const float* panel_tail, int k,
                      const char* const* next, bool add, float* product) {
  constexpr int kElementBytes = sizeof(typename Panel::Element);
  for (int group = 0; group < groups.count; ++group) {
    const int size = groups.size(group);
    PrefetchStretch prefetch[cpu::kPanelRows];
    const int stretches = next == nullptr ? 0
                                          : share_prefetch(next, ptrdiff_t(k) * kElementBytes, kStep * kElementBytes,
                                                           group, groups.count, prefetch);
    switch (stretches) {
      case 0: register_tile_of<0>(size, rows, panel, panel_tail, k, prefetch, add, product); break;
      case 1: register_tile_of<1>(size, rows, panel, panel_tail, k, prefetch, add, product); break;
      case 2: register_tile_of<2>(size, rows, panel, panel_tail, k, prefetch, add, product); break;
      default: register_tile_of<4>(size, rows, panel, panel_tail, k, prefetch, add, product);
    }
    rows += size * round_up_to(k, kLanes);
    product += size * cpu::kMaxTileRows;
  }
}

// Scratch::product[i][tile.product_col(p) + j] = row(i) · row j of panel p, for all rows and panels.
template <class T, class Row>
void product(const Row& row, int num_rows, const WeightRows<T>& tile, cpu::Scratch& scratch) {
  if (num_rows == 0) return;
  const int k = tile.k, block = k_block(k), panels = tile.panels();
  const int blocks = (k + block - 1) / block;
  const RowGroups groups(num_rows);
  const bool widen_in_registers = sizeof(T) == sizeof(float) || num_rows <= kRegisterWidenRows;

  const auto length = [&](int b) { return b * block + block < k ? block : k - b * block; };

  const auto compute = [&](int p, int b, const float* rows, int next_p, int next_b) {
    const int kb = length(b), tail = kb % kLanes, body = kb - tail;
    PanelInPlace<T> panel;
    const char* next_rows[cpu::kPanelRows];
    for (int i = 0; i < cpu::kPanelRows; ++i) {
      panel.rows[i] = tile.row(p, i) + b * block;
      if (next_p < panels) next_rows[i] = reinterpret_cast<const char*>(tile.row(next_p, i) + next_b * block);
      if (tail != 0) narrow(widen_part(panel.rows[i] + body, tail), scratch.panel_tail + i * kLanes);
    }
    const char* const* next = next_p < panels ? next_rows : nullptr;
    float* out = scratch.product + tile.product_col(p);
    if (widen_in_registers) return panel_times_rows(rows, groups, panel, scratch.panel_tail, kb, next, b > 0, out);
    float* to = scratch.panel;
    for (int c = 0; c < body; c += kLanes)
      for (int i = 0; i < cpu::kPanelRows; ++i, to += kLanes) narrow(widen(panel.rows[i] + c), to);
    panel_times_rows(rows, groups, PanelInScratch<T>{scratch.panel}, scratch.panel_tail, kb, next, b > 0, out);
  };

  // When the rows fit scratch over all of K, each weight row is read from end to end: DRAM likes that best.
  // Otherwise one K block of all panels, then the next. The order of each output's sum is the same.
  const int padded = round_up_to(k, kLanes);
  if (ptrdiff_t(num_rows) * padded <= cpu::kPassRows * cpu::kMaxKBlock) {
    for (int b = 0; b < blocks; ++b) pack_rows(row, groups, b * block, length(b), scratch.rows + num_rows * b * block);
    for (int p = 0; p < panels; ++p)
      for (int b = 0; b < blocks; ++b)
        compute(p, b, scratch.rows + num_rows * b * block, b + 1 < blocks ? p : p + 1, b + 1 < blocks ? b + 1 : 0);
  } else {
    for (int b = 0; b < blocks; ++b) {
      pack_rows(row, groups, b * block, length(b), scratch.rows);
      for (int p = 0; p < panels; ++p) {
        const bool last = p + 1 == panels && b + 1 < blocks;
        compute(p, b, scratch.rows, last ? 0 : p + 1, last ? b + 1 : b);
      }
    }
  }
}

}  // namespace
}  // namespace flashmoe::FLASHMOE_ISA_NAMESPACE
