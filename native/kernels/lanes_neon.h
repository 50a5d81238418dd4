// Sixteen lanes on AArch64: four registers of each kind. See lanes.md for the contract that all lane headers meet.
//
// Included by three tiers, which set EDGEWISE_NEON to their namespace and differ in the integer dot product: plain NEON
// widens and adds pairs, neon_dot has SDOT, neon_i8mm has USDOT, which takes codes unsigned as they are.
#pragma once
#include <arm_neon.h>

#include <cstddef>
#include <cstdint>

namespace edgewise::EDGEWISE_NEON {

constexpr int kTile = 4;  // tokens whose accumulators fit in registers

struct Floats { float32x4_t v[4]; };
struct Ints { int32x4_t v[4]; };
struct Codes { uint8x16_t v[4]; };  // 64 unsigned bytes: four per lane

// value(i) for the four registers of a kind.
template <class Out, class Value>
static inline Out each(Value value) {
  return {{value(0), value(1), value(2), value(3)}};
}

static inline Floats zero() { return each<Floats>([](int) { return vdupq_n_f32(0.0f); }); }
static inline Floats set1(float x) { return each<Floats>([=](int) { return vdupq_n_f32(x); }); }
static inline Floats load(const float* p) { return each<Floats>([=](int i) { return vld1q_f32(p + 4 * i); }); }
static inline void store(float* p, Floats x) {
  for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, x.v[i]);
}
static inline Floats load_half(const uint16_t* p) {
  return each<Floats>([=](int i) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i))); });
}
static inline void store_half(uint16_t* p, Floats x) {
  for (int i = 0; i < 4; ++i) vst1_u16(p + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(x.v[i])));
}
static inline Floats load_bfloat(const uint16_t* p) {
  return each<Floats>([=](int i) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16)); });
}
// To the nearest bfloat16, ties to even; below 2^-56 to zero.
static inline void store_bfloat(uint16_t* p, Floats x) {
  for (int i = 0; i < 4; ++i) {
    const uint32x4_t bits = vreinterpretq_u32_f32(x.v[i]), high = vshrq_n_u32(bits, 16);
    const uint32x4_t odd = vandq_u32(high, vdupq_n_u32(1));
    const uint32x4_t rounded = vshrq_n_u32(vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff))), 16);
    const uint32x4_t half = vbslq_u32(vceqq_f32(x.v[i], x.v[i]), rounded, vorrq_u32(high, vdupq_n_u32(0x40)));
    const uint32x4_t small = vcltq_f32(vabsq_f32(x.v[i]), vdupq_n_f32(0x1p-56f));
    vst1_u16(p + 4 * i, vmovn_u32(vbicq_u32(half, small)));
  }
}
static inline uint32x4_t widen(uint8x16_t x, int i) {
  const uint16x8_t half = i < 2 ? vmovl_u8(vget_low_u8(x)) : vmovl_high_u8(x);
  return i % 2 == 0 ? vmovl_u16(vget_low_u16(half)) : vmovl_high_u16(half);
}
static inline int32x4_t widen(int8x16_t x, int i) {
  const int16x8_t half = i < 2 ? vmovl_s8(vget_low_s8(x)) : vmovl_high_s8(x);
  return i % 2 == 0 ? vmovl_s16(vget_low_s16(half)) : vmovl_high_s16(half);
}
// Powers of two from the exponent bytes of E8M0, halved: 2^(e - 128).
static inline Floats load_half_exponent(const uint8_t* p) {
  const uint8x16_t bytes = vld1q_u8(p);
  return each<Floats>([=](int i) {
    const uint32x4_t e = widen(bytes, i);
    const uint32x4_t normal = vshlq_n_u32(vsubq_u32(e, vdupq_n_u32(1)), 23);
    const uint32x4_t subnormal = vshlq_u32(vdupq_n_u32(0x00200000), vreinterpretq_s32_u32(e));
    return vreinterpretq_f32_u32(vbslq_u32(vcltq_u32(e, vdupq_n_u32(2)), subnormal, normal));
  });
}
static inline Floats load_int8(const int8_t* p) {
  const int8x16_t bytes = vld1q_s8(p);
  return each<Floats>([=](int i) { return vcvtq_f32_s32(widen(bytes, i)); });
}
static inline Floats load_uint8(const uint8_t* p) {
  const uint8x16_t bytes = vld1q_u8(p);
  return each<Floats>([=](int i) { return vcvtq_f32_u32(widen(bytes, i)); });
}

static inline Floats add(Floats x, Floats y) { return each<Floats>([&](int i) { return vaddq_f32(x.v[i], y.v[i]); }); }
static inline Floats sub(Floats x, Floats y) { return each<Floats>([&](int i) { return vsubq_f32(x.v[i], y.v[i]); }); }
static inline Floats mul(Floats x, Floats y) { return each<Floats>([&](int i) { return vmulq_f32(x.v[i], y.v[i]); }); }
static inline Floats div(Floats x, Floats y) { return each<Floats>([&](int i) { return vdivq_f32(x.v[i], y.v[i]); }); }
// x > y ? x : y, not FMAX: equal values and NaN give y, as on the other tiers.
static inline float32x4_t higher(float32x4_t x, float32x4_t y) { return vbslq_f32(vcgtq_f32(x, y), x, y); }
static inline float32x4_t lower(float32x4_t x, float32x4_t y) { return vbslq_f32(vcltq_f32(x, y), x, y); }
static inline Floats max(Floats x, Floats y) { return each<Floats>([&](int i) { return higher(x.v[i], y.v[i]); }); }
static inline Floats min(Floats x, Floats y) { return each<Floats>([&](int i) { return lower(x.v[i], y.v[i]); }); }
static inline Floats abs(Floats x) { return each<Floats>([&](int i) { return vabsq_f32(x.v[i]); }); }
static inline Floats fma(Floats x, Floats y, Floats z) {
  return each<Floats>([&](int i) { return vfmaq_f32(z.v[i], x.v[i], y.v[i]); });
}
static inline Floats fnma(Floats x, Floats y, Floats z) {
  return each<Floats>([&](int i) { return vfmsq_f32(z.v[i], x.v[i], y.v[i]); });
}
static inline Floats round_even(Floats x) { return each<Floats>([&](int i) { return vrndnq_f32(x.v[i]); }); }
// The first n lanes of x, the others from y.
static inline Floats first(int n, Floats x, Floats y) {
  alignas(16) static constexpr int32_t kLane[4] = {0, 1, 2, 3};
  const int32x4_t lane = vld1q_s32(kLane);
  return each<Floats>([&](int i) { return vbslq_f32(vcltq_s32(lane, vdupq_n_s32(n - 4 * i)), x.v[i], y.v[i]); });
}
static inline Floats to_floats(Ints x) { return each<Floats>([&](int i) { return vcvtq_f32_s32(x.v[i]); }); }
static inline Ints to_ints(Floats x) { return each<Ints>([&](int i) { return vcvtnq_s32_f32(x.v[i]); }); }
// x * 2^n for integral n in [-126, 127].
static inline Floats scale_by_power(Floats x, Floats n) {
  return each<Floats>([&](int i) {
    const int32x4_t exponent = vaddq_s32(vcvtnq_s32_f32(n.v[i]), vdupq_n_s32(127));
    return vmulq_f32(x.v[i], vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23)));
  });
}
static inline void store_int8(int8_t* p, Ints x) {
  const int16x8_t low = vcombine_s16(vmovn_s32(x.v[0]), vmovn_s32(x.v[1]));
  const int16x8_t high = vcombine_s16(vmovn_s32(x.v[2]), vmovn_s32(x.v[3]));
  vst1q_s8(p, vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
}

static inline Ints set1_ints(int32_t x) { return each<Ints>([=](int) { return vdupq_n_s32(x); }); }
static inline Ints zero_ints() { return set1_ints(0); }
static inline Ints add(Ints x, Ints y) { return each<Ints>([&](int i) { return vaddq_s32(x.v[i], y.v[i]); }); }
static inline Ints shift_left(Ints x, int n) {
  return each<Ints>([&](int i) { return vshlq_s32(x.v[i], vdupq_n_s32(n)); });
}
static inline Ints load_ints(const int32_t* p) { return each<Ints>([=](int i) { return vld1q_s32(p + 4 * i); }); }
static inline Ints mul(Ints x, Ints y) { return each<Ints>([&](int i) { return vmulq_s32(x.v[i], y.v[i]); }); }
static inline Ints clamp(Ints x, int32_t low, int32_t high) {
  return each<Ints>([&](int i) { return vminq_s32(vmaxq_s32(x.v[i], vdupq_n_s32(low)), vdupq_n_s32(high)); });
}
// (x * multiplier + 2^(shift - 1)) / 2^shift, rounded down, by 64 bits; shift 1..62. What comes out fits 32 bits.
static inline Ints rescale(Ints x, Ints multiplier, int shift) {
  const int64x2_t by = vdupq_n_s64(-shift);  // vrshl rounds as it shifts
  return each<Ints>([&](int i) {
    const int64x2_t low = vmull_s32(vget_low_s32(x.v[i]), vget_low_s32(multiplier.v[i]));
    const int64x2_t high = vmull_high_s32(x.v[i], multiplier.v[i]);
    return vcombine_s32(vmovn_s64(vrshlq_s64(low, by)), vmovn_s64(vrshlq_s64(high, by)));
  });
}

static inline Codes load_codes(const uint8_t* p) { return each<Codes>([=](int i) { return vld1q_u8(p + 16 * i); }); }
static inline void store_codes(uint8_t* p, Codes x) {
  for (int i = 0; i < 4; ++i) vst1q_u8(p + 16 * i, x.v[i]);
}
static inline Codes set1_codes(uint8_t x) { return each<Codes>([=](int) { return vdupq_n_u8(x); }); }
static inline Codes both(Codes x, Codes y) { return each<Codes>([&](int i) { return vandq_u8(x.v[i], y.v[i]); }); }
static inline Codes either(Codes x, Codes y) { return each<Codes>([&](int i) { return vorrq_u8(x.v[i], y.v[i]); }); }
static inline Codes sub(Codes x, Codes y) { return each<Codes>([&](int i) { return vsubq_u8(x.v[i], y.v[i]); }); }
static inline Codes shift_right(Codes x, int n) {
  return each<Codes>([&](int i) { return vshlq_u8(x.v[i], vdupq_n_s8(static_cast<int8_t>(-n))); });
}
static inline Codes shift_left(Codes x, int n) {
  return each<Codes>([&](int i) { return vshlq_u8(x.v[i], vdupq_n_s8(static_cast<int8_t>(n))); });
}
static inline Codes table(const uint8_t* p) { return each<Codes>([=](int) { return vld1q_u8(p); }); }
static inline Codes look_up(Codes t, Codes index) {
  return each<Codes>([&](int i) { return vqtbl1q_u8(t.v[i], index.v[i]); });
}

// Byte j of the four that each lane holds.
static inline Floats byte_of(Codes x, int j) {
  return each<Floats>([&](int i) {
    const uint32x4_t shifted = vshlq_u32(vreinterpretq_u32_u8(x.v[i]), vdupq_n_s32(-8 * j));
    return vcvtq_f32_u32(vandq_u32(shifted, vdupq_n_u32(255)));
  });
}

static inline int8x16_t spread4(const int8_t* x) {
  int32_t four;
  __builtin_memcpy(&four, x, 4);
  return vreinterpretq_s8_s32(vdupq_n_s32(four));
}
static inline int32x4_t dot_signed(int32x4_t sum, int8x16_t codes, int8x16_t four) {
#if defined(__ARM_FEATURE_DOTPROD)
  return vdotq_s32(sum, codes, four);
#else
  // Two products of at most 128 * 127 fit 16 bits.
  const int16x8_t low = vmull_s8(vget_low_s8(codes), vget_low_s8(four)), high = vmull_high_s8(codes, four);
  return vpadalq_s16(sum, vpaddq_s16(low, high));
#endif
}
// sum + codes . x over four inputs, codes at most 127.
static inline Ints dot4(Ints sum, Codes codes, const int8_t* x) {
  const int8x16_t four = spread4(x);
  return each<Ints>([&](int i) { return dot_signed(sum.v[i], vreinterpretq_s8_u8(codes.v[i]), four); });
}
// sum + (codes - 128) . x over four inputs: start_full gives the sum to begin with.
#if defined(__ARM_FEATURE_MATMUL_INT8)
static inline Ints dot4_full(Ints sum, Codes codes, const int8_t* x) {
  const int8x16_t four = spread4(x);
  return each<Ints>([&](int i) { return vusdotq_s32(sum.v[i], codes.v[i], four); });
}
static inline Ints start_full(int32_t negated_sum_of_x) { return set1_ints(128 * negated_sum_of_x); }
#else
static inline Ints dot4_full(Ints sum, Codes codes, const int8_t* x) {
  const int8x16_t four = spread4(x);
  return each<Ints>([&](int i) {
    return dot_signed(sum.v[i], vreinterpretq_s8_u8(veorq_u8(codes.v[i], vdupq_n_u8(0x80))), four);
  });
}
static inline Ints start_full(int32_t) { return zero_ints(); }
#endif

// Inputs that each lane selects for itself, codes signed: `selectable` holds sixteen inputs (-127..127) for look_up, start_selected
// of all weights that follow gives the sum to begin with.
static inline Codes selectable(const int8_t* x) { return table(reinterpret_cast<const uint8_t*>(x)); }
static inline Ints start_selected(const Codes*, int) { return zero_ints(); }
static inline Ints dot4_selected(Ints sum, Codes weights, Codes x) {
  return each<Ints>([&](int i) {
    return dot_signed(sum.v[i], vreinterpretq_s8_u8(weights.v[i]), vreinterpretq_s8_u8(x.v[i]));
  });
}
// sum + weights . x over four inputs, weights signed bytes and x unsigned: start_unsigned of each lane's sum of weights gives the
// sum to begin with. The narrow one is for weights of at most 63.
#if defined(__ARM_FEATURE_MATMUL_INT8)
static inline Ints start_unsigned(Ints) { return zero_ints(); }
static inline Ints dot4_unsigned(Ints sum, Codes weights, const uint8_t* x) {
  const uint8x16_t four = vreinterpretq_u8_s8(spread4(reinterpret_cast<const int8_t*>(x)));
  return each<Ints>([&](int i) { return vusdotq_s32(sum.v[i], four, vreinterpretq_s8_u8(weights.v[i])); });
}
#elif defined(__ARM_FEATURE_DOTPROD)
static inline Ints start_unsigned(Ints sum_of_weights) { return shift_left(sum_of_weights, 7); }
static inline Ints dot4_unsigned(Ints sum, Codes weights, const uint8_t* x) {
  const int8x16_t four = veorq_s8(spread4(reinterpret_cast<const int8_t*>(x)), vdupq_n_s8(-128));
  return each<Ints>([&](int i) { return vdotq_s32(sum.v[i], vreinterpretq_s8_u8(weights.v[i]), four); });
}
#else
static inline Ints start_unsigned(Ints) { return zero_ints(); }
// Pairs of products of up to 255 * 128 need more than 16 bits.
static inline Ints dot4_unsigned(Ints sum, Codes weights, const uint8_t* x) {
  const uint8x16_t four = vreinterpretq_u8_s8(spread4(reinterpret_cast<const int8_t*>(x)));
  const int16x8_t wide = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(four)));
  return each<Ints>([&](int i) {
    const int8x16_t w = vreinterpretq_s8_u8(weights.v[i]);
    const int16x8_t low = vmovl_s8(vget_low_s8(w)), high = vmovl_high_s8(w);
    auto products = [&](int16x8_t v) {  // of two lanes
      return vpaddq_s32(vmull_s16(vget_low_s16(v), vget_low_s16(wide)), vmull_high_s16(v, wide));
    };
    return vaddq_s32(sum.v[i], vpaddq_s32(products(low), products(high)));
  });
}
#endif
static inline Ints dot4_unsigned_narrow(Ints sum, Codes weights, const uint8_t* x) { return dot4_unsigned(sum, weights, x); }

// sum + odd bfloat16 x x[1], then + even bfloat16 x x[0], each rounded once. Not BFDOT, which rounds otherwise.
static inline Floats dot2(Floats sum, Codes pairs, const uint16_t* x) {
  const uint32x4_t high = vdupq_n_u32(0xffff0000);
  const float odd_x = vgetq_lane_f32(vreinterpretq_f32_u32(vdupq_n_u32(static_cast<uint32_t>(x[1]) << 16)), 0);
  const float even_x = vgetq_lane_f32(vreinterpretq_f32_u32(vdupq_n_u32(static_cast<uint32_t>(x[0]) << 16)), 0);
  return each<Floats>([&](int i) {
    const uint32x4_t v = vreinterpretq_u32_u8(pairs.v[i]);
    const float32x4_t first = vfmaq_n_f32(sum.v[i], vreinterpretq_f32_u32(vandq_u32(v, high)), odd_x);
    return vfmaq_n_f32(first, vreinterpretq_f32_u32(vshlq_n_u32(v, 16)), even_x);
  });
}

// Bit i: lane i of a is above that of b.
static inline uint32_t above(Floats x, Floats y) {
  const uint32x4_t bits = {1, 2, 4, 8};
  uint32_t mask = 0;
  for (int i = 0; i < 4; ++i) mask |= vaddvq_u32(vandq_u32(vcgtq_f32(x.v[i], y.v[i]), bits)) << 4 * i;
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
  return add(sum, Ints{{vsetq_lane_s32(total, vdupq_n_s32(0), 0), vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0)}});
}
// Four columns side by side: byte j of lane 4 q + i of out[k] is byte 16 q + 4 k + i of columns[j].
static inline void interleave(const Codes* columns, Codes* out) {
  for (int q = 0; q < 4; ++q) {
    const uint16x8_t low01 = vreinterpretq_u16_u8(vzip1q_u8(columns[0].v[q], columns[1].v[q]));
    const uint16x8_t low23 = vreinterpretq_u16_u8(vzip1q_u8(columns[2].v[q], columns[3].v[q]));
    const uint16x8_t high01 = vreinterpretq_u16_u8(vzip2q_u8(columns[0].v[q], columns[1].v[q]));
    const uint16x8_t high23 = vreinterpretq_u16_u8(vzip2q_u8(columns[2].v[q], columns[3].v[q]));
    out[0].v[q] = vreinterpretq_u8_u16(vzip1q_u16(low01, low23));
    out[1].v[q] = vreinterpretq_u8_u16(vzip2q_u16(low01, low23));
    out[2].v[q] = vreinterpretq_u8_u16(vzip1q_u16(high01, high23));
    out[3].v[q] = vreinterpretq_u8_u16(vzip2q_u16(high01, high23));
  }
}

// Sum of lanes, halves folded onto each other: 8, 4, 2, 1.
static inline float reduce_add(Floats x) {
  const float32x4_t four = vaddq_f32(vaddq_f32(x.v[0], x.v[2]), vaddq_f32(x.v[1], x.v[3]));
  const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
  return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}
static inline float reduce_max(Floats x) {
  const float32x4_t four = higher(higher(x.v[0], x.v[2]), higher(x.v[1], x.v[3]));
  return vmaxvq_f32(four);
}
static inline int32_t reduce_add(Ints x) {
  return vaddvq_s32(vaddq_s32(vaddq_s32(x.v[0], x.v[1]), vaddq_s32(x.v[2], x.v[3])));
}
static inline void prefetch(const void* p) { __builtin_prefetch(p); }

}  // namespace edgewise::EDGEWISE_NEON
