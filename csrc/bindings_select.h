#pragma once

#include <pybind11/pybind11.h>

void bind_select(pybind11::module_& m);
