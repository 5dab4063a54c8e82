// _micro: the C++ primitives that bench/micro measures. Each runs n operations and returns the seconds of one. Never
// part of the package; raw addresses in, as in csrc/bindings.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "backward_tiles.h"
#include "ends.h"
#include "planned_ranks.h"
#include "ready_queues.h"
#include "tiles.h"
#include "tiny_calls.h"

namespace py = pybind11;
using namespace flashmoe;
using namespace flashmoe::micro;

namespace {

template <class T = std::byte>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

py::bytes as_bytes(const std::vector<std::byte>& bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

// The instruction sets that this machine and this build know.
std::vector<std::string> isas() {
  std::vector<std::string> known;
  for (const char* isa : {"baseline", "avx2", "avx512"}) {
    try {
      cpu_kernels(isa);
      known.push_back(isa);
    } catch (const std::invalid_argument&) {
    }
  }
  return known;
}

}  // namespace

PYBIND11_MODULE(_micro, m) {
  using unlocked = py::call_guard<py::gil_scoped_release>;
  m.attr("TRANSPORTS") = std::vector<std::string>(std::begin(kTransports), std::end(kTransports));
  m.def("isas", &isas);

  py::class_<Ends>(m, "Ends")
      .def(py::init<const std::string&, const std::string&>(), py::arg("transport"), py::arg("ucx_library"), unlocked())
      .def("put", &Ends::put, py::arg("bytes"), py::arg("cold"), py::arg("n"), unlocked())
      .def("landed", &Ends::landed, py::arg("bytes"), py::arg("cold"), py::arg("n"))
      .def("ping_pong", &Ends::ping_pong, py::arg("bytes"), py::arg("n"), unlocked());

  py::class_<PlannedRanks>(m, "PlannedRanks")
      .def(py::init([](int ep_size, int num_tokens, int hidden_size, int num_experts, int top_k, uintptr_t x,
                       int copies, uintptr_t ids) {
             return std::make_unique<PlannedRanks>(ep_size, num_tokens, hidden_size, num_experts, top_k, at(x),
                                                   copies, at<int32_t>(ids));
           }),
           py::arg("ep_size"), py::arg("num_tokens"), py::arg("hidden_size"), py::arg("num_experts"), py::arg("top_k"),
           py::arg("x"), py::arg("copies"), py::arg("ids"))
      .def("plan", &PlannedRanks::plan, py::arg("n"), unlocked())
      .def("send", &PlannedRanks::send, py::arg("n"), unlocked())
      .def("build_lists", &PlannedRanks::build_lists, py::arg("n"), unlocked())
      .def("gather", &PlannedRanks::gather, py::arg("n"), unlocked())
      .def("gathered", [](PlannedRanks& ranks) { return as_bytes(ranks.gathered()); })
      .def("inbox", [](const PlannedRanks& ranks, int destination) { return as_bytes(ranks.inbox(destination)); })
      .def_property_readonly("blocks", &PlannedRanks::blocks)
      .def_property_readonly("result_rows", &PlannedRanks::result_rows)
      .def("slot_tokens", &PlannedRanks::slot_tokens, py::arg("destination"));

  py::class_<Tiles>(m, "Tiles")
      .def(py::init([](const std::string& isa, int dtype, int activation, bool gated, int hidden_size, int inner) {
             return Tiles(isa, {DType(dtype), Activation(activation), gated, hidden_size, inner});
           }),
           py::arg("isa"), py::arg("dtype"), py::arg("activation"), py::arg("gated"), py::arg("hidden_size"),
           py::arg("intermediate_size"))
      .def_property_readonly("up_cols", &Tiles::up_cols)
      .def_property_readonly("down_cols", &Tiles::down_cols)
      .def("up",
           [](Tiles& t, uintptr_t x, int num_rows, uintptr_t gate_up, int num_experts, uintptr_t h, bool cold,
              uint64_t from, int n) {
             return t.up(at(x), num_rows, at(gate_up), num_experts, at<float>(h), cold, from, n);
           },
           py::arg("x"), py::arg("num_rows"), py::arg("gate_up"), py::arg("num_experts"), py::arg("h"), py::arg("cold"),
           py::arg("start"), py::arg("n"), unlocked())
      .def("down",
           [](Tiles& t, uintptr_t h, int num_rows, uintptr_t down, int num_experts, uintptr_t y, bool cold,
              uint64_t from, int n) {
             return t.down(at<float>(h), num_rows, at(down), num_experts, at(y), cold, from, n);
           },
           py::arg("h"), py::arg("num_rows"), py::arg("down"), py::arg("num_experts"), py::arg("y"), py::arg("cold"),
           py::arg("start"), py::arg("n"), unlocked())
      .def("combine",
           [](Tiles& t, uintptr_t rows, uintptr_t index, uintptr_t weights, int num_tokens, int top_k, uintptr_t y,
              int n) {
             return t.combine(at(rows), at<int32_t>(index), at<float>(weights), num_tokens, top_k, at(y), n);
           },
           py::arg("rows"), py::arg("index"), py::arg("weights"), py::arg("num_tokens"), py::arg("top_k"), py::arg("y"),
           py::arg("n"), unlocked());
  py::class_<BackwardTiles>(m, "BackwardTiles")
      .def(py::init([](const std::string& isa, int dtype, int activation, bool gated, int hidden_size, int inner) {
             return BackwardTiles(isa, {DType(dtype), Activation(activation), gated, hidden_size, inner});
           }),
           py::arg("isa"), py::arg("dtype"), py::arg("activation"), py::arg("gated"), py::arg("hidden_size"),
           py::arg("intermediate_size"))
      .def_property_readonly("up_cols", &BackwardTiles::up_cols)
      .def_property_readonly("down_cols", &BackwardTiles::down_cols)
      .def_property_readonly("stride", &BackwardTiles::stride)
      .def_property_readonly("grad_tiles", &BackwardTiles::grad_tiles)
      .def("up",
           [](BackwardTiles& t, uintptr_t x, uintptr_t dy, int num_rows, uintptr_t gate_up, uintptr_t down,
              int num_experts, uintptr_t made, bool cold, uint64_t from, int n) {
             return t.up(at(x), at(dy), num_rows, at(gate_up), at(down), num_experts, at<float>(made), cold, from, n);
           },
           unlocked())
      .def("down",
           [](BackwardTiles& t, uintptr_t made, int num_rows, uintptr_t gate_up, int num_experts, uintptr_t dx, bool cold,
              uint64_t from, int n) {
             return t.down(at<float>(made), num_rows, at(gate_up), num_experts, at(dx), cold, from, n);
           },
           unlocked())
      .def("gradient",
           [](BackwardTiles& t, uintptr_t x, uintptr_t dy, int num_rows, uintptr_t made, int blocks, uintptr_t matrix,
              uint64_t from, int n) {
             return t.gradient(at(x), at(dy), num_rows, at<float>(made), blocks, at(matrix), from, n);
           },
           unlocked());
  m.def(
      "activate",
      [](const std::string& isa, int activation, uintptr_t x, int count, uintptr_t out, int n) {
        return activate(isa, Activation(activation), at<float>(x), count, at<float>(out), n);
      },
      py::arg("isa"), py::arg("activation"), py::arg("x"), py::arg("count"), py::arg("out"), py::arg("n"), unlocked());

  m.def("take_alone", &take_alone, py::arg("tiles"), py::arg("n"), unlocked());
  m.def("take_together", &take_together, py::arg("workers"), py::arg("tiles"), py::arg("n"), unlocked());
  m.def("hand_off", &hand_off, py::arg("n"), unlocked());
  m.def("tiny_calls", &tiny_calls, py::arg("ep_size"), py::arg("num_tokens"), py::arg("remote_only_seed"), py::arg("n"),
        unlocked());
}
