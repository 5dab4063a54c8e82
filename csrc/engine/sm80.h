// The engine for GPUs from Ampere on: tile products by mma.sync, in bf16, in fp16 and, for fp32 tensors, in tf32, with
// fp32 sums. Eight warps share a tile of 128 rows by 128 weight rows, 32 by 64 each. They bring its operands themselves
// by cp.async, four steps of 64 bytes of K ahead of the products. cp.async reads by way of L2, so it sees the rows of
// `hidden` that other blocks wrote, and those that peers did.
//
// A row's bits depend on that row and its weights alone: each product adds its columns of K to every row in the same
// order, whatever the other rows hold.
//
// Why these sizes. A step is 512 cycles of an A100's tensor cores. Its warps read 48 KiB of shared memory in 384
// cycles, and the copies write 16 KiB in 128 more: just what there is. Four warps of 64 by 64 would read for 256, with
// up to 244 registers a thread. But each scheduler would have one warp, and nothing to do where that one waits; few
// rows would take twice the products, and combine half of the reads in flight. Eight warps of 64 by 64 and the agent
// would have 168 registers a thread, of which the sums alone are 128. Five stages of 16 KiB are what fits in the 99 KiB
// that a block has on every GPU since Ampere, beside what the plan counts.
//
// What to expect, predicted and not measured. On an A100 a step in bf16 takes 16 KiB out of L2: 32 bytes a cycle, of
// some 40 that L2 gives, so prefill should be bound by shared memory and the tensor cores alike, less a barrier in each
// step, and end near 180 to 220 of the 312 TFLOP/s, and tf32 at half of that. Decode reads each weight once and should
// be bound by memory: with 32 KiB of weights in flight in each SM and about 1 µs of latency, 62 of the 108 SMs can draw
// all of its 2 TB/s, so a layer with fewer tiles than SMs still does. 32 rows or fewer are 256 cycles a step of two
// warps, which is 4.9 TB/s of weights.
#pragma once

#include <string>

#include "engine/combine_rows.h"
#include "engine/halved_tile.h"
#include "engine/mma_sums.h"
#include "engine/sm80_math.h"

namespace flashmoe {

// Empty, or why this engine cannot take the call, for which another must be chosen: it copies and stores 16 bytes at a
// time, so every row must begin at a multiple of them.
inline std::string why_not_sm80(const Call& call) {
  const size_t hidden = call.row_bytes(), inner = size_t(call.intermediate_size) * dtype_bytes(call.dtype);
  if (hidden % 16 || inner % 16)
    return "Ampere's engine needs rows of a multiple of 16 bytes, not of " + std::to_string(hidden) + " and " +
           std::to_string(inner);
  for (const std::byte* rows : {call.x, static_cast<const std::byte*>(call.y)})
    if (reinterpret_cast<uintptr_t>(rows) % 16) return "Ampere's engine needs x and y aligned to 16 bytes";
  if (call.num_local_experts() == 0) return {};  // and nobody will read the weights
  for (const std::byte* rows : {call.gate_up_proj, call.down_proj, call.gate_up_bias, call.down_bias})
    if (reinterpret_cast<uintptr_t>(rows) % 16) return "Ampere's engine needs weights and biases aligned to 16 bytes";
  return {};
}

template <DType dtype, int kTileN = 128, int kStages = 5, template <int> class PipelineOf = Sm80Pipeline>
class Sm80Engine {
 public:
  static constexpr int kWarpRows = 32, kWarpColumns = 64, kWarpsInRow = kTileN / kWarpColumns;
  static constexpr int kCrewWarps = kBlockM / kWarpRows * kWarpsInRow, kLoaderWarps = 0;
  static constexpr int kHiddenBytes = dtype_bytes(dtype);
  static_assert(kBlockM % kWarpRows == 0 && kTileN % kWarpColumns == 0);

  using Pipeline = PipelineOf<kStages>;
  using Stage = Sm80Stage<kTileN>;
  using Tile = HalvedTile<kTileN, const std::byte*>;
  struct Operands {};

  struct Shared {
    Stage stage[kStages];
    const std::byte* row[kBlockM];  // where each row lies that the tile multiplies,
    std::byte* result[kBlockM];     // and where the tile begins in each that it gives

    FLASHMOE_DEVICE void init() {}
  };

  FLASHMOE_HD static constexpr int up_cols(bool gated) { return Tile::up_cols(gated); }
  FLASHMOE_HD static constexpr int down_cols(bool gated) { return Tile::down_cols(gated); }
  static std::string make_operands(Operands*, const Call& call) {
    return call.dtype == dtype ? why_not_sm80(call) : "this engine is of another dtype";
  }

  // Up and down tiles take one way, so that the kernel has the loop over K once.
  template <class Group, class P>
  FLASHMOE_DEVICE static void tile(const Group& group, const Context<P>& c, const TileShape& tiles, const Work& work,
                                   Shared& shared) {
    WarpSums sums;
    multiply(group, c, tiles, work, shared, sums);
    const bool activated = work.kind == WorkKind::kUpTile, gated = activated && c.call.gated;
    const Activation activation = c.call.activation;
    for_each_16_rows(group, tile_of(c, tiles, work), shared, sums,
                     [&](RowSums& s, std::byte* const (&rows)[2], const int (&cols)[2]) {
                       if (activated) Sums::template activate<0>(s, activation);
                       if (gated) Sums::multiply_halves(s);
                       if (activated && !gated) Sums::template activate<1>(s, activation);
                       Sums::template store<0>(s, rows, cols[0]);
                       if (!gated) store_second_half(s, rows, cols);
                     });
  }

  template <class Group, class P>
  FLASHMOE_DEVICE static void combine(const Group& group, const Context<P>& c, const Work& work) {
    combine_rows<dtype>(group, c, work);
  }

 private:
  using Sums = MmaSums<dtype, kWarpColumns>;
  using RowSums = typename Sums::Sums;  // of 16 rows
  using WarpSums = Sm80Sums<kWarpRows>;

  template <class Group>
  FLASHMOE_DEVICE static int first_row_of(const Group& group) { return group.warp() / kWarpsInRow * kWarpRows; }
  // Of its columns in either half.
  template <class Group>
  FLASHMOE_DEVICE static int first_column_of(const Group& group) {
    return group.warp() % kWarpsInRow * (kWarpColumns / 2);
  }

  template <class P>
  FLASHMOE_DEVICE static Tile tile_of(const Context<P>& c, const TileShape& tiles, const Work& work) {
    return work.kind == WorkKind::kUpTile ? Tile::up(c, tiles, work, c.call.gate_up_proj)
                                          : Tile::down(c, tiles, work, c.call.down_proj);
  }

  // The tile is not kept in registers beyond this: all there are, are the sums' and the operands'. Whoever needs it
  // again looks it up again.
  template <class Group, class P>
  FLASHMOE_DEVICE static void multiply(const Group& group, const Context<P>& c, const TileShape& tiles,
                                       const Work& work, Shared& shared, WarpSums& sums) {
    const Tile tile = tile_of(c, tiles, work);
    find_rows(group, c, tile, work, shared);
    group.sync();
    const int row_bytes = tile.depth * dtype_bytes(dtype), first_row = first_row_of(group);
    const Sm80Copies<Stage, 32 * kCrewWarps> copies(group.rank(), tile, row_bytes, shared.row);
    sm80_products<dtype, kWarpRows, Pipeline>(group, shared.stage, copies, first_row, first_column_of(group),
                                              first_row < tile.num_rows, ceil_div(row_bytes, Stage::kStepBytes), sums);
  }

  template <class Group, class P>
  FLASHMOE_DEVICE static void find_rows(const Group& group, const Context<P>& c, const Tile& tile, const Work& work,
                                        Shared& shared) {
    for (int row = group.rank(); row < tile.num_rows; row += group.size()) {
      std::byte* hidden =
          reinterpret_cast<std::byte*>(c.ws.hidden + (size_t(work.index) * kBlockM + row) * c.ws.hidden_stride);
      const bool up = work.kind == WorkKind::kUpTile;
      shared.row[row] = up ? token_row(c, uint32_t(work.index), uint32_t(row)) : hidden;
      shared.result[row] = (up ? hidden : result_row(c, uint32_t(work.index), uint32_t(row))) +
                           size_t(tile.begin) * dtype_bytes(dtype);
    }
  }

  // f(sums with their bias, where the warp's part begins in the thread's two rows, columns of it in each half)
  template <class Group, class F>
  FLASHMOE_DEVICE static void for_each_16_rows(const Group& group, const Tile& tile, const Shared& shared,
                                               WarpSums& sums, const F& f) {
    const int first_column = first_column_of(group);
    const int cols[2] = {tile.cols[0] - first_column, tile.cols[1] - first_column};
    FLASHMOE_UNROLL
    for (int i = 0; i < kWarpRows / 16; ++i) {
      const int first_row = first_row_of(group) + 16 * i;
      if (first_row >= tile.num_rows) break;
      std::byte* rows[2];
      FLASHMOE_UNROLL
      for (int r = 0; r < 2; ++r) {
        const int row = first_row + gpu::lane() / 4 + 8 * r;
        rows[r] = row < tile.num_rows ? shared.result[row] + first_column * dtype_bytes(dtype) : nullptr;
      }
      if (tile.bias) {
        Sums::template add_bias<0>(sums[i], tile.bias, tile.bias_begin[0] + first_column, cols[0]);
        Sums::template add_bias<1>(sums[i], tile.bias, tile.bias_begin[1] + first_column, cols[1]);
      }
      f(sums[i], rows, cols);
    }
  }

  FLASHMOE_DEVICE static void store_second_half(const RowSums& sums, std::byte* const (&rows)[2],
                                                const int (&cols)[2]) {
    std::byte* moved[2];
    for (int r = 0; r < 2; ++r) moved[r] = rows[r] ? rows[r] + Tile::kHalf * dtype_bytes(dtype) : nullptr;
    Sums::template store<1>(sums, moved, cols[1]);
  }
};

}  // namespace flashmoe
