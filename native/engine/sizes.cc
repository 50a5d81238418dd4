// Where things lie in packed weights, activations, keys and values. Apart from pack.cc and kernels.cc, so that it builds
// without exceptions.
#include "edgewise/kernels.h"

namespace edgewise {

size_t PackedFormat::scales() const {
  if (sparse) return record_inputs / sparse_group;
  return sub_group == 16 ? record_inputs / 16 : 1;
}

size_t PackedFormat::header_nbytes() const {
  const size_t per_block = kBlock / sub_group;
  if (scale == ScaleType::Nested) {
    const size_t subs = record_inputs / kBlock * per_block * kLanes;
    return (has_min ? 2 : 1) * (2 * kLanes + subs);
  }
  return scales() * kLanes * (scale_nbytes() + minimum_nbytes());
}

size_t PackedFormat::record_nbytes(size_t blocks) const { return header_nbytes() + blocks * block_nbytes(); }

size_t PackedFormat::slab_scales_nbytes(size_t cols) const {
  const size_t records = (cols + record_inputs - 1) / record_inputs;
  return (records * slab_rows() * (scale_nbytes() + minimum_nbytes()) + 63) / 64 * 64;
}

size_t PackedFormat::slab_nbytes(size_t cols) const {
  return slab_scales_nbytes(cols) + (cols + kBlock - 1) / kBlock * kBlock * 64;
}

size_t PackedFormat::panel_nbytes(size_t cols) const {
  if (columns) return slab_nbytes(cols);
  if (element == Element::BFloat16Pairs) return (cols + 1) / 2 * kLanes * 4;
  if (!quantised()) return kLanes * cols * (element == Element::Float32 || element == Element::Float32Rows ? 4 : 2);
  if (sparse) {
    const size_t units = (cols + kSparseUnit - 1) / kSparseUnit, per_record = record_inputs / kSparseUnit;
    return (units + per_record - 1) / per_record * header_nbytes() + units * unit_nbytes();
  }
  const size_t blocks = (cols + kBlock - 1) / kBlock, per_record = record_inputs / kBlock;
  return (blocks + per_record - 1) / per_record * header_nbytes() + blocks * block_nbytes();
}

namespace {
constexpr size_t align64(size_t n) { return (n + 63) / 64 * 64; }
}  // namespace

size_t Activations::nbytes_int8(size_t tokens, size_t cols, size_t slots) {
  const size_t cells = (tokens + slots - 1) / slots * slots * ((cols + kBlock - 1) / kBlock);
  return align64(cells * kBlock) + 6 * align64(cells * 4);
}

size_t Activations::nbytes_float(size_t tokens, size_t cols, size_t slots) {
  return align64((tokens + slots - 1) / slots * slots * ((cols + kBlock - 1) / kBlock) * kBlock * 4);
}

size_t Activations::nbytes_bfloat(size_t tokens, size_t cols, size_t slots) {
  return align64((tokens + slots - 1) / slots * slots * ((cols + kBlock - 1) / kBlock) * kBlock * 2);
}

size_t Chosen::nbytes(size_t cols) {
  const size_t blocks = (cols + kBlock - 1) / kBlock;
  return align64((blocks + 1) * 4) + align64((blocks + 1) * kBlock * 4) + align64((blocks + 1) * kBlock) + 3 * align64(blocks * 4);
}

void Chosen::place(uint8_t* buffer, size_t cols) {
  blocks = (cols + kBlock - 1) / kBlock;
  auto next = [&](size_t nbytes) {
    uint8_t* field = buffer;
    buffer += align64(nbytes);
    return field;
  };
  until = reinterpret_cast<uint32_t*>(next((blocks + 1) * 4));
  offset = reinterpret_cast<uint32_t*>(next((blocks + 1) * kBlock * 4));  // room for what is written before it is known
  q = reinterpret_cast<int8_t*>(next((blocks + 1) * kBlock));
  negated_sum = reinterpret_cast<int32_t*>(next(blocks * 4));
  sum = reinterpret_cast<float*>(next(blocks * 4));
  scale = reinterpret_cast<float*>(next(blocks * 4));
}

void Activations::place_int8(uint8_t* buffer) {
  const size_t cells = tiles() * slots * blocks();
  q = reinterpret_cast<int8_t*>(buffer);
  buffer += align64(cells * kBlock);
  auto next = [&] {
    uint8_t* field = buffer;
    buffer += align64(cells * 4);
    return field;
  };
  scale = reinterpret_cast<float*>(next());
  negated_sum = reinterpret_cast<int32_t*>(next());
  negated_sum_low = reinterpret_cast<int32_t*>(next());
  sum = reinterpret_cast<float*>(next());
  sum_low = reinterpret_cast<float*>(next());
  sum_high = reinterpret_cast<float*>(next());
}

void Activations::place_float(uint8_t* buffer) { f = reinterpret_cast<float*>(buffer); }
void Activations::place_bfloat(uint8_t* buffer) { bf = reinterpret_cast<uint16_t*>(buffer); }

size_t KvLayout::key_tile_nbytes() const {
  switch (type) {
    case KvType::Float32: return kLanes * head_dim * 4;
    case KvType::Float16: return kLanes * head_dim * 2;
    case KvType::BFloat16: return (head_dim + 1) / 2 * kLanes * 4;
    case KvType::Int8: return padded() / kBlock * key_format().record_nbytes(1);
    default: return kLanes * padded() / 2 + padded() * 4 / (kKvGroup / kLanes);
  }
}

size_t KvLayout::value_nbytes() const {
  switch (type) {
    case KvType::Float32: return value_padded() * 4;
    case KvType::Float16:
    case KvType::BFloat16: return value_padded() * 2;
    case KvType::Int8: return value_padded() + value_padded() / kBlock * 4;
    default: return value_padded() / 2 + 4;
  }
}

PackedFormat KvLayout::key_format() const {
  PackedFormat format;
  format.element = Element::Integer;
  format.bits = 8;
  format.scale = ScaleType::Float32;
  return format;
}

}  // namespace edgewise
