#pragma once
#include <cstddef>
#include <cstdint>

namespace edgewise::probe {

// read_*: xor of all 64-bit words of `bytes` (a multiple of 1024) at `data`, 64-byte aligned.
// int8_*, fp32_*: `rounds` rounds of multiply-adds on registers; returns something that depends on all of them.
#define PROBE(tier, suffix)                                \
  uint64_t read_##suffix(const void* data, size_t bytes);  \
  double int8_##suffix(int64_t rounds);                    \
  double fp32_##suffix(int64_t rounds);                    \
  extern const double int8_ops_##suffix, fp32_ops_##suffix; /* operations per round */
#include "kernels/probe/kernels.inc"
#undef PROBE

}  // namespace edgewise::probe
