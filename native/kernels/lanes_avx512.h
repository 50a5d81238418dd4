// Sixteen lanes on AVX-512: one register of each kind. See lanes.md for the contract that all lane headers meet.
//
// Included by two tiers, which set EDGEWISE_AVX512 to their namespace: avx512_bf16 has products of bfloat16.
#pragma once
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace edgewise::EDGEWISE_AVX512 {

constexpr int kTile = 16;  // tokens whose accumulators fit in registers

struct Floats { __m512 v; };
struct Ints { __m512i v; };
struct Codes { __m512i v; };  // 64 unsigned bytes: four per lane

static inline Floats zero() { return {_mm512_setzero_ps()}; }
static inline Floats set1(float x) { return {_mm512_set1_ps(x)}; }
static inline Floats load(const float* p) { return {_mm512_loadu_ps(p)}; }
static inline void store(float* p, Floats a) { _mm512_storeu_ps(p, a.v); }
static inline Floats load_half(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
static inline void store_half(uint16_t* p, Floats a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
static inline Floats load_bfloat(const uint16_t* p) {
  __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
// To the nearest bfloat16, ties to even; below 2^-56 to zero.
static inline void store_bfloat(uint16_t* p, Floats a) {
  const __mmask16 large = _mm512_cmp_ps_mask(_mm512_abs_ps(a.v), _mm512_set1_ps(0x1p-56f), _CMP_NLT_UQ);
#if defined(__AVX512BF16__)
  const __m256i half = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a.v));
#else
  const __m512i bits = _mm512_castps_si512(a.v), high = _mm512_srli_epi32(bits, 16);
  const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __m256i half = _mm512_cvtepi32_epi16(_mm512_mask_or_epi32(rounded, nan, high, _mm512_set1_epi32(0x40)));
#endif
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_maskz_mov_epi16(large, half));
}
// Powers of two from the exponent bytes of E8M0, halved: 2^(e - 128).
static inline Floats load_half_exponent(const uint8_t* p) {
  __m512i e = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  __m512i normal = _mm512_slli_epi32(_mm512_sub_epi32(e, _mm512_set1_epi32(1)), 23);
  __m512i subnormal = _mm512_sllv_epi32(_mm512_set1_epi32(0x00200000), e);
  __mmask16 small = _mm512_cmplt_epi32_mask(e, _mm512_set1_epi32(2));
  return {_mm512_castsi512_ps(_mm512_mask_blend_epi32(small, normal, subnormal))};
}
static inline Floats load_int8(const int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
static inline Floats load_uint8(const uint8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}

static inline Floats add(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
static inline Floats sub(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
static inline Floats mul(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
static inline Floats div(Floats a, Floats b) { return {_mm512_div_ps(a.v, b.v)}; }
static inline Floats max(Floats a, Floats b) { return {_mm512_max_ps(a.v, b.v)}; }
static inline Floats min(Floats a, Floats b) { return {_mm512_min_ps(a.v, b.v)}; }
static inline Floats abs(Floats a) { return {_mm512_abs_ps(a.v)}; }
static inline Floats fma(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
static inline Floats fnma(Floats a, Floats b, Floats c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }
static inline Floats round_even(Floats a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// The first n lanes of a, the others from b.
static inline Floats first(int n, Floats a, Floats b) {
  return {_mm512_mask_blend_ps(static_cast<__mmask16>(n >= 16 ? 0xFFFF : (1u << n) - 1u), b.v, a.v)};
}
static inline Floats to_floats(Ints a) { return {_mm512_cvtepi32_ps(a.v)}; }
static inline Ints to_ints(Floats a) { return {_mm512_cvtps_epi32(a.v)}; }
// a * 2^n for integral n in [-126, 127].
static inline Floats scale_by_power(Floats a, Floats n) { return {_mm512_scalef_ps(a.v, n.v)}; }
static inline void store_int8(int8_t* p, Ints a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v));
}

static inline Ints zero_ints() { return {_mm512_setzero_si512()}; }
static inline Ints add(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
static inline Ints set1_ints(int32_t x) { return {_mm512_set1_epi32(x)}; }
static inline Ints shift_left(Ints a, int n) { return {_mm512_slli_epi32(a.v, static_cast<unsigned>(n))}; }
static inline Ints load_ints(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
static inline Ints mul(Ints a, Ints b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
static inline Ints clamp(Ints a, int32_t low, int32_t high) {
  return {_mm512_min_epi32(_mm512_max_epi32(a.v, _mm512_set1_epi32(low)), _mm512_set1_epi32(high))};
}
// (x * multiplier + 2^(shift - 1)) / 2^shift, rounded down, by 64 bits; shift 1..62. What comes out fits 32 bits.
static inline Ints rescale(Ints a, Ints multiplier, int shift) {
  const __m512i half = _mm512_set1_epi64(int64_t{1} << (shift - 1));
  auto part = [&](__m512i x, __m512i y) {
    return _mm512_srai_epi64(_mm512_add_epi64(_mm512_mul_epi32(x, y), half), static_cast<unsigned>(shift));
  };
  const __m512i even = part(a.v, multiplier.v);
  const __m512i odd = part(_mm512_srli_epi64(a.v, 32), _mm512_srli_epi64(multiplier.v, 32));
  return {_mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32))};
}

static inline Codes load_codes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
static inline void store_codes(uint8_t* p, Codes a) { _mm512_storeu_si512(p, a.v); }
static inline Codes set1_codes(uint8_t x) { return {_mm512_set1_epi8(static_cast<char>(x))}; }
static inline Codes both(Codes a, Codes b) { return {_mm512_and_si512(a.v, b.v)}; }
static inline Codes either(Codes a, Codes b) { return {_mm512_or_si512(a.v, b.v)}; }
static inline Codes sub(Codes a, Codes b) { return {_mm512_sub_epi8(a.v, b.v)}; }
// Shifts of 16-bit words: mask afterwards (right) or before (left).
static inline Codes shift_right(Codes a, int n) { return {_mm512_srli_epi16(a.v, static_cast<unsigned>(n))}; }
static inline Codes shift_left(Codes a, int n) { return {_mm512_slli_epi16(a.v, static_cast<unsigned>(n))}; }
static inline Codes table(const uint8_t* p) {
  return {_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
static inline Codes look_up(Codes t, Codes index) { return {_mm512_shuffle_epi8(t.v, index.v)}; }

// Byte j of the four that each lane holds.
static inline Floats byte_of(Codes a, int j) {
  return {_mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(a.v, static_cast<unsigned>(8 * j)), _mm512_set1_epi32(255)))};
}

static inline __m512i spread4(const int8_t* x) {
  int32_t four;
  __builtin_memcpy(&four, x, 4);
  return _mm512_set1_epi32(four);
}
// sum + codes . x over four inputs, codes at most 127.
static inline Ints dot4(Ints sum, Codes codes, const int8_t* x) { return {_mm512_dpbusd_epi32(sum.v, codes.v, spread4(x))}; }
// sum + (codes - 128) . x over four inputs: start_full gives the sum to begin with.
static inline Ints dot4_full(Ints sum, Codes codes, const int8_t* x) { return dot4(sum, codes, x); }
static inline Ints start_full(int32_t negated_sum_of_x) { return shift_left(set1_ints(negated_sum_of_x), 7); }

// Inputs that each lane selects for itself, codes signed: `selectable` holds sixteen inputs (-127..127) for look_up, start_selected
// of all weights that follow gives the sum to begin with.
static inline Codes selectable(const int8_t* x) {
  return {_mm512_xor_si512(table(reinterpret_cast<const uint8_t*>(x)).v, _mm512_set1_epi8(static_cast<char>(0x80)))};
}
static inline Ints start_selected(const Codes* weights, int n) {
  __m512i sum = _mm512_setzero_si512();
  for (int i = 0; i < n; ++i) sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(static_cast<char>(0x80)), weights[i].v);
  return {_mm512_sub_epi32(_mm512_setzero_si512(), sum)};
}
static inline Ints dot4_selected(Ints sum, Codes weights, Codes x) { return {_mm512_dpbusd_epi32(sum.v, x.v, weights.v)}; }
// sum + weights . x over four inputs, weights signed bytes and x unsigned: start_unsigned of each lane's sum of weights gives the
// sum to begin with. The narrow one is for weights of at most 63.
static inline Ints start_unsigned(Ints) { return zero_ints(); }
static inline Ints dot4_unsigned(Ints sum, Codes weights, const uint8_t* x) {
  return {_mm512_dpbusd_epi32(sum.v, spread4(reinterpret_cast<const int8_t*>(x)), weights.v)};
}
static inline Ints dot4_unsigned_narrow(Ints sum, Codes weights, const uint8_t* x) { return dot4_unsigned(sum, weights, x); }

// sum + odd bfloat16 x x[1], then + even bfloat16 x x[0], each rounded once: what VDPBF16PS does. It takes subnormal
// numbers for zero, but no sum of products of numbers that are multiples of 2^-63 is one.
static inline Floats dot2(Floats sum, Codes pairs, const uint16_t* x) {
  int32_t two;
  __builtin_memcpy(&two, x, 4);
#if defined(__AVX512BF16__)
  return {_mm512_dpbf16_ps(sum.v, reinterpret_cast<__m512bh>(pairs.v), reinterpret_cast<__m512bh>(_mm512_set1_epi32(two)))};
#else
  const __m512i high = _mm512_set1_epi32(static_cast<int32_t>(0xffff0000)), both = _mm512_set1_epi32(two);
  auto odd = [&](__m512i v) { return _mm512_castsi512_ps(_mm512_and_si512(v, high)); };
  auto even = [](__m512i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(v, 16)); };
  return {_mm512_fmadd_ps(even(pairs.v), even(both), _mm512_fmadd_ps(odd(pairs.v), odd(both), sum.v))};
#endif
}

// Bit i: lane i of a is above that of b.
static inline uint32_t above(Floats a, Floats b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ); }
// Of sixteen offsets and codes those whose bit is set, one after the other; sixteen of each are written, the rest are anything.
// Their codes are added to sum, lane by lane in any order.
static inline Ints keep(uint32_t mask, const uint32_t* offset, const int8_t* q, uint32_t* offset_out, int8_t* q_out, Ints sum) {
  const __mmask16 kept = static_cast<__mmask16>(mask);
  const __m512i codes = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q)));
  _mm512_storeu_si512(offset_out, _mm512_maskz_compress_epi32(kept, _mm512_loadu_si512(offset)));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(q_out), _mm512_cvtepi32_epi8(_mm512_maskz_compress_epi32(kept, codes)));
  return {_mm512_mask_add_epi32(sum.v, kept, sum.v, codes)};
}
// Four columns side by side: byte j of lane 4 q + i of out[k] is byte 16 q + 4 k + i of columns[j].
static inline void interleave(const Codes* columns, Codes* out) {
  const __m512i low01 = _mm512_unpacklo_epi8(columns[0].v, columns[1].v), low23 = _mm512_unpacklo_epi8(columns[2].v, columns[3].v);
  const __m512i high01 = _mm512_unpackhi_epi8(columns[0].v, columns[1].v), high23 = _mm512_unpackhi_epi8(columns[2].v, columns[3].v);
  out[0].v = _mm512_unpacklo_epi16(low01, low23);
  out[1].v = _mm512_unpackhi_epi16(low01, low23);
  out[2].v = _mm512_unpacklo_epi16(high01, high23);
  out[3].v = _mm512_unpackhi_epi16(high01, high23);
}

static inline float lowest_sum(__m128 a) {
  a = _mm_add_ps(a, _mm_movehl_ps(a, a));
  return _mm_cvtss_f32(_mm_add_ss(a, _mm_shuffle_ps(a, a, 1)));
}
// Sum of lanes, halves folded onto each other: 8, 4, 2, 1.
static inline float reduce_add(Floats a) {
  __m256 half = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  return lowest_sum(_mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}
static inline float reduce_max(Floats a) { return _mm512_reduce_max_ps(a.v); }
static inline int32_t reduce_add(Ints a) { return _mm512_reduce_add_epi32(a.v); }
static inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

}  // namespace edgewise::EDGEWISE_AVX512
