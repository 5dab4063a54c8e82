// The network between hosts, as Python sees it.
#pragma once

#include <pybind11/pybind11.h>

namespace flashmoe {

void bind_ucx(pybind11::module_& m);

}  // namespace flashmoe
