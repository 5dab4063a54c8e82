// What the backward engine's products are asked for alone: integers, as the forward engines' are.
#pragma once

#include "backward_alone.h"
#include "engine_cases.h"

namespace flashmoe::test {

// f(name, product) of each.
template <class F>
void for_each_backward_product(const F& f) {
  f("grad of h bf16", GradOfHidden<DType::kBFloat16>{});
  f("grad of h fp16", GradOfHidden<DType::kFloat16>{});
  f("ungated up bf16", UngatedUp<DType::kBFloat16>{});
  f("ungated up fp16", UngatedUp<DType::kFloat16>{});
  f("grad of x bf16", GradOfX<DType::kBFloat16>{});
  f("grad of x fp16", GradOfX<DType::kFloat16>{});
  f("grad of w bf16", GradOfWeights<DType::kBFloat16>{});
  f("grad of w fp16", GradOfWeights<DType::kFloat16>{});
}

// None, as where an expert has no rows; less than a step; one more than a step; two blocks, the second of which ends
// within a step; three, of which the third takes the place of the first; and eight. No multiples of 7, by which tiles
// number their rows.
inline constexpr int kBackwardDepths[] = {0, 1, 8, 33, 200, 333, 1024};

// Rows along K are of a multiple of 16 bytes. Sums over rows are of any number.
template <class Alone>
bool has_depth(int depth) {
  return Alone::kXAcross || (depth > 0 && depth % 8 == 0);
}

// As Integers::tiles, of halves that follow each other, and by eights where columns are meant. Before the last of the
// weights the first tile has all of its columns, the next ones 40, 48, …
template <class Alone>
Tiles backward_tiles(const Integers& integers, int num_rows, int num_tiles) {
  const int rows = Alone::kXAcross ? ceil_div(num_rows, 8) * 8 : num_rows;
  return {{}, nullptr, nullptr, integers.kX, integers.kWeights, integers.depth, rows, num_tiles,
          {176, 176 + Alone::kTileN / 2}, 88, 96, integers.kWeights, nullptr};
}

}  // namespace flashmoe::test
