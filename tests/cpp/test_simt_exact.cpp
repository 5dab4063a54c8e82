// The exact engine where rows are of any width: in the whole kernel on fibers, for each dtype, against the layer's
// definition. Rows that are no multiple of 16 bytes, or of 4, are copied, multiplied, combined and given up otherwise.
#include "simt_team.h"

namespace {

using namespace flashmoe;
using namespace flashmoe::test;

struct Widths {
  int hidden_size, intermediate_size;
};

Program program_of(const Layer& layer, const std::vector<int>& num_tokens, uint64_t seed) {
  Program program{{&layer, {}, equal_blocks(layer.num_experts, int(num_tokens.size()))}};
  for (int n : num_tokens) program[0].tokens.push_back(draw_tokens(layer, n, seed++));
  return program;
}

// Both multiples of 16 bytes, then only one, then none; widths of less than a piece, rows of 2 bytes, and rows of more
// than a warp combines at once.
template <DType dtype>
void any_widths() {
  for (const Widths w : {Widths{40, 72}, {40, 17}, {33, 40}, {33, 17}, {6, 102}, {1, 1}, {264, 24}})
    for (bool gated : {true, false})
      for (const std::vector<int>& num_tokens : {std::vector<int>{21}, {19, 7}}) {
        const Layer layer({.hidden_size = w.hidden_size, .intermediate_size = w.intermediate_size, .num_experts = 4, .top_k = 2,
                           .gated = gated, .bias = !gated, .dtype = dtype}, 2);
        const Program program = program_of(layer, num_tokens, 30);
        SimtOutcome first;
        for (uint64_t seed : {0, 1000}) {
          if (kAddressSanitizer && seed) continue;
          const SimtOutcome o = run_simt(program, {.ep_size = int(num_tokens.size()), .blocks_per_rank = 2}, seed);
          const std::string what = std::to_string(w.hidden_size) + " by " + std::to_string(w.intermediate_size) + (gated ? ", gated" : "") +
                                   ", " + std::to_string(num_tokens.size()) + " ranks, seed " + std::to_string(seed) + ": ";
          const std::string trouble = trouble_of(o, program);
          check(trouble.empty(), what + trouble);
          if (seed == 0) first = o;
          check(o.y == first.y, what + "other bits than with the first seed");
        }
      }
}

// A token's bits are its own, also where its row begins in the middle of a word.
void bits() {
  const Layer layer({.hidden_size = 33, .intermediate_size = 17, .num_experts = 2, .top_k = 1, .dtype = DType::kBFloat16}, 7);
  const Tokens all = draw_tokens(layer, 9, 300);
  const std::vector<float> together = run_simt({{&layer, {all}, std::nullopt}}, {.ep_size = 1}, 5).y[0][0];
  for (int t = 0; t < 9; ++t) {
    Tokens alone{1, {}, {all.ids[t]}, {all.weights[t]}};
    alone.x.assign(all.x.begin() + t * 33, all.x.begin() + (t + 1) * 33);
    const std::vector<float> y = run_simt({{&layer, {alone}, std::nullopt}}, {.ep_size = 1}, 6).y[0][0];
    check(std::equal(y.begin(), y.end(), together.begin() + t * 33), "token " + std::to_string(t));
  }
}

// Of a call that fails not one element may be taken for a result, and the last one ends in the middle of a word.
void y_is_given_up() {
  struct NoResults : CudaPlatform {
    using CudaPlatform::CudaPlatform;
    void commit(int pe, size_t offset, const std::byte* source, size_t bytes, size_t signal, uint64_t word, Traffic kind) {
      if (kind != Traffic::kResults) CudaPlatform::commit(pe, offset, source, bytes, signal, word, kind);
    }
  };
  const Layer layer({.hidden_size = 33, .intermediate_size = 17, .num_experts = 2, .dtype = DType::kBFloat16}, 8);
  const Program program = program_of(layer, {7, 5}, 40);
  const SimtOutcome o = run_simt<NoResults>(program, {.blocks_per_rank = 2}, 0);
  check(o.misuse.empty() && !o.ok(), "the call must fail: " + o.misuse);
  for (const std::vector<float>& y : o.y[0])
    for (float value : y) check(std::isnan(value), "y of a call that failed");
}

}  // namespace

int main() {
  run_test("AnyWidthsOfFloat32", any_widths<DType::kFloat32>);
  run_test("AnyWidthsOfBFloat16", any_widths<DType::kBFloat16>);
  run_test("AnyWidthsOfFloat16", any_widths<DType::kFloat16>);
  run_test("BitsDoNotDependOnCompany", bits);
  run_test("YIsGivenUp", y_is_given_up);
  return finish();
}
