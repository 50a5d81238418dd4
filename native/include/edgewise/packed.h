// The packed form of a weight: rows interleaved by sixteen, one lane per row, blocks of 32 inputs.
//
// A panel is 16 rows. A quantised panel is a sequence of records; a record holds the scales of `record_inputs` inputs,
// then their minima, then the codes of each of its blocks. A block of 32 inputs is, for a width of
//   8 bits   8 x 64 bytes: load i holds inputs 4i..4i+3 of each row;
//   4 bits   4 x 64 bytes: load i holds inputs 8i..8i+3 in the low and 8i+4..8i+7 in the high nibbles;
//   2 bits   2 x 64 bytes: load i holds inputs 16i+4c..16i+4c+3 in the bit pairs c = 0..3;
//   1 bit    1 x 64 bytes: bit j holds inputs 4j..4j+3;
//   3, 5, 6 bits   the planes of 2+1, 4+1, 4+2 bits, low bits first.
// A sparse panel keeps two of every four inputs and goes by units of 128 inputs: 16 inputs are a pair of loads, the first
// of which holds one kept code of each group of four, the second the other. A unit holds the place p of each first one
// (2 x 64 bytes: load i has the pairs 4i..4i+3 in its bit pairs), the step e to the second one's, (p + 1 + e) mod 4 (64
// bytes: bit i has pair i), which names all six pairs of places in three bits, and the codes of pairs 0..3 and 4..7, each
// as a block of eight loads above.
// A float panel is K columns of 16 values; of bfloat16 pairs, K / 2 columns of two inputs of each row. Float32Rows are
// sixteen rows of K values: a table to look rows up in, for no kernel.
//
// Columns: where a token reads only some of the inputs, the codes of one input lie together, for as many rows as fill 64
// bytes: a slab of 128 rows at four bits, 64 at eight. A slab holds its scales, record by record (those of all its rows,
// then their minima; up to a whole 64 bytes), then 64 bytes for each input, inputs filled up to whole blocks of 32. They lie
// in a shuffled order, always the same: of a run of lines with gaps hardware fetches the gaps too. Of an input, row 16 k + 4 q + i of 64 rows is byte 16 q + 4 k + i, which makes putting four inputs
// side by side two steps within 16 bytes; at four bits rows 64 .. 127 are the high nibbles.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

// Kernels of every tier use these small members: always inlined, so that no tier emits a copy that another could get.
#define EDGEWISE_INLINE [[gnu::always_inline]] inline

namespace edgewise {

inline constexpr size_t kLanes = 16;
inline constexpr size_t kBlock = 32;
inline constexpr size_t kSparseUnit = 128;
// Inputs below this count as zero: their scale would be subnormal, and codes would not fit a byte.
inline constexpr float kSmallestPeak = 1e-35f;
// Inputs and weights of bfloat16 pairs below 2^-56 count as zero: what is left are multiples of 2^-63, so that no sum of
// products is subnormal, and instructions that take such sums for zero agree with those that do not.
inline constexpr uint16_t kSmallestBFloat = (127 - 56) << 7;

enum class Element : uint8_t { Float32, Float16, BFloat16, BFloat16Pairs, Float32Rows, Integer, Table };
enum class ScaleType : uint8_t { Float16, Float32, Exponent, Nested };

struct PackedFormat {
  Element element = Element::Float32;
  uint8_t bits = 32;           // width of a code
  bool has_min = false;        // value = scale * code + minimum; else scale * (code - 2^(bits-1)), 8 bits included
  ScaleType scale = ScaleType::Float16;
  uint8_t sub_group = 32;      // inputs that share a (sub-)scale within a block: 16 or 32
  uint32_t record_inputs = 32; // inputs whose scales lie in one record: a multiple of 32; Nested: 256; sparse: of 128
  bool zero_points = false;    // a minimum is stored as a byte z: value = scale * (code - z)
  bool sparse = false;         // two of every four inputs are kept
  bool columns = false;        // codes lie input by input
  uint32_t sparse_group = 128; // inputs that share a scale of a sparse weight: 32, 64 or the whole record
  int8_t table[16] = {};       // Element::Table: value = scale * table[code]

  EDGEWISE_INLINE bool quantised() const { return element == Element::Integer || element == Element::Table; }
  EDGEWISE_INLINE size_t block_nbytes() const { return kLanes * kBlock * bits / 8; }
  EDGEWISE_INLINE size_t scale_nbytes() const { return scale == ScaleType::Float32 ? 4 : scale == ScaleType::Exponent ? 1 : 2; }
  EDGEWISE_INLINE size_t minimum_nbytes() const { return !has_min ? 0 : zero_points ? 1 : scale_nbytes(); }
  EDGEWISE_INLINE size_t unit_nbytes() const { return 3 * 64 + 2 * block_nbytes(); }  // of 128 sparse inputs
  EDGEWISE_INLINE size_t slab_rows() const { return 512 / bits; }  // of columns
  EDGEWISE_INLINE size_t slab_panels() const { return slab_rows() / kLanes; }
  size_t slab_scales_nbytes(size_t cols) const;
  size_t slab_nbytes(size_t cols) const;
  size_t scales() const;                    // of a row in a record
  size_t header_nbytes() const;             // scales and minima of a record
  size_t record_nbytes(size_t blocks) const;
  size_t panel_nbytes(size_t cols) const;
};

// Static rounding of activations: code = clamp(rint(x / scale) + zero, 0, top), which stands for (code - zero) scale.
struct Grid {
  float scale = 1;
  int32_t zero = 0, top = 255;
};

// What a matrix needs to be multiplied with inputs of one scale, row by row, whole panels. A row's sum of products of
// signed codes and unsigned inputs, less zero times the sum of the inputs, plus correction, counts in units of `scale`.
// With an output grid its code is that sum times multiplier / 2^shift, rounded half up, plus the grid's zero and `rest`,
// clamped. The bias is in the correction; what rounding it to units leaves is in the rest, in codes, or, where outputs are
// floats, in `remainder`.
struct IntegerRows {
  const int32_t *zero = nullptr, *correction = nullptr, *code_sum = nullptr, *multiplier = nullptr, *rest = nullptr;
  const float *scale = nullptr, *remainder = nullptr;
  int shift = 0;
  Grid out;
};

struct PackedMatrix {
  PackedFormat format;
  const IntegerRows* integers = nullptr;  // where it is multiplied with inputs of one scale
  size_t rows = 0, cols = 0;
  const uint8_t* data = nullptr;
  size_t nbytes = 0, panel_nbytes = 0;
  std::shared_ptr<const void> owner;

  EDGEWISE_INLINE size_t panels() const { return (rows + kLanes - 1) / kLanes; }
  EDGEWISE_INLINE const uint8_t* panel(size_t index) const { return data + index * panel_nbytes; }
  // Of columns, where panel_nbytes is what a slab takes.
  EDGEWISE_INLINE size_t slabs() const { return (rows + format.slab_rows() - 1) / format.slab_rows(); }
  EDGEWISE_INLINE const uint8_t* slab(size_t index) const { return data + index * panel_nbytes; }
};

// Where the codes of each input lie in a slab, in bytes after its scales. cols: filled up to whole blocks.
std::vector<uint32_t> column_offsets(size_t cols);

// Inputs of a matmul for up to `capacity` tokens, in tiles of `slots` (1 or 16) so that a kernel reads them in order.
// For tile t, block b and slot s:  q[((t * blocks + b) * slots + s) * 32 ...], scale[(t * blocks + b) * slots + s].
// Floats and bfloat16 lie as the codes do: f[((t * blocks + b) * slots + s) * 32 ...].
struct Activations {
  size_t tokens = 0, cols = 0, slots = 1;
  EDGEWISE_INLINE size_t blocks() const { return (cols + kBlock - 1) / kBlock; }
  EDGEWISE_INLINE size_t padded() const { return blocks() * kBlock; }
  EDGEWISE_INLINE size_t tiles() const { return (tokens + slots - 1) / slots; }

  int8_t* q = nullptr;
  float* scale = nullptr;
  int32_t* negated_sum = nullptr;       // - sum of q over the block
  int32_t* negated_sum_low = nullptr;   // - sum over its first 16 inputs
  float* sum = nullptr;                 // scale * sum of q over the block
  float* sum_low = nullptr;             // ... its first 16, and its last 16
  float* sum_high = nullptr;
  float* f = nullptr;
  uint16_t* bf = nullptr;

  static size_t nbytes_int8(size_t tokens, size_t cols, size_t slots);
  static size_t nbytes_float(size_t tokens, size_t cols, size_t slots);
  static size_t nbytes_bfloat(size_t tokens, size_t cols, size_t slots);
  // Lay the int8, the float or the bfloat16 fields over a buffer of at least that many bytes, 64-byte aligned.
  void place_int8(uint8_t* buffer);
  void place_float(uint8_t* buffer);
  void place_bfloat(uint8_t* buffer);
};

}  // namespace edgewise
