// The functions of a lane header behind pointers, so that kernel_check.cc can call those of every tier. Pointers are to
// sixteen values, to 64 for codes.
#pragma once
#include <cstddef>
#include <cstdint>

#include "edgewise/cpu.h"

namespace edgewise {

struct LaneFunctions {
  using Unary = void (*)(const float* a, float* out);
  using Binary = void (*)(const float* a, const float* b, float* out);
  using Ternary = void (*)(const float* a, const float* b, const float* c, float* out);
  Unary copy, abs, round_even;
  Binary add, sub, mul, div, max, min, scale_by_power;
  Ternary fma, fnma;
  void (*first)(int n, const float* a, const float* b, float* out);
  void (*load_half)(const uint16_t* p, float* out);
  void (*load_bfloat)(const uint16_t* p, float* out);
  void (*load_half_exponent)(const uint8_t* p, float* out);
  void (*load_int8)(const int8_t* p, float* out);
  void (*load_uint8)(const uint8_t* p, float* out);
  void (*store_half)(const float* a, uint16_t* out);
  void (*store_bfloat)(const float* a, uint16_t* out);
  // to_ints, and the three ways out of Ints.
  void (*round_to_ints)(const float* a, int8_t* bytes, float* floats, int32_t* sum);
  float (*reduce_add)(const float* a);
  float (*reduce_max)(const float* a);
  // Codes: each nibble looked up in a table of 16 bytes; (codes >> n) & mask; (codes & 1) << n, or what was there.
  void (*look_up)(const uint8_t* table, const uint8_t* codes, float* out);
  void (*shift_codes)(const uint8_t* codes, int n, uint8_t mask, float* right, float* left);
  // start_full / set1_ints(sum) << 1, then sums over `count` times four inputs.
  void (*dot4)(int32_t sum, const uint8_t* codes, const int8_t* x, int count, float* out);
  // Sixteen pairs and one, of bfloat16.
  void (*dot2)(const float* sum, const uint16_t* pairs, const uint16_t* x, float* out);
  void (*dot4_full)(int32_t negated_sum, const uint8_t* codes, const int8_t* x, int count, float* out);
  // Sixteen inputs, of which each of 64 weights selects one by its index; over `count` registers of both.
  void (*dot4_selected)(const uint8_t* weights, const uint8_t* index, const int8_t* x, int count, float* out);
  void (*dot4_unsigned)(const int32_t* sums, const uint8_t* weights, const uint8_t* x, int count, bool narrow, float* out);
  // Four columns of 64 codes, side by side.
  void (*interleave)(const uint8_t* columns, float* out);
  uint32_t (*above)(const float* a, const float* b);
  // clamp(rescale(a * b, multiplier, shift)), exact in the two halves of 16 bits.
  void (*rescale)(const int32_t* a, const int32_t* b, const int32_t* multiplier, int shift, float* low, float* high);
};

#define EDGEWISE_TIER(tier, name) \
  namespace name {                \
  LaneFunctions lane_functions(); \
  }
#include "edgewise/tiers.inc"
#undef EDGEWISE_TIER

}  // namespace edgewise
