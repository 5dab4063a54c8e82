// A tile as an engine on tensor cores sees it: both of its halves, for up and down tiles alike.
//
// A tile multiplies kTileN rows of the weights, kTileN / 2 in each half: of a gated up tile the gate rows and the up
// rows of the same columns, so that one thread holds both; else neighbours.
#pragma once

#include "protocol/tile.h"

namespace flashmoe {

template <int kTileN, class Weights>
struct HalvedTile {
  static constexpr int kHalf = kTileN / 2;

  Weights weights;        // of all experts, as one matrix
  int depth;              // of the products: columns of the weights
  int num_rows;           // of the row block
  int begin;              // first column of the output
  int cols[2];            // columns of the output in each half
  int weight_row[2];      // first weight row of each half
  const std::byte* bias;  // of the block's expert, or null
  int bias_begin[2];      // where each half begins in it

  FLASHMOE_HD static constexpr int up_cols(bool gated) { return gated ? kHalf : kTileN; }
  FLASHMOE_HD static constexpr int down_cols(bool) { return kTileN; }

  template <class P>
  FLASHMOE_ROLE static HalvedTile up(const Context<P>& c, const TileShape& tiles, const Work& work, Weights weights) {
    const Call& call = c.call;
    const UpTile t = flashmoe::up_tile(c, tiles, work);
    const int first_row = int(c.ws.ring[work.index].local_expert) * call.up_rows();
    HalvedTile tile(t.num_rows, t.begin, t.end - t.begin, first_row);
    tile.weights = weights, tile.depth = call.hidden_size, tile.bias = t.bias;
    if (!call.gated) return tile;
    tile.cols[1] = tile.cols[0];
    tile.bias_begin[1] = call.intermediate_size + t.begin;
    tile.weight_row[1] = first_row + tile.bias_begin[1];
    return tile;
  }

  template <class P>
  FLASHMOE_ROLE static HalvedTile down(const Context<P>& c, const TileShape& tiles, const Work& work, Weights weights) {
    const Call& call = c.call;
    const DownTile t = flashmoe::down_tile(c, tiles, work);
    const int first_row = int(c.ws.ring[work.index].local_expert) * call.hidden_size;
    HalvedTile tile(t.num_rows, t.begin, t.end - t.begin, first_row);
    tile.weights = weights, tile.depth = call.intermediate_size, tile.bias = t.bias;
    return tile;
  }

 private:
  FLASHMOE_HD HalvedTile(int num_rows, int begin, int all_cols, int first_row)
      : num_rows(num_rows), begin(begin), cols{all_cols < kHalf ? all_cols : kHalf, all_cols - kHalf},
        weight_row{first_row + begin, first_row + begin + kHalf}, bias_begin{begin, begin + kHalf} {}
};

}  // namespace flashmoe
