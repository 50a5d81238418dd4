#include <immintrin.h>

#include "kernels/probe/probe.h"

namespace edgewise::probe {

namespace {
constexpr int kChains = 12;  // independent sums: enough to hide the latency of two units
}

uint64_t read_avx2(const void* data, size_t bytes) {
  const __m256i* p = static_cast<const __m256i*>(data);
  __m256i sum[8];
  for (auto& s : sum) s = _mm256_setzero_si256();
  for (size_t i = 0; i < bytes / 32; i += 8)
    for (int j = 0; j < 8; ++j) sum[j] = _mm256_xor_si256(sum[j], _mm256_load_si256(p + i + j));
  for (int j = 1; j < 8; ++j) sum[0] = _mm256_xor_si256(sum[0], sum[j]);
  alignas(32) uint64_t words[4];
  _mm256_store_si256(reinterpret_cast<__m256i*>(words), sum[0]);
  return words[0] ^ words[1] ^ words[2] ^ words[3];
}

extern const double int8_ops_avx2 = 2.0 * 32 * kChains, fp32_ops_avx2 = 2.0 * 8 * kChains;

double int8_avx2(int64_t rounds) {
  __m256i sum[kChains], a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(5);
  const __m256i ones = _mm256_set1_epi16(1);
  for (auto& s : sum) s = _mm256_setzero_si256();
  for (int64_t i = 0; i < rounds; ++i)
    for (int j = 0; j < kChains; ++j) {
      asm volatile("" : "+x"(a));  // as if `a` were new: the product must be formed again
      sum[j] = _mm256_add_epi32(sum[j], _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), ones));
    }
  for (int j = 1; j < kChains; ++j) sum[0] = _mm256_add_epi32(sum[0], sum[j]);
  return _mm256_extract_epi32(sum[0], 0);
}

double fp32_avx2(int64_t rounds) {
  const __m256 a = _mm256_set1_ps(0.75f), b = _mm256_set1_ps(0.25f);
  __m256 sum[kChains];
  for (int j = 0; j < kChains; ++j) sum[j] = _mm256_set1_ps(0.1f * j);
  for (int64_t i = 0; i < rounds; ++i)
    for (int j = 0; j < kChains; ++j) sum[j] = _mm256_fmadd_ps(sum[j], a, b);
  for (int j = 1; j < kChains; ++j) sum[0] = _mm256_add_ps(sum[0], sum[j]);
  return _mm256_cvtss_f32(sum[0]);
}

}  // namespace edgewise::probe
