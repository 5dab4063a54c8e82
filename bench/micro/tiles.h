// The CPU engine's products, one instruction set and one layer's shape at a time.
//
// Cold means that each tile reads weights that were not read for as long as all the experts handed in are large.
#pragma once

#include <string>
#include <vector>

#include "engine/cpu_kernels.h"
#include "stretch.h"

namespace flashmoe::micro {

class Tiles {
 public:
  Tiles(const std::string& isa, CpuProblem problem)
      : engine_(cpu_kernels(isa.c_str())), problem_(problem),
        scratch_(CpuEngine::scratch_bytes(problem) / sizeof(Line) + 1) {}

  int up_cols() const { return CpuEngine::up_tile_cols(problem_); }
  int down_cols() const { return CpuEngine::down_tile_cols(problem_); }

  // Seconds of each of `n` up tiles of `num_rows` rows at `x`; gate_up: `num_experts` experts' weights. The first is
  // the first of expert 0, or after `from` tiles: so a stretch can go on where the last one stopped.
  double up(const std::byte* x, int num_rows, const std::byte* gate_up, int num_experts, float* h, bool cold,
            uint64_t from, int n) {
    const size_t expert_bytes = (problem_.gated ? 2 : 1) * matrix_bytes();
    std::vector<const void*> rows;
    for (int r = 0; r < num_rows; ++r) rows.push_back(x + r * row_bytes());
    const int cols = problem_.intermediate_size;
    return each_tile(cols, up_cols(), num_experts, cold, from, n, [&](int expert, int begin, int end) {
      engine_.up_tile(problem_, rows.data(), num_rows, gate_up + expert * expert_bytes, nullptr, begin, end, h, cols,
                      scratch_.data());
    });
  }

  // The same of down tiles: h [num_rows, intermediate_size] to y [num_rows, hidden_size].
  double down(const float* h, int num_rows, const std::byte* down, int num_experts, std::byte* y, bool cold,
              uint64_t from, int n) {
    std::vector<void*> rows;
    for (int r = 0; r < num_rows; ++r) rows.push_back(y + r * row_bytes());
    const int cols = problem_.hidden_size, inner = problem_.intermediate_size;
    return each_tile(cols, down_cols(), num_experts, cold, from, n, [&](int expert, int begin, int end) {
      engine_.down_tile(problem_, h, inner, num_rows, down + expert * matrix_bytes(), nullptr, begin, end, rows.data(),
                        scratch_.data());
    });
  }

  // Seconds of each of `n` tokens' weighted sums: of rows[index[t, j]] into y[t], over `num_tokens` tokens in turn.
  double combine(const std::byte* rows, const int32_t* index, const float* weights, int num_tokens, int top_k,
                 std::byte* y, int n) {
    std::vector<const void*> of_token(top_k);
    return seconds_each(n, [&](int i) {
      const size_t token = i % num_tokens;
      for (int j = 0; j < top_k; ++j) of_token[j] = rows + index[token * top_k + j] * row_bytes();
      engine_.combine(problem_, of_token.data(), weights + token * top_k, top_k, y + token * row_bytes());
    });
  }

 private:
  struct alignas(64) Line {
    std::byte bytes[64];
  };
  size_t row_bytes() const { return size_t(problem_.hidden_size) * dtype_bytes(problem_.dtype); }
  size_t matrix_bytes() const { return row_bytes() * problem_.intermediate_size; }

  template <class F>
  static double each_tile(int cols, int tile_cols, int num_experts, bool cold, uint64_t from, int n, F&& f) {
    const uint64_t tiles = ceil_div(cols, tile_cols);
    return seconds_each(n, [&](int i) {
      const uint64_t tile = cold ? from + i : 0;
      const int begin = int(tile % tiles) * tile_cols;
      f(int(tile / tiles % num_experts), begin, std::min(begin + tile_cols, cols));
    });
  }

  CpuEngine engine_;
  CpuProblem problem_;
  std::vector<Line> scratch_;
};

// Seconds of each of `n` activations of the `count` numbers at x, into out.
inline double activate(const std::string& isa, Activation activation, const float* x, int count, float* out, int n) {
  const CpuKernels& kernels = cpu_kernels(isa.c_str());
  return seconds_each(n, [&](int) { kernels.activate(activation, x, count, out); });
}

}  // namespace flashmoe::micro
