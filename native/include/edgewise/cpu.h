// Instruction tiers: what this processor can run, and which one is in use.
#pragma once
#include <string>

namespace edgewise {

enum class Tier { Reference = 0, Avx2 = 1, Avx512 = 2 };

// The best tier this processor and build can run. Avx512 means F, BW, VL, DQ, VNNI and VBMI.
Tier best_tier();

// The tier in use: best_tier(), or what EDGEWISE_ISA (reference, avx2, avx512) asks for. Throws std::invalid_argument
// for an unknown name or one that this processor cannot run. Read once per call, so that tests can switch it.
Tier tier_in_use();

const char* tier_name(Tier tier);

// The processor's own name, "" where it has none.
std::string cpu_model_name();

}  // namespace edgewise
