// The engine of backward calls for GPUs from Ampere on: what protocol/backward.h says, by mma.sync in bf16 and in fp16.
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
  for (const std::byte* rows : {grad.y, static_cast<const std::byte*>(grad.gate_up_proj),
                                static_cast<const std::byte*>(grad.gate_up_bias),
                                static_cast<const std::byte*>(grad.down_proj), static_cast<const std::byte*>(grad.down_bias)})
    if (reinterpret_cast<uintptr_t>(rows) % 16) return "Ampere's engine needs gradients aligned to 16 bytes";
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
  FLASHMOE_DEVICE static void down_tile(const Group& group, const Context<P>& c, const TileShape& tiles, const Work& work,
                                        Shared& shared) {
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
