#include <nanobind/stl/string.h>

#include "bindings/bindings.h"
#include "edgewise/cpu.h"

namespace edgewise {

void bind_probe(nanobind::module_& m) {
  m.def("best_tier", [] { return std::string(tier_name(best_tier())); }, "The best instruction tier of this processor");
  m.def("tier_in_use", [] { return std::string(tier_name(tier_in_use())); }, "The tier in use; see EDGEWISE_ISA");
  m.def("cpu_model_name", &cpu_model_name, "The processor's own name");
}

}  // namespace edgewise
