// Lane functions; fma also against integers, on the reference tier too.
#include "tests/check.h"

namespace edgewise {

namespace {

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

}  // namespace

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
  Case beside(tier, "interleave"), higher(tier, "above");
  Case selected(tier, "dot4_selected"), plain(tier, "dot4_unsigned"), narrow_plain(tier, "dot4_unsigned_narrow"), scaled(tier, "rescale");
  for (int round = 0; round < 500; ++round) {
    const std::vector<uint8_t> codes = filled<uint8_t>(512, [&] { return random.byte(); });
    const std::vector<uint8_t> values = filled<uint8_t>(16, [&] { return random.byte(); });
    found.look_up(values.data(), codes.data(), out);
    reference.look_up(values.data(), codes.data(), expected);
    look_up.floats(out, expected, 64, "any table");
    float side[256], wanted_side[256], a[16], b[16];
    found.interleave(codes.data(), side);
    reference.interleave(codes.data(), wanted_side);
    beside.floats(side, wanted_side, 256, "bytes");
    for (int i = 0; i < 16; ++i) {
      a[i] = round % 2 ? random.bits() : static_cast<float>(random.below(3));
      b[i] = round % 2 ? random.bits() : static_cast<float>(random.below(3));
    }
    const uint32_t mask = found.above(a, b), wanted_mask = reference.above(a, b);
    higher.same(&mask, &wanted_mask, 1, "mask");
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

}  // namespace edgewise
