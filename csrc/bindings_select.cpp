// The selection of experts, on the CPU and on GPUs.
#include "bindings_select.h"

#include "runtime/select.h"

namespace py = pybind11;
using namespace flashmoe;

namespace {

// device: a GPU's number, or -1 for the CPU, which has no streams.
void select_experts(uintptr_t scores, uintptr_t bias, int num_tokens, int num_experts, int top_k, int num_groups,
                    int open_groups, int best_of_group, bool in_each_group, bool softmax, bool renormalize,
                    float epsilon, float scale, uintptr_t ids, uintptr_t weights, int device,
                    [[maybe_unused]] uintptr_t stream) {
  const Selection selection{num_experts, top_k, num_groups, open_groups, best_of_group, in_each_group, softmax,
                            renormalize, epsilon, scale};
  const SelectCall call{selection, num_tokens, reinterpret_cast<const float*>(scores),
                        reinterpret_cast<const float*>(bias), reinterpret_cast<int64_t*>(ids),
                        reinterpret_cast<float*>(weights)};
  const py::gil_scoped_release release;
  if (device < 0) return select_on_host(call);
#ifdef FLASHMOE_WITH_CUDA
  select_on_gpu(call, device, reinterpret_cast<void*>(stream));
#else
  throw std::runtime_error("this build of flashmoe has no CUDA half");
#endif
}

}  // namespace

void bind_select(py::module_& m) { m.def("select_experts", &select_experts); }
