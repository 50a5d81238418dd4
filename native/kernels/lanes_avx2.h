// Sixteen lanes on AVX2: two registers of each kind. See lanes.md for the contract that all lane headers meet.
#pragma once
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace edgewise::avx2 {

constexpr int kTile = 4;  // tokens whose accumulators fit in registers

struct Floats { __m256 a, b; };
struct Ints { __m256i a, b; };
struct Codes { __m256i a, b; };  // 64 unsigned bytes: four per lane

static inline __m256i bytes32(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
static inline __m128i bytes16(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
static inline __m128i bytes8(const void* p) { return _mm_loadl_epi64(static_cast<const __m128i*>(p)); }

static inline Floats zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
static inline Floats set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
static inline Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
static inline void store(float* p, Floats x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
static inline Floats load_half(const uint16_t* p) { return {_mm256_cvtph_ps(bytes16(p)), _mm256_cvtph_ps(bytes16(p + 8))}; }
static inline void store_half(uint16_t* p, Floats x) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.a, mode));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(x.b, mode));
}
static inline __m256 bfloat8(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bytes16(p)), 16));
}
static inline Floats load_bfloat(const uint16_t* p) { return {bfloat8(p), bfloat8(p + 8)}; }
static inline __m128i to_bfloat8(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x), high = _mm256_srli_epi32(bits, 16);
  const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256 large = _mm256_cmp_ps(_mm256_andnot_ps(_mm256_set1_ps(-0.0f), x), _mm256_set1_ps(0x1p-56f), _CMP_NLT_UQ);
  const __m256i half = _mm256_and_si256(_mm256_blendv_epi8(rounded, quiet, nan), _mm256_castps_si256(large));
  return _mm_packus_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}
// To the nearest bfloat16, ties to even; below 2^-56 to zero.
static inline void store_bfloat(uint16_t* p, Floats x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_bfloat8(x.a));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), to_bfloat8(x.b));
}
static inline __m256 half_exponent8(const uint8_t* p) {
  __m256i e = _mm256_cvtepu8_epi32(bytes8(p));
  __m256i normal = _mm256_slli_epi32(_mm256_sub_epi32(e, _mm256_set1_epi32(1)), 23);
  __m256i subnormal = _mm256_sllv_epi32(_mm256_set1_epi32(0x00200000), e);
  return _mm256_castsi256_ps(_mm256_blendv_epi8(normal, subnormal, _mm256_cmpgt_epi32(_mm256_set1_epi32(2), e)));
}
// Powers of two from the exponent bytes of E8M0, halved: 2^(e - 128).
static inline Floats load_half_exponent(const uint8_t* p) { return {half_exponent8(p), half_exponent8(p + 8)}; }
static inline Floats load_int8(const int8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes8(p))), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes8(p + 8)))};
}
static inline Floats load_uint8(const uint8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes8(p))), _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes8(p + 8)))};
}

static inline Floats add(Floats x, Floats y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
static inline Floats sub(Floats x, Floats y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
static inline Floats mul(Floats x, Floats y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
static inline Floats div(Floats x, Floats y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
static inline Floats max(Floats x, Floats y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
static inline Floats min(Floats x, Floats y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
static inline Floats abs(Floats x) {
  __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
static inline Floats fma(Floats x, Floats y, Floats z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
static inline Floats fnma(Floats x, Floats y, Floats z) {
  return {_mm256_fnmadd_ps(x.a, y.a, z.a), _mm256_fnmadd_ps(x.b, y.b, z.b)};
}
static inline Floats round_even(Floats x) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.a, mode), _mm256_round_ps(x.b, mode)};
}
static inline __m256 first8(int n, __m256 x, __m256 y) {
  __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_blendv_ps(y, x, _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane)));
}
// The first n lanes of x, the others from y.
static inline Floats first(int n, Floats x, Floats y) { return {first8(n, x.a, y.a), first8(n - 8, x.b, y.b)}; }
static inline Floats to_floats(Ints x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
static inline Ints to_ints(Floats x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
static inline __m256 power8(__m256 n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
// x * 2^n for integral n in [-126, 127].
static inline Floats scale_by_power(Floats x, Floats n) {
  return {_mm256_mul_ps(x.a, power8(n.a)), _mm256_mul_ps(x.b, power8(n.b))};
}
static inline void store_int8(int8_t* p, Ints x) {
  // The 16-bit pack works within 128-bit halves: put the four quarters in order before the last pack.
  __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xD8);
  __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}

static inline Ints zero_ints() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
static inline Ints add(Ints x, Ints y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
static inline Ints set1_ints(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
static inline Ints shift_left(Ints x, int n) { return {_mm256_slli_epi32(x.a, n), _mm256_slli_epi32(x.b, n)}; }
static inline Ints load_ints(const int32_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 8))};
}
static inline Ints mul(Ints x, Ints y) { return {_mm256_mullo_epi32(x.a, y.a), _mm256_mullo_epi32(x.b, y.b)}; }
static inline Ints clamp(Ints x, int32_t low, int32_t high) {
  const __m256i l = _mm256_set1_epi32(low), h = _mm256_set1_epi32(high);
  return {_mm256_min_epi32(_mm256_max_epi32(x.a, l), h), _mm256_min_epi32(_mm256_max_epi32(x.b, l), h)};
}
// (x * multiplier + 2^(shift - 1)) / 2^shift, rounded down, by 64 bits; shift 1..62. What comes out fits 32 bits.
static inline __m256i rescale8(__m256i x, __m256i multiplier, int shift) {
  // An arithmetic shift of 64 bits: a logical one of what 2^63 was added to.
  const __m256i sign = _mm256_set1_epi64x(INT64_MIN), start = _mm256_set1_epi64x(int64_t{1} << (shift - 1));
  const __m256i back = _mm256_srli_epi64(sign, shift);
  auto part = [&](__m256i a, __m256i b) {
    const __m256i v = _mm256_xor_si256(_mm256_add_epi64(_mm256_mul_epi32(a, b), start), sign);
    return _mm256_sub_epi64(_mm256_srli_epi64(v, shift), back);
  };
  const __m256i even = part(x, multiplier), odd = part(_mm256_srli_epi64(x, 32), _mm256_srli_epi64(multiplier, 32));
  return _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
}
static inline Ints rescale(Ints x, Ints multiplier, int shift) {
  return {rescale8(x.a, multiplier.a, shift), rescale8(x.b, multiplier.b, shift)};
}

static inline Codes load_codes(const uint8_t* p) { return {bytes32(p), bytes32(p + 32)}; }
static inline void store_codes(uint8_t* p, Codes x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.a);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 32), x.b);
}
static inline Codes set1_codes(uint8_t x) {
  __m256i v = _mm256_set1_epi8(static_cast<char>(x));
  return {v, v};
}
static inline Codes both(Codes x, Codes y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
static inline Codes either(Codes x, Codes y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
static inline Codes sub(Codes x, Codes y) { return {_mm256_sub_epi8(x.a, y.a), _mm256_sub_epi8(x.b, y.b)}; }
// Shifts of 16-bit words: mask afterwards (right) or before (left).
static inline Codes shift_right(Codes x, int n) { return {_mm256_srli_epi16(x.a, n), _mm256_srli_epi16(x.b, n)}; }
static inline Codes shift_left(Codes x, int n) { return {_mm256_slli_epi16(x.a, n), _mm256_slli_epi16(x.b, n)}; }
static inline Codes table(const uint8_t* p) {
  __m256i v = _mm256_broadcastsi128_si256(bytes16(p));
  return {v, v};
}
static inline Codes look_up(Codes t, Codes index) {
  return {_mm256_shuffle_epi8(t.a, index.a), _mm256_shuffle_epi8(t.b, index.b)};
}

static inline __m256 byte8(__m256i codes, int j) {
  return _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(codes, 8 * j), _mm256_set1_epi32(255)));
}
// Byte j of the four that each lane holds.
static inline Floats byte_of(Codes x, int j) { return {byte8(x.a, j), byte8(x.b, j)}; }

static inline __m256i spread4(const int8_t* x) {
  int32_t four;
  __builtin_memcpy(&four, x, 4);
  return _mm256_set1_epi32(four);
}
static inline __m256i pairs_to_lanes(__m256i pairs) { return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)); }
// sum + codes . x over four inputs, codes at most 127: a 16-bit pair sum cannot saturate.
static inline Ints dot4(Ints sum, Codes codes, const int8_t* x) {
  __m256i four = spread4(x);
  return {_mm256_add_epi32(sum.a, pairs_to_lanes(_mm256_maddubs_epi16(codes.a, four))),
          _mm256_add_epi32(sum.b, pairs_to_lanes(_mm256_maddubs_epi16(codes.b, four)))};
}
// sum + (codes - 128) . x. Magnitude times sign-adjusted input: 2 * 128 * 127 still fits 16 bits.
static inline __m256i dot4_signed(__m256i sum, __m256i codes, __m256i four) {
  __m256i value = _mm256_xor_si256(codes, _mm256_set1_epi8(static_cast<char>(0x80)));
  __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(value), _mm256_sign_epi8(four, value));
  return _mm256_add_epi32(sum, pairs_to_lanes(pairs));
}
static inline Ints dot4_full(Ints sum, Codes codes, const int8_t* x) {
  __m256i four = spread4(x);
  return {dot4_signed(sum.a, codes.a, four), dot4_signed(sum.b, codes.b, four)};
}
static inline Ints start_full(int32_t) { return zero_ints(); }

// Inputs that each lane selects for itself, codes signed: `selectable` holds sixteen inputs (-127..127) for look_up, start_selected
// of all weights that follow gives the sum to begin with.
static inline Codes selectable(const int8_t* x) { return table(reinterpret_cast<const uint8_t*>(x)); }
static inline Ints start_selected(const Codes*, int) { return zero_ints(); }
// Magnitude times sign-adjusted input, as in dot4_signed.
static inline __m256i dot4_selected8(__m256i sum, __m256i weights, __m256i x) {
  return _mm256_add_epi32(sum, pairs_to_lanes(_mm256_maddubs_epi16(_mm256_abs_epi8(weights), _mm256_sign_epi8(x, weights))));
}
static inline Ints dot4_selected(Ints sum, Codes weights, Codes x) {
  return {dot4_selected8(sum.a, weights.a, x.a), dot4_selected8(sum.b, weights.b, x.b)};
}
// sum + weights . x over four inputs, weights signed bytes and x unsigned: start_unsigned of each lane's sum of weights gives the
// sum to begin with. The narrow one is for weights of at most 63.
static inline Ints start_unsigned(Ints) { return zero_ints(); }
static inline __m256i dot4_unsigned8(__m256i sum, __m256i weights, __m256i even, __m256i odd) {
  const __m256i low = _mm256_srai_epi16(_mm256_slli_epi16(weights, 8), 8), high = _mm256_srai_epi16(weights, 8);
  return _mm256_add_epi32(sum, _mm256_add_epi32(_mm256_madd_epi16(low, even), _mm256_madd_epi16(high, odd)));
}
static inline Ints dot4_unsigned(Ints sum, Codes weights, const uint8_t* x) {
  const __m256i four = spread4(reinterpret_cast<const int8_t*>(x));
  const __m256i even = _mm256_and_si256(four, _mm256_set1_epi16(255)), odd = _mm256_srli_epi16(four, 8);
  return {dot4_unsigned8(sum.a, weights.a, even, odd), dot4_unsigned8(sum.b, weights.b, even, odd)};
}
static inline Ints dot4_unsigned_narrow(Ints sum, Codes weights, const uint8_t* x) {
  const __m256i four = spread4(reinterpret_cast<const int8_t*>(x));  // two products of 255 * 63 fit 16 bits
  return {_mm256_add_epi32(sum.a, pairs_to_lanes(_mm256_maddubs_epi16(four, weights.a))),
          _mm256_add_epi32(sum.b, pairs_to_lanes(_mm256_maddubs_epi16(four, weights.b)))};
}

// sum + odd bfloat16 x x[1], then + even bfloat16 x x[0], each rounded once.
static inline __m256 dot2_8(__m256 sum, __m256i pairs, __m256i two) {
  const __m256i high = _mm256_set1_epi32(static_cast<int32_t>(0xffff0000));
  auto odd = [&](__m256i v) { return _mm256_castsi256_ps(_mm256_and_si256(v, high)); };
  auto even = [](__m256i v) { return _mm256_castsi256_ps(_mm256_slli_epi32(v, 16)); };
  return _mm256_fmadd_ps(even(pairs), even(two), _mm256_fmadd_ps(odd(pairs), odd(two), sum));
}
static inline Floats dot2(Floats sum, Codes pairs, const uint16_t* x) {
  int32_t both;
  __builtin_memcpy(&both, x, 4);
  const __m256i two = _mm256_set1_epi32(both);
  return {dot2_8(sum.a, pairs.a, two), dot2_8(sum.b, pairs.b, two)};
}

// Bit i: lane i of a is above that of b.
static inline uint32_t above(Floats x, Floats y) {
  const int low = _mm256_movemask_ps(_mm256_cmp_ps(x.a, y.a, _CMP_GT_OQ)), high = _mm256_movemask_ps(_mm256_cmp_ps(x.b, y.b, _CMP_GT_OQ));
  return static_cast<uint32_t>(low | high << 8);
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
  return add(sum, Ints{_mm256_zextsi128_si256(_mm_cvtsi32_si128(total)), _mm256_setzero_si256()});
}
// Four columns side by side: byte j of lane 4 q + i of out[k] is byte 16 q + 4 k + i of columns[j].
static inline void interleave(const Codes* columns, Codes* out) {
  auto half = [&](__m256i Codes::* part) __attribute__((always_inline)) {
    const __m256i low01 = _mm256_unpacklo_epi8(columns[0].*part, columns[1].*part), low23 = _mm256_unpacklo_epi8(columns[2].*part, columns[3].*part);
    const __m256i high01 = _mm256_unpackhi_epi8(columns[0].*part, columns[1].*part), high23 = _mm256_unpackhi_epi8(columns[2].*part, columns[3].*part);
    out[0].*part = _mm256_unpacklo_epi16(low01, low23);
    out[1].*part = _mm256_unpackhi_epi16(low01, low23);
    out[2].*part = _mm256_unpacklo_epi16(high01, high23);
    out[3].*part = _mm256_unpackhi_epi16(high01, high23);
  };
  half(&Codes::a);
  half(&Codes::b);
}

static inline float lowest_sum(__m128 a) {
  a = _mm_add_ps(a, _mm_movehl_ps(a, a));
  return _mm_cvtss_f32(_mm_add_ss(a, _mm_shuffle_ps(a, a, 1)));
}
// Sum of lanes, halves folded onto each other: 8, 4, 2, 1.
static inline float reduce_add(Floats x) {
  __m256 half = _mm256_add_ps(x.a, x.b);
  return lowest_sum(_mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}
static inline float reduce_max(Floats x) {
  __m256 half = _mm256_max_ps(x.a, x.b);
  __m128 quarter = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  quarter = _mm_max_ps(quarter, _mm_movehl_ps(quarter, quarter));
  return _mm_cvtss_f32(_mm_max_ss(quarter, _mm_shuffle_ps(quarter, quarter, 1)));
}
static inline int32_t reduce_add(Ints x) {
  __m256i half = _mm256_add_epi32(x.a, x.b);
  __m128i quarter = _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  quarter = _mm_add_epi32(quarter, _mm_shuffle_epi32(quarter, 0x4E));
  return _mm_cvtsi128_si32(_mm_add_epi32(quarter, _mm_shuffle_epi32(quarter, 0xB1)));
}
static inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

}  // namespace edgewise::avx2
