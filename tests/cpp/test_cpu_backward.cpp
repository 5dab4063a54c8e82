// The CPU engine's backward tiles against the derivative of the expert's definition in double precision, on every
// instruction set that this machine runs.
#include "cpu_gradients.h"
#include "cpu_isas.h"

namespace {

using namespace flashmoe;
using namespace flashmoe::test;

constexpr int kBlockM = CpuEngine::kBlockM;

std::vector<double> numbers(Array& a) {
  std::vector<double> v(a.size);
  for (size_t i = 0; i < v.size(); ++i) v[i] = a.get(i);
  return v;
}

// A product of two numbers that are known so far and no further.
Dot times(const Dot& a, const Dot& b) {
  const double value = a.value * b.value;
  const double most = (std::fabs(a.value) + a.error) * (std::fabs(b.value) + b.error);
  return {value, most - std::fabs(value) + kEps * most};
}

// How far a result is from the truth, as a share of what it may be.
class Worst {
 public:
  void compare(double got, const Dot& want) {
    const double error = std::fabs(got - want.value), share = error == 0 ? 0 : error / want.error;
    worst_ = share <= worst_ ? worst_ : share;  // NaN is not
  }
  void must_hold(const std::string& what) const { check(worst_ <= 1, what + " is off by " + std::to_string(worst_) + " of its bound"); }

 private:
  double worst_ = 0;
};

// The activation moves no faster than 1.2 times what it is given, its slope no faster than 0.8 times; their own errors
// are those that test_cpu_numbers holds them to. At relu's kink the slope may be either.
Dot value_at(Activation activation, const Dot& v) {
  const double value = exact(activation, v.value);
  return {value, 1.2 * v.error + 8 * kEps * std::fabs(value) + 1e-7 * (v.value < 0 && activation != Activation::kRelu)};
}
Dot slope_at(Activation activation, const Dot& v) {
  const double slope = exact_slope(activation, v.value);
  if (activation == Activation::kRelu) return {slope, std::fabs(v.value) <= v.error ? 1.0 : 0.0};
  return {slope, 0.8 * v.error + 4e-7};
}

// With the pair's output o = down · h + bias and h = act(gate) · up: the gradients of h, gate and up, given that of o.
void check_up(GradientExpert& e, const MadeRows& made) {
  const Problem& p = e.problem;
  const int H = p.hidden_size, I = p.intermediate_size;
  const std::vector<double> x = numbers(e.x), dy = numbers(e.dy), gate_up = numbers(e.gate_up), down = numbers(e.down);
  Worst hidden, gate_grad, up_grad, weight;
  for (int i = 0; i < made.num_rows; ++i) {
    const double *x_row = &x[size_t(i % kBlockM) * H], *dy_row = &dy[size_t(i) * H];
    const auto section = [&](int row) {
      return dot(H, [&](int k) { return x_row[k]; }, [&](int k) { return gate_up[size_t(row) * H + k]; },
                 e.bias ? e.gate_up_bias.get(row) : 0);
    };
    Dot output = dot(e.bias ? H : 0, [&](int k) { return dy_row[k]; }, [&](int k) { return e.down_bias.get(k); }, 0);
    double sum_of_sizes = 0;
    for (int c = 0; c < I; ++c) {
      const Dot gate = section(c), up = p.gated ? section(I + c) : Dot{1, 0};
      const Dot dh = dot(H, [&](int k) { return dy_row[k]; }, [&](int k) { return down[size_t(k) * I + c]; }, 0);
      const Dot act = value_at(p.activation, gate), h = times(act, up), of_row = times(dh, h);
      hidden.compare(made.hidden.row(i)[c], h);
      gate_grad.compare(made.gate_up_grad.row(i)[c], times(dh, times(slope_at(p.activation, gate), up)));
      if (p.gated) up_grad.compare(made.gate_up_grad.row(i)[I + c], times(dh, act));
      output.value += of_row.value, output.error += of_row.error, sum_of_sizes += std::fabs(of_row.value);
    }
    output.error += kEps * (4 + std::sqrt(double(I))) * (sum_of_sizes + std::fabs(output.value));
    double parts = 0;
    for (int part = 0; part < made.dot.width; ++part) parts += made.dot.row(i)[part];
    weight.compare(parts, output);
  }
  hidden.must_hold(e.describe() + ": h");
  gate_grad.must_hold(e.describe() + ": the gradient of gate");
  up_grad.must_hold(e.describe() + ": the gradient of up");
  weight.must_hold(e.describe() + ": the gradient of the top-k weight");
}

void check_down(const CpuEngine& engine, GradientExpert& e, MadeRows& made) {
  const int H = e.problem.hidden_size;
  const std::vector<double> gate_up = numbers(e.gate_up);
  Array out = run_down_backward(engine, e, made, 0, std::min(made.num_rows, kBlockM),
                                cut(H, CpuEngine::down_tile_cols(e.problem)));
  Worst worst;
  for (size_t i = 0; i < out.size; ++i) {
    const float* grad = made.gate_up_grad.row(int(i / H));
    Dot want = dot(e.up_rows(), [&](int k) { return double(grad[k]); }, [&](int k) { return gate_up[size_t(k) * H + i % H]; }, 0);
    want.error = 1.01 * want.error + half_unit(want.value, e.problem.dtype);
    worst.compare(out.get(i), want);
  }
  worst.must_hold(e.describe() + ": the row's gradient");
}

Splits grad_rows(const WeightGradient& g) { return cut(g.rows, CpuEngine::kGradRows); }
Splits grad_cols(const WeightGradient& g) { return cut(g.cols, CpuEngine::kGradCols); }

void check_weights(const CpuEngine& engine, GradientExpert& e, MadeRows& made) {
  const int H = e.problem.hidden_size, I = e.problem.intermediate_size;
  const std::vector<double> x = numbers(e.x), dy = numbers(e.dy);
  for (bool down : {false, true}) {
    const WeightGradient shape(e, down);
    WeightGradient out = run_gradient(engine, e, made, cut(made.num_rows, kBlockM), down, grad_rows(shape), grad_cols(shape));
    // The row's part of the left operand is scaled, and so rounded, before it is multiplied: one of the four in Dot.
    const auto left = [&](int r, int row) { return double(e.weight[r]) * (down ? dy[size_t(r) * H + row] : made.gate_up_grad.row(r)[row]); };
    const auto right = [&](int r, int col) { return down ? double(made.hidden.row(r)[col]) : x[size_t(r % kBlockM) * H + col]; };
    Worst matrix, bias;
    const auto compare = [&](Worst& worst, double got, Dot want) {
      want.error = 1.01 * want.error + half_unit(want.value, e.problem.dtype);
      worst.compare(got, want);
    };
    for (int row = 0; row < out.rows; ++row) {
      const auto of_row = [&](int r) { return left(r, row); };
      compare(bias, out.bias.get(row), dot(made.num_rows, of_row, [](int) { return 1.0; }, 0));
      for (int col = 0; col < out.cols; ++col)
        compare(matrix, out.matrix.get(size_t(row) * out.cols + col), dot(made.num_rows, of_row, [&](int r) { return right(r, col); }, 0));
    }
    const std::string what = e.describe() + (down ? ": down" : ": gate_up");
    check(out.cols == (down ? I : H), what + " has other columns");
    matrix.must_hold(what + "'s gradient");
    bias.must_hold(what + "_bias' gradient");
  }
}

void check_accuracy(const CpuEngine& engine, GradientExpert& e, int num_rows) {
  if (kAddressSanitizer) return;  // what is right is right without it; the checks of bits reach the same memory
  MadeRows made = run_up_backward(engine, e, 0, num_rows, cut(e.problem.intermediate_size, CpuEngine::up_tile_cols(e.problem)));
  check_up(e, made);
  check_down(engine, e, made);
  check_weights(engine, e, made);
}

bool same_row(const GappedRows& a, int i, const GappedRows& b, int j) {
  return std::memcmp(a.row(i), b.row(j), a.width * sizeof(float)) == 0;
}

// Of the last `num_rows` rows, so that each changes its place, and in other columns where the number is odd. Parts of
// the top-k weight's gradient are sums over columns, which are cut in one way only.
void check_row_bits(const CpuEngine& engine, GradientExpert& e, const std::vector<int>& row_counts) {
  const int H = e.problem.hidden_size, I = e.problem.intermediate_size;
  const int up = CpuEngine::up_tile_cols(e.problem), down = CpuEngine::down_tile_cols(e.problem);
  MadeRows all = run_up_backward(engine, e, 0, kBlockM, cut(I, up));
  Array rows = run_down_backward(engine, e, all, 0, kBlockM, cut(H, down));
  for (int num_rows : row_counts) {
    const int first = kBlockM - num_rows;
    const bool ragged = num_rows % 2;
    MadeRows some = run_up_backward(engine, e, first, num_rows, cut(I, up, ragged));
    bool same = true;
    for (int i = 0; i < num_rows; ++i)
      same = same && same_row(some.gate_up_grad, i, all.gate_up_grad, first + i) && same_row(some.hidden, i, all.hidden, first + i) &&
             (ragged || same_row(some.dot, i, all.dot, first + i));
    check(same, e.describe() + ": up_backward's bits depend on M, M=" + std::to_string(num_rows));
    Array out = run_down_backward(engine, e, all, first, num_rows, cut(H, down, ragged));
    check(std::memcmp(out.at(0), rows.at(size_t(first) * H), out.size * dtype_bytes(out.dtype)) == 0,
          e.describe() + ": down_backward's bits depend on M, M=" + std::to_string(num_rows));
  }
}

// The same list of rows in other blocks, and the same matrix in other tiles.
void check_gradient_bits(const CpuEngine& engine, GradientExpert& e) {
  const int num_rows = int(e.weight.size());
  MadeRows made = run_up_backward(engine, e, 0, num_rows, cut(e.problem.intermediate_size, CpuEngine::up_tile_cols(e.problem)));
  for (bool down : {false, true}) {
    const WeightGradient g(e, down);
    const auto with = [&](const Splits& blocks, const Splits& rows, const Splits& cols) {
      return run_gradient(engine, e, made, blocks, down, rows, cols);
    };
    WeightGradient whole = with(cut(num_rows, kBlockM), grad_rows(g), grad_cols(g));
    for (int block : {1, 7, 64, 100}) {
      WeightGradient other = with(cut(num_rows, block), grad_rows(g), grad_cols(g));
      check(same_bits(other.matrix, whole.matrix) && same_bits(other.bias, whole.bias),
            e.describe() + ": a weight gradient's bits depend on blocks of " + std::to_string(block));
    }
    for (auto [height, width] : {std::pair{5, 31}, {64, 16}, {128, 100}}) {
      WeightGradient other = with(cut(num_rows, kBlockM, true), cut(g.rows, height, true), cut(g.cols, width, true));
      check(same_bits(other.matrix, whole.matrix) && same_bits(other.bias, whole.bias),
            e.describe() + ": a weight gradient's bits depend on tiles of " + std::to_string(height) + " x " + std::to_string(width));
    }
  }
}

// A tile in the middle, and one without a row of the expert's.
void check_gradient_stays_in_its_tile(const CpuEngine& engine, GradientExpert& e) {
  MadeRows made = run_up_backward(engine, e, 0, 9, cut(e.problem.intermediate_size, CpuEngine::up_tile_cols(e.problem)));
  for (bool down : {false, true})
    for (const Splits& blocks : {Splits{0, 9}, Splits{0}})
      for (bool first_cols : {false, true}) {
        WeightGradient out(e, down), before(e, down);
        const GradTile tile{down, out.rows / 3, out.rows - out.rows / 4, first_cols ? 0 : out.cols / 3, out.cols - out.cols / 4};
        if (tile.row_begin == tile.row_end || tile.col_begin == tile.col_end) continue;
        run_gradient_tile(engine, e, made, blocks, tile, out, true);
        bool outside = true, zero = true;
        for (int row = 0; row < out.rows; ++row) {
          const bool in_rows = row >= tile.row_begin && row < tile.row_end;
          for (int col = 0; col < out.cols; ++col) {
            const size_t at = size_t(row) * out.cols + col;
            const bool in = in_rows && col >= tile.col_begin && col < tile.col_end;
            in ? zero = zero && out.matrix.get(at) == 0 : outside = outside && out.matrix.get(at) == before.matrix.get(at);
          }
          const bool in = in_rows && tile.col_begin == 0;
          in ? zero = zero && out.bias.get(row) == 0 : outside = outside && out.bias.get(row) == before.bias.get(row);
        }
        check(outside, e.describe() + ": a grad tile wrote outside of itself");
        if (blocks.size() == 1) check(zero, e.describe() + ": the gradient of an expert without rows is not zero");
      }
}

// A row that is no number stays alone.
void check_isolation(const CpuEngine& engine, const Problem& p) {
  GradientExpert clean(p, true, kBlockM), bad_x(p, true, kBlockM), bad_dy(p, true, kBlockM);
  bad_x.x.set(size_t(1) * p.hidden_size + p.hidden_size / 2, NAN);
  bad_dy.dy.set(size_t(1) * p.hidden_size + p.hidden_size - 1, NAN);
  const Splits up = cut(p.intermediate_size, CpuEngine::up_tile_cols(p)), down = cut(p.hidden_size, CpuEngine::down_tile_cols(p));
  for (int num_rows : {2, 3, 11, 70}) {
    MadeRows want = run_up_backward(engine, clean, 0, num_rows, up);
    Array rows = run_down_backward(engine, clean, want, 0, num_rows, down);
    for (GradientExpert* bad : {&bad_x, &bad_dy}) {
      MadeRows made = run_up_backward(engine, *bad, 0, num_rows, up);
      Array out = run_down_backward(engine, *bad, made, 0, num_rows, down);
      bool alone = true, lost = false;
      for (int i = 0; i < num_rows; ++i)
        if (i != 1)
          alone = alone && same_row(made.gate_up_grad, i, want.gate_up_grad, i) && same_row(made.hidden, i, want.hidden, i) &&
                  same_row(made.dot, i, want.dot, i);
      for (size_t i = 0; i < out.size; ++i)
        int(i) / p.hidden_size == 1 ? lost = lost || !std::isnan(out.get(i)) : alone = alone && out.get(i) == rows.get(i);
      for (int part = 0; part < made.dot.width; ++part) lost = lost || !std::isnan(made.dot.row(1)[part]);
      check(alone, clean.describe() + ": a NaN reached other rows");
      check(!lost, clean.describe() + ": a NaN was lost");
    }
  }
}

void check_backward(const CpuKernels& kernels) {
  const CpuEngine engine(kernels);
  for (DType dtype : kDTypes) {
    for (auto [H, I] : {std::pair{1, 1}, {3, 17}, {17, 3}, {33, 130}, {130, 33}})
      for (Activation activation : kActivations)
        for (bool gated : {false, true})
          for (bool bias : {false, true}) {
            if (kAddressSanitizer && H != 17 && activation != Activation::kSilu) continue;
            GradientExpert e({dtype, activation, gated, H, I}, bias, kBlockM + 20);
            check_accuracy(engine, e, H == 33 ? kBlockM + 20 : 11);
            check_row_bits(engine, e, {1, 2, 3, 5, 8, 31, 66});
          }
    // Tiles of several in each direction, and K in several blocks.
    for (auto [H, I] : {std::pair{257, 300}, {300, 257}, {1100, 33}}) {
      GradientExpert e({dtype, Activation::kSilu, true, H, I}, true, kBlockM + 72);
      check_accuracy(engine, e, 21);
      check_row_bits(engine, e, {1, 6, 12, 13, 64, 65, 127});
    }
    for (bool gated : {false, true}) {
      std::vector<int> heights;
      for (int m = 1; m <= kBlockM; m += kAddressSanitizer ? 3 : 1) heights.push_back(m);
      GradientExpert small({dtype, Activation::kGelu, gated, 33, 17}, true, kBlockM);
      check_row_bits(engine, small, heights);
      GradientExpert odd({dtype, Activation::kSilu, gated, 133, 150}, true, 300);
      check_gradient_bits(engine, odd);
      GradientExpert wide({dtype, Activation::kRelu, gated, 3, 270}, true, 130);
      check_gradient_bits(engine, wide);
      for (auto [H, I] : {std::pair{1, 1}, {17, 3}, {70, 33}, {33, 70}}) {
        GradientExpert e({dtype, Activation::kSilu, gated, H, I}, true, 9);
        check_gradient_stays_in_its_tile(engine, e);
        check_isolation(engine, e.problem);
      }
    }
  }
}

}  // namespace

int main() {
  for_each_isa(check_backward);
  return finish();
}
