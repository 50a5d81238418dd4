#include "edgewise/cpu.h"

#include <cstdlib>
#include <fstream>
#include <stdexcept>

namespace edgewise {

Tier tier_in_use() {
  const char* asked = std::getenv("EDGEWISE_ISA");
  if (asked == nullptr || *asked == '\0') return best_tier();
  const std::optional<Tier> tier = tier_named(asked);
  if (!tier) throw std::invalid_argument(std::string("EDGEWISE_ISA=") + asked + ": expected " + tier_names());
  if (*tier > best_tier())
    throw std::invalid_argument(std::string("EDGEWISE_ISA=") + asked + ", but this processor runs at most " +
                                tier_name(best_tier()) + "; unset EDGEWISE_ISA or choose a lower tier");
  return *tier;
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
