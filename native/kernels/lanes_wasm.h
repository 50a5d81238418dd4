// Sixteen lanes on WebAssembly SIMD: four registers of each kind. See lanes.md for the contract that all lane headers meet.
//
// Only the deterministic instructions: those of relaxed SIMD may round a multiply-add once or twice, as the engine likes.
#pragma once
#include <wasm_simd128.h>

#include <cstddef>
#include <cstdint>

namespace edgewise::wasm {

constexpr int kTile = 4;  // tokens that share the unpacking of codes

struct Floats { v128_t v[4]; };
struct Ints { v128_t v[4]; };
struct Codes { v128_t v[4]; };  // 64 unsigned bytes: four per lane

// value(i) for the four registers of a kind.
template <class Out, class Value>
static inline Out each(Value value) {
  return {{value(0), value(1), value(2), value(3)}};
}

static inline Floats zero() { return each<Floats>([](int) { return wasm_f32x4_splat(0.0f); }); }
static inline Floats set1(float x) { return each<Floats>([=](int) { return wasm_f32x4_splat(x); }); }
static inline Floats load(const float* p) { return each<Floats>([=](int i) { return wasm_v128_load(p + 4 * i); }); }
static inline void store(float* p, Floats x) {
  for (int i = 0; i < 4; ++i) wasm_v128_store(p + 4 * i, x.v[i]);
}
// Half precision in software: exponent and mantissa moved into place, then 2^112 times as much, exact for subnormals too.
static inline v128_t half4(const uint16_t* p) {
  const v128_t half = wasm_u32x4_load16x4(p);
  const v128_t magnitude = wasm_v128_and(half, wasm_i32x4_splat(0x7fff));
  const v128_t sign = wasm_i32x4_shl(wasm_v128_xor(half, magnitude), 16);
  const v128_t value = wasm_f32x4_mul(wasm_i32x4_shl(magnitude, 13), wasm_f32x4_splat(0x1p112f));
  const v128_t special = wasm_i32x4_gt(magnitude, wasm_i32x4_splat(0x7bff));  // infinity or NaN
  return wasm_v128_or(wasm_v128_or(value, sign), wasm_v128_and(special, wasm_i32x4_splat(0x7f800000)));
}
static inline Floats load_half(const uint16_t* p) { return each<Floats>([=](int i) { return half4(p + 4 * i); }); }
// As float_to_half, branches made into selections.
static inline v128_t to_half4(v128_t bits) {
  const v128_t magnitude = wasm_v128_and(bits, wasm_i32x4_splat(0x7fffffff));
  const v128_t sign = wasm_v128_and(wasm_u32x4_shr(bits, 16), wasm_i32x4_splat(0x8000));
  const v128_t odd = wasm_v128_and(wasm_u32x4_shr(magnitude, 13), wasm_i32x4_splat(1));
  const v128_t rounded = wasm_i32x4_add(wasm_i32x4_sub(magnitude, wasm_i32x4_splat(112 << 23)),
                                        wasm_i32x4_add(odd, wasm_i32x4_splat(0xfff)));
  const v128_t subnormal = wasm_i32x4_sub(wasm_f32x4_add(magnitude, wasm_f32x4_splat(0.5f)), wasm_i32x4_splat(0x3f000000));
  v128_t half = wasm_v128_bitselect(subnormal, wasm_u32x4_shr(rounded, 13),
                                    wasm_i32x4_lt(magnitude, wasm_i32x4_splat(0x38800000)));
  half = wasm_v128_bitselect(wasm_i32x4_splat(0x7c00), half, wasm_i32x4_gt(magnitude, wasm_i32x4_splat(0x477fefff)));
  const v128_t payload = wasm_v128_and(wasm_u32x4_shr(magnitude, 13), wasm_i32x4_splat(0x3ff));
  const v128_t nan = wasm_v128_or(wasm_i32x4_max(payload, wasm_i32x4_splat(1)), wasm_i32x4_splat(0x7c00));
  half = wasm_v128_bitselect(nan, half, wasm_i32x4_gt(magnitude, wasm_i32x4_splat(0x7f800000)));
  return wasm_v128_or(half, sign);
}
static inline void store_half(uint16_t* p, Floats x) {
  wasm_v128_store(p, wasm_u16x8_narrow_i32x4(to_half4(x.v[0]), to_half4(x.v[1])));
  wasm_v128_store(p + 8, wasm_u16x8_narrow_i32x4(to_half4(x.v[2]), to_half4(x.v[3])));
}
static inline Floats load_bfloat(const uint16_t* p) {
  return each<Floats>([=](int i) { return wasm_i32x4_shl(wasm_u32x4_load16x4(p + 4 * i), 16); });
}
// To the nearest bfloat16, ties to even; below 2^-56 to zero.
static inline v128_t to_bfloat4(v128_t x) {
  const v128_t high = wasm_u32x4_shr(x, 16), odd = wasm_v128_and(high, wasm_i32x4_splat(1));
  const v128_t rounded = wasm_u32x4_shr(wasm_i32x4_add(x, wasm_i32x4_add(odd, wasm_i32x4_splat(0x7fff))), 16);
  const v128_t quiet = wasm_v128_or(high, wasm_i32x4_splat(0x40));
  const v128_t half = wasm_v128_bitselect(rounded, quiet, wasm_f32x4_eq(x, x));
  return wasm_v128_andnot(half, wasm_f32x4_lt(wasm_f32x4_abs(x), wasm_f32x4_splat(0x1p-56f)));
}
static inline void store_bfloat(uint16_t* p, Floats x) {
  wasm_v128_store(p, wasm_u16x8_narrow_i32x4(to_bfloat4(x.v[0]), to_bfloat4(x.v[1])));
  wasm_v128_store(p + 8, wasm_u16x8_narrow_i32x4(to_bfloat4(x.v[2]), to_bfloat4(x.v[3])));
}
static inline v128_t widen_unsigned(const uint8_t* p) { return wasm_u32x4_extend_low_u16x8(wasm_u16x8_extend_low_u8x16(wasm_v128_load32_zero(p))); }
static inline v128_t widen_signed(const int8_t* p) { return wasm_i32x4_extend_low_i16x8(wasm_i16x8_extend_low_i8x16(wasm_v128_load32_zero(p))); }
// Powers of two from the exponent bytes of E8M0, halved: 2^(e - 128).
static inline Floats load_half_exponent(const uint8_t* p) {
  return each<Floats>([=](int i) {
    const v128_t e = widen_unsigned(p + 4 * i), one = wasm_i32x4_splat(1);
    const v128_t normal = wasm_i32x4_shl(wasm_i32x4_sub(e, one), 23);
    const v128_t subnormal = wasm_i32x4_shl(wasm_i32x4_add(e, one), 21);  // 2^-128 and 2^-127
    return wasm_v128_bitselect(normal, subnormal, wasm_i32x4_gt(e, one));
  });
}
static inline Floats load_int8(const int8_t* p) {
  return each<Floats>([=](int i) { return wasm_f32x4_convert_i32x4(widen_signed(p + 4 * i)); });
}
static inline Floats load_uint8(const uint8_t* p) {
  return each<Floats>([=](int i) { return wasm_f32x4_convert_i32x4(widen_unsigned(p + 4 * i)); });
}

static inline Floats add(Floats x, Floats y) { return each<Floats>([&](int i) { return wasm_f32x4_add(x.v[i], y.v[i]); }); }
static inline Floats sub(Floats x, Floats y) { return each<Floats>([&](int i) { return wasm_f32x4_sub(x.v[i], y.v[i]); }); }
static inline Floats mul(Floats x, Floats y) { return each<Floats>([&](int i) { return wasm_f32x4_mul(x.v[i], y.v[i]); }); }
static inline Floats div(Floats x, Floats y) { return each<Floats>([&](int i) { return wasm_f32x4_div(x.v[i], y.v[i]); }); }
// pmax(y, x) is y < x ? x : y: equal values and NaN give y, as on the other tiers.
static inline Floats max(Floats x, Floats y) { return each<Floats>([&](int i) { return wasm_f32x4_pmax(y.v[i], x.v[i]); }); }
static inline Floats min(Floats x, Floats y) { return each<Floats>([&](int i) { return wasm_f32x4_pmin(y.v[i], x.v[i]); }); }
static inline Floats abs(Floats x) { return each<Floats>([&](int i) { return wasm_f32x4_abs(x.v[i]); }); }

// x * y + z with one rounding, though there is no such instruction. The product of two floats is exact in double; their
// sum with z, rounded to double and then to float, is wrong only where the first rounding lands on the middle between
// two floats, or below the normal range, where that middle lies elsewhere. So the rounded sum is taken if no lane is
// there, and otherwise the sum rounded to odd, after which rounding to float is right (Boldo and Melquiond, "Emulation
// of a FMA and correctly rounded sums: proved algorithms using rounding to odd", IEEE Trans. Computers 57(4), 2008).
struct Wide { v128_t low, high; };
static inline v128_t upper_half(v128_t x) { return wasm_i32x4_shuffle(x, x, 2, 3, 2, 3); }
static inline Wide widen_floats(v128_t x) {
  return {wasm_f64x2_promote_low_f32x4(x), wasm_f64x2_promote_low_f32x4(upper_half(x))};
}
static inline v128_t narrow(Wide x) {
  return wasm_i32x4_shuffle(wasm_f32x4_demote_f64x2_zero(x.low), wasm_f32x4_demote_f64x2_zero(x.high), 0, 1, 4, 5);
}
static inline v128_t sum_to_odd(v128_t a, v128_t b) {
  const v128_t sum = wasm_f64x2_add(a, b);
  const v128_t part = wasm_f64x2_sub(sum, a);
  const v128_t error = wasm_f64x2_add(wasm_f64x2_sub(a, wasm_f64x2_sub(sum, part)), wasm_f64x2_sub(b, part));
  const v128_t none = wasm_f64x2_splat(0.0);
  const v128_t inexact = wasm_v128_or(wasm_f64x2_lt(error, none), wasm_f64x2_gt(error, none));  // false for NaN
  // Towards zero first: one unit less where the error points there; then the sticky bit.
  const v128_t inward = wasm_v128_and(inexact, wasm_i64x2_shr(wasm_v128_xor(sum, error), 63));
  return wasm_v128_or(wasm_i64x2_add(sum, inward), wasm_u64x2_shr(inexact, 63));
}
static inline v128_t is_middle(v128_t x) {
  return wasm_i64x2_eq(wasm_v128_and(x, wasm_i64x2_splat(0x1fffffff)), wasm_i64x2_splat(0x10000000));
}
static inline v128_t multiply_add(v128_t x, v128_t y, v128_t z) {
  const Wide a = widen_floats(x), b = widen_floats(y), c = widen_floats(z);
  const Wide product = {wasm_f64x2_mul(a.low, b.low), wasm_f64x2_mul(a.high, b.high)};
  const Wide sum = {wasm_f64x2_add(product.low, c.low), wasm_f64x2_add(product.high, c.high)};
  const v128_t rounded = narrow(sum);
  // Up to 2^-126, zero included: a tiny sum may have become zero.
  const v128_t small = wasm_u32x4_le(wasm_i32x4_shl(rounded, 1), wasm_i32x4_splat(0x01000000));
  if (__builtin_expect(wasm_v128_any_true(wasm_v128_or(small, wasm_v128_or(is_middle(sum.low), is_middle(sum.high)))), 0))
    return narrow({sum_to_odd(product.low, c.low), sum_to_odd(product.high, c.high)});
  return rounded;
}
static inline Floats fma(Floats x, Floats y, Floats z) {
  return each<Floats>([&](int i) { return multiply_add(x.v[i], y.v[i], z.v[i]); });
}
static inline Floats fnma(Floats x, Floats y, Floats z) {
  return each<Floats>([&](int i) { return multiply_add(wasm_f32x4_neg(x.v[i]), y.v[i], z.v[i]); });
}

static inline Floats round_even(Floats x) { return each<Floats>([&](int i) { return wasm_f32x4_nearest(x.v[i]); }); }
// The first n lanes of x, the others from y.
static inline Floats first(int n, Floats x, Floats y) {
  const v128_t lane = wasm_i32x4_const(0, 1, 2, 3);
  return each<Floats>([&](int i) {
    return wasm_v128_bitselect(x.v[i], y.v[i], wasm_i32x4_lt(lane, wasm_i32x4_splat(n - 4 * i)));
  });
}
static inline Floats to_floats(Ints x) { return each<Floats>([&](int i) { return wasm_f32x4_convert_i32x4(x.v[i]); }); }
static inline v128_t nearest_ints(v128_t x) { return wasm_i32x4_trunc_sat_f32x4(wasm_f32x4_nearest(x)); }
static inline Ints to_ints(Floats x) { return each<Ints>([&](int i) { return nearest_ints(x.v[i]); }); }
// x * 2^n for integral n in [-126, 127].
static inline Floats scale_by_power(Floats x, Floats n) {
  return each<Floats>([&](int i) {
    const v128_t exponent = wasm_i32x4_add(nearest_ints(n.v[i]), wasm_i32x4_splat(127));
    return wasm_f32x4_mul(x.v[i], wasm_i32x4_shl(exponent, 23));
  });
}
static inline void store_int8(int8_t* p, Ints x) {
  const v128_t low = wasm_i16x8_narrow_i32x4(x.v[0], x.v[1]), high = wasm_i16x8_narrow_i32x4(x.v[2], x.v[3]);
  wasm_v128_store(p, wasm_i8x16_narrow_i16x8(low, high));
}

static inline Ints set1_ints(int32_t x) { return each<Ints>([=](int) { return wasm_i32x4_splat(x); }); }
static inline Ints zero_ints() { return set1_ints(0); }
static inline Ints add(Ints x, Ints y) { return each<Ints>([&](int i) { return wasm_i32x4_add(x.v[i], y.v[i]); }); }
static inline Ints shift_left(Ints x, int n) {
  return each<Ints>([&](int i) { return wasm_i32x4_shl(x.v[i], static_cast<uint32_t>(n)); });
}
static inline Ints load_ints(const int32_t* p) { return each<Ints>([=](int i) { return wasm_v128_load(p + 4 * i); }); }
static inline Ints mul(Ints x, Ints y) { return each<Ints>([&](int i) { return wasm_i32x4_mul(x.v[i], y.v[i]); }); }
static inline Ints clamp(Ints x, int32_t low, int32_t high) {
  return each<Ints>([&](int i) { return wasm_i32x4_min(wasm_i32x4_max(x.v[i], wasm_i32x4_splat(low)), wasm_i32x4_splat(high)); });
}
// (x * multiplier + 2^(shift - 1)) / 2^shift, rounded down, by 64 bits; shift 1..62. What comes out fits 32 bits.
static inline Ints rescale(Ints x, Ints multiplier, int shift) {
  const v128_t start = wasm_i64x2_splat(int64_t{1} << (shift - 1));
  auto part = [&](v128_t product) { return wasm_i64x2_shr(wasm_i64x2_add(product, start), static_cast<uint32_t>(shift)); };
  return each<Ints>([&](int i) {
    const v128_t low = part(wasm_i64x2_extmul_low_i32x4(x.v[i], multiplier.v[i]));
    const v128_t high = part(wasm_i64x2_extmul_high_i32x4(x.v[i], multiplier.v[i]));
    return wasm_i32x4_shuffle(low, high, 0, 2, 4, 6);
  });
}

static inline Codes load_codes(const uint8_t* p) { return each<Codes>([=](int i) { return wasm_v128_load(p + 16 * i); }); }
static inline void store_codes(uint8_t* p, Codes x) {
  for (int i = 0; i < 4; ++i) wasm_v128_store(p + 16 * i, x.v[i]);
}
static inline Codes set1_codes(uint8_t x) { return each<Codes>([=](int) { return wasm_u8x16_splat(x); }); }
static inline Codes both(Codes x, Codes y) { return each<Codes>([&](int i) { return wasm_v128_and(x.v[i], y.v[i]); }); }
static inline Codes either(Codes x, Codes y) { return each<Codes>([&](int i) { return wasm_v128_or(x.v[i], y.v[i]); }); }
static inline Codes sub(Codes x, Codes y) { return each<Codes>([&](int i) { return wasm_i8x16_sub(x.v[i], y.v[i]); }); }
// Shifts of 16-bit words: mask afterwards (right) or before (left).
static inline Codes shift_right(Codes x, int n) {
  return each<Codes>([&](int i) { return wasm_u16x8_shr(x.v[i], static_cast<uint32_t>(n)); });
}
static inline Codes shift_left(Codes x, int n) {
  return each<Codes>([&](int i) { return wasm_i16x8_shl(x.v[i], static_cast<uint32_t>(n)); });
}
static inline Codes table(const uint8_t* p) { return each<Codes>([=](int) { return wasm_v128_load(p); }); }
static inline Codes look_up(Codes t, Codes index) {
  return each<Codes>([&](int i) { return wasm_i8x16_swizzle(t.v[i], index.v[i]); });
}
// Byte j of the four that each lane holds.
static inline Floats byte_of(Codes x, int j) {
  return each<Floats>([&](int i) {
    const v128_t shifted = wasm_u32x4_shr(x.v[i], static_cast<uint32_t>(8 * j));
    return wasm_f32x4_convert_i32x4(wasm_v128_and(shifted, wasm_i32x4_splat(255)));
  });
}

// sum + codes . x over four inputs: bytes 0 and 2 of a lane as 16-bit words, then bytes 1 and 3.
static inline Ints dot4(Ints sum, Codes codes, const int8_t* x) {
  const v128_t four = wasm_v128_load32_splat(x);
  const v128_t even = wasm_i16x8_shr(wasm_i16x8_shl(four, 8), 8), odd = wasm_i16x8_shr(four, 8);
  return each<Ints>([&](int i) {
    const v128_t low = wasm_v128_and(codes.v[i], wasm_i16x8_splat(255)), high = wasm_u16x8_shr(codes.v[i], 8);
    const v128_t dot = wasm_i32x4_add(wasm_i32x4_dot_i16x8(low, even), wasm_i32x4_dot_i16x8(high, odd));
    return wasm_i32x4_add(sum.v[i], dot);
  });
}
// sum + (codes - 128) . x over four inputs: start_full gives the sum to begin with.
static inline Ints dot4_full(Ints sum, Codes codes, const int8_t* x) { return dot4(sum, codes, x); }
static inline Ints start_full(int32_t negated_sum_of_x) { return set1_ints(128 * negated_sum_of_x); }

// Inputs that each lane selects for itself, codes signed: `selectable` holds sixteen inputs (-127..127) for look_up, start_selected
// of all weights that follow gives the sum to begin with.
static inline Codes selectable(const int8_t* x) { return table(reinterpret_cast<const uint8_t*>(x)); }
static inline Ints start_selected(const Codes*, int) { return zero_ints(); }
static inline v128_t even_bytes(v128_t x) { return wasm_i16x8_shr(wasm_i16x8_shl(x, 8), 8); }
static inline v128_t odd_bytes(v128_t x) { return wasm_i16x8_shr(x, 8); }
static inline Ints dot4_selected(Ints sum, Codes weights, Codes x) {
  return each<Ints>([&](int i) {
    const v128_t w = weights.v[i], v = x.v[i];
    const v128_t dot = wasm_i32x4_add(wasm_i32x4_dot_i16x8(even_bytes(w), even_bytes(v)), wasm_i32x4_dot_i16x8(odd_bytes(w), odd_bytes(v)));
    return wasm_i32x4_add(sum.v[i], dot);
  });
}
// sum + weights . x over four inputs, weights signed bytes and x unsigned: start_unsigned of each lane's sum of weights gives the
// sum to begin with. The narrow one is for weights of at most 63.
static inline Ints start_unsigned(Ints) { return zero_ints(); }
static inline Ints dot4_unsigned(Ints sum, Codes weights, const uint8_t* x) {
  const v128_t four = wasm_v128_load32_splat(x);
  const v128_t even = wasm_v128_and(four, wasm_i16x8_splat(255)), odd = wasm_u16x8_shr(four, 8);
  return each<Ints>([&](int i) {
    const v128_t w = weights.v[i];
    const v128_t dot = wasm_i32x4_add(wasm_i32x4_dot_i16x8(even_bytes(w), even), wasm_i32x4_dot_i16x8(odd_bytes(w), odd));
    return wasm_i32x4_add(sum.v[i], dot);
  });
}
static inline Ints dot4_unsigned_narrow(Ints sum, Codes weights, const uint8_t* x) { return dot4_unsigned(sum, weights, x); }

// sum + odd bfloat16 x x[1], then + even bfloat16 x x[0], each rounded once.
static inline Floats dot2(Floats sum, Codes pairs, const uint16_t* x) {
  const v128_t high = wasm_i32x4_splat(static_cast<int32_t>(0xffff0000));
  const v128_t odd_x = wasm_i32x4_splat(static_cast<int32_t>(static_cast<uint32_t>(x[1]) << 16));
  const v128_t even_x = wasm_i32x4_splat(static_cast<int32_t>(static_cast<uint32_t>(x[0]) << 16));
  return each<Floats>([&](int i) {
    const v128_t first = multiply_add(wasm_v128_and(pairs.v[i], high), odd_x, sum.v[i]);
    return multiply_add(wasm_i32x4_shl(pairs.v[i], 16), even_x, first);
  });
}

// Bit i: lane i of a is above that of b.
static inline uint32_t above(Floats x, Floats y) {
  uint32_t mask = 0;
  for (int i = 0; i < 4; ++i) mask |= static_cast<uint32_t>(wasm_i32x4_bitmask(wasm_f32x4_gt(x.v[i], y.v[i]))) << 4 * i;
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
  return add(sum, Ints{{wasm_i32x4_make(total, 0, 0, 0), wasm_i32x4_splat(0), wasm_i32x4_splat(0), wasm_i32x4_splat(0)}});
}
// Four columns side by side: byte j of lane 4 q + i of out[k] is byte 16 q + 4 k + i of columns[j].
static inline void interleave(const Codes* columns, Codes* out) {
  auto low8 = [](v128_t a, v128_t b) { return wasm_i8x16_shuffle(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23); };
  auto high8 = [](v128_t a, v128_t b) { return wasm_i8x16_shuffle(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31); };
  for (int q = 0; q < 4; ++q) {
    const v128_t low01 = low8(columns[0].v[q], columns[1].v[q]), low23 = low8(columns[2].v[q], columns[3].v[q]);
    const v128_t high01 = high8(columns[0].v[q], columns[1].v[q]), high23 = high8(columns[2].v[q], columns[3].v[q]);
    out[0].v[q] = wasm_i16x8_shuffle(low01, low23, 0, 8, 1, 9, 2, 10, 3, 11);
    out[1].v[q] = wasm_i16x8_shuffle(low01, low23, 4, 12, 5, 13, 6, 14, 7, 15);
    out[2].v[q] = wasm_i16x8_shuffle(high01, high23, 0, 8, 1, 9, 2, 10, 3, 11);
    out[3].v[q] = wasm_i16x8_shuffle(high01, high23, 4, 12, 5, 13, 6, 14, 7, 15);
  }
}

static inline v128_t second(v128_t x) { return wasm_i32x4_shuffle(x, x, 1, 1, 1, 1); }
// Sum of lanes, halves folded onto each other: 8, 4, 2, 1.
static inline float reduce_add(Floats x) {
  const v128_t four = wasm_f32x4_add(wasm_f32x4_add(x.v[0], x.v[2]), wasm_f32x4_add(x.v[1], x.v[3]));
  const v128_t two = wasm_f32x4_add(four, upper_half(four));
  return wasm_f32x4_extract_lane(wasm_f32x4_add(two, second(two)), 0);
}
static inline float reduce_max(Floats x) {
  const v128_t four = wasm_f32x4_pmax(wasm_f32x4_pmax(x.v[0], x.v[2]), wasm_f32x4_pmax(x.v[1], x.v[3]));
  const v128_t two = wasm_f32x4_pmax(four, upper_half(four));
  return wasm_f32x4_extract_lane(wasm_f32x4_pmax(two, second(two)), 0);
}
static inline int32_t reduce_add(Ints x) {
  const v128_t four = wasm_i32x4_add(wasm_i32x4_add(x.v[0], x.v[2]), wasm_i32x4_add(x.v[1], x.v[3]));
  const v128_t two = wasm_i32x4_add(four, upper_half(four));
  return wasm_i32x4_extract_lane(wasm_i32x4_add(two, second(two)), 0);
}
static inline void prefetch(const void*) {}

}  // namespace edgewise::wasm
