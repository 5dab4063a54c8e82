// The smallest engine that is one: plain float32 loops, four columns a tile, so that even tiny layers have several
// tiles. For tests of the protocol, where the real engine would be one more thing that may be at fault.
#pragma once

#include <cmath>

#include "engine/tile_engine.h"
#include "problem.h"

namespace flashmoe::test {

struct TinyEngine {
  using Problem = LayerShape;
  static int up_tile_cols(const Problem&) { return 4; }
  static int down_tile_cols(const Problem&) { return 4; }

  static float dot(const float* a, const float* b, int n) {
    float sum = 0;
    for (int i = 0; i < n; ++i) sum += a[i] * b[i];
    return sum;
  }

  void up_tile(const Problem& p, const void* const* rows, int num_rows, const void* gate_up, const void* bias, int begin,
               int end, float* hidden, ptrdiff_t stride, void*) const {
    const float *w = static_cast<const float*>(gate_up), *b = static_cast<const float*>(bias);
    const int H = p.hidden_size, I = p.intermediate_size;
    for (int r = 0; r < num_rows; ++r)
      for (int c = begin; c < end; ++c) {
        const float* x = static_cast<const float*>(rows[r]);
        const float gate = dot(x, w + size_t(c) * H, H) + (b ? b[c] : 0);
        const float up = p.gated ? dot(x, w + size_t(I + c) * H, H) + (b ? b[I + c] : 0) : 1;
        hidden[r * stride + c] = gate / (1 + std::exp(-gate)) * up;
      }
  }
  void down_tile(const Problem& p, const float* hidden, ptrdiff_t stride, int num_rows, const void* down, const void* bias,
                 int begin, int end, void* const* out_rows, void*) const {
    const float *w = static_cast<const float*>(down), *b = static_cast<const float*>(bias);
    const int I = p.intermediate_size;
    for (int r = 0; r < num_rows; ++r)
      for (int c = begin; c < end; ++c)
        static_cast<float*>(out_rows[r])[c] = dot(hidden + r * stride, w + size_t(c) * I, I) + (b ? b[c] : 0);
  }
  void combine(const Problem& p, const void* const* rows, const float* weights, int num, void* y) const {
    for (int c = 0; c < p.hidden_size; ++c) {
      float sum = 0;
      for (int j = 0; j < num; ++j) sum += weights[j] * static_cast<const float*>(rows[j])[c];
      static_cast<float*>(y)[c] = sum;
    }
  }

  // y of these tokens by the engine alone, one row at a time and all columns at once: no protocol.
  static std::vector<float> without_protocol(const Layer& l, const Tokens& t) {
    const TinyEngine engine;
    const int H = l.hidden_size, I = l.intermediate_size;
    std::vector<float> y(t.x.size()), hidden(I);
    for (int token = 0; token < t.num_tokens; ++token) {
      std::vector<std::vector<float>> results;
      std::vector<const void*> rows;
      std::vector<float> weights;
      for (int j = 0; j < l.top_k; ++j) {
        const int64_t e = t.ids[size_t(token) * l.top_k + j];
        if (e < 0 || e == l.num_experts) continue;
        const void* x = &t.x[size_t(token) * H];
        auto of_expert = [&](const std::vector<float>& all) { return all.empty() ? nullptr : &all[all.size() / l.num_experts * e]; };
        engine.up_tile(l, &x, 1, of_expert(l.gate_up), of_expert(l.gate_up_bias), 0, I, hidden.data(), I, nullptr);
        results.emplace_back(H);
        void* out = results.back().data();
        engine.down_tile(l, hidden.data(), I, 1, of_expert(l.down), of_expert(l.down_bias), 0, H, &out, nullptr);
        weights.push_back(t.weights[size_t(token) * l.top_k + j]);
      }
      for (const auto& row : results) rows.push_back(row.data());
      engine.combine(l, rows.data(), weights.data(), int(rows.size()), &y[size_t(token) * H]);
    }
    return y;
  }
};

static_assert(TileEngine<TinyEngine>);

}  // namespace flashmoe::test
