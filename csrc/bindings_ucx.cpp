#include "bindings_ucx.h"

#include <pybind11/stl.h>

#include "platform/shared_segment.h"
#include "platform/ucx_network.h"

namespace py = pybind11;

namespace flashmoe {
namespace {

using Address = std::pair<py::bytes, uint64_t>;

std::shared_ptr<UcxFabric> open(const std::string& library, const std::shared_ptr<SharedSegment>& segment, int rank,
                                int world_size) {
  if (!segment || rank < 0 || rank >= world_size)
    throw std::invalid_argument("a segment, and a rank in [0, " + std::to_string(world_size) + "), got " + std::to_string(rank));
  py::gil_scoped_release release;
  return std::make_shared<UcxFabric>(library, segment, segment->data(), segment->bytes(), rank, world_size);
}

std::optional<int> connect(UcxFabric& fabric, const std::vector<std::optional<Address>>& addresses, double timeout_s) {
  if (addresses.size() != size_t(fabric.world_size()))
    throw std::invalid_argument("addresses must have one entry for each of the " + std::to_string(fabric.world_size()) + " ranks");
  std::vector<std::optional<UcxFabric::Address>> ranks;
  for (const std::optional<Address>& address : addresses) {
    ranks.emplace_back();
    if (address) ranks.back() = {std::string(address->first), address->second};
  }
  py::gil_scoped_release release;
  return fabric.connect(ranks, timeout_s);
}

std::shared_ptr<HostNetwork> network(const std::shared_ptr<UcxFabric>& fabric, const std::vector<int>& ranks,
                                     const std::vector<size_t>& offsets) {
  std::vector<UcxNetwork::Place> places;
  for (size_t pe = 0; pe < ranks.size(); ++pe) {
    if (ranks[pe] < 0 || ranks[pe] >= fabric->world_size() || pe >= offsets.size())
      throw std::invalid_argument("ranks must lie in [0, " + std::to_string(fabric->world_size()) + "), each with an offset");
    places.push_back({ranks[pe], offsets[pe]});
  }
  return std::make_shared<UcxNetwork>(fabric, std::move(places));
}

}  // namespace

void bind_ucx(py::module_& m) {
  m.def("ucx_version", [](const std::string& library) { return std::string(UcxLibrary(library).get_version_string()); },
        py::arg("library"), py::call_guard<py::gil_scoped_release>());
  py::class_<UcxFabric, std::shared_ptr<UcxFabric>>(m, "UcxFabric")
      .def(py::init(&open), py::arg("library"), py::arg("segment"), py::arg("rank"), py::arg("world_size"))
      .def_property_readonly("address", [](const UcxFabric& f) { return Address(py::bytes(f.address().worker), f.address().key); })
      .def("connect", &connect, py::arg("addresses"), py::arg("timeout_s"))
      .def("failed", [](const UcxFabric& f, int rank) { return rank >= 0 && rank < f.world_size() && f.failed(rank); })
      .def("network", &network, py::arg("ranks"), py::arg("offsets"))
      .def("close", &UcxFabric::close, py::call_guard<py::gil_scoped_release>());
}

}  // namespace flashmoe
