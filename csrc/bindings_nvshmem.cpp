// flashmoe._C, of NVSHMEM: where its library is, in every build; what is done with it, in a build with its headers.
#include "bindings_nvshmem.h"

#include <pybind11/stl.h>

#include <cstring>

#ifdef FLASHMOE_WITH_CUDA
#include "runtime/moe_cuda.h"
#endif
#include "runtime/nvshmem_library.h"
#include "runtime/nvshmem_world.h"

namespace py = pybind11;
using namespace flashmoe;

namespace {

py::dict library(const std::string& home, const std::vector<std::string>& folders) {
  const NvshmemLibrary found = open_nvshmem_library(home, folders);
  py::dict d;
  d["path"] = found.path, d["found"] = found.found, d["version"] = found.version.text();
  return d;
}

#ifdef FLASHMOE_WITH_NVSHMEM
std::optional<NvshmemVersion> device_code() {
#ifdef FLASHMOE_NVSHMEM_DEVICE
  return NvshmemVersion{FLASHMOE_NVSHMEM_DEVICE};
#else
  return std::nullopt;
#endif
}

std::shared_ptr<NvshmemWorld> make_world(const std::string& home, const std::vector<std::string>& folders) {
  return std::make_shared<NvshmemWorld>(nvshmem_calls(open_nvshmem_library(home, folders)), nvshmem_headers(),
                                        device_code());
}

void initialize(NvshmemWorld& world, const std::string& id, int rank, int size, int device,
                const std::vector<uintptr_t>& modules) {
  NvshmemId bytes;
  if (id.size() != bytes.size())
    throw std::invalid_argument("id must have " + std::to_string(bytes.size()) + " bytes, got " + std::to_string(id.size()));
  std::memcpy(bytes.data(), id.data(), bytes.size());
  std::vector<void*> handles;
  for (uintptr_t module : modules) handles.push_back(reinterpret_cast<void*>(module));
  py::gil_scoped_release release;
  world.initialize(bytes, rank, size, device, std::move(handles));
}

std::vector<uintptr_t> addresses(const std::vector<std::byte*>& pointers) {
  std::vector<uintptr_t> numbers;
  for (const std::byte* pointer : pointers) numbers.push_back(reinterpret_cast<uintptr_t>(pointer));
  return numbers;
}
#endif

}  // namespace

void bind_nvshmem(py::module_& m) {
  m.def("nvshmem_library", &library, py::arg("home"), py::arg("folders"));
#ifdef FLASHMOE_WITH_CUDA
  // CUmodule handles of the kernels that call NVSHMEM: its host library must know of each.
  m.def("has_nvshmem_kernels", &has_nvshmem_kernels);
  m.def("nvshmem_modules", [] {
    std::vector<uintptr_t> modules;
    for (void* module : nvshmem_modules()) modules.push_back(reinterpret_cast<uintptr_t>(module));
    return modules;
  });
#endif
#ifdef FLASHMOE_WITH_NVSHMEM
  using Release = py::call_guard<py::gil_scoped_release>;
  m.attr("nvshmem_headers") = nvshmem_headers().text();
  py::class_<NvshmemArena, std::shared_ptr<NvshmemArena>>(m, "NvshmemArena")
      .def("leak", &NvshmemArena::leak)
      .def_property_readonly("number", &NvshmemArena::number)
      .def_property_readonly("bytes", &NvshmemArena::bytes)
      .def_property_readonly("address", [](const NvshmemArena& a) { return reinterpret_cast<uintptr_t>(a.data()); })
      .def_property_readonly("mapped", [](const NvshmemArena& a) { return addresses(a.mapped()); });
  py::class_<NvshmemWorld, std::shared_ptr<NvshmemWorld>>(m, "NvshmemWorld")
      .def(py::init(&make_world), py::arg("home"), py::arg("folders"))
      .def("unique_id", [](NvshmemWorld& world) {
        const NvshmemId id = world.unique_id();
        return py::bytes(reinterpret_cast<const char*>(id.data()), id.size());
      })
      .def("initialize", &initialize, py::arg("id"), py::arg("rank"), py::arg("size"), py::arg("device"),
           py::arg("modules") = std::vector<uintptr_t>())
      .def("allocate", &NvshmemWorld::allocate, py::arg("bytes"), Release())
      .def("idle", &NvshmemWorld::idle)
      .def("free", &NvshmemWorld::free, py::arg("number"), Release())
      .def("finalize", &NvshmemWorld::finalize, Release())
      .def("abandon", &NvshmemWorld::abandon, py::arg("why"))
      .def_property_readonly("ready", &NvshmemWorld::ready)
      .def_property_readonly("foreign", &NvshmemWorld::foreign)
      .def_property_readonly("state", &NvshmemWorld::state)
      .def_property_readonly("pe", &NvshmemWorld::pe)
      .def_property_readonly("size", &NvshmemWorld::size);
#endif
}
