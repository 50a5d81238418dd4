// The loops of the two AVX-512 tiers, which set EDGEWISE_AVX512 to their name.
#include <immintrin.h>

#include "kernels/probe/probe.h"

#define EDGEWISE_JOIN_AGAIN(a, b) a##b
#define EDGEWISE_JOIN(a, b) EDGEWISE_JOIN_AGAIN(a, b)
#define EDGEWISE_NAMED(prefix) EDGEWISE_JOIN(prefix, EDGEWISE_AVX512)

namespace edgewise::probe {

namespace {
constexpr int kChains = 16;
}

uint64_t EDGEWISE_NAMED(read_)(const void* data, size_t bytes) {
  const __m512i* p = static_cast<const __m512i*>(data);
  __m512i sum[8];
  for (auto& s : sum) s = _mm512_setzero_si512();
  for (size_t i = 0; i < bytes / 64; i += 8)
    for (int j = 0; j < 8; ++j) sum[j] = _mm512_xor_si512(sum[j], _mm512_load_si512(p + i + j));
  for (int j = 1; j < 8; ++j) sum[0] = _mm512_xor_si512(sum[0], sum[j]);
  alignas(64) uint64_t words[8];
  _mm512_store_si512(words, sum[0]);
  uint64_t total = 0;
  for (uint64_t word : words) total ^= word;
  return total;
}

extern const double EDGEWISE_NAMED(int8_ops_) = 2.0 * 64 * kChains, EDGEWISE_NAMED(fp32_ops_) = 2.0 * 16 * kChains;

double EDGEWISE_NAMED(int8_)(int64_t rounds) {
  const __m512i a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(5);
  __m512i sum[kChains];
  for (auto& s : sum) s = _mm512_setzero_si512();
  for (int64_t i = 0; i < rounds; ++i)
    for (int j = 0; j < kChains; ++j) sum[j] = _mm512_dpbusd_epi32(sum[j], a, b);
  for (int j = 1; j < kChains; ++j) sum[0] = _mm512_add_epi32(sum[0], sum[j]);
  alignas(64) int32_t lanes[16];
  _mm512_store_si512(lanes, sum[0]);
  return lanes[0];
}

double EDGEWISE_NAMED(fp32_)(int64_t rounds) {
  const __m512 a = _mm512_set1_ps(0.75f), b = _mm512_set1_ps(0.25f);
  __m512 sum[kChains];
  for (int j = 0; j < kChains; ++j) sum[j] = _mm512_set1_ps(0.1f * j);
  for (int64_t i = 0; i < rounds; ++i)
    for (int j = 0; j < kChains; ++j) sum[j] = _mm512_fmadd_ps(sum[j], a, b);
  for (int j = 1; j < kChains; ++j) sum[0] = _mm512_add_ps(sum[0], sum[j]);
  alignas(64) float lanes[16];
  _mm512_store_ps(lanes, sum[0]);
  return lanes[0];
}

}  // namespace edgewise::probe
