// Scores and weighted values of keys, queries, weights and values in bfloat16: two products and their sum at once.
// Included once per tier, by attention.inl.h.

// sum[n * Queries + i] += vector(n) . pair(i), lane by lane. What is fewer stays in registers, the other is read where it
// is used.
template <int Vectors, int Queries, class Vector, class Pair>
inline void add_pairs(Vector vector, Pair pair, Floats* sum) {
  if constexpr (Vectors <= Queries) {
    Codes v[Vectors];
#pragma GCC unroll 12
    for (int n = 0; n < Vectors; ++n) v[n] = vector(n);
#pragma GCC unroll 12
    for (int i = 0; i < Queries; ++i) {
      const uint16_t* x = pair(i);
#pragma GCC unroll 12
      for (int n = 0; n < Vectors; ++n) sum[n * Queries + i] = dot2(sum[n * Queries + i], v[n], x);
    }
  } else {
#pragma GCC unroll 12
    for (int n = 0; n < Vectors; ++n) {
      const Codes v = vector(n);
#pragma GCC unroll 12
      for (int i = 0; i < Queries; ++i) sum[n * Queries + i] = dot2(sum[n * Queries + i], v, pair(i));
    }
  }
}

// Tiers of few registers take the queries of a pass in turns: block(count, first), count a constant.
template <int Count>
struct Counted {
  static constexpr int value = Count;
};

template <int Queries, class Block>
inline void in_turns(Block block) {
  constexpr int most = kTile >= 16 ? static_cast<int>(kMaxQueries) : 4;
  constexpr int turns = (Queries + most - 1) / most, rest = Queries - (turns - 1) * most;
  for (int turn = 0; turn < turns - 1; ++turn) block(Counted<most>{}, turn * most);
  block(Counted<rest>{}, (turns - 1) * most);
}

template <int Queries, int Tiles>
inline void bfloat_score_tiles(const AttentionTask& task, size_t tile, const uint16_t* q, size_t q_stride, bool fetch, float* scores) {
  const size_t tile_nbytes = task.layout->key_tile_nbytes();
  const uint8_t* keys = task.keys + tile * tile_nbytes;
  Floats sum[Tiles * Queries];
  for (int i = 0; i < Tiles * Queries; ++i) sum[i] = zero();
  if (fetch)
    for (size_t line = 0; line < Tiles * tile_nbytes; line += 64) prefetch(task.key_ahead.of(keys + line));
  for (size_t line = 0; line < tile_nbytes; line += 64)
    add_pairs<Tiles, Queries>([&](int n) { return load_codes(keys + static_cast<size_t>(n) * tile_nbytes + line); },
                              [&](int i) { return q + static_cast<size_t>(i) * q_stride + line / 32; }, sum);
  for (int n = 0; n < Tiles; ++n)
    for (int i = 0; i < Queries; ++i)
      store(scores + static_cast<size_t>(i) * kChunk + static_cast<size_t>(n) * kLanes, mul(sum[n * Queries + i], set1(task.scale)));
}

template <int Queries>
void bfloat_scores(const AttentionTask& task, size_t first_tile, size_t last_tile, float* scores, uint16_t* q) {
  const size_t base = first_tile / (kChunk / kLanes) * (kChunk / kLanes), stride = task.layout->padded();
  const size_t dim = task.layout->head_dim;
  for (size_t i = 0; i < static_cast<size_t>(Queries); ++i)
    for (size_t d = 0; d < stride; d += kLanes)
      store_bfloat(q + i * stride + d, d < dim ? load_tail(task.q + i * task.q_stride + d, dim - d) : zero());
  in_turns<Queries>([&](auto count, int turn) {
    constexpr int some = decltype(count)::value, together = chains_per_query(some);
    const uint16_t* first = q + static_cast<size_t>(turn) * stride;
    float* out = scores + static_cast<size_t>(turn) * kChunk;
    size_t tile = first_tile;
    for (; tile + together <= last_tile; tile += together)
      bfloat_score_tiles<some, together>(task, tile, first, stride, turn == 0 && task.key_ahead.fetches(), out + (tile - base) * kLanes);
    for (; tile < last_tile; ++tile) bfloat_score_tiles<some, 1>(task, tile, first, stride, turn == 0 && task.key_ahead.fetches(), out + (tile - base) * kLanes);
  });
}

// Values of two positions lie side by side, dimension by dimension. Where the last position has no second one yet, what
// lies there is left out: it need not be a number.
template <int Queries, int Parts>
inline void weigh_pair_parts(const AttentionTask& task, size_t from, size_t to, size_t d, const uint16_t* weights, bool fetch, float* out) {
  alignas(64) static constexpr uint16_t kFirst[2 * kLanes] = {0xffff, 0, 0xffff, 0, 0xffff, 0, 0xffff, 0, 0xffff, 0, 0xffff,
      0, 0xffff, 0, 0xffff, 0, 0xffff, 0, 0xffff, 0, 0xffff, 0, 0xffff, 0, 0xffff, 0, 0xffff, 0, 0xffff, 0, 0xffff, 0};
  const size_t padded = task.layout->value_padded(), row_nbytes = padded * 4;
  const uint8_t* row = task.values + from / 2 * row_nbytes + d * 4;
  Floats sum[Parts * Queries];
  for (int i = 0; i < Parts * Queries; ++i) sum[i] = zero();
  auto pair = [&](int i) { return weights + static_cast<size_t>(i) * kChunk; };
  for (size_t p = from; p + 1 < to; p += 2, weights += 2, row += row_nbytes) {
    if (fetch)
      for (size_t line = 0; line < row_nbytes; line += 64) prefetch(task.value_ahead.of(row + line));
    add_pairs<Parts, Queries>([&](int n) { return load_codes(row + n * 4 * kLanes); }, pair, sum);
  }
  if ((to - from) % 2 != 0) {
    const Codes mask = load_codes(reinterpret_cast<const uint8_t*>(kFirst));
    add_pairs<Parts, Queries>([&](int n) { return both(load_codes(row + n * 4 * kLanes), mask); }, pair, sum);
  }
  for (int n = 0; n < Parts; ++n)
    for (int i = 0; i < Queries; ++i)
      store(out + static_cast<size_t>(i) * padded + d + static_cast<size_t>(n) * kLanes, sum[n * Queries + i]);
}

// from: even.
template <int Queries>
void weigh_pairs(const AttentionTask& task, size_t from, size_t to, size_t chunk_start, const uint16_t* weights, float* out) {
  const size_t padded = task.layout->value_padded();
  in_turns<Queries>([&](auto count, int turn) {
    constexpr int some = decltype(count)::value, wanted = chains_per_query(some), together = wanted >= 4 ? 4 : wanted >= 2 ? 2 : 1;
    const uint16_t* first = weights + static_cast<size_t>(turn) * kChunk + (from - chunk_start);
    float* sums = out + static_cast<size_t>(turn) * padded;
    size_t d = 0;
    for (; d + together * kLanes <= padded; d += together * kLanes) weigh_pair_parts<some, together>(task, from, to, d, first, d == 0 && turn == 0 && task.value_ahead.fetches(), sums);
    for (; d < padded; d += kLanes) weigh_pair_parts<some, 1>(task, from, to, d, first, d == 0 && turn == 0 && task.value_ahead.fetches(), sums);
  });
}

// e^x for x <= 0, to 4e-6: what is rounded to bfloat16 next needs no more. 2^(n + r) = 2^n 2^r, |r| <= 1/2, by a minimax
// polynomial.
inline Floats falling_exponential(Floats x) {
  const Floats t = mul(max(x, set1(-87.0f)), set1(1.44269504088896341f)), n = round_even(t), r = sub(t, n);
  Floats p = set1(0.00958285294f);
  p = fma(p, r, set1(0.0559064262f));
  p = fma(p, r, set1(0.240240991f));
  p = fma(p, r, set1(0.693124175f));
  return scale_by_power(fma(p, r, set1(1.0f)), n);
}

struct RoundedWeights {
  uint16_t* to;
  static Floats power(Floats x) { return falling_exponential(x); }
  Floats put(size_t at, Floats x) const {  // what is summed is what weighs
    store_bfloat(to + at, x);
    return load_bfloat(to + at);
  }
};
