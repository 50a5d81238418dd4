// Products, attention and rounding in integers, for activations whose scales are fixed beforehand. Included once per tier,
// inside its namespace. Integers are exact, so that no order of additions matters; see kernels.h for what is computed.

#include "kernels/codes.inl.h"

namespace {

inline Floats nothing() { return zero(); }  // where a zero point has the name

// rint(x / scale), clamped to where codes end, before the zero point is added; what is no number becomes the lowest.
inline Floats steps_of(const Grid& grid, Floats x) {
  const Floats r = round_even(div(x, set1(grid.scale)));
  return min(max(r, set1(static_cast<float>(-grid.zero))), set1(static_cast<float>(grid.top - grid.zero)));
}
inline Floats snapped(const Grid& grid, Floats x) { return mul(steps_of(grid, x), set1(grid.scale)); }

// Values of sums whose codes are sum * multiplier / 2^shift + rest.
inline Floats values_of(const Grid& grid, Ints sum, Ints multiplier, int shift, Ints rest) {
  const Ints steps = clamp(add(rescale(sum, multiplier, shift), rest), -grid.zero, grid.top - grid.zero);
  return mul(to_floats(steps), set1(grid.scale));
}

// Codes as signed bytes: about half of their range, as they are where they have a zero point and fit.
template <int Bits, bool Zero>
inline void signed_codes(const uint8_t* p, Codes* c) {
  unpack<Bits>(p, c);
  if constexpr (!Zero || Bits == 8)
    for (int i = 0; i < 8; ++i) c[i] = sub(c[i], set1_codes(1 << (Bits - 1)));
}
template <int Bits, bool Zero>
constexpr int32_t centre_of = !Zero || Bits == 8 ? 1 << (Bits - 1) : 0;

template <int Bits, bool Zero, int Tokens>
inline void integer_tile(const PackedMatrix& w, size_t panel, const Activations& x, size_t tile, size_t slot, const Products& out,
                         const Ahead& ahead) {
  constexpr size_t block_nbytes = kLanes * kBlock * Bits / 8;
  constexpr int kChains = Tokens < 4 ? 4 : 1;  // side by side, so that they do not wait for one another
  const IntegerRows& rows = *w.integers;
  const size_t blocks = x.blocks(), slots = x.slots, first_row = panel * kLanes;
  const uint8_t* p = w.panel(panel) + w.format.header_nbytes();
  Ints sum[Tokens * kChains];
  for (int i = 0; i < Tokens * kChains; ++i) sum[i] = i % kChains == 0 ? start_unsigned(load_ints(rows.code_sum + first_row)) : zero_ints();
  int32_t negated[Tokens] = {};
  for (size_t b = 0; b < blocks; ++b, p += block_nbytes) {
    const uint8_t* fetched = Tokens == 1 ? ahead.of(p) : p + Ahead::kDistance;
    for (size_t line = 0; line < block_nbytes; line += 64) prefetch(fetched + line);
    Codes c[8];
    signed_codes<Bits, Zero>(p, c);
    const size_t at = (tile * blocks + b) * slots + slot;
#pragma GCC unroll 16
    for (int t = 0; t < Tokens; ++t) {
      const uint8_t* q = reinterpret_cast<const uint8_t*>(x.q) + (at + static_cast<size_t>(t)) * kBlock;
      if constexpr (Zero) negated[t] += x.negated_sum[at + static_cast<size_t>(t)];
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        Ints& total = sum[t * kChains + i % kChains];
        total = Bits < 8 ? dot4_unsigned_narrow(total, c[i], q + 4 * i) : dot4_unsigned(total, c[i], q + 4 * i);
      }
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < Tokens; ++t) {
    Ints total = add(sum[t * kChains], load_ints(rows.correction + first_row));
    for (int i = 1; i < kChains; ++i) total = add(total, sum[t * kChains + i]);
    if constexpr (Zero) total = add(total, mul(load_ints(rows.zero + first_row), set1_ints(negated[t])));
    Floats value;
    if (rows.multiplier != nullptr)
      value = values_of(rows.out, total, load_ints(rows.multiplier + first_row), rows.shift, load_ints(rows.rest + first_row));
    else
      value = fma(to_floats(total), load(rows.scale + first_row), load(rows.remainder + first_row));
    float* y = out.y + static_cast<size_t>(t) * out.stride;
    if (out.add) value = add(load(y), value);
    store(y, value);
  }
}

template <int Bits, bool Zero>
void integer_panels(const PackedMatrix& w, size_t panel, size_t panels, const Activations& x, size_t tile, size_t slot,
                    size_t count, const Products& out, const Ahead& ahead) {
  for (size_t i = 0; i < panels; ++i) {
    auto part = [&](size_t t) { return Products{out.y + t * out.stride + i * kLanes, out.stride, nullptr, out.add}; };
    size_t t = 0;
    for (; t + kTile <= count; t += kTile) integer_tile<Bits, Zero, kTile>(w, panel + i, x, tile, slot + t, part(t), ahead);
    if constexpr (kTile > 4)
      for (; t + 4 <= count; t += 4) integer_tile<Bits, Zero, 4>(w, panel + i, x, tile, slot + t, part(t), ahead);
    for (; t < count; ++t) integer_tile<Bits, Zero, 1>(w, panel + i, x, tile, slot + t, part(t), ahead);
  }
}

MatmulKernel integer_matmul(const PackedFormat& format) {
  if (format.element != Element::Integer || format.sparse || format.sub_group == 16 || format.has_min != format.zero_points ||
      (format.scale != ScaleType::Float16 && format.scale != ScaleType::Float32))
    return nullptr;
  switch (format.bits * 2 + (format.has_min ? 1 : 0)) {
    case 4: return &integer_panels<2, false>;
    case 5: return &integer_panels<2, true>;
    case 6: return &integer_panels<3, false>;
    case 7: return &integer_panels<3, true>;
    case 8: return &integer_panels<4, false>;
    case 9: return &integer_panels<4, true>;
    case 16: return &integer_panels<8, false>;
    case 17: return &integer_panels<8, true>;
    default: return nullptr;
  }
}

template <int Bits, bool Zero>
void describe_panel(const PackedMatrix& w, size_t panel, int32_t* code_sum, float* scale, int32_t* zero) {
  const PackedFormat& format = w.format;
  const uint8_t* p = w.panel(panel);
  store(scale, load_scale(p, format.scale));
  for (size_t i = 0; i < kLanes; ++i)
    zero[i] = Zero ? p[kLanes * format.scale_nbytes() + i] - centre_of<Bits, Zero> : 0;
  p += format.header_nbytes();
  float part[kLanes];
  for (size_t i = 0; i < kLanes; ++i) code_sum[i] = 0;
  for (size_t k = 0; k < w.cols; k += kBlock, p += kLanes * kBlock * Bits / 8) {
    Codes c[8];
    unpack<Bits>(p, c);
    Floats sum = nothing();
    for (int i = 0; i < 8; ++i)
      for (int j = 0; j < 4; ++j) sum = add(sum, byte_of(c[i], j));
    store(part, sum);  // below 2^24
    for (size_t i = 0; i < kLanes; ++i)
      code_sum[i] += static_cast<int32_t>(part[i]) - static_cast<int32_t>(kBlock) * centre_of<Bits, Zero>;
  }
}

void describe(const PackedMatrix& w, size_t panel, int32_t* code_sum, float* scale, int32_t* zero) {
  switch (w.format.bits * 2 + (w.format.has_min ? 1 : 0)) {
    case 4: return describe_panel<2, false>(w, panel, code_sum, scale, zero);
    case 5: return describe_panel<2, true>(w, panel, code_sum, scale, zero);
    case 6: return describe_panel<3, false>(w, panel, code_sum, scale, zero);
    case 7: return describe_panel<3, true>(w, panel, code_sum, scale, zero);
    case 8: return describe_panel<4, false>(w, panel, code_sum, scale, zero);
    case 9: return describe_panel<4, true>(w, panel, code_sum, scale, zero);
    case 16: return describe_panel<8, false>(w, panel, code_sum, scale, zero);
    default: return describe_panel<8, true>(w, panel, code_sum, scale, zero);
  }
}

// Sixteen codes as unsigned bytes, and their sum. Inputs that do not exist have code zero.
inline int32_t store_steps(const Grid& grid, const float* values, size_t left, uint8_t* codes) {
  if (left == 0) {
    for (size_t i = 0; i < kLanes; ++i) codes[i] = 0;
    return 0;
  }
  Floats code = add(steps_of(grid, load_tail(values, left)), set1(static_cast<float>(grid.zero)));
  if (left < kLanes) code = first(static_cast<int>(left), code, nothing());
  store_int8(reinterpret_cast<int8_t*>(codes), to_ints(sub(code, set1(128.0f))));
  for (size_t i = 0; i < kLanes; ++i) codes[i] ^= 0x80;
  return reduce_add(to_ints(code));
}

void quantise_to(const Grid& grid, const float* values, size_t first_input, size_t n, Activations& x, size_t token) {
  const size_t blocks = x.blocks(), tile = token / x.slots, slot = token % x.slots;
  for (size_t from = 0; from < n; from += kBlock) {
    const size_t at = (tile * blocks + (first_input + from) / kBlock) * x.slots + slot, left = n - from;
    uint8_t* codes = reinterpret_cast<uint8_t*>(x.q) + at * kBlock;
    const int32_t low = store_steps(grid, values + from, left, codes);
    const int32_t high = store_steps(grid, values + from + kLanes, left > kLanes ? left - kLanes : 0, codes + kLanes);
    x.negated_sum[at] = -(low + high);
  }
}

void snap(const Grid& grid, const float* x, size_t n, float* y) {
  for (size_t i = 0; i < n; i += kLanes) store_tail(y + i, snapped(grid, load_tail(x + i, n - i)), n - i);
}

void gate_rounded(Gate function, const Grid* sigmoid, const Grid* act, const float* gate, float* up, size_t n) {
  for (size_t i = 0; i < n; i += kLanes) {
    const Floats g = load_tail((gate == nullptr ? up : gate) + i, n - i);
    Floats a;
    switch (function) {
      case Gate::Silu: {
        if (sigmoid == nullptr) {
          a = silu(g);
        } else {
          a = mul(g, snapped(*sigmoid, div(set1(1.0f), add(set1(1.0f), exponential(sub(nothing(), g))))));
        }
        break;
      }
      case Gate::Gelu: a = gelu(g); break;
      case Gate::GeluTanh: a = gelu_tanh(g); break;
      default: a = relu(g);
    }
    if (act != nullptr) a = snapped(*act, a);
    store_tail(up + i, gate == nullptr ? a : mul(a, load_tail(up + i, n - i)), n - i);
  }
}

void store_key(const IntegerAttention& a, const float* key, size_t position, uint8_t* keys) {
  uint8_t* tile = keys + position / kLanes * a.key_tile_nbytes();
  const size_t lane = position % kLanes;
  int32_t sum = 0;
  for (size_t d = 0; d < a.padded(); d += kLanes) {
    uint8_t codes[kLanes];
    const size_t left = d < a.head_dim ? a.head_dim - d : 0;
    store_steps(a.key, key + d, left, codes);
    for (size_t i = 0; i < kLanes; ++i) {
      const int8_t code = i < left ? static_cast<int8_t>(codes[i] - 128) : int8_t{0};
      tile[64 + (d + i) / 4 * 64 + lane * 4 + i % 4] = static_cast<uint8_t>(code);
      sum += code;
    }
  }
  __builtin_memcpy(tile + 4 * lane, &sum, 4);
}

void store_value(const IntegerAttention& a, const float* value, size_t position, uint8_t* values) {
  uint8_t* four = values + position / 4 * 4 * a.padded();
  for (size_t d = 0; d < a.padded(); d += kLanes) {
    uint8_t codes[kLanes];
    store_steps(a.value, value + d, d < a.head_dim ? a.head_dim - d : 0, codes);
    for (size_t i = 0; i < kLanes; ++i) four[d * 4 + i * 4 + position % 4] = codes[i];
  }
}

void attend_in_integers(const IntegerAttention& a, const float* q, size_t begin, size_t end, const uint8_t* keys,
                        const uint8_t* values, float* out, uint8_t* scratch) {
  const size_t padded = a.padded(), first_tile = begin / kLanes, tiles = (end - 1) / kLanes + 1 - first_tile;
  const size_t base = first_tile * kLanes, positions = tiles * kLanes;
  float* scores = reinterpret_cast<float*>(scratch);
  int8_t* pieces[3];
  for (size_t i = 0; i < 3; ++i) pieces[i] = reinterpret_cast<int8_t*>(scratch) + (4 + i) * positions;

  alignas(64) uint8_t codes[kMaxHeadDim + kBlock];
  int32_t query_sum = 0;
  for (size_t d = 0; d < padded; d += kLanes)
    query_sum += store_steps(a.query, q + d, d < a.head_dim ? a.head_dim - d : 0, codes + d);
  const int32_t key_zero = a.key.zero - 128;
  const Ints constant = set1_ints(static_cast<int32_t>(a.head_dim) * a.query.zero * key_zero - key_zero * query_sum);
  const Ints minus_zero = set1_ints(-a.query.zero), multiplier = set1_ints(a.score_multiplier);
  Floats peaks = set1(-1e9f);
  for (size_t i = 0; i < tiles; ++i) {
    const uint8_t* tile = keys + (first_tile + i) * a.key_tile_nbytes();
    const Ints sums = load_ints(reinterpret_cast<const int32_t*>(tile));
    Ints dot[2] = {start_unsigned(sums), zero_ints()};
    for (size_t d = 0; d < padded; d += 8) {
      dot[0] = dot4_unsigned(dot[0], load_codes(tile + 64 + d * kLanes), codes + d);
      dot[1] = dot4_unsigned(dot[1], load_codes(tile + 128 + d * kLanes), codes + d + 4);
    }
    const Ints total = add(add(add(dot[0], dot[1]), mul(minus_zero, sums)), constant);
    Floats score = to_floats(clamp(rescale(total, multiplier, a.score_shift), -a.score.zero, a.score.top - a.score.zero));
    // What is not visible: far below all others.
    const size_t from = base + i * kLanes;
    if (from + kLanes > end) score = first(static_cast<int>(end - from), score, set1(-1e9f));
    if (from < begin) score = first(static_cast<int>(begin - from), set1(-1e9f), score);
    peaks = max(peaks, score);
    store(scores + i * kLanes, score);
  }
  const Floats peak = set1(reduce_max(peaks)), step = set1(a.score.scale);
  Floats totals = nothing();
  for (size_t i = 0; i < positions; i += kLanes) {
    const Floats e = exponential(mul(sub(load(scores + i), peak), step));
    store(scores + i, e);
    totals = add(totals, e);
  }
  const Floats total = set1(reduce_add(totals));
  int32_t weights[3] = {0, 0, 0};  // sums of the pieces of seven bits that probabilities are cut into
  for (size_t i = 0; i < positions; i += kLanes) {
    float steps[kLanes];
    store(steps, steps_of(a.probability, div(load(scores + i), total)));
    for (size_t lane = 0; lane < kLanes; ++lane) {
      const int32_t p = static_cast<int32_t>(steps[lane]);
      for (int piece = 0; piece < 3; ++piece) {
        const int32_t part = p >> 7 * piece & 127;
        pieces[piece][i + lane] = static_cast<int8_t>(part);
        weights[piece] += part;
      }
    }
  }
  const int32_t weight = weights[0] + (weights[1] << 7) + (weights[2] << 14);
  const Ints centred = set1_ints((128 - a.value.zero) * weight), out_multiplier = set1_ints(a.out_multiplier);
  for (size_t d = 0; d < a.head_dim; d += kLanes) {
    Ints sum[3];
    for (int i = 0; i < 3; ++i) sum[i] = start_full(-weights[i]);
    const uint8_t* at = values + base * padded + d * 4;
    for (size_t i = 0; i < positions; i += 4, at += 4 * padded) {
      if (base + i >= end) break;
      const Codes v = load_codes(at);
      for (int piece = 0; piece < 3; ++piece) sum[piece] = dot4_full(sum[piece], v, pieces[piece] + i);
    }
    const Ints products = add(add(sum[0], shift_left(sum[1], 7)), add(shift_left(sum[2], 14), centred));
    store_tail(out + d, values_of(a.out, products, out_multiplier, a.out_shift, zero_ints()), a.head_dim - d);
  }
}

}  // namespace

IntegerKernels integer_kernels() {
  return {&integer_matmul, &describe, &quantise_to, &snap, &gate_rounded, &store_key, &store_value, &attend_in_integers};
}
