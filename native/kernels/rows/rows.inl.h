// Operations on rows of activations. Included once per tier, inside its namespace.

namespace {

void rms_norm(const float* x, const float* weight, float eps, size_t n, float* y) {
  Floats squares = zero();
  for (size_t i = 0; i < n; i += kLanes) {
    const Floats v = load_tail(x + i, n - i);
    squares = fma(v, v, squares);
  }
  const float mean = reduce_add(squares) / static_cast<float>(n);
  const Floats root = set1(__builtin_sqrtf(mean + eps));
  for (size_t i = 0; i < n; i += kLanes) {
    Floats v = div(load_tail(x + i, n - i), root);
    if (weight != nullptr) v = mul(v, load_tail(weight + i, n - i));
    store_tail(y + i, v, n - i);
  }
}

void layer_norm(const float* x, const float* weight, const float* bias, float eps, size_t n, float* y) {
  Floats total = zero();
  for (size_t i = 0; i < n; i += kLanes) total = add(total, load_tail(x + i, n - i));
  const Floats mean = set1(reduce_add(total) / static_cast<float>(n));
  Floats squares = zero();
  for (size_t i = 0; i < n; i += kLanes) {
    Floats centred = sub(load_tail(x + i, n - i), mean);
    if (n - i < kLanes) centred = first(static_cast<int>(n - i), centred, zero());
    squares = fma(centred, centred, squares);
  }
  const Floats root = set1(__builtin_sqrtf(reduce_add(squares) / static_cast<float>(n) + eps));
  for (size_t i = 0; i < n; i += kLanes) {
    Floats v = div(sub(load_tail(x + i, n - i), mean), root);
    if (weight != nullptr) v = mul(v, load_tail(weight + i, n - i));
    if (bias != nullptr) v = add(v, load_tail(bias + i, n - i));
    store_tail(y + i, v, n - i);
  }
}

void add_rows(const float* x, size_t n, float* y) {
  for (size_t i = 0; i < n; i += kLanes) store_tail(y + i, add(load_tail(y + i, n - i), load_tail(x + i, n - i)), n - i);
}

template <Floats (*Function)(Floats)>
inline void gate_with(const float* gate, float* up, size_t n) {
  if (gate == nullptr) {
    for (size_t i = 0; i < n; i += kLanes) store_tail(up + i, Function(load_tail(up + i, n - i)), n - i);
    return;
  }
  for (size_t i = 0; i < n; i += kLanes)
    store_tail(up + i, mul(Function(load_tail(gate + i, n - i)), load_tail(up + i, n - i)), n - i);
}

void gate_rows(Gate function, const float* gate, float* up, size_t n) {
  switch (function) {
    case Gate::Silu: return gate_with<silu>(gate, up, n);
    case Gate::Gelu: return gate_with<gelu>(gate, up, n);
    case Gate::GeluTanh: return gate_with<gelu_tanh>(gate, up, n);
    default: return gate_with<relu>(gate, up, n);
  }
}

// x / scale without a division: the product with the reciprocal, and what the remainder adds to it. With a reciprocal
// that is rounded right the quotient is too (Markstein, IBM Journal of Research and Development 34(1), 1990).
inline Floats quotient(Floats x, Floats scale, Floats reciprocal) {
  const Floats q = mul(x, reciprocal);
  return fma(fnma(q, scale, x), reciprocal, q);
}

// Blocks of 32 inputs to int8: scale = peak / 127, codes = round(x / scale), ties to even.
void quantise(const float* values, size_t first, size_t n, Activations& x, size_t token) {
  const size_t blocks = x.blocks(), tile = token / x.slots, slot = token % x.slots;
  for (size_t from = 0; from < n; from += kBlock) {
    const size_t at = (tile * blocks + (first + from) / kBlock) * x.slots + slot;
    const Floats low = load_tail(values + from, n - from);
    const Floats high = n - from > kLanes ? load_tail(values + from + kLanes, n - from - kLanes) : zero();
    const float peak = reduce_max(max(abs(low), abs(high)));
    const float scale = peak >= kSmallestPeak ? peak / 127.0f : 1.0f;
    const Floats divisor = set1(scale), reciprocal = set1(1.0f / scale);
    const Ints q_low = to_ints(quotient(low, divisor, reciprocal)), q_high = to_ints(quotient(high, divisor, reciprocal));
    store_int8(x.q + at * kBlock, q_low);
    store_int8(x.q + at * kBlock + kLanes, q_high);
    const int32_t sum_low = reduce_add(q_low), sum_high = reduce_add(q_high);
    x.scale[at] = scale;
    x.negated_sum[at] = -(sum_low + sum_high);
    x.negated_sum_low[at] = -sum_low;
    x.sum[at] = scale * static_cast<float>(sum_low + sum_high);
    x.sum_low[at] = scale * static_cast<float>(sum_low);
    x.sum_high[at] = scale * static_cast<float>(sum_high);
  }
}

void place(const float* values, size_t first, size_t n, Activations& x, size_t token) {
  const size_t blocks = x.blocks(), tile = token / x.slots, slot = token % x.slots;
  for (size_t from = 0; from < n; from += kBlock) {
    float* f = x.f + ((tile * blocks + (first + from) / kBlock) * x.slots + slot) * kBlock;
    store(f, load_tail(values + from, n - from));
    store(f + kLanes, n - from > kLanes ? load_tail(values + from + kLanes, n - from - kLanes) : zero());
  }
}

// The first of the highest values; what is no number is passed over.
size_t highest(const float* x, size_t n) {
  constexpr size_t kStretch = 64 * kLanes;
  size_t at = 0;
  float best = -__builtin_inff();
  for (size_t from = 0; from < n; from += kStretch) {  // the highest of a stretch by lanes, its place only where it counts
    const size_t end = from + kStretch < n ? from + kStretch : n;
    Floats tops[4];
    for (Floats& top : tops) top = set1(-__builtin_inff());
    size_t i = from;
    for (; i + 4 * kLanes <= end; i += 4 * kLanes)
#pragma GCC unroll 4
      for (size_t k = 0; k < 4; ++k) tops[k] = max(load(x + i + k * kLanes), tops[k]);
    float top = reduce_max(max(max(tops[0], tops[1]), max(tops[2], tops[3])));
    for (; i < end; ++i)
      if (x[i] > top) top = x[i];
    if (!(top > best)) continue;
    best = top;
    at = from;
    while (x[at] != best) ++at;
  }
  return at;
}

void place_bfloat(const float* values, size_t first, size_t n, Activations& x, size_t token) {
  const size_t blocks = x.blocks(), tile = token / x.slots, slot = token % x.slots;
  for (size_t from = 0; from < n; from += kBlock) {
    uint16_t* bf = x.bf + ((tile * blocks + (first + from) / kBlock) * x.slots + slot) * kBlock;
    store_bfloat(bf, load_tail(values + from, n - from));
    store_bfloat(bf + kLanes, n - from > kLanes ? load_tail(values + from + kLanes, n - from - kLanes) : zero());
  }
}

float sum_of_exponentials(const float* x, float peak, size_t n) {
  const Floats top = set1(peak);
  Floats totals[4];  // four chains of additions, so that they do not wait for one another
  for (Floats& total : totals) total = zero();
  size_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
#pragma GCC unroll 4
    for (size_t k = 0; k < 4; ++k) totals[k] = add(totals[k], exponential(sub(load(x + i + k * kLanes), top)));
  for (size_t k = 0; i < n; i += kLanes, ++k) {
    Floats e = exponential(sub(load_tail(x + i, n - i), top));
    if (n - i < kLanes) e = first(static_cast<int>(n - i), e, zero());
    totals[k] = add(totals[k], e);
  }
  return reduce_add(add(add(totals[0], totals[1]), add(totals[2], totals[3])));
}

}  // namespace

RowKernels row_kernels() {
  return {&rms_norm, &layer_norm, &add_rows, &gate_rows, &quantise, &place, &place_bfloat, &highest, &sum_of_exponentials};
}
