#pragma once
#include <nanobind/nanobind.h>

namespace edgewise {
void bind_probe(nanobind::module_& m);  // what the machine is and can do
}  // namespace edgewise
