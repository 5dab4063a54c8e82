// The activations with their slopes, as Ampere's engine of backward calls has them, against double precision: also far
// out, where a slope is a limit, and at what is no number.
#include "engine/fast_slope.h"
#include "harness.h"
#include "reference_gradients.h"

namespace {

using namespace flashmoe;
using namespace flashmoe::test;

// Absolute, but of the value where that is large.
template <Activation activation>
std::string trouble_at(float x) {
  const Differential d = fast_differential<activation>(x);
  const double value = test::activate(double(x), activation), slope = derivative(double(x), activation);
  const double value_error = std::fabs(d.value - value) / std::max(1.0, std::fabs(value)), slope_error = std::fabs(d.slope - slope);
  if (value_error <= 5e-7 && slope_error <= 2e-6) return {};
  return "at " + std::to_string(x) + ": value is off by " + std::to_string(value_error * 1e6) + "e-6, slope by " +
         std::to_string(slope_error * 1e6) + "e-6";
}

template <Activation activation>
void follows_its_definition() {
  std::string trouble;
  for (int i = -120'000; i <= 120'000 && trouble.empty(); ++i) trouble = trouble_at<activation>(float(i) * 1e-3f);
  check(trouble.empty(), trouble);
  for (float x : {0.0f, -0.0f, 1e-30f, -1e-30f}) check(trouble_at<activation>(x).empty(), "near 0: " + trouble_at<activation>(x));
}

// Neither infinity times 0 nor a NaN that is lost.
template <Activation activation>
void ends_well() {
  for (float x : {109.9f, 110.0f, 110.1f, 200.0f, 1e4f, 1e10f, 3e38f, INFINITY}) {
    const Differential far = fast_differential<activation>(x), below = fast_differential<activation>(-x);
    const std::string at = "at " + std::to_string(x);
    check(far.value == x && far.slope == 1.0f, at);
    check(std::fabs(below.value) < 1e-30f && std::fabs(below.slope) < 1e-30f, "minus, " + at);
  }
  const Differential none = fast_differential<activation>(NAN);
  check(std::isnan(none.value) && std::isnan(none.slope), "no number");
}

}  // namespace

int main() {
  run_test("SiluFollowsItsDefinition", follows_its_definition<Activation::kSilu>);
  run_test("SiluEndsWell", ends_well<Activation::kSilu>);
  run_test("GeluFollowsItsDefinition", follows_its_definition<Activation::kGelu>);
  run_test("GeluEndsWell", ends_well<Activation::kGelu>);
  run_test("GeluTanhFollowsItsDefinition", follows_its_definition<Activation::kGeluTanh>);
  run_test("GeluTanhEndsWell", ends_well<Activation::kGeluTanh>);
  run_test("ReluFollowsItsDefinition", follows_its_definition<Activation::kRelu>);
  run_test("ReluEndsWell", ends_well<Activation::kRelu>);
  return finish();
}
