#include "edgewise/kernels.h"

#include <stdexcept>
#include <string>

namespace edgewise {

const Kernels& kernels(Tier tier) {
  if (tier > best_tier())
    throw std::invalid_argument(std::string("instruction tier ") + tier_name(tier) + " cannot run on this processor");
  switch (tier) {
#define EDGEWISE_TIER(tier, name)                                                                                \
  case Tier::tier: {                                                                                             \
    static const Kernels table = {Tier::tier, &name::matmul_kernel, name::row_kernels(), name::attention_kernels(),  \
                                  name::integer_kernels(), name::column_kernels()};                                  \
    return table;                                                                                                \
  }
#include "edgewise/tiers.inc"
#undef EDGEWISE_TIER
  }
  throw std::invalid_argument("unknown instruction tier");
}

}  // namespace edgewise
