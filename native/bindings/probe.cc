#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <stdexcept>

#include "bindings/bindings.h"
#include "edgewise/cpu.h"
#include "engine/probe.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace edgewise {

namespace {

Tier tier_of(const std::optional<std::string>& name) {
  if (!name) return tier_in_use();
  if (const std::optional<Tier> tier = tier_named(*name)) return *tier;
  throw std::invalid_argument("tier " + *name + ": expected " + tier_names());
}

}  // namespace

void bind_probe(nb::module_& m) {
  using Release = nb::call_guard<nb::gil_scoped_release>;
  m.def("best_tier", [] { return std::string(tier_name(best_tier())); }, "The best instruction tier of this processor");
  m.def("tier_in_use", [] { return std::string(tier_name(tier_in_use())); }, "The tier in use; see EDGEWISE_ISA");
  m.def("cpu_model_name", &cpu_model_name, "The processor's own name");
  m.def(
      "tiers",
      [] {
        std::vector<std::string> names;
        for (Tier tier : kTiers)
          if (tier <= best_tier()) names.emplace_back(tier_name(tier));
        return names;
      },
      "Every instruction tier that this processor and build can run, the plainest first");
  m.def(
      "probe_read",
      [](size_t nbytes, int threads, int repeats, std::optional<std::string> tier) {
        return probe_read(nbytes, threads, repeats, tier_of(tier));
      },
      "nbytes"_a, "threads"_a, "repeats"_a = 5, "tier"_a = nb::none(), Release(),
      "Bytes per second of each pass over nbytes of memory");
  m.def(
      "probe_int8",
      [](int threads, double seconds, std::optional<std::string> tier) {
        return probe_int8(threads, seconds, tier_of(tier));
      },
      "threads"_a, "seconds"_a, "tier"_a = nb::none(), Release(), "int8 operations per second, two per multiply-add");
  m.def(
      "probe_fp32",
      [](int threads, double seconds, std::optional<std::string> tier) {
        return probe_fp32(threads, seconds, tier_of(tier));
      },
      "threads"_a, "seconds"_a, "tier"_a = nb::none(), Release(), "fp32 operations per second, two per multiply-add");
}

}  // namespace edgewise
