// Plain loops, as the compiler makes of them for the base instruction set.
#include "kernels/probe/probe.h"

namespace edgewise::probe {

namespace {
constexpr int kBlock = 512;  // stays in the first cache
}

uint64_t read_reference(const void* data, size_t bytes) {
  const uint64_t* words = static_cast<const uint64_t*>(data);
  uint64_t sum[8] = {};
  for (size_t i = 0; i < bytes / 8; i += 8)
    for (int j = 0; j < 8; ++j) sum[j] ^= words[i + j];
  for (int j = 1; j < 8; ++j) sum[0] ^= sum[j];
  return sum[0];
}

extern const double int8_ops_reference = 2.0 * kBlock, fp32_ops_reference = 2.0 * kBlock;

double int8_reference(int64_t rounds) {
  int8_t a[kBlock], b[kBlock];
  for (int j = 0; j < kBlock; ++j) a[j] = static_cast<int8_t>(j), b[j] = static_cast<int8_t>(3 * j);
  int64_t total = 0;
  for (int64_t i = 0; i < rounds; ++i) {
    asm volatile("" : : "r"(a), "r"(b) : "memory");  // the arrays may have changed: no round can be left out
    int32_t sum = 0;
    for (int j = 0; j < kBlock; ++j) sum += int32_t(a[j]) * b[j];
    total += sum;
  }
  return static_cast<double>(total);
}

double fp32_reference(int64_t rounds) {
  float sum[kBlock] = {}, a[kBlock];
  for (int j = 0; j < kBlock; ++j) a[j] = 0.5f + 1e-4f * j;
  for (int64_t i = 0; i < rounds; ++i) {
    asm volatile("" : : "r"(a), "r"(sum) : "memory");
    for (int j = 0; j < kBlock; ++j) sum[j] = sum[j] * a[j] + 0.25f;
  }
  double total = 0;
  for (float value : sum) total += value;
  return total;
}

}  // namespace edgewise::probe
