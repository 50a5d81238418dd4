#pragma once
#include <nanobind/nanobind.h>

namespace edgewise {
void bind_probe(nanobind::module_& m);  // what the machine is and can do
void bind_io(nanobind::module_& m);     // file formats: blocks, headers
}  // namespace edgewise
