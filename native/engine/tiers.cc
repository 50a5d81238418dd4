// Apart from cpu.cc, so that it builds without exceptions and files.
#include "edgewise/cpu.h"

#include <iterator>

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace edgewise {

#if defined(__aarch64__)
namespace {

#if defined(__linux__)
// Bits of the kernel's ABI (asm/hwcap.h), by number because older headers lack the second.
bool has_dot_product() { return (getauxval(AT_HWCAP) >> 20 & 1) != 0; }
bool has_i8mm() { return (getauxval(AT_HWCAP2) >> 13 & 1) != 0; }
#elif defined(__APPLE__)
bool has(const char* feature) {
  int value = 0;
  size_t size = sizeof value;
  return sysctlbyname(feature, &value, &size, nullptr, 0) == 0 && value != 0;
}
bool has_dot_product() { return has("hw.optional.arm.FEAT_DotProd"); }
bool has_i8mm() { return has("hw.optional.arm.FEAT_I8MM"); }
#else
bool has_dot_product() { return false; }
bool has_i8mm() { return false; }
#endif

}  // namespace
#endif

Tier best_tier() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi"))
    return __builtin_cpu_supports("avx512bf16") ? Tier::Avx512Bf16 : Tier::Avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Tier::Avx2;
  return Tier::Reference;
#elif defined(__aarch64__)
  if (!has_dot_product()) return Tier::Neon;
  return has_i8mm() ? Tier::NeonI8mm : Tier::NeonDot;
#elif defined(__wasm_simd128__)
  return Tier::Wasm;
#else
  return Tier::Reference;
#endif
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
