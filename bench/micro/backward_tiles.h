// The CPU engine's backward products, one instruction set and one layer's shape at a time.
//
// Of one row block: x and dy [num_rows, hidden_size], and `made`, [num_rows, stride] floats as csrc/protocol/backward.h
// lays them out. Cold means what it means in tiles.h.
#pragma once

#include <string>
#include <vector>

#include "engine/cpu_kernels.h"
#include "stretch.h"

namespace flashmoe::micro {

class BackwardTiles {
 public:
  BackwardTiles(const std::string& isa, CpuProblem problem)
      : engine_(cpu_kernels(isa.c_str())), problem_(problem),
        scratch_(CpuEngine::backward_scratch_bytes(problem) / sizeof(Line) + 1) {}

  int up_cols() const { return CpuEngine::up_tile_cols(problem_); }
  int down_cols() const { return CpuEngine::down_tile_cols(problem_); }
  int up_rows() const { return (problem_.gated ? 2 : 1) * problem_.intermediate_size; }
  int stride() const { return up_rows() + problem_.intermediate_size + ceil_div(problem_.intermediate_size, 16); }
  int grad_tiles() const { return ceil_div(up_rows(), CpuEngine::kGradRows) * across(); }

  // Seconds of each of `n` tiles, from tile `from` on.
  double up(const std::byte* x, const std::byte* dy, int num_rows, const std::byte* gate_up, const std::byte* down,
            int num_experts, float* made, bool cold, uint64_t from, int n) {
    const Rows rows(*this, x, dy, num_rows, made);
    const uint64_t tiles = ceil_div(problem_.intermediate_size, up_cols());
    return seconds_each(n, [&](int i) {
      const uint64_t tile = cold ? from + i : 0, expert = tile / tiles % num_experts;
      const int part = int(tile % tiles), begin = part * up_cols();
      engine_.up_backward(problem_, rows.all,
                          {gate_up + expert * up_rows() * row_bytes(), nullptr, down + expert * matrix_bytes(), nullptr},
                          part, begin, std::min(begin + up_cols(), problem_.intermediate_size), scratch_.data());
    });
  }

  double down(float* made, int num_rows, const std::byte* gate_up, int num_experts, std::byte* dx, bool cold,
              uint64_t from, int n) {
    const Rows rows(*this, dx, dx, num_rows, made);
    std::vector<void*> out;
    for (int r = 0; r < num_rows; ++r) out.push_back(dx + r * row_bytes());
    const uint64_t tiles = ceil_div(problem_.hidden_size, down_cols());
    return seconds_each(n, [&](int i) {
      const uint64_t tile = cold ? from + i : 0, expert = tile / tiles % num_experts;
      const int begin = int(tile % tiles) * down_cols();
      engine_.down_backward(problem_, rows.all.made, num_rows, gate_up + expert * up_rows() * row_bytes(), begin,
                            std::min(begin + down_cols(), problem_.hidden_size), out.data(), scratch_.data());
    });
  }

  // Tiles of gate_up_proj's gradient, of `blocks` row blocks that are all this one.
  double gradient(const std::byte* x, const std::byte* dy, int num_rows, float* made, int blocks, std::byte* matrix,
                  uint64_t from, int n) {
    const Rows rows(*this, x, dy, num_rows, made);
    return seconds_each(n, [&](int i) {
      const int tile = int((from + i) % grad_tiles()), row = tile / across() * CpuEngine::kGradRows,
                col = tile % across() * CpuEngine::kGradCols;
      const GradTile t{false, row, std::min(row + CpuEngine::kGradRows, up_rows()), col,
                       std::min(col + CpuEngine::kGradCols, problem_.hidden_size)};
      engine_.begin_gradient(t, scratch_.data());
      for (int b = 0; b < blocks; ++b) engine_.add_to_gradient(problem_, t, rows.all, scratch_.data());
      engine_.end_gradient(problem_, t, matrix, nullptr, scratch_.data());
    });
  }

 private:
  struct alignas(64) Line {
    std::byte bytes[64];
  };
  struct Rows {
    std::vector<const void*> x, dy;
    std::vector<float> weight;
    GradientRows all;

    Rows(const BackwardTiles& t, const std::byte* first_x, const std::byte* first_dy, int num_rows, float* made)
        : weight(num_rows, 1.0f) {
      for (int r = 0; r < num_rows; ++r) x.push_back(first_x + r * t.row_bytes()), dy.push_back(first_dy + r * t.row_bytes());
      float* hidden = made + t.up_rows();
      all = {x.data(), dy.data(), weight.data(), num_rows,
             {made, hidden, hidden + t.problem_.intermediate_size, ptrdiff_t(t.stride())}};
    }
  };
  size_t row_bytes() const { return size_t(problem_.hidden_size) * dtype_bytes(problem_.dtype); }
  size_t matrix_bytes() const { return row_bytes() * problem_.intermediate_size; }
  int across() const { return ceil_div(problem_.hidden_size, CpuEngine::kGradCols); }

  CpuEngine engine_;
  CpuProblem problem_;
  std::vector<Line> scratch_;
};

}  // namespace flashmoe::micro
