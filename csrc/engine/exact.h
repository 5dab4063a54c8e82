// The exact engine: tile products on a block's plain fp32 units (engine/exact_product.h). Tokens, weights, biases and
// results are of the call's dtype, and of any width.
#pragma once

#include <string>

#include "engine/combine_rows.h"
#include "engine/exact_product.h"
#include "protocol/tile.h"

namespace flashmoe {

template <int kWarps = 8>
class ExactEngine {
  using Product = ExactProduct<kWarps>;

 public:
  static constexpr int kCrewWarps = kWarps, kLoaderWarps = 0;
  static constexpr int kHiddenBytes = 4;
  static constexpr int kCols = Product::kMostCols;  // weight rows of a tile

  struct Shared {
    const std::byte* row[kBlockM];
    std::byte* result[kBlockM];
    typename Product::Staged staged;

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
  static constexpr int kRows = Product::kRows, kColumns = kCols / Product::kThreadColumns;
  using Sums = typename Product::template Sums<kCols>;

  FLASHMOE_DEVICE static int row_of(int i) { return Product::row_of(i); }
  FLASHMOE_DEVICE static int column_of(int j) { return Product::column_of(j); }

  // sums += shared.row[0:num_rows, 0:K) · weightsᵀ. Rows are of type `rows`, weights of the call's.
  template <class Group, class Weights>
  FLASHMOE_DEVICE static void multiply(const Group& group, Shared& shared, const Call& call, DType rows, int num_rows,
                                       int K, const Weights& weights, Sums& sums) {
    const auto row = [&](int r) { return r < num_rows ? shared.row[r] : nullptr; };
    const bool whole_pieces = has_whole_pieces(call);
    Product::multiply(
        group, shared.staged, K,
        [&](int k) { Product::template stage_rows<kBlockM>(group, rows, whole_pieces, row, k, K, shared.staged.a); },
        [&](int k) {
          Product::template stage_rows<kCols>(group, call.dtype, whole_pieces, weights, k, K, shared.staged.b);
        },
        sums);
  }
};

}  // namespace flashmoe
