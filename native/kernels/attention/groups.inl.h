// Attention over groups of positions in four bits, and how a group is packed. Part of attention.inl.h.
//
// A key is s_d c_d + m_d, so that a score is sum (q_d s_d) c_d + sum q_d m_d: scales go to the query, once for a group. A
// value is s c_d + m with one pair for a position: they go to its weight.

inline size_t key_group_nbytes(const KvLayout& layout) { return kKvGroup / kLanes * layout.key_tile_nbytes(); }
inline size_t value_group_nbytes(const KvLayout& layout) { return kKvGroup * layout.value_nbytes(); }

inline Codes low_nibbles(Codes pairs) { return both(pairs, set1_codes(15)); }
inline Codes high_nibbles(Codes pairs) { return both(shift_right(pairs, 4), set1_codes(15)); }

// codes: of the first tile; scaled: (Queries, padded), offset: (Queries), of the group.
template <int Queries, int Tiles>
inline void score_codes(const AttentionTask& task, const uint8_t* codes, const float* scaled, const float* offset, float* scores) {
  const size_t padded = task.layout->padded(), tile_nbytes = kLanes * padded / 2;
  Floats sum[Tiles * Queries];
  for (int i = 0; i < Tiles * Queries; ++i) sum[i] = zero();
  if (task.key_ahead.fetches())
    for (size_t line = 0; line < Tiles * tile_nbytes; line += 64) prefetch(task.key_ahead.of(codes + line));
  for (size_t d = 0; d < padded; d += 8) {
    Codes low[Tiles], high[Tiles];
    for (int n = 0; n < Tiles; ++n) {
      const Codes pairs = load_codes(codes + static_cast<size_t>(n) * tile_nbytes + 8 * d);
      low[n] = low_nibbles(pairs);
      high[n] = high_nibbles(pairs);
    }
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j)
      add_products<Tiles, Queries>([&](int n) { return j < 4 ? byte_of(low[n], j) : byte_of(high[n], j - 4); },
                                   [&](int i) { return scaled[static_cast<size_t>(i) * padded + d + static_cast<size_t>(j)]; }, sum);
  }
  for (int n = 0; n < Tiles; ++n)
    for (int i = 0; i < Queries; ++i)
      store(scores + static_cast<size_t>(i) * kChunk + static_cast<size_t>(n) * kLanes,
            mul(add(sum[n * Queries + i], set1(offset[i])), set1(task.scale)));
}

template <int Queries>
void group_scores(const AttentionTask& task, const Seen& seen, float* scores, float* scaled) {
  const size_t dim = task.layout->head_dim, padded = task.layout->padded(), tile_nbytes = kLanes * padded / 2;
  constexpr size_t tiles = kKvGroup / kLanes;
  constexpr int wanted = chains_per_query(Queries), together = wanted >= 4 ? 4 : wanted >= 2 ? 2 : 1;
  const size_t last_tile = seen.last_tile();
  for (size_t tile = seen.first_tile(); tile < last_tile;) {
    const size_t group = tile / tiles, end = last_tile < (group + 1) * tiles ? last_tile : (group + 1) * tiles;
    const uint8_t* keys = task.keys + group * key_group_nbytes(*task.layout);
    const uint16_t* scale = reinterpret_cast<const uint16_t*>(keys);
    const uint8_t* codes = keys + 4 * padded;
    float offset[Queries];
    for (size_t i = 0; i < Queries; ++i) {
      const float* q = task.q + i * task.q_stride;
      Floats sum = zero();
      for (size_t d = 0; d < padded; d += kLanes) {
        const Floats x = d < dim ? load_tail(q + d, dim - d) : zero();
        store(scaled + i * padded + d, mul(x, load_half(scale + d)));
        sum = fma(x, load_half(scale + padded + d), sum);
      }
      offset[i] = reduce_add(sum);
    }
    float* row = scores + tile * kLanes - seen.start;
    for (; tile + together <= end; tile += together, row += together * kLanes)
      score_codes<Queries, together>(task, codes + tile % tiles * tile_nbytes, scaled, offset, row);
    for (; tile < end; ++tile, row += kLanes) score_codes<Queries, 1>(task, codes + tile % tiles * tile_nbytes, scaled, offset, row);
  }
}

// Blocks of 32 dimensions from the block on, over all tiles that are seen: what a query does not see weighs zero.
template <int Queries, int Blocks>
inline void weigh_codes(const AttentionTask& task, const Seen& seen, size_t block, const float* weights, const float* offset, float* out) {
  const size_t padded = task.layout->value_padded(), blocks = padded / kBlock, group_nbytes = value_group_nbytes(*task.layout);
  constexpr size_t kQuad = 4;
  Floats sum[2 * Blocks * Queries];
  for (int i = 0; i < 2 * Blocks * Queries; ++i) sum[i] = zero();
  for (size_t p = seen.first_tile() * kLanes; p < seen.last_tile() * kLanes; p += kQuad) {
    const uint8_t* group = task.values + p / kKvGroup * group_nbytes;
    const uint8_t* codes = group + 4 * kKvGroup + (p % kKvGroup / kQuad * blocks + block) * 64;
    Codes low[Blocks], high[Blocks];
    for (int n = 0; n < Blocks; ++n) {
      if (task.value_ahead.fetches()) prefetch(task.value_ahead.of(codes + 64 * n));
      const Codes pairs = load_codes(codes + 64 * n);
      low[n] = low_nibbles(pairs);
      high[n] = high_nibbles(pairs);
    }
#pragma GCC unroll 4
    for (int j = 0; j < static_cast<int>(kQuad); ++j)
      add_products<2 * Blocks, Queries>([&](int n) { return n % 2 == 0 ? byte_of(low[n / 2], j) : byte_of(high[n / 2], j); },
                                        [&](int i) { return weights[static_cast<size_t>(i) * kChunk + p - seen.start + static_cast<size_t>(j)]; }, sum);
  }
  for (int n = 0; n < 2 * Blocks; ++n)
    for (int i = 0; i < Queries; ++i)
      store(out + static_cast<size_t>(i) * padded + block * kBlock + static_cast<size_t>(n) * kLanes, add(sum[n * Queries + i], set1(offset[i])));
}

template <int Queries>
void weigh_groups(const AttentionTask& task, const Seen& seen, float* weights, float* out) {
  const size_t blocks = task.layout->value_padded() / kBlock, group_nbytes = value_group_nbytes(*task.layout);
  float offset[Queries];
  for (size_t i = 0; i < Queries; ++i) {
    Floats sum = zero();
    for (size_t p = seen.first_tile() * kLanes; p < seen.last_tile() * kLanes; p += kLanes) {
      const uint16_t* scale = reinterpret_cast<const uint16_t*>(task.values + p / kKvGroup * group_nbytes) + p % kKvGroup;
      float* row = weights + i * kChunk + (p - seen.start);
      const Floats weight = load(row);
      sum = fma(weight, load_half(scale + kKvGroup), sum);
      store(row, mul(weight, load_half(scale)));
    }
    offset[i] = reduce_add(sum);
  }
  constexpr int together = chains_per_query(Queries) >= 4 ? 2 : 1;
  size_t block = 0;
  for (; block + together <= blocks; block += together) weigh_codes<Queries, together>(task, seen, block, weights, offset, out);
  for (; block < blocks; ++block) weigh_codes<Queries, 1>(task, seen, block, weights, offset, out);
}

template <int Queries>
void chunk_of_groups(const AttentionTask& task, size_t chunk, float* out, float* peak, float* weight, float* scratch) {
  const Seen seen(task, chunk);
  if (seen.empty()) {
    for (int i = 0; i < Queries; ++i) peak[i] = kHidden;
    return;
  }
  float* scores = scratch;
  group_scores<Queries>(task, seen, scores, scratch + kMaxQueries * kChunk);
  if (task.bias != nullptr) add_bias(task, seen.first_tile(), seen.last_tile(), scores);
  soften_all<FloatWeights>(task, seen, scores, scores, peak, weight);
  weigh_groups<Queries>(task, seen, scores, out);
}

// The grid of n values a stride apart: 16 steps from the lowest to the highest, both ends in float16.
struct Grid {
  uint16_t scale, minimum;
  float step, low;
  Grid(const float* x, size_t n, size_t stride) {
    float lowest = x[0], highest = x[0];
    for (size_t i = 1; i < n; ++i) {
      const float v = x[i * stride];
      lowest = v < lowest ? v : lowest;
      highest = v > highest ? v : highest;
    }
    constexpr float most = 65504.0f;  // of float16
    lowest = lowest < -most ? -most : lowest > most ? most : lowest;
    const float wide = (highest - lowest) / 15.0f;
    float pair[kLanes] = {wide > most ? most : wide, lowest};
    uint16_t halves[kLanes];
    store_half(halves, load(pair));
    store(pair, load_half(halves));
    scale = halves[0], minimum = halves[1], step = pair[0], low = pair[1];
  }
  uint8_t code(float x) const {
    if (step == 0.0f) return 0;
    const float q = __builtin_rintf((x - low) / step);
    return static_cast<uint8_t>(q > 0.0f ? q < 15.0f ? q : 15.0f : 0.0f);
  }
};

void pack_group(const KvLayout& eight, const uint8_t* keys, const uint8_t* values, uint8_t* packed_keys, uint8_t* packed_values) {
  const size_t padded = eight.padded(), value_padded = eight.value_padded(), tile_nbytes = eight.key_tile_nbytes(), record_nbytes = 4 * kLanes + kLanes * kBlock;
  uint16_t* key_scale = reinterpret_cast<uint16_t*>(packed_keys);
  uint8_t* key_codes = packed_keys + 4 * padded;
  float x[kKvGroup * kBlock];  // (positions, 32 dimensions)
  for (size_t block = 0; block < padded; block += kBlock) {
    for (size_t p = 0; p < kKvGroup; ++p) {
      const uint8_t* record = keys + p / kLanes * tile_nbytes + block / kBlock * record_nbytes;
      const float scale = reinterpret_cast<const float*>(record)[p % kLanes];
      const uint8_t* codes = record + 4 * kLanes + p % kLanes * 4;
      for (size_t i = 0; i < kBlock; ++i) x[p * kBlock + i] = static_cast<float>(codes[i / 4 * 64 + i % 4] - 128) * scale;
    }
    for (size_t i = 0; i < kBlock; ++i) {
      const size_t d = block + i;
      const Grid grid(x + i, kKvGroup, kBlock);
      key_scale[d] = grid.scale;
      key_scale[padded + d] = grid.minimum;
      for (size_t p = 0; p < kKvGroup; ++p) {
        uint8_t& pair = key_codes[p / kLanes * kLanes * padded / 2 + d / 8 * 64 + p % kLanes * 4 + d % 4];
        const uint8_t code = grid.code(x[p * kBlock + i]);
        pair = d % 8 < 4 ? code : static_cast<uint8_t>(pair | (code << 4));
      }
    }
  }

  uint16_t* value_scale = reinterpret_cast<uint16_t*>(packed_values);
  uint8_t* value_codes = packed_values + 4 * kKvGroup;
  float row[kMaxHeadDim];
  for (size_t p = 0; p < kKvGroup; ++p) {
    const uint8_t* value = values + p * eight.value_nbytes();
    const float* scales = reinterpret_cast<const float*>(value + value_padded);
    for (size_t d = 0; d < value_padded; ++d) row[d] = static_cast<float>(static_cast<int8_t>(value[d])) * scales[d / kBlock];
    const Grid grid(row, eight.value_dim, 1);
    value_scale[p] = grid.scale;
    value_scale[kKvGroup + p] = grid.minimum;
    for (size_t d = 0; d < value_padded; d += kBlock)
      for (size_t i = 0; i < kLanes; ++i) {
        const size_t at = (p / 4 * (value_padded / kBlock) + d / kBlock) * 64 + 4 * i + p % 4;
        const uint8_t low = d + i < eight.value_dim ? grid.code(row[d + i]) : 0;
        const uint8_t high = d + i + kLanes < eight.value_dim ? grid.code(row[d + i + kLanes]) : 0;
        value_codes[at] = static_cast<uint8_t>(low | (high << 4));
      }
  }
}
