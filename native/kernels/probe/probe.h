#pragma once
#include <cstddef>
#include <cstdint>

namespace edgewise::probe {

// read_*: xor of all 64-bit words of `bytes` (a multiple of 1024) at `data`, 64-byte aligned.
// int8_*, fp32_*: `rounds` rounds of multiply-adds on registers; returns something that depends on all of them.
#define EDGEWISE_TIER(tier, name)                       \
  uint64_t read_##name(const void* data, size_t bytes); \
  double int8_##name(int64_t rounds);                   \
  double fp32_##name(int64_t rounds);                   \
  extern const double int8_ops_##name, fp32_ops_##name; /* operations per round */
#include "edgewise/tiers.inc"
#undef EDGEWISE_TIER

}  // namespace edgewise::probe
