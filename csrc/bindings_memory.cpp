// A group's memory as Python makes it: segments that processes share, and what they must be able to hold.
#include "bindings_memory.h"

#include "platform/shared_segment.h"
#include "protocol/heap_layout.h"

namespace py = pybind11;
using namespace flashmoe;

void bind_memory(py::module_& m) {
  py::class_<SharedSegment, std::shared_ptr<SharedSegment>>(m, "Segment")
      .def_static("create", &SharedSegment::create, py::arg("bytes"))
      .def_static("attach", &SharedSegment::attach, py::arg("fd"), py::arg("bytes"))
      .def("leak", &SharedSegment::leak)
      .def_property_readonly("fd", &SharedSegment::fd)
      .def_property_readonly("bytes", &SharedSegment::bytes);

  py::class_<Limits>(m, "Limits")
      .def(py::init([](int ep_size, int max_tokens, int max_wire_bytes, int max_top_k, int max_experts, bool backward) {
             if (ep_size < 1 || max_tokens < 0 || max_wire_bytes < 1 || max_top_k < 1 || max_experts < 1)
               throw std::invalid_argument("Limits must be positive");
             const double rows = double(ep_size) * max_tokens * max_top_k;  // that one rank may have to serve
             if (rows > double(1u << 31))
               throw std::invalid_argument("ranks times max_tokens times max_top_k must be at most 2^31, got " +
                                           std::to_string(uint64_t(rows)));
             return Limits{ep_size, max_tokens, max_wire_bytes, max_top_k, max_experts, backward};
           }),
           py::arg("ep_size"), py::arg("max_tokens"), py::arg("max_wire_bytes"), py::arg("max_top_k"),
           py::arg("max_experts"), py::arg("backward") = false)
      .def_readonly("ep_size", &Limits::ep_size)
      .def_readonly("max_tokens", &Limits::max_tokens)
      .def_readonly("max_wire_bytes", &Limits::max_wire_bytes)
      .def_readonly("max_top_k", &Limits::max_top_k)
      .def_readonly("max_experts", &Limits::max_experts)
      .def_property_readonly("heap_bytes", [](const Limits& l) { return HeapLayout(l).bytes; });
}
