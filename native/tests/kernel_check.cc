// Every kernel and lane function of every tier that this processor can run, against the reference tier, to the bit.
//
//   kernel_check [tier]       a name asks that this tier be the best one here, so that a run cannot pass by running less
//   kernel_check --run tier   runs the tiers up to this one unasked: Zig's runtime library knows of no x86 features
//
// Plain C++ without files and exceptions, so that it runs under an emulator or in a WebAssembly engine. Inputs come from
// fixed seeds. The last line says how many cases passed and failed; the exit status is 1 where any failed.
#include "tests/check.h"

namespace edgewise {
namespace {

void check_tier(Tier tier, const Kernels& found, const LaneFunctions& lanes) {
  const Kernels reference{Tier::Reference, &reference::matmul_kernel, reference::row_kernels(), reference::attention_kernels(),
                          reference::integer_kernels(), reference::column_kernels()};
  const int before = passed;
  check_fma(tier, lanes);  // the reference tier's too: it is what the others are held to
  if (tier != Tier::Reference) {
    check_lanes(tier, lanes);
    check_rows(tier, found.rows, reference.rows);
    check_matmuls(tier, found, reference);
    check_attention(tier, found.attention, reference.attention);
    check_integers(tier, found.integer, reference.integer);
    check_columns(tier, found, reference);
  }
  std::printf("%s: %d cases equal\n", tier_name(tier), passed - before);
  std::fflush(stdout);
}

}  // namespace
}  // namespace edgewise

int main(int count, char** arguments) {
  using namespace edgewise;
  Tier best = best_tier();
  if (count > 1) {
    const std::optional<Tier> wanted = tier_named(arguments[count - 1]);
    if (wanted && count == 3 && std::strcmp(arguments[1], "--run") == 0) {
      best = *wanted;
    } else if (wanted != best) {
      std::printf("FAILED the best tier here is %s, expected %s\n", tier_name(best), arguments[count - 1]);
      ++failed;
    }
  }
#define EDGEWISE_TIER(tier, name) \
  if (Tier::tier <= best)         \
    check_tier(Tier::tier, {Tier::tier, &name::matmul_kernel, name::row_kernels(), name::attention_kernels(), name::integer_kernels(),    \
                             name::column_kernels()},                                                                   \
               name::lane_functions());
#include "edgewise/tiers.inc"
#undef EDGEWISE_TIER
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}
