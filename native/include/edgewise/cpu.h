// Instruction tiers: what this processor can run, and which one is in use.
#pragma once
#include <optional>
#include <string>
#include <string_view>

namespace edgewise {

enum class Tier {
#define EDGEWISE_TIER(tier, name) tier,
#include "edgewise/tiers.inc"
#undef EDGEWISE_TIER
};

inline constexpr Tier kTiers[] = {
#define EDGEWISE_TIER(tier, name) Tier::tier,
#include "edgewise/tiers.inc"
#undef EDGEWISE_TIER
};

// The best tier this processor and build can run. Avx512 means F, BW, VL, DQ, VNNI and VBMI, Avx512Bf16
// products of bfloat16 too; NeonDot has the dot product
// of bytes, NeonI8mm their matrix product too.
Tier best_tier();

const char* tier_name(Tier tier);
std::optional<Tier> tier_named(std::string_view name);

// The names of all tiers of this build: "reference, avx2 or avx512".
std::string tier_names();

// The tier in use: best_tier(), or the one that EDGEWISE_ISA names. Throws std::invalid_argument for an unknown name or
// one that this processor cannot run. Read once per call, so that tests can switch it.
Tier tier_in_use();

// The processor's own name, "" where it has none.
std::string cpu_model_name();

}  // namespace edgewise
