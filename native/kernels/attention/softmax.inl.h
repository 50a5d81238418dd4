// From scores to weights. Included once per tier, by attention.inl.h.

// The positions of a chunk that any query sees, [from, to) and the tiles they lie in. Empty: from >= to.
struct Seen {
  size_t start, from, to;
  Seen(const AttentionTask& task, size_t chunk) : start(chunk * kChunk), from(start + kChunk), to(start) {
    for (size_t i = 0; i < task.queries; ++i) {
      const size_t b = static_cast<size_t>(task.begin[i]), e = static_cast<size_t>(task.end[i]);
      if (b >= e) continue;
      if (b < from) from = b;
      if (e > to) to = e;
    }
    if (from < start) from = start;
    if (to > start + kChunk) to = start + kChunk;
  }
  bool empty() const { return from >= to; }
  size_t first_tile() const { return from / kLanes; }
  size_t last_tile() const { return (to + kLanes - 1) / kLanes; }
};

// The tiles of a chunk as a query sees them: those from whole to whole_end wholly, those around them in part or not at all.
struct Visible {
  size_t from, to, whole, whole_end;
  long begin, end;

  Visible(const Seen& seen, long first, long last) : from(seen.first_tile()), to(seen.last_tile()), begin(first), end(last) {
    whole = within((static_cast<size_t>(begin) + kLanes - 1) / kLanes, from, to);
    whole_end = within(static_cast<size_t>(end) / kLanes, whole, to);
  }
  static size_t within(size_t x, size_t low, size_t high) { return x < low ? low : x > high ? high : x; }
  // What is seen of a tile, and elsewhere what stands for hidden.
  Floats of(size_t tile, Floats x, Floats hidden) const {
    const long at = static_cast<long>(tile * kLanes), lanes = static_cast<long>(kLanes);
    if (end < at + lanes) x = first_lanes(end - at, x, hidden);
    if (begin > at) x = first_lanes(begin - at, hidden, x);
    return x;
  }
  static Floats first_lanes(long n, Floats a, Floats b) {
    return first(static_cast<int>(n < 0 ? 0 : n < static_cast<long>(kLanes) ? n : static_cast<long>(kLanes)), a, b);
  }
};

// Weights of a chunk from its scores, their sum, and the highest score, of one query. Lanes start at fixed positions of the
// chunk, so a query's sum does not depend on its neighbours' positions: tiles outside its own range add exact zeros.
template <class Weights>
inline void soften(const Visible& visible, size_t start, const float* scores, Weights weights, float* peak, float* weight) {
  const Floats hidden = set1(kHidden);
  const float* tiles = scores - start;
  Floats highest = hidden;
  for (size_t t = visible.from; t < visible.whole; ++t) highest = max(highest, visible.of(t, load(tiles + t * kLanes), hidden));
  for (size_t t = visible.whole; t < visible.whole_end; ++t) highest = max(highest, load(tiles + t * kLanes));
  for (size_t t = visible.whole_end; t < visible.to; ++t) highest = max(highest, visible.of(t, load(tiles + t * kLanes), hidden));
  *peak = reduce_max(highest);
  *weight = 0.0f;
  if (*peak == kHidden) {
    for (size_t t = visible.from; t < visible.to; ++t) weights.put(t * kLanes - start, zero());
    return;
  }
  const Floats top = set1(*peak);
  Floats total = zero();
  // The exponential clamps its argument, so what is hidden is set to zero by position, not by value.
  auto edge = [&](size_t t) {
    total = add(total, weights.put(t * kLanes - start, visible.of(t, Weights::power(sub(load(tiles + t * kLanes), top)), zero())));
  };
  for (size_t t = visible.from; t < visible.whole; ++t) edge(t);
  for (size_t t = visible.whole; t < visible.whole_end; ++t)
    total = add(total, weights.put(t * kLanes - start, Weights::power(sub(load(tiles + t * kLanes), top))));
  for (size_t t = visible.whole_end; t < visible.to; ++t) edge(t);
  *weight = reduce_add(total);
}

struct FloatWeights {
  float* to;
  static Floats power(Floats x) { return exponential(x); }
  Floats put(size_t at, Floats x) const {
    store(to + at, x);
    return x;
  }
};

// The same for Rows queries that see every tile wholly, side by side: one row alone waits for its own sums.
template <int Rows, class Weights>
inline void soften_whole(size_t tiles, const float* scores, const Weights* weights, float* peak, float* weight) {
  Floats highest[Rows], total[Rows], top[Rows];
  for (int i = 0; i < Rows; ++i) highest[i] = set1(kHidden), total[i] = zero();
  for (size_t at = 0; at < tiles * kLanes; at += kLanes)
#pragma GCC unroll 4
    for (int i = 0; i < Rows; ++i) highest[i] = max(highest[i], load(scores + static_cast<size_t>(i) * kChunk + at));
#pragma GCC unroll 4
  for (int i = 0; i < Rows; ++i) {
    peak[i] = reduce_max(highest[i]);
    top[i] = set1(peak[i]);
  }
  for (size_t at = 0; at < tiles * kLanes; at += kLanes)
#pragma GCC unroll 4
    for (int i = 0; i < Rows; ++i)
      total[i] = add(total[i], weights[i].put(at, Weights::power(sub(load(scores + static_cast<size_t>(i) * kChunk + at), top[i]))));
#pragma GCC unroll 4
  for (int i = 0; i < Rows; ++i) weight[i] = reduce_add(total[i]);
}

// Of all queries of a pass. to: where the weights of the first begin; those of a query lie kChunk further than of the last.
template <class Weights, class To>
inline void soften_all(const AttentionTask& task, const Seen& seen, const float* scores, To* to, float* peak, float* weight) {
  constexpr size_t kRows = kTile >= 16 ? 4 : 1;
  const size_t first_tile = seen.first_tile(), last_tile = seen.last_tile();
  auto whole = [&](size_t i) {
    return static_cast<size_t>(task.begin[i]) <= first_tile * kLanes && static_cast<size_t>(task.end[i]) >= last_tile * kLanes;
  };
  for (size_t i = 0; i < task.queries;) {
    bool all = i + kRows <= task.queries;
    for (size_t k = 0; all && k < kRows; ++k) all = whole(i + k);
    if (all && first_tile * kLanes == seen.start) {
      Weights rows[kRows];
      for (size_t k = 0; k < kRows; ++k) rows[k] = {to + (i + k) * kChunk};
      soften_whole<kRows>(last_tile - first_tile, scores + i * kChunk, rows, peak + i, weight + i);
      i += kRows;
      continue;
    }
    soften(Visible(seen, task.begin[i], task.end[i]), seen.start, scores + i * kChunk, Weights{to + i * kChunk}, peak + i, weight + i);
    ++i;
  }
}
