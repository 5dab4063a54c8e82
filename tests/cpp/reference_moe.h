// The layer in double precision, as its definition says it: the truth that everything else is held against.
#pragma once

#include <algorithm>
#include <cmath>
#include <string>

#include "problem.h"

namespace flashmoe::test {

inline double activate(double v, Activation activation) {
  switch (activation) {
    case Activation::kSilu: return v / (1 + std::exp(-v));
    case Activation::kGelu: return v * 0.5 * std::erfc(-v / std::sqrt(2.0));
    case Activation::kGeluTanh: return 0.5 * v * (1 + std::tanh(std::sqrt(2 / M_PI) * (v + 0.044715 * v * v * v)));
    case Activation::kRelu: return std::max(v, 0.0);
  }
  return NAN;
}

// y = Σ_j weights[j] · down(act(gate · x) * (up · x)), for one token's row x.
inline std::vector<double> reference_token(const Layer& l, const float* x, const int64_t* ids, const float* weights) {
  const int H = l.hidden_size, I = l.intermediate_size;
  std::vector<double> y(H, 0.0), h(I);
  auto dot = [](const float* a, const auto* b, int n) {
    double sum = 0;
    for (int i = 0; i < n; ++i) sum += double(a[i]) * double(b[i]);
    return sum;
  };
  for (int j = 0; j < l.top_k; ++j) {
    const int64_t e = ids[j];
    if (e < 0 || e >= l.num_experts) continue;
    const float* up = l.gate_up.data() + size_t(e) * l.up_rows() * H;
    const float* down = l.down.data() + size_t(e) * H * I;
    const float* up_bias = l.bias ? l.gate_up_bias.data() + size_t(e) * l.up_rows() : nullptr;
    for (int i = 0; i < I; ++i) {
      const double first = dot(up + size_t(i) * H, x, H) + (up_bias ? up_bias[i] : 0);
      h[i] = activate(first, l.activation);
      if (l.gated) h[i] *= dot(up + size_t(I + i) * H, x, H) + (up_bias ? up_bias[I + i] : 0);
    }
    for (int c = 0; c < H; ++c)
      y[c] += weights[j] * (dot(down + size_t(c) * I, h.data(), I) + (l.bias ? l.down_bias[size_t(e) * H + c] : 0));
  }
  return y;
}

inline std::vector<double> reference_moe(const Layer& l, const Tokens& t) {
  std::vector<double> y;
  for (int i = 0; i < t.num_tokens; ++i) {
    const std::vector<double> row =
        reference_token(l, &t.x[size_t(i) * l.hidden_size], &t.ids[size_t(i) * l.top_k], &t.weights[size_t(i) * l.top_k]);
    y.insert(y.end(), row.begin(), row.end());
  }
  return y;
}

// Worst difference over the largest value: a row that went to a wrong place is off by about 1.
inline double relative_error(const std::vector<float>& y, const std::vector<double>& truth) {
  if (y.size() != truth.size()) return INFINITY;
  double worst = 0, largest = 1e-3;
  for (size_t i = 0; i < y.size(); ++i) {
    if (!std::isfinite(y[i])) return INFINITY;
    worst = std::max(worst, std::fabs(y[i] - truth[i])), largest = std::max(largest, std::fabs(truth[i]));
  }
  return worst / largest;
}

inline double tolerance(DType dtype) { return dtype == DType::kFloat32 ? 4e-6 : 2e-2; }

}  // namespace flashmoe::test
