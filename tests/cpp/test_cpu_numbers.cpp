// How the CPU engine widens, rounds, activates and differentiates numbers, and which instruction set it takes for that.
#include <cstdlib>

#include "cpu_expert.h"
#include "cpu_isas.h"
#include "engine/cpu_backward.h"

namespace {

using namespace flashmoe;
using namespace flashmoe::test;

constexpr int kBlockM = CpuEngine::kBlockM;

// Every 16-bit pattern widens to its value, and what fp32 numbers round to is what the definition says.
void check_conversions(const CpuEngine& engine, DType dtype) {
  constexpr int kAll = 65536;
  const Problem up{dtype, Activation::kRelu, false, 1, kAll};
  Array weights(dtype, kAll), x(dtype, 2);
  for (int i = 0; i < kAll; ++i) {
    const uint16_t pattern = uint16_t(i);
    std::memcpy(weights.at(i), &pattern, 2);
  }
  x.set(0, 1), x.set(1, -1);
  for (int num_rows : {2, 7}) {  // widened in registers, and in scratch
    std::vector<const void*> rows;
    for (int i = 0; i < num_rows; ++i) rows.push_back(x.at(i % 2));
    std::vector<float> h(size_t(num_rows) * kAll);
    PoisonedScratch scratch(up);
    engine.up_tile(up, rows.data(), num_rows, weights.at(0), nullptr, 0, kAll, h.data(), kAll, scratch.memory);
    int wrong = 0;
    for (int i = 0; i < num_rows; ++i)
      for (int c = 0; c < kAll; ++c) {
        const double value = decode(uint16_t(c), dtype) * (i % 2 ? -1 : 1);
        const float got = h[size_t(i) * kAll + c];
        wrong += std::isnan(value) ? !std::isnan(got) : got != (value < 0 ? 0 : value);
      }
    check(wrong == 0, std::string(name(dtype)) + ": " + std::to_string(wrong) + " patterns widen wrongly");
  }

  // A column of ones passes h on to the rounding store.
  std::mt19937 random(5);
  std::vector<float> values;
  for (int i = 0; i < 200000; ++i) {
    uint32_t bits = random();
    if (i % 2) {  // near the middle between two neighbours, where rounding to even decides
      const float middle = float(0.5 * (decode(uint16_t(bits), dtype) + decode(uint16_t(bits + 1), dtype)));
      std::memcpy(&bits, &middle, 4);
      bits += i / 2 % 3 - 1;
    }
    float value;
    std::memcpy(&value, &bits, 4);
    values.push_back(value);
  }
  for (float special : {0.0f, 65504.0f, 65519.99f, 65520.0f, 65536.0f, 3.3895314e38f, 3.4e38f, INFINITY, -INFINITY, NAN})
    values.push_back(special), values.push_back(-special);
  const Problem down{dtype, Activation::kRelu, false, 1, 1};
  Array one(dtype, 1), out(dtype, kBlockM);
  one.set(0, 1);
  std::vector<void*> out_rows;
  for (int i = 0; i < kBlockM; ++i) out_rows.push_back(out.at(i));
  PoisonedScratch scratch(down);
  int wrong = 0;
  for (size_t first = 0; first < values.size(); first += kBlockM) {
    const int num_rows = int(std::min<size_t>(kBlockM, values.size() - first));
    engine.down_tile(down, values.data() + first, 1, num_rows, one.at(0), nullptr, 0, 1, out_rows.data(),
                     scratch.memory);
    for (int i = 0; i < num_rows; ++i) {
      const double want = rounded(values[first + i], dtype), got = out.get(i);
      wrong += std::isnan(want) ? !std::isnan(got) : got != want;
    }
  }
  check(wrong == 0, std::string(name(dtype)) + ": " + std::to_string(wrong) + " numbers round wrongly");
}

// Over all magnitudes, and more of them where the activations bend.
std::vector<float> all_magnitudes() {
  std::vector<float> x;
  for (uint64_t b = 0; b < (uint64_t(1) << 32); b += 3989) {
    const uint32_t bits = uint32_t(b);
    float value;
    std::memcpy(&value, &bits, 4);
    x.push_back(value);
  }
  std::mt19937 random(9);
  std::uniform_real_distribution<float> uniform(-12, 12);
  for (int i = 0; i < 500000; ++i) x.push_back(uniform(random));
  for (float special : {0.0f, INFINITY, NAN}) x.push_back(special), x.push_back(-special);
  return x;
}

// Error of the activations over all magnitudes: relative to the result above -1, absolute below, where the result
// fades away (and where e^x turns half a unit of x into |x| half units of the result).
void check_activations(const CpuKernels& kernels) {
  const std::vector<float> x = all_magnitudes();
  std::vector<float> y(x.size());
  for (Activation activation : kActivations) {
    kernels.activate(activation, x.data(), int(x.size()), y.data());
    double near = 0, tail = 0;
    int nan_wrong = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      const double want = exact(activation, x[i]);
      if (std::isnan(want) || std::isnan(y[i])) {
        nan_wrong += std::isnan(want) != std::isnan(y[i]);
      } else if (std::isinf(want) || std::isinf(y[i])) {
        nan_wrong += want != y[i];
      } else if (x[i] >= -1 && std::fabs(want) > 1.2e-38) {
        near = std::max(near, std::fabs(y[i] - want) / std::fabs(want));
      } else {
        tail = std::max(tail, std::fabs(y[i] - want));
      }
    }
    std::printf("  %-9s %-9s relative error %.2e above -1, absolute error %.2e below\n", kernels.name,
                name(activation), near, tail);
    check(nan_wrong == 0, std::string(kernels.name) + " " + name(activation) + ": NaN or infinity misplaced");
    const double near_bound = activation == Activation::kGelu ? 5.5e-7 : 3.0e-7;
    check(near <= near_bound && tail <= 1.0e-7, std::string(kernels.name) + " " + name(activation) + ": not accurate");
  }
}

// The slope's error is absolute, for slopes lie between -0.2 and 1.2. Far out it is what it tends to, 0 or 1, at infinities
// too; NaN comes of NaN alone. The value beside it is the forward pass'.
void check_slopes(const CpuKernels& kernels) {
  const std::vector<float> x = all_magnitudes();
  std::vector<float> value(x.size()), slope(x.size()), forward(x.size());
  for (Activation activation : kActivations) {
    kernels.backward->differentiate(activation, x.data(), int(x.size()), value.data(), slope.data());
    kernels.activate(activation, x.data(), int(x.size()), forward.data());
    const std::string what = std::string(kernels.name) + " " + name(activation);
    double worst = 0;
    int nan_wrong = 0, no_limit = 0, other_value = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      other_value += std::isnan(forward[i]) ? !std::isnan(value[i]) : value[i] != forward[i];
      nan_wrong += std::isnan(x[i]) != std::isnan(slope[i]);
      if (std::isnan(x[i]) || std::isnan(slope[i])) continue;
      worst = std::max(worst, std::fabs(slope[i] - exact_slope(activation, x[i])));
      no_limit += std::fabs(x[i]) >= 110 && slope[i] != float(x[i] > 0);
    }
    std::printf("  %-9s %-9s slope: absolute error %.2e\n", kernels.name, name(activation), worst);
    check(other_value == 0, what + ": " + std::to_string(other_value) + " values are not those of the forward pass");
    check(nan_wrong == 0, what + ": " + std::to_string(nan_wrong) + " slopes are NaN, or lost one");
    check(no_limit == 0, what + ": " + std::to_string(no_limit) + " slopes far out are neither 0 nor 1");
    check(worst <= (activation == Activation::kRelu ? 0 : 4e-7), what + ": the slope is not accurate");
  }
}

void check_selection() {
  setenv("FLASHMOE_CPU_ISA", "quantum", 1);
  for (int use = 0; use < 2; ++use) {  // the second use must not find the first one's failure cached as success
    const std::string message = refusal_of([] { CpuEngine engine; });
    check(message.find("quantum") != std::string::npos && message.find("baseline") != std::string::npos,
          "an unknown FLASHMOE_CPU_ISA must be named with the known ones, got: " + message);
  }
  check(!refusal_of([] { cpu_isa(); }).empty(), "cpu_isa() must throw for an unknown FLASHMOE_CPU_ISA");
  setenv("FLASHMOE_CPU_ISA", "baseline", 1);
  check(std::string(cpu_isa()) == "baseline", "FLASHMOE_CPU_ISA=baseline must be obeyed");
  check(std::string(cpu_kernels("").name) == cpu_kernels(nullptr).name, "an empty FLASHMOE_CPU_ISA means the best");
}

void check_numbers(const CpuKernels& kernels) {
  check_activations(kernels);
  check_slopes(kernels);
  const CpuEngine engine(kernels);
  for (DType dtype : {DType::kBFloat16, DType::kFloat16}) check_conversions(engine, dtype);
}

}  // namespace

int main() {
  run_test("Selection", check_selection);
  for_each_isa(check_numbers);
  return finish();
}
