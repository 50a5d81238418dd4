// Where the key and the value of a position go. Included once per tier, by attention.inl.h.

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
  if (layout.type == KvType::BFloat16) {  // pairs of dimensions, position by position
    uint16_t* k = reinterpret_cast<uint16_t*>(tile) + 2 * lane;
    for (size_t d = 0; d < dim; d += kLanes) {
      uint16_t half[kLanes];
      store_bfloat(half, load_tail(key + d, dim - d));
      for (size_t i = 0; i < kLanes && d + i < dim; i += 2) __builtin_memcpy(k + (d + i) * kLanes, half + i, 4);
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
    const float scale = peak >= kSmallestPeak ? peak / 127.0f : 1.0f;
    scales[lane] = scale;
    for (size_t i = 0; i < kBlock; ++i) {
      const int q = i < count ? static_cast<int>(__builtin_rintf(key[d + i] / scale)) : 0;
      codes[i / 4 * 64 + lane * 4 + i % 4] = static_cast<uint8_t>(q + 128);
    }
    tile += 4 * kLanes + block_nbytes;
  }
}

void store_value(const KvLayout& layout, const float* value, size_t position, uint8_t* values) {
  uint8_t* p = values + position * layout.value_nbytes();
  const size_t dim = layout.value_dim, padded = layout.value_padded();
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
  if (layout.type == KvType::BFloat16) {  // pairs of positions, dimension by dimension
    uint16_t* pair = reinterpret_cast<uint16_t*>(values + position / 2 * 2 * layout.value_nbytes()) + position % 2;
    for (size_t d = 0; d < padded; d += kLanes) {
      uint16_t half[kLanes];
      store_bfloat(half, d < dim ? load_tail(value + d, dim - d) : zero());
      for (size_t i = 0; i < kLanes; ++i) pair[2 * (d + i)] = half[i];
    }
    return;
  }
  float* scales = reinterpret_cast<float*>(p + padded);
  for (size_t d = 0; d < padded; d += kBlock) {
    const size_t count = dim > d ? (dim - d < kBlock ? dim - d : kBlock) : 0;
    float peak = 0.0f;
    for (size_t i = 0; i < count; ++i) peak = __builtin_fabsf(value[d + i]) > peak ? __builtin_fabsf(value[d + i]) : peak;
    const float scale = peak >= kSmallestPeak ? peak / 127.0f : 1.0f;
    scales[d / kBlock] = scale;
    for (size_t i = 0; i < kBlock; ++i)
      p[d + i] = static_cast<uint8_t>(static_cast<int8_t>(i < count ? static_cast<int>(__builtin_rintf(value[d + i] / scale)) : 0));
  }
}
