// The block layouts of GGUF tensors: which values, scales and minima lie where, and what they decode to.
#pragma once
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>

namespace edgewise {

enum class BlockType {
  F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, MXFP4,
};
inline constexpr int kBlockTypes = 15;

struct BlockLayout {
  const char* name;
  int ggml_id;          // the type's number in a GGUF file
  int values;           // per block; 1 for F32, F16, BF16
  int nbytes;           // per block
  int bits;             // width of a code; of the value itself for F32, F16, BF16
  int group;            // values that share a scale (K-quants: a sub-scale)
  bool has_min;         // value = scale * code plus or minus a minimum
  int offset;           // without minimum and table: value = scale * (code - offset)
  const int8_t* table;  // 16 signed entries, value = scale * table[code]; else null
};

const BlockLayout& layout(BlockType type);
std::optional<BlockType> block_type_by_name(std::string_view name);
std::optional<BlockType> block_type_by_ggml_id(uint32_t id);

// One quantised block, apart: integer codes in logical order and the scales as stored.
struct UnpackedBlock {
  uint8_t code[256];
  uint16_t d;           // half bits: scale, or scale of the sub-scales; MXFP4: its E8M0 byte
  uint16_t m;           // half bits: Q4_1, Q5_1: minimum, added; K-quants: scale of the sub-minima, subtracted
  int8_t sub[16];       // K-quants: integer sub-scales, Q3_K's already minus 32
  uint8_t sub_min[16];  // Q2_K, Q4_K, Q5_K: integer sub-minima
};

// Half the value of an E8M0 scale, as the doubled entries of the MXFP4 table want it.
float e8m0_to_float_half(uint8_t exponent);

// bytes: layout(type).nbytes of a quantised type (not F32, F16, BF16). Fields the type lacks are left alone.
void unpack_block(BlockType type, const uint8_t* bytes, UnpackedBlock& block);

// bytes: n_blocks blocks one after the other, of any alignment -> n_blocks * values floats.
// The order of float operations is ggml's, so that results are equal to the bit.
void decode_blocks(BlockType type, const uint8_t* bytes, size_t n_blocks, float* out);

// F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, MXFP4; ggml's reference rounding. Values are expected to be finite.
bool can_encode(BlockType type);
void encode_blocks(BlockType type, const float* values, size_t n_blocks, uint8_t* out);

// The first block whose scale or minimum (for F32, F16, BF16: whose value) is NaN or infinite; n_blocks if none.
// An MXFP4 exponent counts when its largest entry would overflow.
size_t first_nonfinite_block(BlockType type, const uint8_t* bytes, size_t n_blocks);

}  // namespace edgewise
