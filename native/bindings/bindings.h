#pragma once
#include <nanobind/nanobind.h>

namespace edgewise {
void bind_pool(nanobind::module_& m);   // how threads share work and fetch ahead
void bind_probe(nanobind::module_& m);  // what the machine is and can do
void bind_io(nanobind::module_& m);     // file formats: blocks, headers
void bind_kernels(nanobind::module_& m);  // packing and single kernels
void bind_engine(nanobind::module_& m);   // models and sessions
}  // namespace edgewise
