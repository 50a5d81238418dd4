// From stored weights to the packed form: a permutation, never another rounding.
#pragma once
#include "edgewise/packed.h"
#include "io/blocks.h"

namespace edgewise {

// The packed format of a GGUF block type.
PackedFormat packed_format_of(BlockType type);

// Bytes of a packed (rows, cols) matrix.
size_t packed_nbytes(const PackedFormat& format, size_t rows, size_t cols);

// raw: rows x (cols / values) blocks, row by row. Panels [begin, end) of 16 rows are written.
void pack_blocks(BlockType type, const uint8_t* raw, size_t rows, size_t cols, size_t begin, size_t end, uint8_t* out);

// codes: (rows, cols) unsigned codes, symmetric ones already shifted by 2^(bits-1). scales, minima: (rows, groups)
// float32 that the format's scale type represents exactly, with `group` inputs each (a multiple of 16 or the row).
void pack_codes(const PackedFormat& format, const uint8_t* codes, const float* scales, const float* minima, size_t group,
                size_t rows, size_t cols, size_t begin, size_t end, uint8_t* out);

// Two of every four inputs: codes and places (rows, cols / 2), in any order within a group of four but never the same place
// twice; cols a multiple of 4. scales, minima: (rows, groups), `group` kept codes each.
void pack_sparse(const PackedFormat& format, const uint8_t* codes, const uint8_t* places, const float* scales, const float* minima,
                 size_t group, size_t rows, size_t cols, size_t begin, size_t end, uint8_t* out);

// A matrix in panels, whose format is `format` without columns, in columns. Slabs [begin, end) are written.
void pack_columns(const PackedFormat& format, const uint8_t* panels, size_t rows, size_t cols, size_t begin, size_t end, uint8_t* out);
// Whether kernels take weights of this format in columns: integers of 4 or 8 bits, one scale for at least 32 inputs.
bool fits_columns(const PackedFormat& format);

// values: (rows, cols) float32, float16 or bfloat16 as the format's element says; in pairs, those below 2^-56 become zero.
void pack_floats(const PackedFormat& format, const uint8_t* values, size_t rows, size_t cols, size_t begin, size_t end,
                 uint8_t* out);

// One row of a packed matrix as float32, (cols): for embedding look-ups and tests.
void unpack_row(const PackedMatrix& w, size_t row, float* out);

}  // namespace edgewise
