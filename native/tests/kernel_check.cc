// Every kernel and lane function of every tier that this processor can run, against the reference tier, to the bit.
//
//   kernel_check [tier]       a name asks that this tier be the best one here, so that a run cannot pass by running less
//   kernel_check --run tier   runs the tiers up to this one unasked: Zig's runtime library knows of no x86 features
//
// Plain C++ without files and exceptions, so that it runs under an emulator or in a WebAssembly engine. Inputs come from
// fixed seeds. The last line says how many cases passed and failed; the exit status is 1 where any failed.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "edgewise/half.h"
#include "edgewise/kernels.h"
#include "tests/lanes/lanes.h"

namespace edgewise {
namespace {

int passed = 0, failed = 0;

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

// ---- lanes

// a * b + c in integers, rounded once, ties to even: what every fma has to equal. Finite inputs.
float exact_fma(float a, float b, float c) {
  struct Parts { bool negative; int exponent; uint64_t mantissa; };  // mantissa * 2^exponent
  auto split = [](float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x), field = bits >> 23 & 255, low = bits & 0x7fffff;
    return Parts{bits >> 31 != 0, field == 0 ? -149 : static_cast<int>(field) - 150, field == 0 ? low : low | 0x800000};
  };
  const Parts x = split(a), y = split(b), z = split(c);
  Parts p{x.negative != y.negative, x.exponent + y.exponent, x.mantissa * y.mantissa}, q = z;
  if (p.mantissa == 0 && q.mantissa == 0) return p.negative && q.negative ? -0.0f : 0.0f;
  if (p.mantissa == 0) return c;
  // Both to one exponent: the larger mantissa moves left by up to 64 bits, the other right, its lost bits kept as sticky.
  using Wide = unsigned __int128;
  auto top = [](const Parts& v) { return v.mantissa == 0 ? -1000 : v.exponent + 64 - __builtin_clzll(v.mantissa); };
  if (top(p) < top(q)) std::swap(p, q);
  const int base = top(p) - 120;
  Wide high = static_cast<Wide>(p.mantissa) << (p.exponent - base);
  Wide low = 0;
  if (q.mantissa != 0) {
    const int shift = q.exponent - base;
    if (shift >= 0) {
      low = static_cast<Wide>(q.mantissa) << shift;
    } else if (shift > -64) {
      low = q.mantissa >> -shift;
      if (low << -shift != q.mantissa) low |= 1;
    } else {
      low = 1;
    }
  }
  Wide sum = p.negative == q.negative ? high + low : high - low;
  if (sum == 0) return 0.0f;
  const bool negative = p.negative != (static_cast<__int128>(sum) < 0);
  if (static_cast<__int128>(sum) < 0) sum = -sum;
  const uint64_t upper = static_cast<uint64_t>(sum >> 64), lower = static_cast<uint64_t>(sum);
  const int width = upper != 0 ? 128 - __builtin_clzll(upper) : 64 - __builtin_clzll(lower);
  int drop = width - 24;
  if (base + drop < -149) drop = -149 - base;
  Wide kept;
  if (drop <= 0) {
    kept = sum << -drop;
  } else if (drop > 126) {
    kept = 0;
  } else {
    const Wide rest = sum & ((static_cast<Wide>(1) << drop) - 1), half = static_cast<Wide>(1) << (drop - 1);
    kept = sum >> drop;
    if (rest > half || (rest == half && (kept & 1) != 0)) ++kept;
  }
  const float magnitude = std::ldexp(static_cast<float>(static_cast<uint64_t>(kept)), base + drop);
  return negative ? -magnitude : magnitude;
}

// A product just below half the spacing of floats at c: rounded first to double, the sum lies on the middle.
void hard_triple(Random& random, float* a, float* b, float* c) {
  const float near = static_cast<float>(1 + random.below(64)) * 0x1p-23f;
  *a = 1.0f + near;
  *b = 1.0f - near;
  *c = static_cast<float>((1 << 24) + 2 * random.below(1 << 23));  // spaced by two
  if (random.below(2) == 0) *c = -*c;
  if (random.below(2) == 0) *a = -*a;
  switch (random.below(3)) {
    case 0:  // where floats are subnormal, spaced by 2^-149
      *a *= 0x1p-75f;
      *b *= 0x1p-75f;
      *c = std::ldexp(*c < 0 ? -1.0f : 1.0f, -149) * static_cast<float>((1 << 19) + random.below(1 << 20));
      break;
    case 1:  // at the upper end
      *a *= 0x1p51f;
      *b *= 0x1p51f;
      *c *= 0x1p102f;
      break;
    default: break;
  }
}

void check_fma(Tier tier, const LaneFunctions& found) {
  Case exact(tier, "fma"), negated(tier, "fnma"), special(tier, "fma of special values");
  Random random{11};
  float a[16], b[16], c[16], minus[16], out[16], expected[16];
  int twice = 0;  // cases that a double sum would get wrong
  for (int round = 0; round < 4000; ++round) {
    for (int i = 0; i < 16; ++i) {
      switch (round % 4) {
        case 0: hard_triple(random, a + i, b + i, c + i); break;
        case 1: a[i] = random.value(), b[i] = random.value(), c[i] = random.value(); break;
        case 2: {  // neighbours in exponent, from the whole range
          const int e = random.below(250) - 125, f = random.below(200) - 100;
          a[i] = std::ldexp(random.uniform(), e), b[i] = std::ldexp(random.uniform(), f);
          c[i] = std::ldexp(random.uniform(), e + f + random.below(80) - 40);
          break;
        }
        default:  // all cancels but the last bits
          a[i] = random.uniform(), b[i] = random.uniform(), c[i] = -(a[i] * b[i]);
      }
      if (!std::isfinite(c[i])) c[i] = 1.0f;
      minus[i] = -a[i];
      expected[i] = exact_fma(a[i], b[i], c[i]);
      twice += static_cast<float>(static_cast<double>(a[i]) * b[i] + c[i]) != expected[i];
    }
    found.fma(a, b, c, out);
    exact.floats(out, expected, 16, "against integers");
    found.fnma(minus, b, c, out);
    negated.floats(out, expected, 16, "against integers");
  }
  if (twice < 6000) exact.miss("too few of the cases are hard", 0, twice, 6000);
  const float odd[] = {0.0f, -0.0f, 1.0f, -1.0f, INFINITY, -INFINITY, NAN, 0x1p-149f, -0x1p-149f, 0x1p-126f, 3.4028235e38f, 0x1p-75f};
  const LaneFunctions reference = reference::lane_functions();
  for (float x : odd)
    for (float y : odd) {
      for (int i = 0; i < 16; ++i) a[i] = x, b[i] = y, c[i] = odd[i % 12];
      found.fma(a, b, c, out);
      reference.fma(a, b, c, expected);
      special.floats(out, expected, 16, "products of special values");
    }
}

void check_lanes(Tier tier, const LaneFunctions& found) {
  const LaneFunctions reference = reference::lane_functions();
  Random random{7};
  float a[64], b[64], out[64], expected[64];

  struct { const char* name; LaneFunctions::Binary LaneFunctions::*function; } const binary[] = {
      {"add", &LaneFunctions::add}, {"sub", &LaneFunctions::sub}, {"mul", &LaneFunctions::mul},
      {"div", &LaneFunctions::div}, {"max", &LaneFunctions::max}, {"min", &LaneFunctions::min}};
  for (const auto& [name, function] : binary) {
    Case test(tier, name);
    for (int round = 0; round < 500; ++round) {
      for (int i = 0; i < 16; ++i) {
        a[i] = round % 2 ? random.bits() : random.value();
        b[i] = random.below(8) == 0 ? -a[i] : random.below(8) == 0 ? a[i] : round % 2 ? random.bits() : random.value();
      }
      (found.*function)(a, b, out);
      (reference.*function)(a, b, expected);
      test.floats(out, expected, 16, "any floats");
    }
  }
  struct { const char* name; LaneFunctions::Unary LaneFunctions::*function; } const unary[] = {
      {"load and store", &LaneFunctions::copy}, {"abs", &LaneFunctions::abs}, {"round_even", &LaneFunctions::round_even}};
  for (const auto& [name, function] : unary) {
    Case test(tier, name);
    for (int round = 0; round < 500; ++round) {
      for (int i = 0; i < 16; ++i) a[i] = round % 2 ? random.bits() : static_cast<float>(random.below(400) - 200) * 0.5f;
      (found.*function)(a, out);
      (reference.*function)(a, expected);
      test.floats(out, expected, 16, "any floats, and halves");
    }
  }
  {
    Case test(tier, "scale_by_power");
    for (int n = -126; n <= 127; ++n) {
      for (int i = 0; i < 16; ++i) a[i] = random.uniform() + 1.5f, b[i] = static_cast<float>(n);
      found.scale_by_power(a, b, out);
      reference.scale_by_power(a, b, expected);
      test.floats(out, expected, 16, "every power");
    }
  }
  {
    Case test(tier, "first");
    for (int n = 0; n <= 16; ++n) {
      for (int i = 0; i < 16; ++i) a[i] = random.value(), b[i] = random.bits();
      found.first(n, a, b, out);
      reference.first(n, a, b, expected);
      test.floats(out, expected, 16, "every count");
    }
  }
  {
    Case test(tier, "load_half"), brain(tier, "load_bfloat");
    for (uint32_t first = 0; first < 65536; first += 16) {
      uint16_t halves[16];
      for (uint32_t i = 0; i < 16; ++i) halves[i] = static_cast<uint16_t>(first + i);
      found.load_half(halves, out);
      reference.load_half(halves, expected);
      test.floats(out, expected, 16, "every half");
      found.load_bfloat(halves, out);
      reference.load_bfloat(halves, expected);
      brain.floats(out, expected, 16, "every bfloat");
    }
  }
  {
    Case test(tier, "store_half");
    for (int round = 0; round < 20000; ++round) {
      uint16_t halves[16], wanted[16];
      for (int i = 0; i < 16; ++i) {
        // Halves, the middles between them, and neighbours of those; the rest any float.
        const float half = half_to_float(static_cast<uint16_t>(random.below(0x7c00)));
        const float next = half_to_float(static_cast<uint16_t>(random.below(0x7c00) + 1));
        const uint32_t middle = std::bit_cast<uint32_t>(random.below(2) ? half : (half + next) * 0.5f) + static_cast<uint32_t>(random.below(3)) - 1;
        a[i] = round % 2 ? random.bits() : std::bit_cast<float>(middle ^ static_cast<uint32_t>(random.below(2)) << 31);
        if (round % 2 == 0 && random.below(3) == 0) {
          const uint16_t low = static_cast<uint16_t>(random.below(0x7c00));
          const float lower = half_to_float(low), upper = low == 0x7bff ? 65536.0f : half_to_float(static_cast<uint16_t>(low + 1));
          a[i] = (lower + upper) * 0.5f;
        }
        if (std::isnan(a[i])) a[i] = INFINITY;
      }
      found.store_half(a, halves);
      reference.store_half(a, wanted);
      test.same(halves, wanted, 16, "floats around halves");
    }
    uint16_t halves[16];
    for (int i = 0; i < 16; ++i) a[i] = std::bit_cast<float>(0x7fc00000u | static_cast<uint32_t>(i) << 13 | static_cast<uint32_t>(i & 1) << 31);
    found.store_half(a, halves);
    for (size_t i = 0; i < 16; ++i)
      if (!std::isnan(half_to_float(halves[i]))) test.miss("NaN stays NaN", i, half_to_float(halves[i]), NAN);
  }
  {
    Case exponent(tier, "load_half_exponent"), bytes(tier, "load_int8"), unsigned_bytes(tier, "load_uint8");
    for (int first = 0; first < 256; first += 16) {
      uint8_t p[16];
      int8_t s[16];
      for (int i = 0; i < 16; ++i) p[i] = static_cast<uint8_t>(first + i), s[i] = static_cast<int8_t>(first + i);
      found.load_half_exponent(p, out);
      reference.load_half_exponent(p, expected);
      exponent.floats(out, expected, 16, "every byte");
      found.load_int8(s, out);
      reference.load_int8(s, expected);
      bytes.floats(out, expected, 16, "every byte");
      found.load_uint8(p, out);
      reference.load_uint8(p, expected);
      unsigned_bytes.floats(out, expected, 16, "every byte");
    }
  }
  {
    Case test(tier, "to_ints, store_int8, reduce_add");
    for (int round = 0; round < 500; ++round) {
      int8_t bytes[16], wanted[16];
      int32_t sum, wanted_sum;
      for (int i = 0; i < 16; ++i) a[i] = round % 2 ? static_cast<float>(random.below(509) - 254) * 0.5f : random.uniform() * 127.0f;
      found.round_to_ints(a, bytes, out, &sum);
      reference.round_to_ints(a, wanted, expected, &wanted_sum);
      test.same(bytes, wanted, 16, "bytes");
      test.floats(out, expected, 16, "floats");
      test.same(&sum, &wanted_sum, 1, "sum");
    }
  }
  {
    Case sum(tier, "reduce_add"), peak(tier, "reduce_max");
    for (int round = 0; round < 2000; ++round) {
      for (int i = 0; i < 16; ++i) a[i] = random.below(40) == 0 ? -INFINITY : random.uniform() * static_cast<float>(1 << random.below(20));
      *out = found.reduce_add(a);
      *expected = reference.reduce_add(a);
      sum.floats(out, expected, 1, "sums");
      *out = found.reduce_max(a);
      *expected = reference.reduce_max(a);
      peak.floats(out, expected, 1, "maxima");
    }
  }
  {
    Case test(tier, "store_bfloat");
    for (int round = 0; round < 40000; ++round) {
      uint16_t half[16], wanted[16];
      for (int i = 0; i < 16; ++i) {
        a[i] = random.bits();
        // Middles between two bfloat16 and their neighbours, and values about the smallest that is kept.
        if (round % 4 == 1) a[i] = std::bit_cast<float>((std::bit_cast<uint32_t>(a[i]) & 0xffff8000u) + static_cast<uint32_t>(random.below(3)) - 1);
        if (round % 4 == 2) a[i] = std::bit_cast<float>(static_cast<uint32_t>(kSmallestBFloat << 16) + static_cast<uint32_t>(random.below(70000)) - 35000u);
      }
      found.store_bfloat(a, half);
      reference.store_bfloat(a, wanted);
      test.same(half, wanted, 16, "halves");
    }
  }
  {
    Case test(tier, "dot2");
    auto bfloat = [&] { return float_to_bf16(random.uniform() * std::ldexp(1.0f, random.below(112) - 55)); };
    for (int round = 0; round < 20000; ++round) {
      uint16_t pairs[32], x[2] = {bfloat(), bfloat()};
      for (uint16_t& v : pairs) v = random.below(30) == 0 ? uint16_t{0} : bfloat();
      for (uint16_t* v = pairs; v < pairs + 32; ++v)
        if ((*v & 0x7fff) < kSmallestBFloat) *v = 0;
      for (uint16_t& v : x)
        if ((v & 0x7fff) < kSmallestBFloat) v = 0;
      float sum[16] = {};
      // A sum of products, now and then the opposite of the next one: what is left may be a few units of the last place.
      found.dot2(sum, pairs, x, sum);
      reference.dot2(sum, pairs, x, sum);
      if (round % 3 == 0)
        for (float& v : sum) v = -v / 2;
      found.dot2(sum, pairs, x, out);
      reference.dot2(sum, pairs, x, expected);
      test.floats(out, expected, 16, "sums");
    }
  }
  Case look_up(tier, "look_up, byte_of"), shifts(tier, "shifts of codes"), dot(tier, "dot4"), full(tier, "dot4_full");
  Case selected(tier, "dot4_selected"), plain(tier, "dot4_unsigned"), narrow_plain(tier, "dot4_unsigned_narrow"), scaled(tier, "rescale");
  for (int round = 0; round < 500; ++round) {
    const std::vector<uint8_t> codes = filled<uint8_t>(512, [&] { return random.byte(); });
    const std::vector<uint8_t> values = filled<uint8_t>(16, [&] { return random.byte(); });
    found.look_up(values.data(), codes.data(), out);
    reference.look_up(values.data(), codes.data(), expected);
    look_up.floats(out, expected, 64, "any table");
    const int n = random.below(8);
    float left[64], wanted[64];
    found.shift_codes(codes.data(), n, static_cast<uint8_t>(255 >> n), out, left);
    reference.shift_codes(codes.data(), n, static_cast<uint8_t>(255 >> n), expected, wanted);
    shifts.floats(out, expected, 64, "right");
    shifts.floats(left, wanted, 64, "left");

    // Extremes every fourth time: the largest codes and inputs, whose pair sums come nearest to overflow.
    std::vector<int8_t> x = filled<int8_t>(32, [&] { return static_cast<int8_t>(random.below(255) - 127); });
    std::vector<uint8_t> wide = codes;
    if (round % 4 == 0) {
      for (int8_t& v : x) v = random.below(2) ? 127 : -127;
      for (uint8_t& v : wide) v = random.below(2) ? 255 : 0;
    }
    std::vector<uint8_t> narrow = wide;
    for (uint8_t& v : narrow) v &= 127;
    const int count = round % 2 ? 8 : 4;
    const int32_t start = random.below(8129) - 4064;
    found.dot4(start, narrow.data(), x.data(), count, out);
    reference.dot4(start, narrow.data(), x.data(), count, expected);
    dot.floats(out, expected, 16, "sums");
    int32_t sum = 0;
    for (int i = 0; i < 4 * count; ++i) sum += x[static_cast<size_t>(i)];
    found.dot4_full(-sum, wide.data(), x.data(), count, out);
    reference.dot4_full(-sum, wide.data(), x.data(), count, expected);
    full.floats(out, expected, 16, "sums");

    const int registers = 1 + round % 4;
    std::vector<uint8_t> index = codes;
    for (uint8_t& v : index) v &= 15;
    found.dot4_selected(wide.data(), index.data(), x.data(), registers, out);
    reference.dot4_selected(wide.data(), index.data(), x.data(), registers, expected);
    selected.floats(out, expected, 16, "sums");
    std::vector<uint8_t> bytes = filled<uint8_t>(32, [&] { return random.byte(); });
    if (round % 4 == 0)
      for (uint8_t& v : bytes) v = random.below(2) ? 255 : 0;
    for (bool small : {false, true}) {
      std::vector<uint8_t> weights = wide;
      if (small)
        for (uint8_t& v : weights) v = static_cast<uint8_t>((v & 127) - 64 + (v & 127 ? 0 : 1));
      std::vector<int32_t> sums(16, 0);
      for (size_t i = 0; i < 64 * static_cast<size_t>(count); ++i) sums[i % 64 / 4] += static_cast<int8_t>(weights[i]);
      found.dot4_unsigned(sums.data(), weights.data(), bytes.data(), count, small, out);
      reference.dot4_unsigned(sums.data(), weights.data(), bytes.data(), count, small, expected);
      (small ? narrow_plain : plain).floats(out, expected, 16, "sums");
    }
    int32_t left_factor[16], right_factor[16], multiplier[16];
    const int shift = 1 + random.below(60);
    // Products stay below 2^29, so that what is scaled by up to a half of 2^31 >> shift fits.
    for (int i = 0; i < 16; ++i) {
      left_factor[i] = random.below(1 << 15) - (1 << 14), right_factor[i] = random.below(1 << 15) - (1 << 14);
      multiplier[i] = shift >= 31 ? static_cast<int32_t>(random.next() >> 33) : random.below(1 << shift);
    }
    found.rescale(left_factor, right_factor, multiplier, shift, out, left);
    reference.rescale(left_factor, right_factor, multiplier, shift, expected, wanted);
    scaled.floats(out, expected, 16, "clamped");
    scaled.floats(left, wanted, 16, "upper half");
  }
}

// ---- rows

const size_t kSizes[] = {1, 2, 15, 16, 17, 31, 32, 33, 48, 64, 100, 127, 128, 257, 576};

void check_rows(Tier tier, const RowKernels& found, const RowKernels& expected) {
  Case rms(tier, "rms_norm"), layer(tier, "layer_norm"), add(tier, "add"), place(tier, "place"), quantise(tier, "quantise");
  Random random{3};
  for (size_t n : kSizes)
    for (float size : {1e-4f, 1.0f, 1e4f}) {
      const std::vector<float> x = filled<float>(n, [&] { return random.value() * size; });
      const std::vector<float> weight = filled<float>(n, [&] { return random.value(); });
      const std::vector<float> bias = filled<float>(n, [&] { return random.value(); });
      Buffer y(4 * n, 0xAB), z(4 * n, 0xAB);
      for (int with = 0; with < 4; ++with) {
        const float* w = with & 1 ? weight.data() : nullptr;
        const float* b = with & 2 ? bias.data() : nullptr;
        found.rms_norm(x.data(), w, 1e-6f, n, y.floats());
        expected.rms_norm(x.data(), w, 1e-6f, n, z.floats());
        rms.buffers(y, z, "row");
        found.layer_norm(x.data(), w, b, 1e-5f, n, y.floats());
        expected.layer_norm(x.data(), w, b, 1e-5f, n, z.floats());
        layer.buffers(y, z, "row");
      }
      found.add(x.data(), n, y.floats());
      expected.add(x.data(), n, z.floats());
      add.buffers(y, z, "row");

      for (size_t tokens : {size_t{1}, size_t{5}, size_t{17}}) {
        Activations a, b;
        a.tokens = tokens, a.cols = n, a.slots = tokens == 1 ? 1 : kLanes;
        b = a;
        Buffer p(Activations::nbytes_int8(tokens, n, a.slots)), q(p.size);
        a.place_int8(p.data), b.place_int8(q.data);
        Buffer f(Activations::nbytes_float(tokens, n, a.slots)), g(f.size);
        a.place_float(f.data), b.place_float(g.data);
        Buffer h(Activations::nbytes_bfloat(tokens, n, a.slots)), i(h.size);
        a.place_bfloat(h.data), b.place_bfloat(i.data);
        for (size_t t = 0; t < tokens; ++t) {
          std::vector<float> row = filled<float>(n, [&] { return random.value() * size; });
          if (t == 2) row.assign(n, 0.0f);
          found.quantise(row.data(), 0, row.size(), a, t);
          expected.quantise(row.data(), 0, row.size(), b, t);
          found.place(row.data(), 0, row.size(), a, t);
          expected.place(row.data(), 0, row.size(), b, t);
          found.place_bfloat(row.data(), 0, row.size(), a, t);
          expected.place_bfloat(row.data(), 0, row.size(), b, t);
        }
        place.buffers(h, i, "bfloat16 inputs");
        quantise.buffers(p, q, "codes, scales and sums");
        place.buffers(f, g, "inputs");
      }
    }
  struct { const char* name; Gate function; } const gates[] = {
      {"silu", Gate::Silu}, {"gelu", Gate::Gelu}, {"gelu_tanh", Gate::GeluTanh}, {"relu", Gate::Relu}};
  for (const auto& [name, function] : gates) {
    Case test(tier, name);
    for (size_t n : kSizes) {
      std::vector<float> gate = filled<float>(n, [&] { return random.value() * 4.0f; });
      for (size_t i = 0; i < n; i += 11) gate[i] = random.uniform() * 120.0f;
      if (n > 40) gate[7] = INFINITY, gate[21] = -INFINITY, gate[33] = -0.0f, gate[35] = NAN;
      const std::vector<float> up = filled<float>(n, [&] { return random.value(); });
      for (bool gated : {true, false}) {
        std::vector<float> y = gated ? up : gate, z = y;
        found.gate(function, gated ? gate.data() : nullptr, y.data(), n);
        expected.gate(function, gated ? gate.data() : nullptr, z.data(), n);
        test.floats(y.data(), z.data(), n, gated ? "gated" : "alone");
      }
    }
  }
}

// ---- matmul

// Random codes are codes of any width; scales are made to be finite, now and then subnormal or zero.
void fill_panel(Random& random, const PackedFormat& format, size_t cols, uint8_t* p, size_t nbytes) {
  for (size_t i = 0; i < nbytes; ++i) p[i] = random.byte();
  auto half = [&](uint8_t* at) {
    const uint16_t bits = static_cast<uint16_t>(random.below(0x400) | random.below(19) << 10 | random.below(2) << 15);
    std::memcpy(at, &bits, 2);
  };
  if (!format.quantised()) {
    for (size_t i = 0; i < kLanes * cols; ++i) {
      const float value = random.value();
      const uint16_t brain = static_cast<uint16_t>(std::bit_cast<uint32_t>(value) >> 16);
      if (format.element == Element::Float32) std::memcpy(p + 4 * i, &value, 4);
      else if (format.element == Element::BFloat16 || format.element == Element::BFloat16Pairs) std::memcpy(p + 2 * i, &brain, 2);
      else half(p + 2 * i);
    }
    return;
  }
  const size_t per_record = format.record_inputs / kBlock, blocks = (cols + kBlock - 1) / kBlock;
  const size_t record = format.sparse ? format.header_nbytes() + per_record / 4 * format.unit_nbytes() : format.record_nbytes(per_record);
  for (size_t block = 0; block < blocks; block += per_record, p += record) {
    if (format.scale == ScaleType::Nested) {
      for (size_t i = 0; i < (format.has_min ? 2 : 1) * kLanes; ++i) half(p + 2 * i);
      continue;
    }
    // Zero points behind the scales may be any byte.
    const size_t width = format.scale_nbytes(), header = format.zero_points ? format.scales() * kLanes * width : format.header_nbytes();
    for (size_t at = 0; at < header; at += width) {
      const float value = random.value();
      if (width == 4) std::memcpy(p + at, &value, 4);
      else if (width == 2) half(p + at);
      else p[at] = static_cast<uint8_t>(random.below(20) == 0 ? random.below(2) : 100 + random.below(40));
    }
  }
}

void check_matmul(Case& test, const Kernels& found, const Kernels& reference, const PackedFormat& format, bool int8_inputs, bool whole_records) {
  const MatmulKernel kernel = found.matmul(format, int8_inputs), plain = reference.matmul(format, int8_inputs);
  if (kernel == nullptr || plain == nullptr) return test.miss("no kernel", 0, 0, 0);
  Random random{5};
  static const size_t any[] = {1, 31, 32, 33, 100, 128, 288}, whole[] = {256, 768};
  for (size_t c = 0; c < (whole_records ? 2u : 7u); ++c) {
    const size_t cols = whole_records ? whole[c] : any[c];
    PackedMatrix w;
    w.format = format;
    w.rows = 3 * kLanes;
    w.cols = cols;
    w.panel_nbytes = format.panel_nbytes(cols);
    w.nbytes = 3 * w.panel_nbytes;
    // Kernels prefetch past the end but do not read there.
    Buffer data(w.nbytes);
    for (size_t panel = 0; panel < 3; ++panel) fill_panel(random, format, cols, data.data + panel * w.panel_nbytes, w.panel_nbytes);
    w.data = data.data;
    const std::vector<float> bias = filled<float>(3 * kLanes, [&] { return random.value(); });
    for (size_t tokens : {size_t{1}, size_t{16}, size_t{21}}) {
      Activations x;
      x.tokens = tokens, x.cols = cols, x.slots = tokens == 1 ? 1 : kLanes;
      Buffer codes(Activations::nbytes_int8(tokens, cols, x.slots)), floats(Activations::nbytes_float(tokens, cols, x.slots));
      Buffer halves(Activations::nbytes_bfloat(tokens, cols, x.slots));
      x.place_int8(codes.data);
      x.place_float(floats.data);
      x.place_bfloat(halves.data);
      for (size_t t = 0; t < tokens; ++t) {
        const std::vector<float> row = filled<float>(cols, [&] { return random.value(); });
        reference.rows.quantise(row.data(), 0, row.size(), x, t);
        reference.rows.place(row.data(), 0, row.size(), x, t);
        reference.rows.place_bfloat(row.data(), 0, row.size(), x, t);
      }
      struct { size_t tile, slot, count; } const parts[] = {{0, 0, tokens < 16 ? tokens : 16}, {1, 0, 5}, {0, 3, 7}, {0, 15, 1}, {1, 2, 2}};
      for (size_t part = 0; part < (tokens == 1 ? 1u : tokens == 16 ? 1u : 5u); ++part) {
        const auto [tile, slot, count] = parts[part];
        if (tokens == 21 && part == 0) continue;
        // One panel and several, onto what is there and not, with a bias and without.
        struct { size_t first, panels; bool add, bias; } const calls[] = {{0, 3, false, true}, {1, 1, true, false}, {1, 2, true, true}};
        for (const auto& [first, panels, add, with_bias] : calls) {
          const size_t stride = panels * kLanes + 3;
          Buffer y(4 * stride * count), z(y.size);
          for (size_t i = 0; i < stride * count; ++i) y.floats()[i] = z.floats()[i] = static_cast<float>(i % 7) - 3.0f;
          const float* offset = with_bias ? bias.data() : nullptr;
          kernel(w, first, panels, x, tile, slot, count, {y.floats(), stride, offset, add}, {});
          plain(w, first, panels, x, tile, slot, count, {z.floats(), stride, offset, add}, {});
          test.floats(y.floats(), z.floats(), stride * count, "outputs");
          test.same(y.data + y.size, z.data + z.size, 64, "behind the outputs");
        }
      }
    }
  }
}

enum class Kind { Symmetric, Minimum, Table };
enum class Centre { None, Half, Zero };

void check_line(Tier tier, const Kernels& found, const Kernels& reference, int bits, Kind kind, bool nested, bool halves, const char* name) {
  for (bool int8_inputs : {true, false})
    for (ScaleType scale : {ScaleType::Float16, ScaleType::Float32, ScaleType::Exponent}) {
      Case test(tier, name);
      PackedFormat format;
      format.element = kind == Kind::Table ? Element::Table : Element::Integer;
      format.bits = static_cast<uint8_t>(bits);
      format.has_min = kind == Kind::Minimum;
      format.scale = nested ? ScaleType::Nested : scale;
      format.sub_group = halves ? 16 : 32;
      format.record_inputs = nested ? 256 : halves || scale == ScaleType::Float16 ? 32 : scale == ScaleType::Float32 ? 64 : 128;
      for (int i = 0; i < 16; ++i) format.table[i] = static_cast<int8_t>(i * 17 - 128 + (i == 15 ? 0 : i % 3));
      check_matmul(test, found, reference, format, int8_inputs, nested);
      if (nested) break;
    }
  if (kind != Kind::Minimum || nested) return;
  for (bool int8_inputs : {true, false}) {
    Case test(tier, name);
    PackedFormat format;
    format.element = Element::Integer;
    format.bits = static_cast<uint8_t>(bits);
    format.has_min = format.zero_points = true;
    format.sub_group = halves ? 16 : 32;
    format.record_inputs = halves ? 32 : 64;
    check_matmul(test, found, reference, format, int8_inputs, false);
  }
}

void check_sparse(Tier tier, const Kernels& found, const Kernels& reference, int bits, Centre centre, const char* name) {
  for (bool int8_inputs : {true, false})
    for (uint32_t group : {32u, 64u, 128u, 256u}) {
      Case test(tier, name);
      PackedFormat format;
      format.element = Element::Integer;
      format.bits = static_cast<uint8_t>(bits);
      format.has_min = centre != Centre::Half;
      format.zero_points = centre == Centre::Zero;
      format.scale = group == 256 ? ScaleType::Float32 : ScaleType::Float16;
      format.sparse = true;
      format.sparse_group = group;
      format.record_inputs = group < 128 ? 128 : group;
      check_matmul(test, found, reference, format, int8_inputs, false);
    }
}

void check_matmuls(Tier tier, const Kernels& found, const Kernels& reference) {
  struct { const char* name; Element element; } const dense[] = {
      {"float32", Element::Float32}, {"float16", Element::Float16}, {"bfloat16", Element::BFloat16},
      {"bfloat16 pairs", Element::BFloat16Pairs}};
  for (const auto& [name, element] : dense) {
    Case test(tier, name);
    PackedFormat format;
    format.element = element;
    format.bits = element == Element::Float32 ? 32 : 16;
    check_matmul(test, found, reference, format, false, false);
  }
#define EDGEWISE_MATMUL(bits, kind, nested, halves) \
  check_line(tier, found, reference, bits, Kind::kind, nested, halves, #bits " bits, " #kind ", " #nested ", " #halves);
#define EDGEWISE_SPARSE(bits, centre) check_sparse(tier, found, reference, bits, Centre::centre, #bits " bits, " #centre ", two of four");
#include "kernels/matmul/kernels.inc"
#undef EDGEWISE_SPARSE
#undef EDGEWISE_MATMUL
}

// ---- attention

void check_attention(Tier tier, const AttentionKernels& found, const AttentionKernels& reference) {
  struct { const char* name; KvType type; } const types[] = {{"attention on float32", KvType::Float32},
      {"attention on float16", KvType::Float16}, {"attention on bfloat16", KvType::BFloat16}, {"attention on int8", KvType::Int8}, {"attention on int4", KvType::Int4}};
  for (const auto& [name, type] : types) {
    Case test(tier, name);
    Random random{9};
    for (size_t dim : {size_t{16}, size_t{33}, size_t{64}, size_t{80}}) {
      KvLayout layout;
      layout.type = type;
      layout.head_dim = dim;
      const size_t positions = 300, padded = layout.padded();
      Buffer keys((positions + kLanes - 1) / kLanes * layout.key_tile_nbytes()), key_copy(keys.size);
      Buffer values(positions * layout.value_nbytes()), value_copy(values.size);
      for (size_t p = 0; p < positions; ++p) {
        std::vector<float> row = filled<float>(dim, [&] { return random.value(); });
        if (p == 9) row.assign(dim, 0.0f);
        reference.store_key(layout, row.data(), p, keys.data);
        found.store_key(layout, row.data(), p, key_copy.data);
        reference.store_value(layout, row.data(), p, values.data);
        found.store_value(layout, row.data(), p, value_copy.data);
      }
      test.buffers(key_copy, keys, "keys");
      test.buffers(value_copy, values, "values");

      for (size_t queries = 1; queries <= kMaxQueries; queries += dim == 64 ? 1 : 4) {
        const std::vector<float> q = filled<float>(queries * padded, [&] { return random.value(); });
        std::vector<int32_t> begin(queries), end(queries);
        for (size_t i = 0; i < queries; ++i) {
          end[i] = 1 + random.below(static_cast<int>(positions));
          begin[i] = random.below(3) == 0 ? random.below(end[i] + 5) : 0;
        }
        AttentionTask task{&layout, keys.data, values.data, q.data(), padded, queries, begin.data(), end.data(),
                           1.0f / std::sqrt(static_cast<float>(dim))};
        // Every other time a bias by distance: tables of all queries side by side, from -reach - 16 to reach + 15.
        const int reach = 1 + random.below(80);
        const std::vector<float> table = filled<float>(queries * 2 * (static_cast<size_t>(reach) + kLanes), [&] { return random.value(); });
        std::vector<const float*> bias(queries);
        std::vector<int32_t> position(queries);
        for (size_t i = 0; i < queries; ++i) {
          bias[i] = table.data() + (2 * i + 1) * (static_cast<size_t>(reach) + kLanes);
          position[i] = random.below(static_cast<int>(positions));
        }
        if (random.below(2)) task.bias = bias.data(), task.position = position.data(), task.reach = reach;
        struct State {
          Buffer out, peak, weight, scratch;
          State(size_t n, size_t padded) : out(4 * n * padded, 0), peak(4 * n, 0), weight(4 * n, 0), scratch(4 * kAttentionScratch, 0) {}
        };
        State first(queries, padded), second(queries, padded), plain_first(queries, padded), plain_second(queries, padded);
        auto run = [&](const AttentionKernels& kernels, State& a, State& b) {
          kernels.chunk(task, 0, a.out.floats(), a.peak.floats(), a.weight.floats(), a.scratch.floats());
          kernels.chunk(task, 1, b.out.floats(), b.peak.floats(), b.weight.floats(), b.scratch.floats());
          kernels.merge(queries, padded, a.out.floats(), a.peak.floats(), a.weight.floats(), b.out.floats(), b.peak.floats(), b.weight.floats());
          for (size_t i = 0; i < queries; ++i)
            kernels.finish(a.out.floats() + i * padded, a.weight.floats()[i], dim, b.out.floats() + i * padded);
        };
        run(found, first, second);
        run(reference, plain_first, plain_second);
        test.floats(first.out.floats(), plain_first.out.floats(), queries * padded, "merged sums");
        test.floats(first.peak.floats(), plain_first.peak.floats(), queries, "peaks");
        test.floats(first.weight.floats(), plain_first.weight.floats(), queries, "weights");
        test.floats(second.out.floats(), plain_second.out.floats(), queries * padded, "outputs");
      }
    }
  }
}

void check_tier(Tier tier, const Kernels& found, const LaneFunctions& lanes) {
  const Kernels reference{Tier::Reference, &reference::matmul_kernel, reference::row_kernels(), reference::attention_kernels()};
  const int before = passed;
  check_fma(tier, lanes);  // the reference tier's too: it is what the others are held to
  if (tier != Tier::Reference) {
    check_lanes(tier, lanes);
    check_rows(tier, found.rows, reference.rows);
    check_matmuls(tier, found, reference);
    check_attention(tier, found.attention, reference.attention);
  }
  std::printf("%s: %d cases equal\n", tier_name(tier), passed - before);
  std::fflush(stdout);
}

}  // namespace
}  // namespace edgewise

int main(int count, char** arguments) {
  using namespace edgewise;
  Tier best = best_tier();
  if (count > 1) {
    const std::optional<Tier> wanted = tier_named(arguments[count - 1]);
    if (wanted && count == 3 && std::strcmp(arguments[1], "--run") == 0) {
      best = *wanted;
    } else if (wanted != best) {
      std::printf("FAILED the best tier here is %s, expected %s\n", tier_name(best), arguments[count - 1]);
      ++failed;
    }
  }
#define EDGEWISE_TIER(tier, name) \
  if (Tier::tier <= best)         \
    check_tier(Tier::tier, {Tier::tier, &name::matmul_kernel, name::row_kernels(), name::attention_kernels()}, name::lane_functions());
#include "edgewise/tiers.inc"
#undef EDGEWISE_TIER
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}
