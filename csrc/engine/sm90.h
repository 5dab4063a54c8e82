// The Hopper engine: tile products by wgmma, in bf16 and fp16 with fp32 sums. One or two warpgroups do math, each for 64
// rows of a block; one more holds the loaders and the agent. A block of more rows than that is computed in passes, each
// of which reads the weights again. In each step over K, 128 bytes wide,
//   - a thread brings kTileN rows of the weights by TMA,
//   - two warps gather the block's rows by index: tokens where they lie, or rows of `hidden`,
//   - the math warpgroups multiply what came kStages steps ago.
// Rows of `hidden` are copied by threads and not by TMA, since other blocks wrote them with plain stores: so no fence
// between the proxies is owed on global memory.
//
// A row's bits depend on that row and its weights alone: each product of 64 rows adds its columns of K to every row in
// the same order, whatever the other rows hold.
//
// So the wide tiles and the narrow ones give the same bits.
//
// What to expect on an H100, predicted and not measured. Wide: a step of 128 × 256 × 64 is 4.19 MFLOP, 1024 cycles of an
// SM's tensor cores, and takes 16 KiB of rows and 32 KiB of weights out of L2: 48 bytes a cycle, 11.6 TB/s for 132 SMs
// at full speed. L2 gives about 5.5 to 7 TB/s, so prefill should end near 470 to 600 of the 989 TFLOP/s, bound by L2,
// until two blocks share their weights by multicast (32 KiB each: 700 to 900).
// Narrow: few rows, so each weight is read once, and memory is the bound. Its 3.35 TB/s are 25 bytes a nanosecond for
// each SM, 4.8 TB/s are 36, and at about 1 µs of latency that many KB must be in flight: 13 stages of 8 KiB of weights
// are 104, so that half of the SMs can draw it all where there are no more tiles. Mixtral's experts are worth 448 up
// tiles and 64 down tiles each: one token's two experts load 132 SMs to 97 % and 97 %, where tiles of 128 weight rows
// would to 85 % and 48 %. A step has 128 cycles of products in about 560 of reading (322 ns). Rows are read from L2
// once for every 64 weight rows, 1 + rows / 64 bytes for each of the weights: within L2's reach to about 32 rows.
#pragma once

#include "engine/combine_rows.h"
#include "engine/sm90_math.h"

namespace flashmoe {

template <DType dtype, int kTileN_, int kStages, int kMathGroups_, template <int, int, int> class PipelineOf = Sm90Pipeline>
class Sm90Engine {
 public:
  static constexpr int kTileN = kTileN_;
  static constexpr int kMathGroups = kMathGroups_, kRows = 64 * kMathGroups;  // of a pass
  static constexpr int kCrewWarps = 4 * kMathGroups, kLoaderWarps = 3;
  static constexpr int kHiddenBytes = dtype_bytes(dtype);
  static_assert(kBlockM % kRows == 0 && kTileN % 64 == 0 && kTileN <= 256);

  static constexpr uint32_t kPiecesAhead = 2;  // of the crew, that the loaders may be
  using Pipeline = PipelineOf<kStages, 2, kCrewWarps>;
  using Stage = Sm90Stage<kTileN, kRows>;
  using Tile = Sm90Tile<kTileN>;
  using Loaders = Sm90Loaders<Stage, Pipeline>;
  using Sums = Sm90Sums<dtype, kTileN>;
  using Operands = Sm90Operands;
  static_assert(Loaders::kWarps == kLoaderWarps && Pipeline::kTables > kPiecesAhead);

  struct Shared {
    Stage stage[kStages];
    const std::byte* row[kRows];  // of the gathering warps: where the rows of their pass lie
    std::byte* result[Pipeline::kTables][kBlockM];  // where the rows of a tile go, found by them too
    Pipeline pipeline;

    FLASHMOE_DEVICE void init() { pipeline.init(); }
  };

  FLASHMOE_HD static constexpr int up_cols(bool gated) { return Tile::up_cols(gated); }
  FLASHMOE_HD static constexpr int down_cols(bool gated) { return Tile::down_cols(gated); }
  static std::string make_operands(Operands* operands, const Call& call) {
    if (call.dtype != dtype) return "this engine is of another dtype";
    return make_sm90_operands<kTileN>(operands, call);
  }

  // By all warps of the crew, and by all that are not: registers move to where the sums are. A launch gives each of
  // 3 · 128 threads 168 of an SM's 65536; with 2 · 128 threads all may have the most there is.
  FLASHMOE_DEVICE static void crew_begins() {
    if constexpr (kMathGroups == 2) gpu::increase_registers<200>();
  }
  FLASHMOE_DEVICE static void others_begin() {
    if constexpr (kMathGroups == 2) gpu::decrease_registers<104>();
  }
  static_assert(kMathGroups <= 2 && 2 * 200 + 104 <= 3 * 168);

  FLASHMOE_DEVICE static void prefetch(const Operands* operands) {
    if (gpu::lane() == 0) gpu::prefetch_tensor_map(&operands->gate_up), gpu::prefetch_tensor_map(&operands->down);
  }

  // By each warp of the loaders.
  template <class P, class Ask>
  FLASHMOE_DEVICE void load(int loader, const Context<P>& c, const TileShape& tiles, const Work& work, Shared& shared,
                            const Operands* operands, const Ask& ask) {
    const uint32_t slot = uint32_t(work.index);
    const auto hidden = [&](int row) { return hidden_row(c, work, row); };
    if (work.kind == WorkKind::kUpTile)
      load_tile(loader, Tile::up(c, tiles, work, &operands->gate_up), shared,
                [&](int row) { return token_row(c, slot, uint32_t(row)); }, hidden, ask);
    else if (work.kind == WorkKind::kDownTile)
      load_tile(loader, Tile::down(c, tiles, work, &operands->down), shared, hidden,
                [&](int row) { return result_row(c, slot, uint32_t(row)); }, ask);
    else if (loader == Loaders::kGatherWarps && gpu::lane() == 0)
      ask();
  }

  template <class Group, class P>
  FLASHMOE_DEVICE void tile(const Group& group, const Context<P>& c, const TileShape& tiles, const Work& work,
                            Shared& shared) {
    work.kind == WorkKind::kUpTile ? up_tile(group, c, tiles, work, shared) : down_tile(group, c, tiles, work, shared);
  }

  template <class Group, class P>
  FLASHMOE_DEVICE void up_tile(const Group& group, const Context<P>& c, const TileShape& tiles, const Work& work,
                               Shared& shared) {
    const Tile tile = Tile::up(c, tiles, work, nullptr);
    std::byte* const* results = next_table(shared);
    for (int pass = 0; pass < passes_of(tile); ++pass) {
      typename Sums::Sums sums;
      if (!multiply(group, tile, pass, shared, sums)) continue;
      Sums::template activate<0>(sums, c.call.activation);
      std::byte* rows[2];
      find_rows(group, tile, pass, results, rows);
      if (c.call.gated) {
        Sums::multiply_halves(sums);
      } else {
        Sums::template activate<1>(sums, c.call.activation);
        store_second_half(sums, rows, tile);
      }
      Sums::template store<0>(sums, rows, tile.cols[0]);
    }
  }

  template <class Group, class P>
  FLASHMOE_DEVICE void down_tile(const Group& group, const Context<P>& c, const TileShape& tiles, const Work& work,
                                 Shared& shared) {
    const Tile tile = Tile::down(c, tiles, work, nullptr);
    std::byte* const* results = next_table(shared);
    for (int pass = 0; pass < passes_of(tile); ++pass) {
      typename Sums::Sums sums;
      if (!multiply(group, tile, pass, shared, sums)) continue;
      std::byte* rows[2];
      find_rows(group, tile, pass, results, rows);
      Sums::template store<0>(sums, rows, tile.cols[0]);
      store_second_half(sums, rows, tile);
    }
  }

  template <class Group, class P>
  FLASHMOE_DEVICE static void combine(const Group& group, const Context<P>& c, const Work& work) {
    combine_rows<dtype>(group, c, work);
  }

 private:
  static constexpr int kStepBytes = Stage::kStepBytes, kStepColumns = kStepBytes / dtype_bytes(dtype);
  // Weights that one pass reads are read by no other block of rows soon: the narrow tiles are for few rows.
  static constexpr gpu::CacheHint kWeightHint = kRows < kBlockM ? gpu::CacheHint::kEvictFirst : gpu::CacheHint::kNone;

  FLASHMOE_HD static int steps_of(const Tile& tile) { return ceil_div(tile.depth, kStepColumns); }
  FLASHMOE_HD static int passes_of(const Tile& tile) { return kRows == kBlockM ? 1 : ceil_div(tile.num_rows, kRows); }

  // Of result rows, for the next tile; by all that load or compute it. It is whole when the first stage is full.
  FLASHMOE_DEVICE std::byte** next_table(Shared& shared) { return shared.result[Pipeline::table_of(num_tiles_++)]; }

  template <class Address, class Result, class Ask>
  FLASHMOE_DEVICE void load_tile(int loader, const Tile& tile, Shared& shared, const Address& address,
                                 const Result& result, const Ask& ask) {
    if (loader == Loaders::kGatherWarps)
      return Loaders::fetch_weights(shared.pipeline, shared.stage, turn_, tile, passes_of(tile), steps_of(tile),
                                    kStepColumns, kWeightHint, ask);
    std::byte** results = next_table(shared);
    for (int row = 32 * loader + gpu::lane(); row < tile.num_rows; row += 32 * Loaders::kGatherWarps)
      results[row] = result(row);
    for (int first = 0; first < tile.num_rows; first += kRows)
      Loaders::gather_rows(shared.pipeline, shared.stage, turn_, shared.row, loader,
                           tile.num_rows - first < kRows ? tile.num_rows - first : kRows,
                           tile.depth * dtype_bytes(dtype), steps_of(tile), [&](int row) { return address(first + row); });
  }

  // With the bias; false if this warpgroup has no rows in this pass.
  template <class Group>
  FLASHMOE_DEVICE bool multiply(const Group& group, const Tile& tile, int pass, Shared& shared,
                                typename Sums::Sums& sums) {
    const int first_row = group.warp() / 4 * 64;
    const bool has_rows = pass * kRows + first_row < tile.num_rows;
    sm90_products<dtype, kTileN>(shared.pipeline, shared.stage, turn_, first_row, has_rows, steps_of(tile), sums);
    if (has_rows && tile.bias) {
      Sums::template add_bias<0>(sums, tile.bias, tile.bias_begin[0], tile.cols[0]);
      Sums::template add_bias<1>(sums, tile.bias, tile.bias_begin[1], tile.cols[1]);
    }
    return has_rows;
  }

  FLASHMOE_DEVICE static void store_second_half(const typename Sums::Sums& sums, std::byte* const (&rows)[2],
                                                const Tile& tile) {
    std::byte* moved[2];
    for (int i = 0; i < 2; ++i) moved[i] = rows[i] ? rows[i] + Tile::kHalf * dtype_bytes(dtype) : nullptr;
    Sums::template store<1>(sums, moved, tile.cols[1]);
  }

  // Where the tile begins in each of the two rows that a thread holds, or null where the block has no such row.
  template <class Group>
  FLASHMOE_DEVICE static void find_rows(const Group& group, const Tile& tile, int pass, std::byte* const* results,
                                        std::byte* (&rows)[2]) {
    FLASHMOE_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int row = pass * kRows + group.rank() / 128 * 64 + gpu::wgmma_row(group.rank(), 2 * i);
      rows[i] = row < tile.num_rows ? results[row] + size_t(tile.begin) * dtype_bytes(dtype) : nullptr;
    }
  }
  template <class P>
  FLASHMOE_DEVICE static std::byte* hidden_row(const Context<P>& c, const Work& work, int row) {
    return reinterpret_cast<std::byte*>(c.ws.hidden + (size_t(work.index) * kBlockM + row) * c.ws.hidden_stride);
  }

  typename Pipeline::Turn turn_;
  uint32_t num_tiles_ = 0;
};

// For many rows an expert, and for few.
template <DType dtype>
using Sm90Wide = Sm90Engine<dtype, 256, 4, 2>;
template <DType dtype>
using Sm90Narrow = Sm90Engine<dtype, 64, 13, 1>;

}  // namespace flashmoe
