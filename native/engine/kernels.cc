#include "edgewise/kernels.h"

#include <stdexcept>
#include <string>

namespace edgewise {

namespace {
#define EDGEWISE_TABLE(tier, name) \
  { tier, &name::matmul_kernel, name::row_kernels(), name::attention_kernels() }
}  // namespace

const Kernels& kernels(Tier tier) {
  static const Kernels ref = EDGEWISE_TABLE(Tier::Reference, reference);
  if (tier > best_tier())
    throw std::invalid_argument(std::string("instruction tier ") + tier_name(tier) + " cannot run on this processor");
  switch (tier) {
#if defined(__x86_64__)
    case Tier::Avx2: {
      static const Kernels table = EDGEWISE_TABLE(Tier::Avx2, avx2);
      return table;
    }
    case Tier::Avx512: {
      static const Kernels table = EDGEWISE_TABLE(Tier::Avx512, avx512);
      return table;
    }
#endif
    default: return ref;
  }
}

size_t KvLayout::key_tile_nbytes() const {
  switch (type) {
    case KvType::Float32: return kLanes * head_dim * 4;
    case KvType::Float16: return kLanes * head_dim * 2;
    default: return padded() / kBlock * key_format().record_nbytes(1);
  }
}

size_t KvLayout::value_nbytes() const {
  switch (type) {
    case KvType::Float32: return padded() * 4;
    case KvType::Float16: return padded() * 2;
    case KvType::Int8: return padded() + padded() / kBlock * 4;
    default: return padded() / 2 + padded() / kBlock * 4;
  }
}

PackedFormat KvLayout::key_format() const {
  PackedFormat format;
  format.element = Element::Integer;
  format.bits = type == KvType::Int8 ? 8 : 4;
  format.scale = ScaleType::Float32;
  return format;
}

}  // namespace edgewise
