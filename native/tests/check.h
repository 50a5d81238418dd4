// What the checks of kernel_check share: inputs from fixed seeds, and cases that compare with what is expected.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "edgewise/half.h"
#include "edgewise/kernels.h"
#include "tests/lanes/lanes.h"

namespace edgewise {

inline int passed = 0, failed = 0;

// ---- inputs

struct Random {
  uint64_t state;
  uint64_t next() {  // splitmix64
    uint64_t z = (state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  int below(int n) { return static_cast<int>(next() % static_cast<uint64_t>(n)); }
  uint8_t byte() { return static_cast<uint8_t>(next()); }
  float bits() { return std::bit_cast<float>(static_cast<uint32_t>(next())); }  // any float at all
  float uniform() { return static_cast<float>(next() >> 40) * 0x1p-23f - 1.0f; }
  // Full mantissas over some orders of magnitude, and now and then a zero.
  float value() { return below(50) == 0 ? 0.0f : uniform() * static_cast<float>(1 << below(12)) * 0x1p-6f; }
};

template <class T, class Make>
std::vector<T> filled(size_t n, Make make) {
  std::vector<T> out(n);
  for (T& x : out) x = make();
  return out;
}

// Memory on a boundary of 64 bytes, which the engine's has; a gap behind shows what was written past the end.
struct Buffer {
  std::vector<uint8_t> memory;
  uint8_t* data;
  size_t size;
  explicit Buffer(size_t n, uint8_t fill = 0) : memory(n + 128, fill), size(n) {
    data = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
  }
  float* floats() { return reinterpret_cast<float*>(data); }
};

// ---- verdicts

struct Case {
  Tier tier;
  const char* name;
  bool good = true;

  Case(Tier t, const char* n) : tier(t), name(n) {}
  ~Case() { ++(good ? passed : failed); }

  void miss(const char* where, size_t index, double found, double expected) {
    if (good) std::printf("FAILED %s %s: %s, [%zu] is %a, expected %a\n", tier_name(tier), name, where, index, found, expected);
    good = false;
  }
  // The same bits, or NaN both: which NaN comes out of arithmetic is the processor's choice.
  void floats(const float* found, const float* expected, size_t n, const char* where) {
    for (size_t i = 0; i < n; ++i) {
      if (std::isnan(found[i]) && std::isnan(expected[i])) continue;
      if (std::memcmp(found + i, expected + i, sizeof(float)) != 0) return miss(where, i, found[i], expected[i]);
    }
  }
  template <class T>
  void same(const T* found, const T* expected, size_t n, const char* where) {
    for (size_t i = 0; i < n; ++i)
      if (found[i] != expected[i]) return miss(where, i, static_cast<double>(found[i]), static_cast<double>(expected[i]));
  }
  void buffers(const Buffer& found, const Buffer& expected, const char* where) {
    same(found.data, expected.data, found.size + 64, where);
  }
};

// The checks, one file for each operator: a tier's functions against the reference tier's.
void check_fma(Tier tier, const LaneFunctions& found);
void check_lanes(Tier tier, const LaneFunctions& found);
void check_rows(Tier tier, const RowKernels& found, const RowKernels& expected);
void check_matmuls(Tier tier, const Kernels& found, const Kernels& reference);
void check_attention(Tier tier, const AttentionKernels& found, const AttentionKernels& reference);
void check_integers(Tier tier, const IntegerKernels& found, const IntegerKernels& reference);
void check_columns(Tier tier, const Kernels& found, const Kernels& reference);

// A panel of random codes under finite scales.
void fill_panel(Random& random, const PackedFormat& format, size_t cols, uint8_t* p, size_t nbytes);

}  // namespace edgewise
