// The engine of backward calls for GPUs from Ampere on: what protocol/backward.h says, by mma.sync in bf16 and in fp16.
//
// Its tiles are the forward engine's (sm80.h): 128 rows by 128 columns, eight warps, four steps of 32 elements of K
// ahead. What differs is how operands lie. Of x, of dy, of hidden rows and of an up tile's gate_up, K runs along the
// rows. But down, a down tile's gate_up and both operands of a grad tile have K as their rows, and are transposed on
// the way to registers (sm80_across.h).
//
// Hidden rows are in the call's own type, and weighted: w · d(gate, up) and w · h, each rounded once. So grad tiles
// multiply rows as they lie, x and dy where they came. A down tile's rows are weighted too, and their combine only
// sums. The gradients of w itself are made of fp32 sums that no w has touched.
//
// A token's bits depend on its row and the weights alone, as in the forward engine; that holds for an up tile's parts
// of g · h too, whose columns are added in a fixed order. Those of a weight's gradient depend on the order of the
// expert's rows: a step of K is 32 of them, counted from the first, whatever their sources.
//
// Why an up tile is two products, one after the other. Its three sums are 96 registers of a thread: with operands and
// addresses, and what a worker keeps, more than the 168 that there are. So the gradient of h is summed first and waits,
// in fp32, in the rows for which the tile's results are meant: 32 KiB to L2 and back, beside the 3.5 MiB that a tile
// reads where K is 4096.
//
// What to expect, predicted and not measured. Of 16 · H · I operations a row (gated), 14 are steps like the forward
// engine's: on an A100 512 cycles of its tensor cores and as many of shared memory. In the gradient of h a warp has 32
// by 32 products, which shared memory feeds in 352 cycles for each 256. Together that is 95 % of the forward engine's
// rate, less what begins and ends tiles, of which an up tile has two: some 3 % where H is 4096. So 165 to 200 of the
// 312 TFLOP/s, and a backward call takes about 2.9 forward calls. On Hopper shared memory bounds all of it, at 460
// TFLOP/s for 132 SMs of 1.7 GHz: perhaps 250 to 330 of them. A grad tile of an expert with one row block is but four
// steps, and 32 KiB of results: writing them is what bounds it.
#pragma once

#include <string>

#include "engine/combine_gradients.h"
#include "engine/combine_rows.h"
#include "engine/sm80.h"
#include "engine/sm80_grad_tile.h"
#include "engine/sm80_up_gradient.h"

namespace flashmoe {

// As why_not_sm80, of a backward call.
inline std::string why_not_sm80_backward(const Call& call) {
  if (std::string why = why_not_sm80(call); !why.empty()) return why;
  const Gradients& grad = call.grad;
  uintptr_t bits = reinterpret_cast<uintptr_t>(grad.y);
  for (const std::byte* rows : {grad.gate_up_proj, grad.gate_up_bias, grad.down_proj, grad.down_bias})
    bits |= reinterpret_cast<uintptr_t>(rows);
  if (bits % 16) return "Ampere's engine needs gradients aligned to 16 bytes";
  return {};
}

template <DType dtype, int kTileN = 128, int kStages = 5, template <int> class PipelineOf = Sm80Pipeline>
class Sm80BackwardEngine {
  using Parts = Sm80BackwardParts<dtype, kTileN, kStages, PipelineOf>;
  using UpGradient = Sm80UpGradient<Parts>;
  using GradTile = Sm80GradTile<Parts>;
  using Stage = typename Parts::Stage;

 public:
  static constexpr int kCrewWarps = Parts::kWarps, kLoaderWarps = 0;
  static constexpr int kHiddenBytes = 2;
  static constexpr int kGradRows = GradTile::kRows, kGradCols = GradTile::kCols;

  using Shared = typename Parts::Shared;
  struct Operands {};
  static std::string make_operands(Operands*, const Call& call) {
    return call.dtype == dtype ? why_not_sm80_backward(call) : "this engine is of another dtype";
  }

  FLASHMOE_HD static constexpr int up_cols(bool) { return UpGradient::kCols; }
  FLASHMOE_HD static constexpr int down_cols(bool) { return kTileN; }

  template <class Group, class P>
  FLASHMOE_DEVICE static void tile(const Group& group, const Context<P>& c, const TileShape& tiles, const Work& work,
                                   Shared& shared) {
    switch (work.kind) {
      case WorkKind::kUpTile: return UpGradient::compute(group, c, tiles, work, shared);
      case WorkKind::kDownTile: return down_tile(group, c, tiles, work, shared);
      default: GradTile::compute(group, c, work, shared);
    }
  }

  // The rows are weighted already, as what they are products of was.
  template <class Group, class P>
  FLASHMOE_DEVICE static void combine(const Group& group, const Context<P>& c, const Work& work) {
    combine_rows<dtype, false>(group, c, work);
    take_weight_gradients(group, c, work);
  }

 private:
  template <class Group, class P>
  FLASHMOE_DEVICE static void down_tile(const Group& group, const Context<P>& c, const TileShape& tiles,
                                        const Work& work, Shared& shared) {
    const DownTile t = flashmoe::down_tile(c, tiles, work);
    const typename Parts::Rows made = Parts::rows_of(c, work.index);
    for (int r = group.rank(); r < t.num_rows; r += group.size()) {
      std::byte* result = result_row(c, uint32_t(work.index), uint32_t(r));
      shared.left[r] = Parts::row_at(made, made.gate_up_grad, r);
      shared.result[r] = result + 2 * t.begin;
      if (work.part == 0)
        *reinterpret_cast<float*>(result + weight_gradient_at(c.call)) =
            sum_of_dots(made.dot + r * made.stride, ceil_div(c.call.intermediate_size, Parts::kWarpHalf));
    }
    group.sync();
    typename Parts::WarpSums sums;
    multiply_down(group, c, tiles, work, shared, sums);
    const int cols = t.end - t.begin;
    Parts::store(group, sums, t.num_rows, cols, [&](int r) { return shared.result[r]; });
  }

  template <class Group, class P>
  FLASHMOE_DEVICE static void multiply_down(const Group& group, const Context<P>& c, const TileShape& tiles,
                                            const Work& work, Shared& shared, typename Parts::WarpSums& sums) {
    const DownTile t = flashmoe::down_tile(c, tiles, work);
    const std::byte* gate_up = flashmoe::up_tile(c, tiles, work).gate_up + 2 * t.begin;
    const int K = c.call.up_rows();
    Parts::template multiply<AlongK, AcrossK>(
        group, shared, Sm80RowCopies<Stage, Parts::kThreads>(group.rank(), t.num_rows, 2 * K, shared.left),
        MatrixCopies<Stage, Parts::kThreads>(group.rank(), gate_up, c.call.row_bytes(), K, t.end - t.begin), t.num_rows,
        K, sums);
  }

  // Four at a time: a load is a walk to memory. A row is longer than its dots by what rounds them to 16 bytes.
  FLASHMOE_DEVICE static float sum_of_dots(const float* dot, int count) {
    float sum = 0;
    for (int first = 0; first < count; first += 4) {
      const gpu::Words4 words = gpu::load_coherent(reinterpret_cast<const gpu::Words4*>(dot + first));
      FLASHMOE_UNROLL
      for (int i = 0; i < 4; ++i) {
        float part;
        memcpy(&part, &words.word[i], 4);
        if (first + i < count) sum += part;
      }
    }
    return sum;
  }
};

}  // namespace flashmoe
