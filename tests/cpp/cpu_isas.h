// The CPU engine's kernels for each instruction set that this machine runs.
#pragma once

#include <functional>
#include <stdexcept>
#include <string>

#include "engine/cpu_kernels.h"
#include "harness.h"

namespace flashmoe::cpu_wide16 {
const CpuKernels& kernels();  // the logic of the AVX-512 kernels, compiled for what this machine has
}

namespace flashmoe::test {

inline std::string refusal_of(const std::function<void()>& f) {
  try {
    f();
  } catch (const std::invalid_argument& e) {
    return e.what();
  }
  return "";
}

inline void for_each_isa(const std::function<void(const CpuKernels&)>& f) {
  for (const char* isa : {"baseline", "avx2", "avx512"}) {
    const CpuKernels* kernels = nullptr;
    const std::string message = refusal_of([&] { kernels = &cpu_kernels(isa); });
    if (kernels == nullptr) {
      std::printf("%s: not run (%s)\n", isa, message.c_str());
      check(contains(message, isa), "an unsupported instruction set must be named");
      continue;
    }
    check(std::string(kernels->name) == isa, "the kernels asked for");
    run_test(isa, [&] { f(*kernels); });
  }
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
#endif
    run_test("sixteen lanes", [&] { f(cpu_wide16::kernels()); });
}

}  // namespace flashmoe::test
