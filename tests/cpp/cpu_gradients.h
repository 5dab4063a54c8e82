// One expert's rows with the gradients that come in for them, and what the CPU engine's backward tiles make of these.
#pragma once

#include "cpu_expert.h"
#include "engine/cpu_backward.h"

namespace flashmoe::test {

// Any number of rows, of which row i has the expert's x[i % kBlockM], beside other dy and another weight each time.
struct GradientExpert : Expert {
  Array dy;
  std::vector<float> weight;

  GradientExpert(const Problem& p, bool with_bias, int num_rows)
      : Expert(p, with_bias), dy(p.dtype, size_t(num_rows) * p.hidden_size), weight(num_rows) {
    std::mt19937 random(num_rows);
    dy.fill(random, 0.7);
    for (float& w : weight) w = std::uniform_real_distribution<float>(-0.2f, 1.0f)(random);
  }
  int up_rows() const { return sections * problem.intermediate_size; }
  void* x_row(int i) { return x.at(size_t(i % CpuEngine::kBlockM) * problem.hidden_size); }
  void* dy_row(int i) { return dy.at(size_t(i) * problem.hidden_size); }
  ExpertWeights weights() {
    return {gate_up.at(0), bias ? gate_up_bias.at(0) : nullptr, down.at(0), bias ? down_bias.at(0) : nullptr};
  }
};

// As PoisonedScratch.
struct PoisonedBackwardScratch {
  void* memory;
  explicit PoisonedBackwardScratch(const Problem& p)
      : memory(std::aligned_alloc(64, round_up(CpuEngine::backward_scratch_bytes(p), 64))) {
    std::memset(memory, 0xff, CpuEngine::backward_scratch_bytes(p));
  }
  PoisonedBackwardScratch(const PoisonedBackwardScratch&) = delete;
  ~PoisonedBackwardScratch() { std::free(memory); }
};

// Cuts of [0, n) into ranges of `width`, or of widths that grow from 1 up to it and are aligned to nothing.
inline Splits cut(int n, int width, bool ragged = false) {
  Splits splits = {0};
  for (int next = ragged ? 1 : width; splits.back() < n; next = std::min(width, next * 2 + 1))
    splits.push_back(std::min(n, splits.back() + next));
  return splits;
}

// Rows with a gap behind each that nobody may write to. The last ends with its array, where AddressSanitizer looks.
struct GappedRows {
  static constexpr float kGap = -77.0f;
  int num_rows, width;
  ptrdiff_t stride;
  std::vector<float> values;

  GappedRows(int rows, int w, ptrdiff_t s) : num_rows(rows), width(w), stride(s), values((rows - 1) * s + w, kGap) {}
  const float* row(int i) const { return &values[i * stride]; }
  bool gaps_are_whole() const {
    for (int i = 0; i + 1 < num_rows; ++i)
      for (ptrdiff_t c = width; c < stride; ++c)
        if (row(i)[c] != kGap) return false;
    return true;
  }
};

// What the up tiles make of rows [first, first + num_rows).
struct MadeRows {
  int num_rows;
  GappedRows gate_up_grad, hidden, dot;

  MadeRows(const GradientExpert& e, int rows, int parts)
      : MadeRows(e, rows, parts, e.up_rows() + e.problem.intermediate_size + parts + 3) {}
  BackwardRows from(int row) {
    const ptrdiff_t at = row * hidden.stride;
    return {&gate_up_grad.values[at], &hidden.values[at], &dot.values[at], hidden.stride};
  }

 private:
  MadeRows(const GradientExpert& e, int rows, int parts, ptrdiff_t stride)
      : num_rows(rows), gate_up_grad(rows, e.up_rows(), stride), hidden(rows, e.problem.intermediate_size, stride),
        dot(rows, parts, stride) {}
};

// The rows of a row block as the engine takes them: each list of exactly its size.
struct BlockOfRows {
  std::vector<const void*> x, dy;
  std::vector<float> weight;
  BlockOfRows(GradientExpert& e, int first, int num_rows) : weight(&e.weight[first], &e.weight[first] + num_rows) {
    for (int i = first; i < first + num_rows; ++i) x.push_back(e.x_row(i)), dy.push_back(e.dy_row(i));
  }
  GradientRows rows(const BackwardRows& made) const {
    return {x.data(), dy.data(), weight.data(), int(x.size()), made};
  }
};

// In blocks of `block` rows at most, and in columns [splits[0], splits[1]), …, each of which is a part.
inline MadeRows run_up_backward(const CpuEngine& engine, GradientExpert& e, int first, int num_rows, const Splits& splits,
                                int block = CpuEngine::kBlockM) {
  MadeRows made(e, num_rows, int(splits.size()) - 1);
  PoisonedBackwardScratch scratch(e.problem);
  for (int done = 0; done < num_rows; done += block) {
    const BlockOfRows rows(e, first + done, std::min(block, num_rows - done));
    for (size_t s = 0; s + 1 < splits.size(); ++s)
      engine.up_backward(e.problem, rows.rows(made.from(done)), e.weights(), int(s), splits[s], splits[s + 1], scratch.memory);
  }
  check(made.gate_up_grad.gaps_are_whole() && made.hidden.gaps_are_whole() && made.dot.gaps_are_whole(),
        e.describe() + ": up_backward wrote beyond its columns");
  return made;
}

inline Array run_down_backward(const CpuEngine& engine, GradientExpert& e, MadeRows& made, int first, int num_rows,
                               const Splits& splits) {
  Array out(e.problem.dtype, size_t(num_rows) * e.problem.hidden_size);
  std::vector<void*> rows;
  for (int i = 0; i < num_rows; ++i) rows.push_back(out.at(size_t(i) * e.problem.hidden_size));
  PoisonedBackwardScratch scratch(e.problem);
  for (size_t s = 0; s + 1 < splits.size(); ++s)
    engine.down_backward(e.problem, made.from(first), num_rows, e.gate_up.at(0), splits[s], splits[s + 1], rows.data(),
                         scratch.memory);
  return out;
}

// A weight's gradient and its bias', full of a number that no test expects.
struct WeightGradient {
  bool down;
  int rows, cols;
  Array matrix, bias;
  WeightGradient(const GradientExpert& e, bool of_down)
      : down(of_down), rows(of_down ? e.problem.hidden_size : e.up_rows()),
        cols(of_down ? e.problem.intermediate_size : e.problem.hidden_size),
        matrix(e.problem.dtype, size_t(rows) * cols), bias(e.problem.dtype, rows) {
    std::memset(matrix.at(0), 0x3c, matrix.size * dtype_bytes(matrix.dtype));
    std::memset(bias.at(0), 0x3c, bias.size * dtype_bytes(bias.dtype));
  }
};

// One tile of it, of the rows of `made`, in blocks [blocks[0], blocks[1]), …
inline void run_gradient_tile(const CpuEngine& engine, GradientExpert& e, MadeRows& made, const Splits& blocks,
                              const GradTile& tile, WeightGradient& out, bool with_bias) {
  PoisonedBackwardScratch scratch(e.problem);
  engine.begin_gradient(tile, scratch.memory);
  for (size_t b = 0; b + 1 < blocks.size(); ++b) {
    const BlockOfRows rows(e, blocks[b], blocks[b + 1] - blocks[b]);
    engine.add_to_gradient(e.problem, tile, rows.rows(made.from(blocks[b])), scratch.memory);
  }
  engine.end_gradient(e.problem, tile, out.matrix.at(0), with_bias ? out.bias.at(0) : nullptr, scratch.memory);
}

inline WeightGradient run_gradient(const CpuEngine& engine, GradientExpert& e, MadeRows& made, const Splits& blocks,
                                   bool down, const Splits& rows, const Splits& cols) {
  WeightGradient out(e, down);
  for (size_t r = 0; r + 1 < rows.size(); ++r)
    for (size_t c = 0; c + 1 < cols.size(); ++c)
      run_gradient_tile(engine, e, made, blocks, {down, rows[r], rows[r + 1], cols[c], cols[c + 1]}, out, true);
  return out;
}

inline bool same_bits(Array& a, Array& b) {
  return a.size == b.size && std::memcmp(a.at(0), b.at(0), a.size * dtype_bytes(a.dtype)) == 0;
}

}  // namespace flashmoe::test
