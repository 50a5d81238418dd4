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
  // Eight bits: codes of the whole head, then one float scale per 32 dimensions.
  const float scale = reinterpret_cast<const float*>(value + padded)[d / kBlock];
  return mul(load_int8(reinterpret_cast<const int8_t*>(value) + d), set1(scale));
}

template <int Queries, int Parts, KvType Type>
inline void weigh_parts(const AttentionTask& task, size_t from, size_t to, size_t d, const float* weights, float* out) {
  const size_t padded = task.layout->value_padded(), value_nbytes = task.layout->value_nbytes();
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
  for (; d + together * kLanes <= task.layout->value_padded(); d += together * kLanes)
    weigh_parts<Queries, together, Type>(task, from, to, d, weights, out);
  for (; d < task.layout->value_padded(); d += kLanes) weigh_parts<Queries, 1, Type>(task, from, to, d, weights, out);
}

#include "kernels/attention/softmax.inl.h"
#include "kernels/attention/bfloat.inl.h"

template <int Queries, KvType Type>
void chunk_of(const AttentionTask& task, size_t chunk, float* out, float* peak, float* weight, float* scratch) {
  const Seen seen(task, chunk);
  if (seen.empty()) {
    for (int i = 0; i < Queries; ++i) peak[i] = kHidden;
    return;
  }
  float* scores = scratch;
  if constexpr (Type == KvType::BFloat16) {
    uint16_t* q = reinterpret_cast<uint16_t*>(scratch + kMaxQueries * kChunk);  // the queries, and the weights, in bfloat16
    uint16_t* weights = q + kMaxQueries * kMaxHeadDim;
    bfloat_scores<Queries>(task, seen.first_tile(), seen.last_tile(), scores, q);
    if (task.bias != nullptr) add_bias(task, seen.first_tile(), seen.last_tile(), scores);
    soften_all<RoundedWeights>(task, seen, scores, weights, peak, weight);
    return weigh_pairs<Queries>(task, seen.from / 2 * 2, seen.to, seen.start, weights, out);
  }
  if constexpr (Type == KvType::Float32 || Type == KvType::Float16)
    float_scores<Queries, Type>(task, seen.first_tile(), seen.last_tile(), scores);
  else
    quantised_scores(task, seen.first_tile(), seen.last_tile(), scores, scratch + kMaxQueries * kChunk);
  if (task.bias != nullptr) add_bias(task, seen.first_tile(), seen.last_tile(), scores);
  soften_all<FloatWeights>(task, seen, scores, scores, peak, weight);
  weigh_values<Queries, Type>(task, seen.from, seen.to, seen.start, scores, out);
}

#include "kernels/attention/groups.inl.h"

template <int Queries>
void chunk_of_type(const AttentionTask& task, size_t chunk, float* out, float* peak, float* weight, float* scratch) {
  switch (task.layout->type) {
    case KvType::Float32: return chunk_of<Queries, KvType::Float32>(task, chunk, out, peak, weight, scratch);
    case KvType::Float16: return chunk_of<Queries, KvType::Float16>(task, chunk, out, peak, weight, scratch);
    case KvType::BFloat16: return chunk_of<Queries, KvType::BFloat16>(task, chunk, out, peak, weight, scratch);
    case KvType::Int8: return chunk_of<Queries, KvType::Int8>(task, chunk, out, peak, weight, scratch);
    default: return chunk_of_groups<Queries>(task, chunk, out, peak, weight, scratch);
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

void merge(size_t queries, size_t n, float* out, float* peak, float* weight, const float* later, const float* later_peak,
           const float* later_weight) {
  float before[kLanes] = {}, after[kLanes] = {}, tops[kLanes];
  for (size_t i = 0; i < queries; ++i) {
    tops[i] = peak[i] > later_peak[i] ? peak[i] : later_peak[i];
    if (peak[i] == kHidden || later_peak[i] == kHidden) continue;
    before[i] = peak[i] - tops[i];
    after[i] = later_peak[i] - tops[i];
  }
  store(before, exponential(load(before)));
  store(after, exponential(load(after)));
  for (size_t i = 0; i < queries; ++i, out += n, later += n) {
    if (later_peak[i] == kHidden) continue;
    if (peak[i] == kHidden) {
      for (size_t d = 0; d < n; d += kLanes) store(out + d, load(later + d));
      weight[i] = later_weight[i];
    } else {
      const Floats a = set1(before[i]), b = set1(after[i]);
      for (size_t d = 0; d < n; d += kLanes) store(out + d, fma(load(later + d), b, mul(load(out + d), a)));
      weight[i] = weight[i] * before[i] + later_weight[i] * after[i];
    }
    peak[i] = tops[i];
  }
}

void finish(const float* sum, float weight, size_t n, float* out) {
  const Floats share = set1(1.0f / weight);
  for (size_t i = 0; i < n; i += kLanes) store_tail(out + i, mul(load(sum + i), share), n - i);
}

#include "kernels/attention/store.inl.h"

}  // namespace

AttentionKernels attention_kernels() { return {&store_key, &store_value, &pack_group, &attend_chunk, &merge, &finish}; }
