// flashmoe._C: raw addresses in, exceptions out. Tensors are checked in flashmoe/ops.py, one level up.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings_arguments.h"
#include "bindings_cuda.h"
#include "bindings_memory.h"
#include "bindings_nvshmem.h"
#include "bindings_select.h"
#include "bindings_ucx.h"
#include "engine/cpu.h"
#include "platform/host_network.h"
#include "platform/shared_segment.h"
#include "runtime/kept_sums.h"
#include "runtime/moe.h"

namespace py = pybind11;
using namespace flashmoe;

namespace {

std::shared_ptr<Group> make_group(const std::string& name, int ep_rank, const Limits& limits,
                                  const std::vector<std::shared_ptr<SharedSegment>>& segments,
                                  const std::vector<size_t>& offsets, const std::vector<int>& pids,
                                  const std::vector<int>& global_ranks, std::shared_ptr<HostNetwork> network,
                                  std::optional<uint64_t> remote_only_seed, double timeout_s, double entry_timeout_s,
                                  int num_workers) {
  const size_t ep_size = limits.ep_size, bytes = HeapLayout(limits).bytes;
  if (segments.size() != ep_size || offsets.size() != ep_size || pids.size() != ep_size || global_ranks.size() != ep_size)
    throw std::invalid_argument("segments, offsets, pids and global_ranks must have one entry for each of the " +
                                std::to_string(ep_size) + " ranks");
  if (ep_rank < 0 || size_t(ep_rank) >= ep_size)
    throw std::invalid_argument("ep_rank must lie in [0, " + std::to_string(ep_size) + "), got " + std::to_string(ep_rank));
  GroupOptions o{name, ep_rank, limits, {}, std::move(network), {}, pids, global_ranks, remote_only_seed, timeout_s,
                 entry_timeout_s, num_workers};
  for (size_t pe = 0; pe < ep_size; ++pe) {
    if (!segments[pe]) {  // of another host
      if (!o.network || int(pe) == ep_rank || remote_only_seed)
        throw std::invalid_argument("rank " + std::to_string(pe) + " has no segment here, and no network leads to it");
      o.heaps.push_back(nullptr);
      continue;
    }
    if (offsets[pe] % HeapLayout::kAlign || offsets[pe] > segments[pe]->bytes() || segments[pe]->bytes() - offsets[pe] < bytes)
      throw std::invalid_argument("segment of rank " + std::to_string(pe) + " must hold " + std::to_string(bytes) +
                                  " bytes from an offset that is a multiple of " + std::to_string(HeapLayout::kAlign) +
                                  ", got " + std::to_string(segments[pe]->bytes()) + " bytes and offset " +
                                  std::to_string(offsets[pe]));
    o.heaps.push_back(segments[pe]->data() + offsets[pe]);
    o.keep.push_back(segments[pe]);
  }
  return std::make_shared<Group>(std::move(o));
}

std::vector<std::shared_ptr<Group>> local_team(const Limits& limits, std::optional<uint64_t> remote_only_seed,
                                               double timeout_s, double entry_timeout_s, int num_workers,
                                               uint64_t last_epoch) {
  GroupOptions o;
  o.name = "team", o.limits = limits, o.remote_only_seed = remote_only_seed;
  o.timeout_s = timeout_s, o.entry_timeout_s = entry_timeout_s, o.num_workers = num_workers, o.last_epoch = last_epoch;
  return make_local_team(o);
}

// The same arguments, one by one: a call makes no object in between.
template <class... Args>
void forward(Group& group, Kept* kept, Args... args) {
  const ForwardArgs call = forward_args(args...);
  py::gil_scoped_release release;
  group.forward(call, kept);
}
template <class... Args>
auto forward_taking(ForwardArgs (*)(Args...)) {
  return &forward<Args...>;
}

// Before those the gradient of y, and where its own go.
template <class... Args>
void backward(Group& group, Kept* kept, uintptr_t grad_y, uintptr_t grad_topk_weights, uintptr_t grad_gate_up_proj,
              uintptr_t grad_gate_up_bias, uintptr_t grad_down_proj, uintptr_t grad_down_bias, Args... args) {
  const Gradients grad =
      gradients(grad_y, grad_topk_weights, grad_gate_up_proj, grad_gate_up_bias, grad_down_proj, grad_down_bias);
  const ForwardArgs call = forward_args(args...);
  py::gil_scoped_release release;
  group.backward(call, grad, kept);
}
template <class... Args>
auto backward_taking(ForwardArgs (*)(Args...)) {
  return &backward<Args...>;
}

// By worker the bytes of its TraceEvents, and how many events were lost.
py::tuple trace(const Group& group) {
  uint64_t lost;
  py::list workers;
  for (const std::vector<TraceEvent>& events : group.trace(lost)) workers.append(bytes_of(events));
  return py::make_tuple(workers, lost);
}

py::dict build_info() {
  py::dict features;
  py::dict d;
  features["host"] = true;
#ifdef FLASHMOE_WITH_UCX
  features["ucx"] = true;
#else
  features["ucx"] = false;
#endif
#ifdef FLASHMOE_WITH_CUDA
  features["cuda"] = true;
  d["cuda_architectures"] = FLASHMOE_WITH_CUDA, d["cuda_compiler"] = FLASHMOE_CUDA_COMPILER;
#else
  features["cuda"] = false;
#endif
#ifdef FLASHMOE_WITH_NVSHMEM
  features["nvshmem"] = true;
#else
  features["nvshmem"] = false;
#endif
  d["version"] = FLASHMOE_VERSION, d["compiler"] = __VERSION__, d["cpp_standard"] = __cplusplus;
  d["isa"] = cpu_isa(), d["features"] = features;
  d["block_rows"] = kBlockM, d["chunk_rows"] = kChunkRows;
  return d;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The flashmoe core. Use the flashmoe package; addresses are not checked here.";
  py::register_exception<PeerError>(m, "PeerError", PyExc_RuntimeError);
  m.def("build_info", &build_info);
  m.def(
      "read_memory", [](uintptr_t memory, size_t bytes, int workers) { return read_memory(address(memory), bytes, workers); },
      py::arg("address"), py::arg("bytes"), py::arg("num_workers"), py::call_guard<py::gil_scoped_release>());
  m.def("available_memory", &available_memory_bytes);
  bind_select(m);
  bind_nvshmem(m);

  bind_memory(m);
  py::class_<HostNetwork, std::shared_ptr<HostNetwork>>(m, "Network");
#ifdef FLASHMOE_WITH_UCX
  bind_ucx(m);
#endif

  // As a buffer it is one byte that stands for it, so that a tensor can hold it.
  py::class_<Kept>(m, "Kept", py::buffer_protocol()).def(py::init()).def_buffer([](Kept& kept) {
    return py::buffer_info(reinterpret_cast<unsigned char*>(&kept), 1);
  });
  py::class_<Group, std::shared_ptr<Group>>(m, "Group")
      .def(py::init(&make_group), py::arg("name"), py::arg("ep_rank"), py::arg("limits"), py::arg("segments"),
           py::arg("offsets"), py::arg("pids"), py::arg("global_ranks"), py::arg("network") = nullptr,
           py::arg("remote_only_seed") = py::none(), py::arg("timeout_s") = 60.0, py::arg("entry_timeout_s") = 600.0, py::arg("num_workers") = 1)
      .def("forward", forward_taking(&forward_args))
      .def("backward", backward_taking(&forward_args))
      .def("stats", [](const Group& group) { return dict_of(group.stats()); })
      .def("set_trace", &Group::set_trace, py::arg("max_events"), py::call_guard<py::gil_scoped_release>())
      .def("trace", &trace)
      .def_property_readonly("failed", &Group::failed)
      .def_property_readonly("name", [](const Group& g) { return g.options().name; })
      .def_property_readonly("ep_rank", [](const Group& g) { return g.options().ep_rank; })
      .def_property_readonly("ep_size", [](const Group& g) { return g.options().limits.ep_size; })
      .def_property_readonly("limits", [](const Group& g) { return g.options().limits; })
      .def_property("num_workers", &Group::num_workers, &Group::set_num_workers);

  m.def("local_group", &make_local_group, py::arg("num_workers") = 1);
  m.def("local_team", &local_team, py::arg("limits"), py::arg("remote_only_seed") = py::none(),
        py::arg("timeout_s") = 60.0, py::arg("entry_timeout_s") = 600.0, py::arg("num_workers") = 1,
        py::arg("last_epoch") = 0);
  bind_cuda(m);
}
