// The loops of the three NEON tiers, which set EDGEWISE_NEON to their name and differ in the integer multiply-add: SMMLA
// where there is i8mm, else SDOT, else widening multiplications.
#include <arm_neon.h>

#include "kernels/probe/probe.h"

#define EDGEWISE_JOIN_AGAIN(a, b) a##b
#define EDGEWISE_JOIN(a, b) EDGEWISE_JOIN_AGAIN(a, b)
#define EDGEWISE_NAMED(prefix) EDGEWISE_JOIN(prefix, EDGEWISE_NEON)

namespace edgewise::probe {

namespace {

constexpr int kChains = 16;  // independent sums: enough to hide the latency of four units

inline int32x4_t multiply_add(int32x4_t sum, int8x16_t a, int8x16_t b) {
#if defined(__ARM_FEATURE_MATMUL_INT8)
  return vmmlaq_s32(sum, a, b);
#elif defined(__ARM_FEATURE_DOTPROD)
  return vdotq_s32(sum, a, b);
#else
  return vpadalq_s16(sum, vpaddq_s16(vmull_s8(vget_low_s8(a), vget_low_s8(b)), vmull_high_s8(a, b)));
#endif
}
#if defined(__ARM_FEATURE_MATMUL_INT8)
constexpr double kProducts = 32;
#else
constexpr double kProducts = 16;
#endif

}  // namespace

uint64_t EDGEWISE_NAMED(read_)(const void* data, size_t bytes) {
  const uint64_t* p = static_cast<const uint64_t*>(data);
  uint64x2_t sum[8];
  for (auto& s : sum) s = vdupq_n_u64(0);
  for (size_t i = 0; i < bytes / 8; i += 16)
    for (int j = 0; j < 8; ++j) sum[j] = veorq_u64(sum[j], vld1q_u64(p + i + 2 * j));
  for (int j = 1; j < 8; ++j) sum[0] = veorq_u64(sum[0], sum[j]);
  return vgetq_lane_u64(sum[0], 0) ^ vgetq_lane_u64(sum[0], 1);
}

extern const double EDGEWISE_NAMED(int8_ops_) = 2.0 * kProducts * kChains, EDGEWISE_NAMED(fp32_ops_) = 2.0 * 4 * kChains;

double EDGEWISE_NAMED(int8_)(int64_t rounds) {
  int32x4_t sum[kChains];
  int8x16_t a = vdupq_n_s8(3);
  const int8x16_t b = vdupq_n_s8(5);
  for (auto& s : sum) s = vdupq_n_s32(0);
  for (int64_t i = 0; i < rounds; ++i)
    for (int j = 0; j < kChains; ++j) {
      asm volatile("" : "+w"(a));  // as if `a` were new: the product must be formed again
      sum[j] = multiply_add(sum[j], a, b);
    }
  for (int j = 1; j < kChains; ++j) sum[0] = vaddq_s32(sum[0], sum[j]);
  return vgetq_lane_s32(sum[0], 0);
}

double EDGEWISE_NAMED(fp32_)(int64_t rounds) {
  const float32x4_t a = vdupq_n_f32(0.75f), b = vdupq_n_f32(0.25f);
  float32x4_t sum[kChains];
  for (int j = 0; j < kChains; ++j) sum[j] = vdupq_n_f32(0.1f * static_cast<float>(j));
  for (int64_t i = 0; i < rounds; ++i)
    for (int j = 0; j < kChains; ++j) sum[j] = vfmaq_f32(b, sum[j], a);
  for (int j = 1; j < kChains; ++j) sum[0] = vaddq_f32(sum[0], sum[j]);
  return vgetq_lane_f32(sum[0], 0);
}

}  // namespace edgewise::probe
