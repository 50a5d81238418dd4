// Apart from cpu.cc, so that it builds without exceptions and files.
#include "edgewise/cpu.h"

#include <iterator>

namespace edgewise {

Tier best_tier() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi"))
    return Tier::Avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Tier::Avx2;
#endif
  return Tier::Reference;
}

const char* tier_name(Tier tier) {
  switch (tier) {
#define EDGEWISE_TIER(tier, name) \
  case Tier::tier: return #name;
#include "edgewise/tiers.inc"
#undef EDGEWISE_TIER
  }
  return "unknown";
}

std::optional<Tier> tier_named(std::string_view name) {
  for (Tier tier : kTiers)
    if (name == tier_name(tier)) return tier;
  return std::nullopt;
}

std::string tier_names() {
  std::string names;
  for (Tier tier : kTiers) {
    if (tier != kTiers[0]) names += tier == kTiers[std::size(kTiers) - 1] ? " or " : ", ";
    names += tier_name(tier);
  }
  return names;
}

}  // namespace edgewise
