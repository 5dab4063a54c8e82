// Calls on GPUs; none of this in a build without a CUDA half.
#include "bindings_cuda.h"

#ifdef FLASHMOE_WITH_CUDA
#include "bindings_arguments.h"
#include "runtime/moe_cuda.h"

namespace py = pybind11;
using namespace flashmoe;

namespace {

// By rank that is here, by list: the bytes of its TraceEvents, how many there were, and the writer's multiprocessor.
py::list cuda_trace(CudaTeam& team) {
  std::vector<std::vector<CudaTraceList>> traced;
  {
    const py::gil_scoped_release release;
    traced = team.trace();
  }
  py::list ranks;
  for (const std::vector<CudaTraceList>& rank : traced) {
    py::list lists;
    for (const CudaTraceList& list : rank)
      lists.append(py::make_tuple(bytes_of(list.events), list.count, list.multiprocessor));
    ranks.append(lists);
  }
  return ranks;
}

std::optional<py::dict> cuda_stats(CudaTeam& team, int layer, int rank) {
  std::optional<GroupStats> stats;
  {
    const py::gil_scoped_release release;
    stats = team.stats(layer, rank);
  }
  return stats ? std::optional(dict_of(*stats)) : std::nullopt;
}

// What Python holds, for as long as the last copy of this lives.
std::shared_ptr<void> kept(const py::object& object) {
  return {new py::object(object), [](void* held) {
            const py::gil_scoped_acquire acquire;
            delete static_cast<py::object*>(held);
          }};
}

// With the addresses of mapped heaps (0: not mapped): one rank of a group of several processes.
std::shared_ptr<CudaTeam> make_cuda_team(int device, std::optional<Limits> limits, double timeout_s,
                                         double entry_timeout_s, int sm_margin, bool exact, int missing_ranks,
                                         const std::string& name, int ep_rank, const std::vector<int>& global_ranks,
                                         const std::vector<uintptr_t>& mapped, const std::vector<uintptr_t>& symmetric,
                                         const std::vector<int>& pes, uintptr_t stage, size_t stage_bytes,
                                         size_t backward_bytes, const std::vector<py::object>& keep) {
  CudaOptions o{device, limits, timeout_s, entry_timeout_s, sm_margin, exact, missing_ranks, backward_bytes, std::nullopt, {}};
  if (!mapped.empty()) {
    CudaPeers& peers = o.peers.emplace();
    peers.name = name, peers.ep_rank = ep_rank, peers.global_ranks = global_ranks, peers.pes = pes;
    for (uintptr_t heap : mapped) peers.mapped.push_back(reinterpret_cast<std::byte*>(heap));
    for (uintptr_t heap : symmetric) peers.symmetric.push_back(reinterpret_cast<std::byte*>(heap));
    peers.stage = reinterpret_cast<std::byte*>(stage), peers.stage_bytes = stage_bytes;
  }
  for (const py::object& object : keep) o.keep.push_back(kept(object));
  return std::make_shared<CudaTeam>(o);
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.def("num_cuda_devices", &num_cuda_devices);
  py::class_<ForwardArgs>(m, "ForwardArgs").def(py::init(&forward_args));
  py::class_<Gradients>(m, "Gradients").def(py::init(&gradients));
  py::class_<CudaTeam, std::shared_ptr<CudaTeam>>(m, "CudaTeam")
      .def(py::init(&make_cuda_team), py::arg("device"), py::arg("limits") = py::none(), py::arg("timeout_s") = 60.0,
           py::arg("entry_timeout_s") = 600.0, py::arg("sm_margin") = 0, py::arg("exact") = false,
           py::arg("missing_ranks") = 0, py::arg("name") = "", py::arg("ep_rank") = 0,
           py::arg("global_ranks") = std::vector<int>(), py::arg("mapped") = std::vector<uintptr_t>(),
           py::arg("symmetric") = std::vector<uintptr_t>(), py::arg("pes") = std::vector<int>(), py::arg("stage") = 0,
           py::arg("stage_bytes") = 0, py::arg("backward_bytes") = 0, py::arg("keep") = std::vector<py::object>())
      .def("forward",
           [](CudaTeam& team, const std::vector<ForwardArgs>& ranks, uintptr_t stream, bool tf32) {
             py::gil_scoped_release release;
             team.forward(ranks, reinterpret_cast<void*>(stream), tf32);
           },
           py::arg("ranks"), py::arg("stream"), py::arg("tf32") = false)
      .def("backward",
           [](CudaTeam& team, const std::vector<ForwardArgs>& ranks, const std::vector<Gradients>& grads, uintptr_t stream) {
             py::gil_scoped_release release;
             team.backward(ranks, grads, reinterpret_cast<void*>(stream));
           },
           py::arg("ranks"), py::arg("grads"), py::arg("stream"))
      .def_static("stage_bytes", &CudaTeam::stage_bytes, py::arg("limits"))
      .def("set_trace", &CudaTeam::set_trace, py::arg("max_events"), py::call_guard<py::gil_scoped_release>())
      .def("trace", &cuda_trace)
      .def("check", &CudaTeam::check, py::call_guard<py::gil_scoped_release>())
      .def("stats", &cuda_stats, py::arg("layer"), py::arg("rank") = 0);
}
#else
void bind_cuda(pybind11::module_&) {}
#endif
