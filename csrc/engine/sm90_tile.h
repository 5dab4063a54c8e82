// A tile as the Hopper engine sees it: both of its halves, for up and down tiles alike.
//
// A tile multiplies kTileN rows of the weights, in two boxes of kTileN / 2: of a gated up tile the gate rows and the
// up rows of the same columns, so that one thread holds both; else neighbours.
#pragma once

#include <string>

#include "gpu/tensor_map.h"
#include "protocol/tile.h"

namespace flashmoe {

// The weights as TMA reads them, as one matrix over all local experts.
struct Sm90Operands {
  gpu::TensorMap gate_up, down;
};

template <int kTileN>
struct Sm90Tile {
  static constexpr int kHalf = kTileN / 2;

  const gpu::TensorMap* weights;  // for the loaders; the math has none
  int depth;              // of the products: columns of the weights
  int num_rows;           // of the row block
  int begin;              // first column of the output
  int cols[2];            // columns of the output in each half
  int weight_row[2];      // first weight row of each half, in the matrix of all experts
  const std::byte* bias;  // of the block's expert, or null
  int bias_begin[2];      // where each half begins in it

  FLASHMOE_HD static constexpr int up_cols(bool gated) { return gated ? kHalf : kTileN; }
  FLASHMOE_HD static constexpr int down_cols(bool) { return kTileN; }

  template <class P>
  FLASHMOE_ROLE static Sm90Tile up(const Context<P>& c, const TileShape& tiles, const Work& work,
                                   const gpu::TensorMap* weights) {
    const Call& call = c.call;
    const UpTile t = flashmoe::up_tile(c, tiles, work);
    const int first_row = int(c.ws.ring[work.index].local_expert) * call.up_rows();
    Sm90Tile tile(t.num_rows, t.begin, t.end - t.begin, first_row);
    tile.weights = weights, tile.depth = call.hidden_size, tile.bias = t.bias;
    if (!call.gated) return tile;
    tile.cols[1] = tile.cols[0];
    tile.bias_begin[1] = call.intermediate_size + t.begin;
    tile.weight_row[1] = first_row + tile.bias_begin[1];
    return tile;
  }

  template <class P>
  FLASHMOE_ROLE static Sm90Tile down(const Context<P>& c, const TileShape& tiles, const Work& work,
                                     const gpu::TensorMap* weights) {
    const Call& call = c.call;
    const DownTile t = flashmoe::down_tile(c, tiles, work);
    const int first_row = int(c.ws.ring[work.index].local_expert) * call.hidden_size;
    Sm90Tile tile(t.num_rows, t.begin, t.end - t.begin, first_row);
    tile.weights = weights, tile.depth = call.intermediate_size, tile.bias = t.bias;
    return tile;
  }

 private:
  FLASHMOE_HD Sm90Tile(int num_rows, int begin, int all_cols, int first_row)
      : num_rows(num_rows), begin(begin), cols{all_cols < kHalf ? all_cols : kHalf, all_cols - kHalf},
        weight_row{first_row + begin, first_row + begin + kHalf}, bias_begin{begin, begin + kHalf} {}
};

// Empty, or why this engine cannot take the call, for which another must be chosen. TMA wants every row of the
// weights, and a 16-byte copy every row of the tokens, to begin at a multiple of 16 bytes: all pointers must, and so
// must both widths. That is the one demand there is; any width beyond it will do.
template <int kTileN>
std::string make_sm90_operands(Sm90Operands* operands, const Call& call) {
  const uint64_t hidden = call.hidden_size, inner = call.intermediate_size, size = dtype_bytes(call.dtype);
  if (hidden * size % 16 || inner * size % 16)
    return "Hopper's engine needs rows of a multiple of 16 bytes, not of " + std::to_string(hidden * size) + " and " +
           std::to_string(inner * size);
  for (const std::byte* rows : {call.x, static_cast<const std::byte*>(call.y)})
    if (reinterpret_cast<uintptr_t>(rows) % 16) return "Hopper's engine needs x and y aligned to 16 bytes";
  const uint64_t experts = call.num_local_experts();
  if (experts == 0) return {};  // and nobody will read the maps
  const uint32_t step = uint32_t(128 / size), rows = kTileN / 2;
  const auto make = [&](gpu::TensorMap* map, const std::byte* data, uint64_t columns, uint64_t weight_rows) {
    return gpu::make_tensor_map(map, {call.dtype, data, 2, {columns, experts * weight_rows, 1}, {columns * size, 0},
                                      {step, rows, 1}, true});
  };
  const std::string error = make(&operands->gate_up, call.gate_up_proj, hidden, uint64_t(call.up_rows()));
  return error.empty() ? make(&operands->down, call.down_proj, inner, hidden) : error;
}

}  // namespace flashmoe
