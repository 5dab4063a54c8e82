// The exact engine: tile products on a block's plain fp32 units. Every output owns one accumulator, to which the
// products of K are added in order by fused multiply-add, so a row's bits depend on that row and its weights alone:
// not on the tile's height, its columns, or the number of threads.
//
// Tokens, weights, biases and results are of the call's dtype, and of any width. Rows are read 16 bytes at a time where
// all of them allow it, else element by element. One kernel serves all dtypes: they differ where rows are staged and
// results stored, and nowhere in the products.
#pragma once

#include <string>

#include "engine/combine_rows.h"
#include "protocol/tile.h"

namespace flashmoe {

template <int kWarps = 8>
class ExactEngine {
 public:
  static constexpr int kCrewWarps = kWarps, kLoaderWarps = 0;
  static constexpr int kHiddenBytes = 4;
  static constexpr int kCols = 64;  // weight rows of a tile
  static constexpr int kStep = 32;  // elements of K that are staged at a time

  struct Shared {
    const std::byte* row[kBlockM];
    std::byte* result[kBlockM];
    float a[kStep][kBlockM + 1];  // transposed: the threads of a warp read along rows
    float b[kStep][kCols + 1];

    FLASHMOE_DEVICE void init() {}
  };
  struct Operands {};
  static std::string make_operands(Operands*, const Call&) { return {}; }

  // A gated tile has as many gate rows as up rows of the weights, so that one thread holds both halves of an output.
  FLASHMOE_HD static constexpr int up_cols(bool gated) { return gated ? kCols / 2 : kCols; }
  FLASHMOE_HD static constexpr int down_cols(bool) { return kCols; }

  template <class Group, class P>
  FLASHMOE_DEVICE static void tile(const Group& group, const Context<P>& c, const TileShape& tiles, const Work& work,
                                   Shared& shared) {
    work.kind == WorkKind::kUpTile ? up_tile(group, c, tiles, work, shared) : down_tile(group, c, tiles, work, shared);
  }

  template <class Group, class P>
  FLASHMOE_DEVICE static void up_tile(const Group& group, const Context<P>& c, const TileShape& tiles, const Work& work,
                                      Shared& shared) {
    const Call& call = c.call;
    const UpTile t = flashmoe::up_tile(c, tiles, work);
    const int I = call.intermediate_size, cols = t.end - t.begin;
    for (int r = group.rank(); r < t.num_rows; r += group.size())
      shared.row[r] = token_row(c, uint32_t(work.index), uint32_t(r));
    group.sync();

    // Of the tile's weight rows the second half is the up rows, if it is gated.
    const auto weight_row = [&](int n) { return t.begin + n + (call.gated && n >= kCols / 2 ? I - kCols / 2 : 0); };
    const auto weights = [&](int n) -> const std::byte* {
      const bool inside = (call.gated ? n % (kCols / 2) : n) < cols;
      return inside ? t.gate_up + size_t(weight_row(n)) * call.row_bytes() : nullptr;
    };
    Sums sums = {};
    multiply(group, shared, call, call.dtype, t.num_rows, call.hidden_size, weights, sums);

    FLASHMOE_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const int r = row_of(i);
      if (r >= t.num_rows) break;
      float* hidden = t.hidden + size_t(r) * c.ws.hidden_stride;
      FLASHMOE_UNROLL  // so that the sums stay in registers
      for (int j = 0; j < kColumns; ++j) {
        const int n = column_of(j);
        if (n >= cols) break;
        const auto sum = [&](int column, int at) {
          return sums[i][column] + (t.bias ? load_element(call.dtype, t.bias, weight_row(at)) : 0.0f);
        };
        const float h = activate(call.activation, sum(j, n));
        hidden[t.begin + n] = call.gated ? h * sum((j + kColumns / 2) % kColumns, n + kCols / 2) : h;
      }
    }
  }

  template <class Group, class P>
  FLASHMOE_DEVICE static void down_tile(const Group& group, const Context<P>& c, const TileShape& tiles, const Work& work,
                                        Shared& shared) {
    const Call& call = c.call;
    const DownTile t = flashmoe::down_tile(c, tiles, work);
    const int cols = t.end - t.begin;
    const size_t weight_bytes = size_t(call.intermediate_size) * dtype_bytes(call.dtype);
    for (int r = group.rank(); r < t.num_rows; r += group.size()) {
      shared.row[r] = reinterpret_cast<const std::byte*>(t.hidden + size_t(r) * c.ws.hidden_stride);
      shared.result[r] = result_row(c, uint32_t(work.index), uint32_t(r));
    }
    group.sync();

    const auto weights = [&](int n) { return n < cols ? t.down + size_t(t.begin + n) * weight_bytes : nullptr; };
    Sums sums = {};
    multiply(group, shared, call, DType::kFloat32, t.num_rows, call.intermediate_size, weights, sums);

    FLASHMOE_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const int r = row_of(i);
      if (r >= t.num_rows) break;
      FLASHMOE_UNROLL
      for (int j = 0; j < kColumns; ++j) {
        const int n = column_of(j);
        if (n >= cols) break;
        const float bias = t.bias ? load_element(call.dtype, t.bias, t.begin + n) : 0.0f;
        store_element(call.dtype, shared.result[r], t.begin + n, sums[i][j] + bias);
      }
    }
  }

  template <class Group, class P>
  FLASHMOE_DEVICE static void combine(const Group& group, const Context<P>& c, const Work& work) {
    with_dtype(c.call.dtype, [&]<DType dtype>() { combine_rows<dtype>(group, c, work); });
  }

 private:
  // The crew as a grid over the tile: a thread has kRows × kColumns outputs, each the same distance apart.
  static constexpr int kThreadColumns = 16, kThreadRows = 32 * kWarps / kThreadColumns;
  static constexpr int kRows = kBlockM / kThreadRows, kColumns = kCols / kThreadColumns;
  static_assert(kRows * kThreadRows == kBlockM, "the crew's rows must divide a row block");
  using Sums = float[kRows][kColumns];

  FLASHMOE_DEVICE static int row_of(int i) { return gpu::thread_in_block() / kThreadColumns + i * kThreadRows; }
  FLASHMOE_DEVICE static int column_of(int j) { return gpu::thread_in_block() % kThreadColumns + j * kThreadColumns; }

  // sums += shared.row[0:num_rows, 0:K) · weightsᵀ. Rows are of type `rows`, weights of the call's.
  template <class Group, class Weights>
  FLASHMOE_DEVICE static void multiply(const Group& group, Shared& shared, const Call& call, DType rows, int num_rows,
                                       int K, const Weights& weights, Sums& sums) {
    const auto row = [&](int r) { return r < num_rows ? shared.row[r] : nullptr; };
    const bool whole_pieces = has_whole_pieces(call);
    for (int begin = 0; begin < K; begin += kStep) {
      stage(group, rows, whole_pieces, row, begin, K, shared.a);
      stage(group, call.dtype, whole_pieces, weights, begin, K, shared.b);
      group.sync();
      for (int k = 0; k < kStep; ++k) {
        float b[kColumns];
        FLASHMOE_UNROLL
        for (int j = 0; j < kColumns; ++j) b[j] = shared.b[k][column_of(j)];
        FLASHMOE_UNROLL
        for (int i = 0; i < kRows; ++i) {
          const float a = shared.a[k][row_of(i)];
          FLASHMOE_UNROLL
          for (int j = 0; j < kColumns; ++j) sums[i][j] = fmaf(a, b[j], sums[i][j]);
        }
      }
      group.sync();
    }
  }

  // to[k][r] = row(r)[begin + k], zeros past K and where there is no row.
  template <class Group, class Row, int kRowsAndPad>
  FLASHMOE_DEVICE static void stage(const Group& group, DType dtype, bool whole_pieces, const Row& row, int begin,
                                    int K, float (&to)[kStep][kRowsAndPad]) {
    with_dtype(dtype, [&]<DType type>() {
      whole_pieces ? stage_by<type, kPerPiece<type>>(group, row, begin, K, to)
                   : stage_by<type, 1>(group, row, begin, K, to);
    });
  }

  // kPer elements at a time.
  template <DType type, int kPer, class Group, class Row, int kRowsAndPad>
  FLASHMOE_DEVICE static void stage_by(const Group& group, const Row& row, int begin, int K,
                                       float (&to)[kStep][kRowsAndPad]) {
    constexpr int kPieces = kStep / kPer;
    for (int piece = group.rank(); piece < (kRowsAndPad - 1) * kPieces; piece += group.size()) {
      const int r = piece / kPieces, k = piece % kPieces * kPer;
      const std::byte* from = row(r);
      float value[kPer] = {};
      if (from && begin + k < K) load_elements<type>(from, begin + k, value);
      FLASHMOE_UNROLL
      for (int e = 0; e < kPer; ++e) to[k + e][r] = value[e];
    }
  }
};

}  // namespace flashmoe
