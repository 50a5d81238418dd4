// Sixteen lanes as plain loops: what every processor can run, and what the other lane headers have to equal.
// See lanes.md for the contract.
#pragma once
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "edgewise/half.h"

namespace edgewise::reference {

constexpr int kTile = 4;

struct Floats { float v[16]; };
struct Ints { int32_t v[16]; };
struct Codes { uint8_t v[64]; };  // four per lane

template <class Value>
static inline Floats each(Value value) {
  Floats out;
  for (int i = 0; i < 16; ++i) out.v[i] = value(i);
  return out;
}
template <class Value>
static inline Ints each_int(Value value) {
  Ints out;
  for (int i = 0; i < 16; ++i) out.v[i] = value(i);
  return out;
}
template <class Value>
static inline Codes each_code(Value value) {
  Codes out;
  for (int i = 0; i < 64; ++i) out.v[i] = static_cast<uint8_t>(value(i));
  return out;
}

static inline Floats zero() { return each([](int) { return 0.0f; }); }
static inline Floats set1(float x) { return each([=](int) { return x; }); }
static inline Floats load(const float* p) { return each([=](int i) { return p[i]; }); }
static inline void store(float* p, Floats a) {
  for (int i = 0; i < 16; ++i) p[i] = a.v[i];
}
static inline Floats load_half(const uint16_t* p) { return each([=](int i) { return half_to_float(p[i]); }); }
static inline void store_half(uint16_t* p, Floats a) {
  for (int i = 0; i < 16; ++i) p[i] = float_to_half(a.v[i]);
}
static inline Floats load_bfloat(const uint16_t* p) { return each([=](int i) { return bf16_to_float(p[i]); }); }
// To the nearest bfloat16, ties to even; below 2^-56 to zero.
static inline void store_bfloat(uint16_t* p, Floats a) {
  for (int i = 0; i < 16; ++i) p[i] = std::fabs(a.v[i]) < 0x1p-56f ? uint16_t{0} : float_to_bf16(a.v[i]);
}
// Powers of two from the exponent bytes of E8M0, halved: 2^(e - 128).
static inline Floats load_half_exponent(const uint8_t* p) {
  return each([=](int i) { return std::ldexp(1.0f, p[i] - 128); });
}
static inline Floats load_int8(const int8_t* p) { return each([=](int i) { return static_cast<float>(p[i]); }); }
static inline Floats load_uint8(const uint8_t* p) { return each([=](int i) { return static_cast<float>(p[i]); }); }

static inline Floats add(Floats a, Floats b) { return each([&](int i) { return a.v[i] + b.v[i]; }); }
static inline Floats sub(Floats a, Floats b) { return each([&](int i) { return a.v[i] - b.v[i]; }); }
static inline Floats mul(Floats a, Floats b) { return each([&](int i) { return a.v[i] * b.v[i]; }); }
static inline Floats div(Floats a, Floats b) { return each([&](int i) { return a.v[i] / b.v[i]; }); }
static inline Floats max(Floats a, Floats b) { return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }
static inline Floats min(Floats a, Floats b) { return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; }); }
static inline Floats abs(Floats a) { return each([&](int i) { return std::fabs(a.v[i]); }); }
// a * b + c, rounded once. Not fmaf where that is no instruction: musl's rounds twice if the result is subnormal. The
// product is exact in double; a sum rounded to odd can be rounded again (Boldo and Melquiond, IEEE Trans. Computers
// 57(4), 2008).
static inline float fused(float a, float b, float c) {
#if defined(__FP_FAST_FMAF) || defined(__aarch64__)
  return __builtin_fmaf(a, b, c);
#else
  const double product = static_cast<double>(a) * b;
  double sum = product + c;
  const double part = sum - product, error = (product - (sum - part)) + (c - part);
  if (error > 0 || error < 0) {
    uint64_t bits = std::bit_cast<uint64_t>(sum);
    if (bits >> 63 != (error < 0)) --bits;  // towards zero first, then the sticky bit
    sum = std::bit_cast<double>(bits | 1);
  }
  return static_cast<float>(sum);
#endif
}
static inline Floats fma(Floats a, Floats b, Floats c) { return each([&](int i) { return fused(a.v[i], b.v[i], c.v[i]); }); }
static inline Floats fnma(Floats a, Floats b, Floats c) { return each([&](int i) { return fused(-a.v[i], b.v[i], c.v[i]); }); }
static inline Floats round_even(Floats a) { return each([&](int i) { return std::nearbyintf(a.v[i]); }); }
// The first n lanes of a, the others from b.
static inline Floats first(int n, Floats a, Floats b) { return each([&](int i) { return i < n ? a.v[i] : b.v[i]; }); }
static inline Floats to_floats(Ints a) { return each([&](int i) { return static_cast<float>(a.v[i]); }); }
static inline Ints to_ints(Floats a) { return each_int([&](int i) { return static_cast<int32_t>(std::lrintf(a.v[i])); }); }
// a * 2^n for integral n in [-126, 127].
static inline Floats scale_by_power(Floats a, Floats n) {
  return each([&](int i) { return a.v[i] * std::ldexp(1.0f, static_cast<int>(n.v[i])); });
}
static inline void store_int8(int8_t* p, Ints a) {
  for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(a.v[i]);
}

static inline Ints zero_ints() { return each_int([](int) { return 0; }); }
static inline Ints add(Ints a, Ints b) { return each_int([&](int i) { return a.v[i] + b.v[i]; }); }
static inline Ints set1_ints(int32_t x) { return each_int([=](int) { return x; }); }
static inline Ints shift_left(Ints a, int n) { return each_int([&](int i) { return a.v[i] * (1 << n); }); }
static inline Ints load_ints(const int32_t* p) { return each_int([=](int i) { return p[i]; }); }
static inline Ints mul(Ints a, Ints b) { return each_int([&](int i) { return a.v[i] * b.v[i]; }); }
static inline Ints clamp(Ints a, int32_t low, int32_t high) {
  return each_int([=](int i) { return a.v[i] < low ? low : a.v[i] > high ? high : a.v[i]; });
}
// (x * multiplier + 2^(shift - 1)) / 2^shift, rounded down, by 64 bits; shift 1..62. What comes out fits 32 bits.
static inline Ints rescale(Ints a, Ints multiplier, int shift) {
  return each_int([&](int i) {
    return static_cast<int32_t>((static_cast<int64_t>(a.v[i]) * multiplier.v[i] + (int64_t{1} << (shift - 1))) >> shift);
  });
}

static inline Codes load_codes(const uint8_t* p) { return each_code([=](int i) { return p[i]; }); }
static inline void store_codes(uint8_t* p, Codes a) {
  for (int i = 0; i < 64; ++i) p[i] = a.v[i];
}
static inline Codes set1_codes(uint8_t x) { return each_code([=](int) { return x; }); }
static inline Codes both(Codes a, Codes b) { return each_code([&](int i) { return a.v[i] & b.v[i]; }); }
static inline Codes either(Codes a, Codes b) { return each_code([&](int i) { return a.v[i] | b.v[i]; }); }
static inline Codes sub(Codes a, Codes b) { return each_code([&](int i) { return a.v[i] - b.v[i]; }); }
// Shifts as if of single bytes: callers mask afterwards (right) or before (left), so wider words agree.
static inline Codes shift_right(Codes a, int n) { return each_code([&](int i) { return a.v[i] >> n; }); }
static inline Codes shift_left(Codes a, int n) { return each_code([&](int i) { return a.v[i] << n; }); }
static inline Codes table(const uint8_t* p) { return each_code([=](int i) { return p[i % 16]; }); }
static inline Codes look_up(Codes t, Codes index) { return each_code([&](int i) { return t.v[index.v[i]]; }); }

// Byte j of the four that each lane holds.
static inline Floats byte_of(Codes a, int j) { return each([&](int i) { return static_cast<float>(a.v[4 * i + j]); }); }

// sum + codes . x over four inputs.
static inline Ints dot4(Ints sum, Codes codes, const int8_t* x) {
  return each_int([&](int i) {
    int32_t dot = sum.v[i];
    for (int j = 0; j < 4; ++j) dot += codes.v[4 * i + j] * x[j];
    return dot;
  });
}
// sum + (codes - 128) . x, with the sum that start_full begins with.
static inline Ints dot4_full(Ints sum, Codes codes, const int8_t* x) { return dot4(sum, codes, x); }
static inline Ints start_full(int32_t negated_sum_of_x) { return set1_ints(128 * negated_sum_of_x); }

// Inputs that each lane selects for itself, codes signed: `selectable` holds sixteen inputs (-127..127) for look_up, start_selected
// of all weights that follow gives the sum to begin with.
static inline Codes selectable(const int8_t* x) { return table(reinterpret_cast<const uint8_t*>(x)); }
static inline Ints start_selected(const Codes*, int) { return zero_ints(); }
static inline Ints dot4_selected(Ints sum, Codes weights, Codes x) {
  return each_int([&](int i) {
    int32_t dot = sum.v[i];
    for (int j = 4 * i; j < 4 * i + 4; ++j) dot += static_cast<int8_t>(weights.v[j]) * static_cast<int8_t>(x.v[j]);
    return dot;
  });
}
// sum + weights . x over four inputs, weights signed bytes and x unsigned: start_unsigned of each lane's sum of weights gives the
// sum to begin with. The narrow one is for weights of at most 63.
static inline Ints start_unsigned(Ints) { return zero_ints(); }
static inline Ints dot4_unsigned(Ints sum, Codes weights, const uint8_t* x) {
  return each_int([&](int i) {
    int32_t dot = sum.v[i];
    for (int j = 0; j < 4; ++j) dot += static_cast<int8_t>(weights.v[4 * i + j]) * x[j];
    return dot;
  });
}
static inline Ints dot4_unsigned_narrow(Ints sum, Codes weights, const uint8_t* x) { return dot4_unsigned(sum, weights, x); }

// sum + odd bfloat16 x x[1], then + even bfloat16 x x[0], each rounded once.
static inline Floats dot2(Floats sum, Codes pairs, const uint16_t* x) {
  return each([&](int i) {
    auto half = [&](int j) { return bf16_to_float(static_cast<uint16_t>(pairs.v[4 * i + 2 * j] | pairs.v[4 * i + 2 * j + 1] << 8)); };
    return fused(half(0), bf16_to_float(x[0]), fused(half(1), bf16_to_float(x[1]), sum.v[i]));
  });
}

// Bit i: lane i of a is above that of b.
static inline uint32_t above(Floats a, Floats b) {
  uint32_t mask = 0;
  for (int i = 0; i < 16; ++i) mask |= static_cast<uint32_t>(a.v[i] > b.v[i]) << i;
  return mask;
}
// Of sixteen offsets and codes those whose bit is set, one after the other; sixteen of each are written, the rest are anything.
// Their codes are added to sum, lane by lane in any order.
static inline Ints keep(uint32_t mask, const uint32_t* offset, const int8_t* q, uint32_t* offset_out, int8_t* q_out, Ints sum) {
  int32_t total = 0;
  for (size_t n = 0; mask != 0; mask &= mask - 1, ++n) {
    const int i = __builtin_ctz(mask);
    offset_out[n] = offset[i];
    q_out[n] = q[i];
    total += q[i];
  }
  return add(sum, each_int([=](int i) { return i == 0 ? total : 0; }));
}
// Four columns side by side: byte j of lane 4 q + i of out[k] is byte 16 q + 4 k + i of columns[j].
static inline void interleave(const Codes* columns, Codes* out) {
  for (int k = 0; k < 4; ++k) out[k] = each_code([=](int i) { return columns[i % 4].v[i / 16 * 16 + 4 * k + i % 16 / 4]; });
}

// Sum of lanes, halves folded onto each other: 8, 4, 2, 1.
static inline float reduce_add(Floats a) {
  for (int width = 8; width >= 1; width /= 2)
    for (int i = 0; i < width; ++i) a.v[i] += a.v[i + width];
  return a.v[0];
}
static inline float reduce_max(Floats a) {
  float peak = a.v[0];
  for (int i = 1; i < 16; ++i) peak = a.v[i] > peak ? a.v[i] : peak;
  return peak;
}
static inline int32_t reduce_add(Ints a) {
  int32_t sum = 0;
  for (int i = 0; i < 16; ++i) sum += a.v[i];
  return sum;
}
static inline void prefetch(const void*) {}

}  // namespace edgewise::reference
