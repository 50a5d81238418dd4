// Rounding floats to blocks, by ggml's reference rules: here, and only here, a value is multiplied by the reciprocal
// of its scale, and halves are rounded up (trunc(x + 0.5)), because the files of others are made that way.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

#include "edgewise/half.h"
#include "io/blocks.h"

namespace edgewise {
namespace {

void store16(uint16_t value, uint8_t* out) {
  out[0] = uint8_t(value);
  out[1] = uint8_t(value >> 8);
}

// Truncates to 0..top; NaN gives 0.
uint8_t to_code(float value, int top) { return value > 0.0f ? uint8_t(std::min(value, float(top))) : uint8_t(0); }

float reciprocal(float scale) { return scale == 0.0f ? 0.0f : 1.0f / scale; }

void pack_nibbles(const uint8_t* code, uint8_t* qs) {
  for (int i = 0; i < 16; ++i) qs[i] = uint8_t((code[i] & 15) | (code[i + 16] & 15) << 4);
}

void pack_fifth_bits(const uint8_t* code, uint8_t* qh) {
  for (int byte = 0; byte < 4; ++byte) {
    qh[byte] = 0;
    for (int bit = 0; bit < 8; ++bit) qh[byte] |= uint8_t((code[byte * 8 + bit] >> 4) << bit);
  }
}

// Q4_0, Q5_0: the value of largest magnitude, sign included, becomes the lowest code.
void encode_symmetric(const float* x, int bits, uint8_t* out) {
  float extreme = x[0];
  for (int i = 1; i < 32; ++i)
    if (std::fabs(x[i]) > std::fabs(extreme)) extreme = x[i];
  const int offset = 1 << (bits - 1);
  const float d = extreme / float(-offset), inverse = reciprocal(d);
  uint8_t code[32];
  for (int i = 0; i < 32; ++i) code[i] = to_code(x[i] * inverse + (float(offset) + 0.5f), 2 * offset - 1);
  store16(float_to_half(d), out);
  if (bits == 5) pack_fifth_bits(code, out + 2);
  pack_nibbles(code, out + (bits == 5 ? 6 : 2));
}

// Q4_1, Q5_1: the smallest value is code 0, the largest the highest code.
void encode_with_minimum(const float* x, int bits, uint8_t* out) {
  const auto [low, high] = std::minmax_element(x, x + 32);
  const int top = (1 << bits) - 1;
  const float minimum = *low, d = (*high - minimum) / float(top), inverse = reciprocal(d);
  uint8_t code[32];
  for (int i = 0; i < 32; ++i) code[i] = to_code((x[i] - minimum) * inverse + 0.5f, top);
  store16(float_to_half(d), out);
  store16(float_to_half(minimum), out + 2);
  if (bits == 5) pack_fifth_bits(code, out + 4);
  pack_nibbles(code, out + (bits == 5 ? 8 : 4));
}

float largest_magnitude(const float* x) {
  float largest = 0.0f;
  for (int i = 0; i < 32; ++i) largest = std::max(largest, std::fabs(x[i]));
  return largest;
}

void encode_q8_0(const float* x, uint8_t* out) {
  const float d = largest_magnitude(x) / 127.0f, inverse = reciprocal(d);
  store16(float_to_half(d), out);
  for (int i = 0; i < 32; ++i) {
    const float rounded = std::round(x[i] * inverse);
    out[2 + i] = uint8_t(int8_t(std::isfinite(rounded) ? std::clamp(rounded, -127.0f, 127.0f) : 0.0f));
  }
}

// The exponent puts the largest magnitude into 4..8 of E2M1's 0..6 (doubled: 0..12); the nearest entry is taken.
void encode_mxfp4(const float* x, uint8_t* out) {
  const float largest = largest_magnitude(x);
  const float exponent = largest > 0.0f ? std::floor(std::log2(largest)) - 2.0f + 127.0f : 0.0f;
  out[0] = uint8_t(std::clamp(exponent, 0.0f, 254.0f));
  const float d = e8m0_to_float_half(out[0]);
  const int8_t* table = layout(BlockType::MXFP4).table;
  uint8_t code[32];
  for (int i = 0; i < 32; ++i) {
    float least = std::numeric_limits<float>::infinity();
    code[i] = 0;
    for (int k = 0; k < 16; ++k) {
      const float error = std::fabs(d * float(table[k]) - x[i]);
      if (error < least) {
        least = error;
        code[i] = uint8_t(k);
      }
    }
  }
  pack_nibbles(code, out + 1);
}

}  // namespace

bool can_encode(BlockType type) {
  switch (type) {
    case BlockType::F32:
    case BlockType::F16:
    case BlockType::BF16:
    case BlockType::Q4_0:
    case BlockType::Q4_1:
    case BlockType::Q5_0:
    case BlockType::Q5_1:
    case BlockType::Q8_0:
    case BlockType::MXFP4: return true;
    default: return false;
  }
}

void encode_blocks(BlockType type, const float* values, size_t n_blocks, uint8_t* out) {
  const BlockLayout& form = layout(type);
  for (size_t i = 0; i < n_blocks; ++i, values += form.values, out += form.nbytes) switch (type) {
      case BlockType::F32: std::memcpy(out, values, 4); break;
      case BlockType::F16: store16(float_to_half(*values), out); break;
      case BlockType::BF16: store16(float_to_bf16(*values), out); break;
      case BlockType::Q4_0: encode_symmetric(values, 4, out); break;
      case BlockType::Q5_0: encode_symmetric(values, 5, out); break;
      case BlockType::Q4_1: encode_with_minimum(values, 4, out); break;
      case BlockType::Q5_1: encode_with_minimum(values, 5, out); break;
      case BlockType::Q8_0: encode_q8_0(values, out); break;
      case BlockType::MXFP4: encode_mxfp4(values, out); break;
      default:
        throw std::invalid_argument(std::string("cannot write ") + form.name +
                                    "; expected F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 or MXFP4");
    }
}

}  // namespace edgewise
