// Which kernel a call on a GPU gets: one case for each fact that decides.
#include "harness.h"
#include "runtime/cuda_choice.h"

namespace {

using namespace flashmoe;
using namespace flashmoe::test;
using Kind = CudaKernelKind;

// Mixtral in bfloat16 on Hopper, one token more than is few.
constexpr CudaProblem kMixtral{90, DType::kBFloat16, 4096, 14336, true, 8 * kNarrowRows + 1, 8, false, false, false};

template <class Change>
Kind with(Change change) {
  CudaProblem p = kMixtral;
  change(p);
  return choose_kernel(p);
}

void test_hopper() {
  check(choose_kernel(kMixtral) == Kind::kSm90Wide, "many rows take wide tiles");
  check(with([](auto& p) { p.num_pairs = 8 * kNarrowRows; }) == Kind::kSm90Narrow, "few rows take narrow tiles");
  check(with([](auto& p) { p.num_pairs = 0; }) == Kind::kSm90Narrow, "no rows are few");
  check(with([](auto& p) { p.num_experts = 1 << 30, p.num_pairs = 1 << 30; }) == Kind::kSm90Narrow, "counted in 64 bits");
  check(with([](auto& p) { p.dtype = DType::kFloat16; }) == Kind::kSm90Wide, "float16 as bfloat16");
}

void test_every_other_architecture_runs_sm80() {
  for (int capability : {80, 86, 89, 100, 103, 120, 121})
    check(with([&](auto& p) { p.compute_capability = capability; }) == Kind::kSm80, "sm_" + std::to_string(capability));
  check(with([](auto& p) { p.compute_capability = 75; }) == Kind::kExact, "before Ampere there is no bfloat16");
}

void test_float32_is_rounded_only_where_allowed() {
  const auto fp32 = [](CudaProblem& p) { p.dtype = DType::kFloat32; };
  check(with(fp32) == Kind::kExact, "float32 stays float32");
  check(with([&](auto& p) { fp32(p), p.tf32 = true; }) == Kind::kSm80, "tf32 where it is allowed, also on Hopper");
  check(with([&](auto& p) { fp32(p), p.tf32 = p.exact = true; }) == Kind::kExact, "exactness goes before tf32");
  check(with([](auto& p) { p.exact = true; }) == Kind::kExact, "exactness goes before Hopper's kernel");
  check(with([](auto& p) { p.tf32 = true; }) == Kind::kSm90Wide, "tf32 is nothing to bfloat16");
}

void test_what_is_no_multiple_of_16_bytes_is_exact() {
  check(with([](auto& p) { p.aligned = false; }) == Kind::kExact, "addresses");
  check(with([](auto& p) { p.hidden_size = 4100; }) == Kind::kExact, "rows of x");
  check(with([](auto& p) { p.intermediate_size = 14337; }) == Kind::kExact, "rows of down_proj");
  check(with([](auto& p) { p.hidden_size = 4104, p.intermediate_size = 8; }) == Kind::kSm90Wide, "8 elements of 2 bytes");
  const auto tf32 = [](CudaProblem& p) { p.dtype = DType::kFloat32, p.tf32 = true; };
  check(with([&](auto& p) { tf32(p), p.hidden_size = 4100; }) == Kind::kSm80, "4 elements of 4 bytes");
  check(with([&](auto& p) { tf32(p), p.hidden_size = 4102; }) == Kind::kExact, "2 elements of 4 bytes");
}

// Two bytes off is where a bias may begin that is a slice of another tensor.
void test_every_tensor_that_is_read_in_pieces_counts() {
  alignas(16) static std::byte memory[32];
  ForwardArgs call{};
  call.x = call.gate_up_proj = call.down_proj = call.y = memory;
  check(begin_aligned(call), "all at one place, without biases");
  call.gate_up_bias = call.down_bias = memory + 16;
  check(begin_aligned(call), "all at multiples of 16 bytes");
  for (const void* ForwardArgs::* tensor : {&ForwardArgs::x, &ForwardArgs::gate_up_proj, &ForwardArgs::gate_up_bias,
                                            &ForwardArgs::down_proj, &ForwardArgs::down_bias}) {
    ForwardArgs moved = call;
    moved.*tensor = memory + 2;
    check(!begin_aligned(moved), "one of the inputs is two bytes off");
  }
  call.y = memory + 2;
  check(!begin_aligned(call), "y is two bytes off");

  check(begin_aligned(Gradients{}), "no gradients are asked for");
  Gradients grad{};
  grad.y = memory + 2;
  check(!begin_aligned(grad), "the gradient of y is two bytes off");
  for (std::byte* Gradients::* tensor : {&Gradients::gate_up_proj, &Gradients::gate_up_bias, &Gradients::down_proj,
                                         &Gradients::down_bias}) {
    grad = {};
    grad.*tensor = memory + 2;
    check(!begin_aligned(grad), "a gradient that is asked for is two bytes off");
    grad.*tensor = memory + 16;
    check(begin_aligned(grad), "a gradient at a multiple of 16 bytes");
  }
}

void test_backward_calls() {
  const auto backward = [](auto change) {
    return with([&](CudaProblem& p) { p.backward = true, change(p); });
  };
  for (DType dtype : {DType::kBFloat16, DType::kFloat16})
    for (int capability : {80, 90, 100})
      check(backward([&](auto& p) { p.dtype = dtype, p.compute_capability = capability; }) == Kind::kSm80Backward, "16 bits");
  check(backward([](auto& p) { p.num_pairs = 1; }) == Kind::kSm80Backward, "few rows");
  check(backward([](auto& p) { p.dtype = DType::kFloat32, p.tf32 = true; }) == Kind::kExactBackward, "float32 is not rounded");
  check(backward([](auto& p) { p.exact = true; }) == Kind::kExactBackward, "exactness");
  check(backward([](auto& p) { p.aligned = false; }) == Kind::kExactBackward, "addresses");
  check(backward([](auto& p) { p.hidden_size = 4100; }) == Kind::kExactBackward, "rows of no whole pieces");
}

}  // namespace

int main() {
  run_test("Hopper's tiles follow the expected rows of an expert", test_hopper);
  run_test("every other architecture from 8.0 on runs sm80", test_every_other_architecture_runs_sm80);
  run_test("float32 is rounded only where that is allowed", test_float32_is_rounded_only_where_allowed);
  run_test("what is no multiple of 16 bytes is exact", test_what_is_no_multiple_of_16_bytes_is_exact);
  run_test("every tensor that is read in pieces counts", test_every_tensor_that_is_read_in_pieces_counts);
  run_test("backward calls have kernels of their own", test_backward_calls);
  return finish();
}
