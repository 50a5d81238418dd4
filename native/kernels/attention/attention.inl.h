// Attention of a few queries over one chunk of positions, and the merge of chunks. Included once per tier.
//
// Softmax over all positions is computed chunk by chunk (256 positions, fixed) with a running maximum (Milakov and
// Gimelshein, arXiv:1805.02867; FlashAttention, arXiv:2205.14135, section 3.1). A query's bits depend only on its own
// positions: queries that share a pass share loads, never sums.

namespace {

constexpr float kHidden = -__builtin_inff();

inline Floats load_key(const uint8_t* tile, size_t d, KvType type) {
  if (type == KvType::Float32) return load(reinterpret_cast<const float*>(tile) + kLanes * d);
  return load_half(reinterpret_cast<const uint16_t*>(tile) + kLanes * d);
}

// Every sum is a chain of dependent additions: with few queries, several tiles or dimensions go side by side, so that the
// multipliers stay busy. Each chain keeps its own order, and with it its bits.
constexpr int chains_per_query(int queries) {
  const int chains = kTile >= 16 ? 24 : 4, most = kTile >= 16 ? 12 : 4;
  return queries >= chains ? 1 : chains / queries < most ? chains / queries : most;
}

// sum[n * Queries + i] += vectors[n] * scalar(i): what is fewer stays in registers, the other is read where it is used.
template <int Vectors, int Queries, class Vector, class Scalar>
inline void add_products(Vector vector, Scalar scalar, Floats* sum) {
  if constexpr (Vectors <= Queries) {
    Floats v[Vectors];
#pragma GCC unroll 12
    for (int n = 0; n < Vectors; ++n) v[n] = vector(n);
#pragma GCC unroll 12
    for (int i = 0; i < Queries; ++i) {
      const Floats s = set1(scalar(i));
#pragma GCC unroll 12
      for (int n = 0; n < Vectors; ++n) sum[n * Queries + i] = fma(v[n], s, sum[n * Queries + i]);
    }
  } else {
    Floats s[Queries];
#pragma GCC unroll 12
    for (int i = 0; i < Queries; ++i) s[i] = set1(scalar(i));
#pragma GCC unroll 12
    for (int n = 0; n < Vectors; ++n) {
      const Floats v = vector(n);
#pragma GCC unroll 12
      for (int i = 0; i < Queries; ++i) sum[n * Queries + i] = fma(v, s[i], sum[n * Queries + i]);
    }
  }
}

template <int Queries, int Tiles, KvType Type>
inline void score_tiles(const AttentionTask& task, size_t tile, size_t dim, size_t tile_nbytes, float* scores) {
  const uint8_t* keys = task.keys + tile * tile_nbytes;
  Floats sum[Tiles * Queries];
  for (int i = 0; i < Tiles * Queries; ++i) sum[i] = zero();
  for (size_t line = 0; line < Tiles * tile_nbytes; line += 64) prefetch(task.key_ahead.of(keys + line));
  for (size_t d = 0; d < dim; ++d)
    add_products<Tiles, Queries>([&](int n) { return load_key(keys + static_cast<size_t>(n) * tile_nbytes, d, Type); },
                                 [&](int i) { return task.q[static_cast<size_t>(i) * task.q_stride + d]; }, sum);
  for (int n = 0; n < Tiles; ++n)
    for (int i = 0; i < Queries; ++i)
      store(scores + static_cast<size_t>(i) * kChunk + static_cast<size_t>(n) * kLanes, mul(sum[n * Queries + i], set1(task.scale)));
}

// scores[query][position - chunk start] for tiles [first_tile, last_tile) of 16 positions: lanes are positions.
template <int Queries, KvType Type>
void float_scores(const AttentionTask& task, size_t first_tile, size_t last_tile, float* scores) {
  const size_t dim = task.layout->head_dim, tile_nbytes = task.layout->key_tile_nbytes();
  const size_t base = first_tile / (kChunk / kLanes) * (kChunk / kLanes);
  constexpr int together = chains_per_query(Queries);
  size_t tile = first_tile;
  for (; tile + together <= last_tile; tile += together)
    score_tiles<Queries, together, Type>(task, tile, dim, tile_nbytes, scores + (tile - base) * kLanes);
  for (; tile < last_tile; ++tile)
    score_tiles<Queries, 1, Type>(task, tile, dim, tile_nbytes, scores + (tile - base) * kLanes);
}

void quantised_scores(const AttentionTask& task, size_t first_tile, size_t last_tile, float* scores, float* scratch) {
  const size_t base = first_tile / (kChunk / kLanes) * (kChunk / kLanes);
  Activations x;
  x.tokens = task.queries;
  x.cols = task.layout->head_dim;
  x.slots = kLanes;
  x.place_int8(reinterpret_cast<uint8_t*>(scratch));
  const auto quantise = row_kernels().quantise;
  for (size_t i = 0; i < task.queries; ++i) quantise(task.q + i * task.q_stride, 0, x.cols, x, i);
  PackedMatrix keys;
  keys.format = task.layout->key_format();
  keys.cols = x.cols;
  keys.data = task.keys;
  keys.panel_nbytes = task.layout->key_tile_nbytes();
  const MatmulKernel kernel = matmul_kernel(keys.format, true);
  float out[kMaxQueries * kLanes];
  for (size_t tile = first_tile; tile < last_tile; ++tile) {
    kernel(keys, tile, 1, x, 0, 0, task.queries, {out, kLanes}, task.key_ahead);
    for (size_t i = 0; i < task.queries; ++i)
      store(scores + i * kChunk + (tile - base) * kLanes, mul(load(out + i * kLanes), set1(task.scale)));
  }
}

// The distances of a tile's keys are sixteen in a row, so their biases are too.
void add_bias(const AttentionTask& task, size_t first_tile, size_t last_tile, float* scores) {
  const size_t base = first_tile / (kChunk / kLanes) * (kChunk / kLanes);
  const long reach = task.reach, lanes = static_cast<long>(kLanes);
  for (size_t i = 0; i < task.queries; ++i)
    for (size_t tile = first_tile; tile < last_tile; ++tile) {
      const long distance = static_cast<long>(tile * kLanes) - task.position[i];
      const long known = distance < -reach - lanes ? -reach - lanes : distance > reach ? reach : distance;
      float* lane = scores + i * kChunk + (tile - base) * kLanes;
      store(lane, add(load(lane), load(task.bias[i] + known)));
    }
}

inline Floats load_value(const uint8_t* value, size_t d, size_t padded, KvType type) {
  if (type == KvType::Float32) return load(reinterpret_cast<const float*>(value) + d);
  if (type == KvType::Float16) return load_half(reinterpret_cast<const uint16_t*>(value) + d);
  // Quantised values: codes of the whole head, then one float scale per 32 dimensions.
  const float scale = reinterpret_cast<const float*>(value + (type == KvType::Int8 ? padded : padded / 2))[d / kBlock];
  if (type == KvType::Int8) return mul(load_int8(reinterpret_cast<const int8_t*>(value) + d), set1(scale));
  // Four bits: dimensions 0..15 of a block in the low nibbles of 16 bytes, 16..31 in the high ones.
  uint8_t code[kLanes];
  const uint8_t* block = value + d / kBlock * kLanes;
  const int shift = d % kBlock == 0 ? 0 : 4;
  for (size_t i = 0; i < kLanes; ++i) code[i] = static_cast<uint8_t>((block[i] >> shift) & 15);
  return mul(sub(load_uint8(code), set1(8.0f)), set1(scale));
}

template <int Queries, int Parts, KvType Type>
inline void weigh_parts(const AttentionTask& task, size_t from, size_t to, size_t d, const float* weights, float* out) {
  const size_t padded = task.layout->padded(), value_nbytes = task.layout->value_nbytes();
  const uint8_t* value = task.values + from * value_nbytes;
  Floats sum[Parts * Queries];
  for (int i = 0; i < Parts * Queries; ++i) sum[i] = zero();
  for (size_t p = from; p < to; ++p, ++weights, value += value_nbytes) {
    if (d == 0)
      for (size_t line = 0; line < value_nbytes; line += 64) prefetch(task.value_ahead.of(value + line));
    add_products<Parts, Queries>([&](int n) { return load_value(value, d + static_cast<size_t>(n) * kLanes, padded, Type); },
                                 [&](int i) { return weights[static_cast<size_t>(i) * kChunk]; }, sum);
  }
  for (int n = 0; n < Parts; ++n)
    for (int i = 0; i < Queries; ++i)
      store(out + static_cast<size_t>(i) * padded + d + static_cast<size_t>(n) * kLanes, sum[n * Queries + i]);
}

// out[query][d] = sum over positions of p * v: lanes are dimensions, positions in order.
template <int Queries, KvType Type>
void weigh_values(const AttentionTask& task, size_t from, size_t to, size_t chunk_start, const float* scores, float* out) {
  constexpr int wanted = chains_per_query(Queries), together = wanted >= 4 ? 4 : wanted >= 2 ? 2 : 1;
  const float* weights = scores + (from - chunk_start);
  size_t d = 0;
  for (; d + together * kLanes <= task.layout->padded(); d += together * kLanes)
    weigh_parts<Queries, together, Type>(task, from, to, d, weights, out);
  for (; d < task.layout->padded(); d += kLanes) weigh_parts<Queries, 1, Type>(task, from, to, d, weights, out);
}

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

// A query's scores over whole tiles become e^(score - peak), zero where it does not see; their sum. Without a position that
// it sees, the peak is kHidden.
inline void soften(const Seen& seen, long begin, long end, float* row, float* peak, float* weight) {
  const Floats hidden = set1(kHidden);
  const size_t first_tile = seen.first_tile(), last_tile = seen.last_tile();
  Floats highest = hidden;
  for (size_t tile = first_tile; tile < last_tile; ++tile) {
    const long at = static_cast<long>(tile * kLanes);
    float* lane = row + (tile * kLanes - seen.start);
    Floats s = load(lane);
    if (end < at + static_cast<long>(kLanes)) s = first(static_cast<int>(end > at ? end - at : 0), s, hidden);
    if (begin > at) s = first(static_cast<int>(begin - at < 16 ? begin - at : 16), hidden, s);
    store(lane, s);
    highest = max(highest, s);
  }
  *peak = reduce_max(highest);
  *weight = 0.0f;
  if (*peak == kHidden) {
    for (size_t tile = first_tile; tile < last_tile; ++tile) store(row + (tile * kLanes - seen.start), zero());
    return;
  }
  // Lanes start at fixed positions of the chunk, so a query's sum does not depend on its neighbours' positions:
  // tiles outside its own range add exact zeros.
  Floats total = zero();
  for (size_t tile = first_tile; tile < last_tile; ++tile) {
    const long at = static_cast<long>(tile * kLanes);
    float* lane = row + (tile * kLanes - seen.start);
    Floats e = exponential(sub(load(lane), set1(*peak)));
    // exp clamps its argument, so hidden lanes are set to zero by position, not by value.
    if (end < at + static_cast<long>(kLanes)) e = first(static_cast<int>(end > at ? end - at : 0), e, zero());
    if (begin > at) e = first(static_cast<int>(begin - at < 16 ? begin - at : 16), zero(), e);
    store(lane, e);
    total = add(total, e);
  }
  *weight = reduce_add(total);
}

template <int Queries, KvType Type>
void chunk_of(const AttentionTask& task, size_t chunk, float* out, float* peak, float* weight, float* scratch) {
  const Seen seen(task, chunk);
  if (seen.empty()) {
    for (int i = 0; i < Queries; ++i) peak[i] = kHidden;
    return;
  }
  float* scores = scratch;
  if constexpr (Type == KvType::Float32 || Type == KvType::Float16)
    float_scores<Queries, Type>(task, seen.first_tile(), seen.last_tile(), scores);
  else
    quantised_scores(task, seen.first_tile(), seen.last_tile(), scores, scratch + kMaxQueries * kChunk);
  if (task.bias != nullptr) add_bias(task, seen.first_tile(), seen.last_tile(), scores);
  for (int i = 0; i < Queries; ++i) soften(seen, task.begin[i], task.end[i], scores + i * kChunk, peak + i, weight + i);
  weigh_values<Queries, Type>(task, seen.from, seen.to, seen.start, scores, out);
}

template <int Queries>
void chunk_of_type(const AttentionTask& task, size_t chunk, float* out, float* peak, float* weight, float* scratch) {
  switch (task.layout->type) {
    case KvType::Float32: return chunk_of<Queries, KvType::Float32>(task, chunk, out, peak, weight, scratch);
    case KvType::Float16: return chunk_of<Queries, KvType::Float16>(task, chunk, out, peak, weight, scratch);
    case KvType::Int8: return chunk_of<Queries, KvType::Int8>(task, chunk, out, peak, weight, scratch);
    default: return chunk_of<Queries, KvType::Int4>(task, chunk, out, peak, weight, scratch);
  }
}

void attend_chunk(const AttentionTask& task, size_t chunk, float* out, float* peak, float* weight, float* scratch) {
  switch (task.queries) {
#define EDGEWISE_QUERIES(n) \
  case n: return chunk_of_type<n>(task, chunk, out, peak, weight, scratch);
    EDGEWISE_QUERIES(1) EDGEWISE_QUERIES(2) EDGEWISE_QUERIES(3) EDGEWISE_QUERIES(4) EDGEWISE_QUERIES(5)
    EDGEWISE_QUERIES(6) EDGEWISE_QUERIES(7) EDGEWISE_QUERIES(8) EDGEWISE_QUERIES(9) EDGEWISE_QUERIES(10)
    EDGEWISE_QUERIES(11) EDGEWISE_QUERIES(12)
#undef EDGEWISE_QUERIES
    default: return;
  }
}

void merge(float* out, float* peak, float* weight, const float* later, float later_peak, float later_weight, size_t n) {
  if (later_peak == kHidden) return;
  if (*peak == kHidden) {
    for (size_t i = 0; i < n; i += kLanes) store(out + i, load(later + i));
    *peak = later_peak;
    *weight = later_weight;
    return;
  }
  const float top = *peak > later_peak ? *peak : later_peak;
  float factors[kLanes] = {*peak - top, later_peak - top};
  store(factors, exponential(load(factors)));
  const Floats a = set1(factors[0]), b = set1(factors[1]);
  for (size_t i = 0; i < n; i += kLanes) store(out + i, fma(load(later + i), b, mul(load(out + i), a)));
  *weight = *weight * factors[0] + later_weight * factors[1];
  *peak = top;
}

void finish(const float* sum, float weight, size_t n, float* out) {
  const Floats share = set1(1.0f / weight);
  for (size_t i = 0; i < n; i += kLanes) store_tail(out + i, mul(load(sum + i), share), n - i);
}

void store_key(const KvLayout& layout, const float* key, size_t position, uint8_t* keys) {
  uint8_t* tile = keys + position / kLanes * layout.key_tile_nbytes();
  const size_t lane = position % kLanes, dim = layout.head_dim;
  if (layout.type == KvType::Float32) {
    float* k = reinterpret_cast<float*>(tile) + lane;
    for (size_t d = 0; d < dim; ++d) k[d * kLanes] = key[d];
    return;
  }
  if (layout.type == KvType::Float16) {
    uint16_t* k = reinterpret_cast<uint16_t*>(tile) + lane;
    for (size_t d = 0; d < dim; d += kLanes) {
      uint16_t half[kLanes];
      store_half(half, load_tail(key + d, dim - d));
      for (size_t i = 0; i < kLanes && d + i < dim; ++i) k[(d + i) * kLanes] = half[i];
    }
    return;
  }
  // A packed panel of one record per block: sixteen float scales, then the codes.
  const PackedFormat format = layout.key_format();
  const size_t block_nbytes = format.block_nbytes();
  for (size_t d = 0; d < dim; d += kBlock) {
    float* scales = reinterpret_cast<float*>(tile);
    uint8_t* codes = tile + 4 * kLanes;
    float peak = 0.0f;
    const size_t count = dim - d < kBlock ? dim - d : kBlock;
    for (size_t i = 0; i < count; ++i) peak = __builtin_fabsf(key[d + i]) > peak ? __builtin_fabsf(key[d + i]) : peak;
    const float levels = layout.type == KvType::Int8 ? 127.0f : 7.0f;
    const float scale = peak >= kSmallestPeak ? peak / levels : 1.0f;
    scales[lane] = scale;
    for (size_t i = 0; i < kBlock; ++i) {
      const int q = i < count ? static_cast<int>(__builtin_rintf(key[d + i] / scale)) : 0;
      if (layout.type == KvType::Int8) {
        codes[i / 4 * 64 + lane * 4 + i % 4] = static_cast<uint8_t>(q + 128);
      } else {
        uint8_t& pair = codes[i / 8 * 64 + lane * 4 + i % 4];
        const uint8_t code = static_cast<uint8_t>(q + 8);
        pair = i % 8 < 4 ? static_cast<uint8_t>((pair & 0xF0) | code) : static_cast<uint8_t>((pair & 0x0F) | (code << 4));
      }
    }
    tile += 4 * kLanes + block_nbytes;
  }
}

void store_value(const KvLayout& layout, const float* value, size_t position, uint8_t* values) {
  uint8_t* p = values + position * layout.value_nbytes();
  const size_t dim = layout.head_dim, padded = layout.padded();
  if (layout.type == KvType::Float32 || layout.type == KvType::Float16) {
    for (size_t d = 0; d < padded; d += kLanes) {
      const Floats v = d < dim ? load_tail(value + d, dim - d) : zero();
      if (layout.type == KvType::Float32)
        store(reinterpret_cast<float*>(p) + d, v);
      else
        store_half(reinterpret_cast<uint16_t*>(p) + d, v);
    }
    return;
  }
  const bool wide = layout.type == KvType::Int8;
  float* scales = reinterpret_cast<float*>(p + (wide ? padded : padded / 2));
  for (size_t d = 0; d < padded; d += kBlock) {
    const size_t count = dim > d ? (dim - d < kBlock ? dim - d : kBlock) : 0;
    float peak = 0.0f;
    for (size_t i = 0; i < count; ++i) peak = __builtin_fabsf(value[d + i]) > peak ? __builtin_fabsf(value[d + i]) : peak;
    const float scale = peak >= kSmallestPeak ? peak / (wide ? 127.0f : 7.0f) : 1.0f;
    scales[d / kBlock] = scale;
    int q[kBlock];
    for (size_t i = 0; i < kBlock; ++i) q[i] = i < count ? static_cast<int>(__builtin_rintf(value[d + i] / scale)) : 0;
    if (wide) {
      for (size_t i = 0; i < kBlock; ++i) p[d + i] = static_cast<uint8_t>(static_cast<int8_t>(q[i]));
    } else {
      for (size_t i = 0; i < kLanes; ++i) p[d / 2 + i] = static_cast<uint8_t>((q[i] + 8) | ((q[i + kLanes] + 8) << 4));
    }
  }
}

}  // namespace

AttentionKernels attention_kernels() { return {&store_key, &store_value, &attend_chunk, &merge, &finish}; }
