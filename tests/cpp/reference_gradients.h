// The gradients of the layer in double precision, by the chain rule from its definition: the truth for backward calls.
#pragma once

#include "reference_moe.h"

namespace flashmoe::test {

inline double derivative(double v, Activation activation) {
  const auto sigmoid = [](double z) { return 1 / (1 + std::exp(-z)); };
  switch (activation) {
    case Activation::kSilu: return sigmoid(v) + v * sigmoid(v) * sigmoid(-v);
    case Activation::kGelu: return 0.5 * std::erfc(-v / std::sqrt(2.0)) + v * std::exp(-v * v / 2) / std::sqrt(2 * M_PI);
    case Activation::kGeluTanh: {
      const double c = std::sqrt(2 / M_PI), t = std::tanh(c * (v + 0.044715 * v * v * v));
      return 0.5 * (1 + t) + 0.5 * v * (1 - t * t) * c * (1 + 3 * 0.044715 * v * v);
    }
    case Activation::kRelu: return v > 0;
  }
  return NAN;
}

// Of one rank's x and topk_weights, and of all experts' weights, which sum over all ranks' tokens.
struct TokenGradients {
  std::vector<double> x, weights;
};
struct WeightGradients {
  std::vector<double> gate_up, gate_up_bias, down, down_bias;

  explicit WeightGradients(const Layer& l)
      : gate_up(l.gate_up.size()), gate_up_bias(l.gate_up_bias.size()), down(l.down.size()), down_bias(l.down_bias.size()) {}
};

// Of Σ dy · y over one rank's tokens; those of weights are added to `all`.
inline TokenGradients add_reference_gradients(const Layer& l, const Tokens& t, const std::vector<float>& dy, WeightGradients& all) {
  const size_t H = l.hidden_size, I = l.intermediate_size, U = l.up_rows(), K = l.top_k;
  TokenGradients grad{std::vector<double>(t.x.size()), std::vector<double>(t.ids.size())};
  for (size_t pair = 0; pair < t.ids.size(); ++pair) {
    const int64_t e = t.ids[pair];
    if (e < 0 || e >= l.num_experts) continue;
    const float *x = &t.x[pair / K * H], *dy_row = &dy[pair / K * H], *gate_up = &l.gate_up[e * U * H], *down = &l.down[e * H * I];
    std::vector<double> z(U), h(I), dh(I), dz(U), dout(H);
    for (size_t u = 0; u < U; ++u) {
      z[u] = l.bias ? l.gate_up_bias[e * U + u] : 0;
      for (size_t c = 0; c < H; ++c) z[u] += double(gate_up[u * H + c]) * x[c];
    }
    for (size_t i = 0; i < I; ++i) h[i] = activate(z[i], l.activation) * (l.gated ? z[I + i] : 1);
    // y += w · out
    for (size_t c = 0; c < H; ++c) {
      double out = l.bias ? l.down_bias[e * H + c] : 0;
      for (size_t i = 0; i < I; ++i) out += double(down[c * I + i]) * h[i];
      grad.weights[pair] += out * dy_row[c];
      dout[c] = double(t.weights[pair]) * dy_row[c];
    }
    // out = down · h + bias
    for (size_t c = 0; c < H; ++c) {
      if (l.bias) all.down_bias[e * H + c] += dout[c];
      for (size_t i = 0; i < I; ++i) {
        all.down[(e * H + c) * I + i] += dout[c] * h[i];
        dh[i] += dout[c] * down[c * I + i];
      }
    }
    // h = act(gate) · up
    for (size_t i = 0; i < I; ++i) {
      dz[i] = dh[i] * derivative(z[i], l.activation) * (l.gated ? z[I + i] : 1);
      if (l.gated) dz[I + i] = dh[i] * activate(z[i], l.activation);
    }
    // (gate, up) = gate_up · x + bias
    for (size_t u = 0; u < U; ++u) {
      if (l.bias) all.gate_up_bias[e * U + u] += dz[u];
      for (size_t c = 0; c < H; ++c) {
        all.gate_up[(e * U + u) * H + c] += dz[u] * x[c];
        grad.x[pair / K * H + c] += dz[u] * gate_up[u * H + c];
      }
    }
  }
  return grad;
}

// What of `all`, an array of as many numbers for each expert, is of rank `rank`'s experts.
inline std::vector<double> of_rank(const std::vector<double>& all, const ExpertMap& map, int rank) {
  const size_t each = all.size() / map.size();
  std::vector<double> mine;
  for (size_t e = 0; e < map.size(); ++e)
    if (map[e] == rank) mine.insert(mine.end(), all.begin() + e * each, all.begin() + (e + 1) * each);
  return mine;
}

}  // namespace flashmoe::test
