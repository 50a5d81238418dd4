#include "edgewise/cpu.h"

#include <cstdlib>
#include <fstream>
#include <stdexcept>

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
    case Tier::Avx512: return "avx512";
    case Tier::Avx2: return "avx2";
    default: return "reference";
  }
}

Tier tier_in_use() {
  const char* asked = std::getenv("EDGEWISE_ISA");
  if (asked == nullptr || *asked == '\0') return best_tier();
  for (Tier tier : {Tier::Reference, Tier::Avx2, Tier::Avx512}) {
    if (std::string(asked) != tier_name(tier)) continue;
    if (tier > best_tier())
      throw std::invalid_argument(std::string("EDGEWISE_ISA=") + asked + ", but this processor runs at most " +
                                  tier_name(best_tier()) + "; unset EDGEWISE_ISA or choose a lower tier");
    return tier;
  }
  throw std::invalid_argument(std::string("EDGEWISE_ISA=") + asked + ": expected reference, avx2 or avx512");
}

std::string cpu_model_name() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);)
    if (line.rfind("model name", 0) == 0) {
      auto colon = line.find(':');
      return colon == std::string::npos ? "" : line.substr(line.find_first_not_of(" \t", colon + 1));
    }
  return "";
}

}  // namespace edgewise
