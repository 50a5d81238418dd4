#include "io/blocks.h"

#include <bit>
#include <cstring>
#include <stdexcept>
#include <string>

#include "edgewise/half.h"

namespace edgewise {
namespace {

constexpr int8_t kIq4Nl[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
constexpr int8_t kE2M1Doubled[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

constexpr BlockLayout kLayouts[kBlockTypes] = {
    // name     id  values bytes bits group  min  offset table
    {"F32",      0,   1,    4,   32,    1, false,   0, nullptr},
    {"F16",      1,   1,    2,   16,    1, false,   0, nullptr},
    {"BF16",    30,   1,    2,   16,    1, false,   0, nullptr},
    {"Q4_0",     2,  32,   18,    4,   32, false,   8, nullptr},
    {"Q4_1",     3,  32,   20,    4,   32, true,    0, nullptr},
    {"Q5_0",     6,  32,   22,    5,   32, false,  16, nullptr},
    {"Q5_1",     7,  32,   24,    5,   32, true,    0, nullptr},
    {"Q8_0",     8,  32,   34,    8,   32, false, 128, nullptr},
    {"Q2_K",    10, 256,   84,    2,   16, true,    0, nullptr},
    {"Q3_K",    11, 256,  110,    3,   16, false,   4, nullptr},
    {"Q4_K",    12, 256,  144,    4,   32, true,    0, nullptr},
    {"Q5_K",    13, 256,  176,    5,   32, true,    0, nullptr},
    {"Q6_K",    14, 256,  210,    6,   16, false,  32, nullptr},
    {"IQ4_NL",  20,  32,   18,    4,   32, false,   0, kIq4Nl},
    {"MXFP4",   39,  32,   17,    4,   32, false,   0, kE2M1Doubled},
};

uint16_t load16(const uint8_t* bytes) { return uint16_t(bytes[0] | bytes[1] << 8); }

uint32_t load32(const uint8_t* bytes) { return uint32_t(load16(bytes)) | uint32_t(load16(bytes + 2)) << 16; }

// 16 bytes: the low halves are values 0..15, the high halves 16..31.
void unpack_nibbles(const uint8_t* qs, uint8_t* code) {
  for (int i = 0; i < 16; ++i) {
    code[i] = qs[i] & 15;
    code[i + 16] = qs[i] >> 4;
  }
}

// Bit i of qh is the fifth bit of value i.
void unpack_fifth_bits(const uint8_t* qh, uint8_t* code) {
  const uint32_t high = load32(qh);
  for (int i = 0; i < 32; ++i) code[i] |= uint8_t((high >> i & 1u) << 4);
}

// 12 bytes: eight 6-bit scales and eight 6-bit minima; the last four of each keep their top two bits in bytes 0..7.
void unpack_scales_q4_k(const uint8_t* s, UnpackedBlock& block) {
  for (int i = 0; i < 4; ++i) {
    block.sub[i] = int8_t(s[i] & 63);
    block.sub_min[i] = s[i + 4] & 63;
    block.sub[i + 4] = int8_t((s[i + 8] & 15) | (s[i] >> 6) << 4);
    block.sub_min[i + 4] = uint8_t((s[i + 8] >> 4) | (s[i + 4] >> 6) << 4);
  }
}

// 12 bytes: sixteen 6-bit scales; four low bits in bytes 0..7, two high bits in bytes 8..11.
void unpack_scales_q3_k(const uint8_t* s, UnpackedBlock& block) {
  for (int i = 0; i < 16; ++i) {
    const int low = s[i % 8] >> (i / 8 * 4) & 15;
    const int high = s[8 + i % 4] >> (i / 4 * 2) & 3;
    block.sub[i] = int8_t((low | high << 4) - 32);
  }
}

// 64 bytes: two halves of 32 bytes, each holding four runs of 32 two-bit values.
void unpack_pairs(const uint8_t* qs, uint8_t* code) {
  for (int half = 0; half < 2; ++half)
    for (int run = 0; run < 4; ++run)
      for (int i = 0; i < 32; ++i) code[half * 128 + run * 32 + i] = qs[half * 32 + i] >> (2 * run) & 3;
}

// 128 bytes: four runs of 32 bytes, low halves first.
void unpack_nibble_runs(const uint8_t* qs, uint8_t* code) {
  for (int run = 0; run < 4; ++run)
    for (int i = 0; i < 32; ++i) {
      code[run * 64 + i] = qs[run * 32 + i] & 15;
      code[run * 64 + 32 + i] = qs[run * 32 + i] >> 4;
    }
}

void unpack_q6_k(const uint8_t* bytes, UnpackedBlock& block) {
  const uint8_t *ql = bytes, *qh = bytes + 128;
  for (int half = 0; half < 2; ++half)
    for (int run = 0; run < 4; ++run)
      for (int i = 0; i < 32; ++i) {
        const int low = ql[half * 64 + run % 2 * 32 + i] >> (run / 2 * 4) & 15;
        const int high = qh[half * 32 + i] >> (run * 2) & 3;
        block.code[half * 128 + run * 32 + i] = uint8_t(low | high << 4);
      }
  std::memcpy(block.sub, bytes + 192, 16);
  block.d = load16(bytes + 208);
}

// Where the scales of a block lie: the byte of d, and of m (-1: none).
struct ScalePlace {
  int d;
  int m;
};

ScalePlace scale_place(BlockType type) {
  switch (type) {
    case BlockType::Q4_1:
    case BlockType::Q5_1:
    case BlockType::Q4_K:
    case BlockType::Q5_K: return {0, 2};
    case BlockType::Q2_K: return {80, 82};
    case BlockType::Q3_K: return {108, -1};
    case BlockType::Q6_K: return {208, -1};
    default: return {0, -1};
  }
}

void decode_block(const BlockLayout& form, const UnpackedBlock& block, float scale, float* out) {
  if (form.values == 256) {
    const float minimum_scale = form.has_min ? half_to_float(block.m) : 0.0f;
    for (int start = 0, g = 0; start < 256; start += form.group, ++g) {
      const float sub = scale * float(block.sub[g]);
      const float minimum = form.has_min ? minimum_scale * float(block.sub_min[g]) : 0.0f;
      for (int i = start; i < start + form.group; ++i)
        out[i] = form.has_min ? sub * float(block.code[i]) - minimum : sub * float(int(block.code[i]) - form.offset);
    }
  } else if (form.table != nullptr) {
    for (int i = 0; i < 32; ++i) out[i] = scale * float(form.table[block.code[i]]);
  } else if (form.has_min) {
    const float minimum = half_to_float(block.m);
    for (int i = 0; i < 32; ++i) out[i] = scale * float(block.code[i]) + minimum;
  } else {
    for (int i = 0; i < 32; ++i) out[i] = scale * float(int(block.code[i]) - form.offset);
  }
}

}  // namespace

const BlockLayout& layout(BlockType type) { return kLayouts[int(type)]; }

std::optional<BlockType> block_type_by_name(std::string_view name) {
  for (int i = 0; i < kBlockTypes; ++i)
    if (name == kLayouts[i].name) return BlockType(i);
  return std::nullopt;
}

std::optional<BlockType> block_type_by_ggml_id(uint32_t id) {
  for (int i = 0; i < kBlockTypes; ++i)
    if (id == uint32_t(kLayouts[i].ggml_id)) return BlockType(i);
  return std::nullopt;
}

float e8m0_to_float_half(uint8_t exponent) {
  return std::bit_cast<float>(exponent < 2 ? 0x00200000u << exponent : uint32_t(exponent - 1) << 23);
}

void unpack_block(BlockType type, const uint8_t* bytes, UnpackedBlock& block) {
  const ScalePlace place = scale_place(type);
  block.d = type == BlockType::MXFP4 ? bytes[0] : load16(bytes + place.d);
  if (place.m >= 0) block.m = load16(bytes + place.m);
  switch (type) {
    case BlockType::Q4_0:
    case BlockType::IQ4_NL: unpack_nibbles(bytes + 2, block.code); return;
    case BlockType::MXFP4: unpack_nibbles(bytes + 1, block.code); return;
    case BlockType::Q4_1: unpack_nibbles(bytes + 4, block.code); return;
    case BlockType::Q5_0:
      unpack_nibbles(bytes + 6, block.code);
      unpack_fifth_bits(bytes + 2, block.code);
      return;
    case BlockType::Q5_1:
      unpack_nibbles(bytes + 8, block.code);
      unpack_fifth_bits(bytes + 4, block.code);
      return;
    case BlockType::Q8_0:
      for (int i = 0; i < 32; ++i) block.code[i] = bytes[2 + i] ^ 0x80;  // int8 + 128
      return;
    case BlockType::Q2_K:
      for (int i = 0; i < 16; ++i) {
        block.sub[i] = int8_t(bytes[i] & 15);
        block.sub_min[i] = bytes[i] >> 4;
      }
      unpack_pairs(bytes + 16, block.code);
      return;
    case BlockType::Q3_K:
      unpack_pairs(bytes + 32, block.code);
      for (int i = 0; i < 256; ++i) block.code[i] |= uint8_t((bytes[i % 32] >> (i / 32) & 1) << 2);
      unpack_scales_q3_k(bytes + 96, block);
      return;
    case BlockType::Q4_K:
      unpack_scales_q4_k(bytes + 4, block);
      unpack_nibble_runs(bytes + 16, block.code);
      return;
    case BlockType::Q5_K:
      unpack_scales_q4_k(bytes + 4, block);
      unpack_nibble_runs(bytes + 48, block.code);
      for (int i = 0; i < 256; ++i) block.code[i] |= uint8_t((bytes[16 + i % 32] >> (i / 32) & 1) << 4);
      return;
    case BlockType::Q6_K: unpack_q6_k(bytes, block); return;
    case BlockType::F32:
    case BlockType::F16:
    case BlockType::BF16: break;
  }
  throw std::invalid_argument(std::string("unpack_block expects a quantised type; given ") + layout(type).name);
}

void decode_blocks(BlockType type, const uint8_t* bytes, size_t n_blocks, float* out) {
  const BlockLayout& form = layout(type);
  switch (type) {
    case BlockType::F32: std::memcpy(out, bytes, n_blocks * 4); return;
    case BlockType::F16:
      for (size_t i = 0; i < n_blocks; ++i) out[i] = half_to_float(load16(bytes + 2 * i));
      return;
    case BlockType::BF16:
      for (size_t i = 0; i < n_blocks; ++i) out[i] = bf16_to_float(load16(bytes + 2 * i));
      return;
    default: break;
  }
  UnpackedBlock block;
  for (size_t i = 0; i < n_blocks; ++i) {
    unpack_block(type, bytes + i * form.nbytes, block);
    const float scale = type == BlockType::MXFP4 ? e8m0_to_float_half(uint8_t(block.d)) : half_to_float(block.d);
    decode_block(form, block, scale, out + i * form.values);
  }
}

size_t first_nonfinite_block(BlockType type, const uint8_t* bytes, size_t n_blocks) {
  const size_t step = size_t(layout(type).nbytes);
  if (type == BlockType::MXFP4) {  // above 252 the largest entry overflows; 255 is NaN by the MX specification
    for (size_t i = 0; i < n_blocks; ++i)
      if (bytes[i * step] > 252) return i;
    return n_blocks;
  }
  const ScalePlace place = type == BlockType::F32 || type == BlockType::BF16 ? ScalePlace{int(step) - 2, -1}
                                                                             : scale_place(type);
  // The top 16 bits of a float carry its whole exponent, as those of a bfloat16 do.
  const uint16_t exponent = type == BlockType::F32 || type == BlockType::BF16 ? 0x7f80u : 0x7c00u;
  for (size_t i = 0; i < n_blocks; ++i) {
    const uint8_t* block = bytes + i * step;
    if ((load16(block + place.d) & exponent) == exponent) return i;
    if (place.m >= 0 && (load16(block + place.m) & exponent) == exponent) return i;
  }
  return n_blocks;
}

}  // namespace edgewise
