# The C++ primitives that bench/micro measures: built when asked for, never part of the package.

pybind11_add_module(_micro MODULE NO_EXTRAS EXCLUDE_FROM_ALL bench/micro/primitives.cpp)
flashmoe_link_core(_micro)
