#include "edgewise/pack.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "edgewise/half.h"

namespace edgewise {

size_t packed_nbytes(const PackedFormat& format, size_t rows, size_t cols) {
  if (format.columns) return (rows + format.slab_rows() - 1) / format.slab_rows() * format.slab_nbytes(cols);
  return (rows + kLanes - 1) / kLanes * format.panel_nbytes(cols);
}

PackedFormat packed_format_of(BlockType type) {
  const BlockLayout& block = layout(type);
  PackedFormat format;
  switch (type) {
    case BlockType::F32: format.element = Element::Float32; return format;
    case BlockType::F16: format.element = Element::Float16; format.bits = 16; return format;
    case BlockType::BF16: format.element = Element::BFloat16; format.bits = 16; return format;
    default: break;
  }
  format.element = block.table ? Element::Table : Element::Integer;
  format.bits = static_cast<uint8_t>(block.bits);
  format.has_min = block.has_min;
  format.sub_group = static_cast<uint8_t>(block.group);
  if (block.table) std::memcpy(format.table, block.table, sizeof format.table);
  if (type == BlockType::MXFP4) format.scale = ScaleType::Exponent;
  if (block.values == 256) {
    format.scale = ScaleType::Nested;
    format.record_inputs = 256;
  }
  return format;
}

namespace {

// Sets codes of one block of 32 inputs for one lane. out is zeroed beforehand.
void put_codes(const PackedFormat& format, const uint8_t* code, size_t lane, uint8_t* out) {
  const int bits = format.bits;
  if (bits == 8) {
    for (size_t i = 0; i < kBlock; ++i) out[i / 4 * 64 + lane * 4 + i % 4] = code[i];
    return;
  }
  int place = 0;  // lowest bit of the plane being written
  if (bits >= 4) {
    for (size_t i = 0; i < kBlock; ++i)
      out[i / 8 * 64 + lane * 4 + i % 4] |= static_cast<uint8_t>((code[i] & 15) << (i % 8 < 4 ? 0 : 4));
    out += 256;
    place = 4;
  }
  if (bits == 2 || bits == 3 || bits == 6) {
    for (size_t i = 0; i < kBlock; ++i)
      out[i / 16 * 64 + lane * 4 + i % 4] |= static_cast<uint8_t>((code[i] >> place & 3) << (i % 16 / 4 * 2));
    out += 128;
    place += 2;
  }
  if (bits == 1 || bits == 3 || bits == 5)
    for (size_t i = 0; i < kBlock; ++i)
      out[lane * 4 + i % 4] |= static_cast<uint8_t>((code[i] >> place & 1) << (i / 4));
}

uint8_t get_code(const PackedFormat& format, const uint8_t* p, size_t lane, size_t i) {
  const int bits = format.bits;
  if (bits == 8) return p[i / 4 * 64 + lane * 4 + i % 4];
  int code = 0, place = 0;
  if (bits >= 4) {
    code = p[i / 8 * 64 + lane * 4 + i % 4] >> (i % 8 < 4 ? 0 : 4) & 15;
    p += 256;
    place = 4;
  }
  if (bits == 2 || bits == 3 || bits == 6) {
    code |= (p[i / 16 * 64 + lane * 4 + i % 4] >> (i % 16 / 4 * 2) & 3) << place;
    p += 128;
    place += 2;
  }
  if (bits == 1 || bits == 3 || bits == 5) code |= (p[lane * 4 + i % 4] >> (i / 4) & 1) << place;
  return static_cast<uint8_t>(code);
}

void put_scale(const PackedFormat& format, float value, uint8_t* at, size_t lane) {
  if (format.scale == ScaleType::Float32) {
    std::memcpy(at + 4 * lane, &value, 4);
  } else if (format.scale == ScaleType::Float16) {
    const uint16_t half = float_to_half(value);
    std::memcpy(at + 2 * lane, &half, 2);
  } else {
    at[lane] = static_cast<uint8_t>(std::ilogb(value) + 128);  // 2^(e - 128)
  }
}

// minima: of a zero point, the zero point itself.
void put_minimum(const PackedFormat& format, float value, uint8_t* at, size_t lane) {
  if (!format.zero_points) return put_scale(format, value, at, lane);
  at[lane] = static_cast<uint8_t>(value);
}

float get_scale(const PackedFormat& format, const uint8_t* at, size_t lane) {
  if (format.scale == ScaleType::Float32) {
    float value;
    std::memcpy(&value, at + 4 * lane, 4);
    return value;
  }
  if (format.scale == ScaleType::Exponent) return std::ldexp(1.0f, at[lane] - 128);
  uint16_t half;
  std::memcpy(&half, at + 2 * lane, 2);
  return half_to_float(half);
}

float get_minimum(const PackedFormat& format, const uint8_t* at, size_t lane, float scale) {
  return format.zero_points ? -(static_cast<float>(at[lane]) * scale) : get_scale(format, at, lane);
}

uint16_t get_half(const uint8_t* p, size_t lane) {
  uint16_t half;
  std::memcpy(&half, p + 2 * lane, 2);
  return half;
}

// Byte offset of an input in a panel of bfloat16 pairs.
size_t pair_offset(size_t k, size_t lane) { return ((k / 2 * kLanes + lane) * 2 + k % 2) * 2; }

// A code that stands for zero, for inputs and rows that do not exist.
uint8_t zero_code(const PackedFormat& format) {
  if (format.element == Element::Table) {
    for (uint8_t i = 0; i < 16; ++i)
      if (format.table[i] == 0) return i;
    return 0;  // no zero entry: the scale of a missing row is zero instead
  }
  return format.has_min ? 0 : static_cast<uint8_t>(1 << (format.bits - 1));
}

void pack_block_panel(BlockType type, const PackedFormat& format, const uint8_t* raw, size_t row_nbytes, size_t rows,
                      size_t cols, size_t panel, uint8_t* out) {
  const BlockLayout& block = layout(type);
  const size_t values = static_cast<size_t>(block.values), per_record = format.record_inputs / kBlock;
  const size_t header = format.header_nbytes(), block_nbytes = format.block_nbytes();
  const size_t record = format.record_nbytes(per_record), subs = kBlock / format.sub_group;
  std::memset(out, 0, format.panel_nbytes(cols));
  UnpackedBlock u;
  for (size_t lane = 0; lane < kLanes; ++lane) {
    const size_t row = panel * kLanes + lane;
    if (row >= rows) {  // scales and minima are zero: so is every output
      continue;
    }
    const uint8_t* bytes = raw + row * row_nbytes;
    for (size_t r = 0; r < cols / values; ++r, bytes += block.nbytes) {
      unpack_block(type, bytes, u);
      uint8_t* head = out + r * record;
      if (format.scale == ScaleType::Exponent) {
        head[lane] = static_cast<uint8_t>(u.d);
      } else {
        std::memcpy(head + 2 * lane, &u.d, 2);
        if (format.has_min) std::memcpy(head + 32 + 2 * lane, &u.m, 2);
      }
      if (format.scale == ScaleType::Nested) {
        uint8_t* sub = head + (format.has_min ? 64 : 32);
        for (size_t s = 0; s < per_record * subs; ++s) {
          sub[s * kLanes + lane] = static_cast<uint8_t>(u.sub[s]);
          if (format.has_min) sub[(per_record * subs + s) * kLanes + lane] = u.sub_min[s];
        }
      }
      for (size_t b = 0; b < per_record; ++b) put_codes(format, u.code + b * kBlock, lane, head + header + b * block_nbytes);
    }
  }
}

}  // namespace

void pack_blocks(BlockType type, const uint8_t* raw, size_t rows, size_t cols, size_t begin, size_t end, uint8_t* out) {
  const PackedFormat format = packed_format_of(type);
  const size_t panel_nbytes = format.panel_nbytes(cols);
  if (!format.quantised()) return pack_floats(format, raw, rows, cols, begin, end, out);
  const BlockLayout& block = layout(type);
  const size_t row_nbytes = cols / static_cast<size_t>(block.values) * static_cast<size_t>(block.nbytes);
  for (size_t panel = begin; panel < end; ++panel)
    pack_block_panel(type, format, raw, row_nbytes, rows, cols, panel, out + panel * panel_nbytes);
}

void pack_codes(const PackedFormat& format, const uint8_t* codes, const float* scales, const float* minima, size_t group,
                size_t rows, size_t cols, size_t begin, size_t end, uint8_t* out) {
  const size_t panel_nbytes = format.panel_nbytes(cols), blocks = (cols + kBlock - 1) / kBlock;
  const size_t per_record = format.record_inputs / kBlock, groups = (cols + group - 1) / group;
  const size_t header = format.header_nbytes(), block_nbytes = format.block_nbytes();
  const size_t scale_nbytes = kLanes * format.scale_nbytes();
  const size_t scales_per_record = format.scales(), minimum_nbytes = kLanes * format.minimum_nbytes();
  const size_t inputs_per_scale = format.sub_group == 16 ? 16 : format.record_inputs;
  const uint8_t zero = zero_code(format);
  for (size_t panel = begin; panel < end; ++panel) {
    uint8_t* base = out + panel * panel_nbytes;
    std::memset(base, 0, panel_nbytes);
    for (size_t lane = 0; lane < kLanes; ++lane) {
      const size_t row = panel * kLanes + lane;
      if (row >= rows) continue;
      for (size_t first = 0; first < blocks; first += per_record) {
        uint8_t* head = base + first / per_record * format.record_nbytes(per_record);
        for (size_t s = 0; s < scales_per_record; ++s) {
          const size_t input = first * kBlock + s * inputs_per_scale;
          if (input >= cols) continue;
          const size_t g = row * groups + input / group;
          put_scale(format, scales[g], head + s * scale_nbytes, lane);
          if (format.has_min)
            put_minimum(format, minima[g], head + scales_per_record * scale_nbytes + s * minimum_nbytes, lane);
        }
        for (size_t b = 0; b < per_record && first + b < blocks; ++b) {
          uint8_t code[kBlock];
          for (size_t i = 0; i < kBlock; ++i) {
            const size_t input = (first + b) * kBlock + i;
            code[i] = input < cols ? codes[row * cols + input] : zero;
          }
          put_codes(format, code, lane, head + header + b * block_nbytes);
        }
      }
    }
  }
}

namespace {

// Where the codes, places and steps of one unit of 128 sparse inputs of a row lie: pair i of 16 inputs, group j in it.
struct SparseUnit {
  const PackedFormat& format;
  uint8_t* at;
  size_t lane;
  uint8_t* code_block(size_t pair) const { return at + 3 * 64 + pair / 4 * format.block_nbytes(); }
  // The input, within a block of eight loads, that a kept code of a pair stands for: loads 2i and 2i + 1.
  static size_t slot(size_t pair, size_t j, bool second) { return (pair % 4 * 2 + (second ? 1 : 0)) * 4 + j; }
  void put_places(size_t pair, size_t j, unsigned place, unsigned step) const {
    at[pair / 4 * 64 + lane * 4 + j] |= static_cast<uint8_t>(place << (pair % 4 * 2));
    at[2 * 64 + lane * 4 + j] |= static_cast<uint8_t>(step << pair);
  }
  unsigned place(size_t pair, size_t j) const { return at[pair / 4 * 64 + lane * 4 + j] >> (pair % 4 * 2) & 3; }
  unsigned second_place(size_t pair, size_t j) const { return (place(pair, j) + 1 + (at[2 * 64 + lane * 4 + j] >> pair & 1)) & 3; }
};

// Byte offset of a unit in a panel, and of the scales of the record it is in.
size_t unit_offset(const PackedFormat& format, size_t unit) {
  const size_t per_record = format.record_inputs / kSparseUnit;
  return (unit / per_record + 1) * format.header_nbytes() + unit * format.unit_nbytes();
}
size_t record_offset(const PackedFormat& format, size_t unit) {
  const size_t per_record = format.record_inputs / kSparseUnit, record = unit / per_record;
  return record * (format.header_nbytes() + per_record * format.unit_nbytes());
}

void unpack_sparse_row(const PackedMatrix& w, size_t row, float* out) {
  const PackedFormat& format = w.format;
  uint8_t* base = const_cast<uint8_t*>(w.panel(row / kLanes));
  const size_t lane = row % kLanes, scale_nbytes = kLanes * format.scale_nbytes();
  const float offset = format.has_min ? 0.0f : static_cast<float>(1 << (format.bits - 1));
  std::memset(out, 0, w.cols * sizeof(float));
  for (size_t k = 0; k < w.cols; k += 4) {
    const size_t unit = k / kSparseUnit, pair = k % kSparseUnit / 16, j = k % 16 / 4;
    const SparseUnit at{format, base + unit_offset(format, unit), lane};
    const uint8_t* head = base + record_offset(format, unit);
    const size_t s = k % format.record_inputs / format.sparse_group;
    const float scale = get_scale(format, head + s * scale_nbytes, lane);
    const float min = format.has_min ? get_minimum(format, head + format.scales() * scale_nbytes + s * kLanes * format.minimum_nbytes(), lane, scale) : 0.0f;
    for (bool second : {false, true}) {
      const size_t input = k + (second ? at.second_place(pair, j) : at.place(pair, j));
      if (input < w.cols)
        out[input] = scale * (static_cast<float>(get_code(format, at.code_block(pair), lane, SparseUnit::slot(pair, j, second))) - offset) + min;
    }
  }
}

}  // namespace

void pack_sparse(const PackedFormat& format, const uint8_t* codes, const uint8_t* places, const float* scales, const float* minima,
                 size_t group, size_t rows, size_t cols, size_t begin, size_t end, uint8_t* out) {
  const size_t panel_nbytes = format.panel_nbytes(cols), kept = cols / 2, groups = (kept + group - 1) / group;
  const size_t scale_nbytes = kLanes * format.scale_nbytes(), minimum_nbytes = kLanes * format.minimum_nbytes();
  for (size_t panel = begin; panel < end; ++panel) {
    uint8_t* base = out + panel * panel_nbytes;
    std::memset(base, 0, panel_nbytes);
    for (size_t lane = 0; lane < kLanes; ++lane) {
      const size_t row = panel * kLanes + lane;
      if (row >= rows) continue;
      for (size_t unit = 0; unit * kSparseUnit < cols; ++unit) {
        const SparseUnit at{format, base + unit_offset(format, unit), lane};
        uint8_t* head = base + record_offset(format, unit);
        if (unit * kSparseUnit % format.record_inputs == 0)
          for (size_t s = 0; s < format.scales(); ++s) {
            const size_t input = unit * kSparseUnit + s * format.sparse_group;
            if (input >= cols) break;
            const size_t g = row * groups + input / 2 / group;
            put_scale(format, scales[g], head + s * scale_nbytes, lane);
            if (format.has_min) put_minimum(format, minima[g], head + format.scales() * scale_nbytes + s * minimum_nbytes, lane);
          }
        uint8_t slots[2][kBlock];
        std::memset(slots, format.has_min ? 0 : 1 << (format.bits - 1), sizeof slots);
        for (size_t i = 0; i < kSparseUnit / 4; ++i) {
          const size_t pair = i / 4, j = i % 4, from = row * kept + (unit * kSparseUnit + 4 * i) / 2;
          if (unit * kSparseUnit + 4 * i >= cols) break;
          // Of the two orders, the one whose second place is one or two after the first.
          const bool turned = ((places[from + 1] - places[from]) & 3) == 3;
          const size_t first = from + (turned ? 1 : 0), second = from + (turned ? 0 : 1);
          at.put_places(pair, j, places[first], ((places[second] - places[first]) & 3) - 1u);
          slots[pair / 4][SparseUnit::slot(pair, j, false)] = codes[first];
          slots[pair / 4][SparseUnit::slot(pair, j, true)] = codes[second];
        }
        for (size_t half : {size_t{0}, size_t{1}}) put_codes(format, slots[half], lane, at.code_block(4 * half));
      }
    }
  }
}

std::vector<uint32_t> column_offsets(size_t cols) {
  const size_t inputs = (cols + kBlock - 1) / kBlock * kBlock;
  std::vector<uint32_t> offsets(inputs);
  for (size_t i = 0; i < inputs; ++i) offsets[i] = static_cast<uint32_t>(64 * i);
  uint64_t state = inputs;
  for (size_t i = inputs; i > 1; --i) {  // Fisher and Yates, on splitmix64
    uint64_t z = (state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    std::swap(offsets[i - 1], offsets[(z ^ (z >> 31)) % i]);
  }
  return offsets;
}

bool fits_columns(const PackedFormat& format) {
  return format.element == Element::Integer && (format.bits == 4 || format.bits == 8) && format.sub_group == 32 && !format.sparse &&
         (format.scale == ScaleType::Float16 || format.scale == ScaleType::Float32);
}

namespace {

// Where the code of a row lies among the 64 bytes of an input.
size_t column_byte(size_t row) { return row % 16 / 4 * 16 + row / 16 % 4 * 4 + row % 4; }

void unpack_column_row(const PackedMatrix& w, size_t row, float* out) {
  const PackedFormat& format = w.format;
  const size_t rows = format.slab_rows();
  const std::vector<uint32_t> offsets = column_offsets(w.cols);
  const uint8_t* base = w.slab(row / rows);
  const uint8_t* columns = base + format.slab_scales_nbytes(w.cols);
  const size_t scale_nbytes = format.scale_nbytes(), minimum = format.minimum_nbytes(), inside = row % rows;
  const size_t panel = inside / kLanes, lane = inside % kLanes;
  const float offset = format.has_min ? 0.0f : static_cast<float>(1 << (format.bits - 1));
  for (size_t k = 0; k < w.cols; ++k) {
    const uint8_t* scales = base + k / format.record_inputs * rows * (scale_nbytes + minimum);
    const uint8_t byte = columns[offsets[k] + column_byte(inside % 64)];
    const int code = format.bits == 8 ? byte : inside >= 64 ? byte >> 4 : byte & 15;
    const float scale = get_scale(format, scales + panel * kLanes * scale_nbytes, lane);
    const float least = format.has_min ? get_minimum(format, scales + rows * scale_nbytes + panel * kLanes * minimum, lane, scale) : 0.0f;
    out[k] = scale * (static_cast<float>(code) - offset) + least;
  }
}

}  // namespace

void pack_columns(const PackedFormat& format, const uint8_t* panels, size_t rows, size_t cols, size_t begin, size_t end, uint8_t* out) {
  PackedFormat dense = format;
  dense.columns = false;
  const size_t slab_rows = format.slab_rows(), slab_nbytes = format.slab_nbytes(cols), panel_nbytes = dense.panel_nbytes(cols);
  const size_t blocks = (cols + kBlock - 1) / kBlock, per_record = format.record_inputs / kBlock;
  const std::vector<uint32_t> offsets = column_offsets(cols);
  const size_t scale = format.scale_nbytes(), minimum = format.minimum_nbytes(), record = slab_rows * (scale + minimum);
  for (size_t slab = begin; slab < end; ++slab) {
    uint8_t* base = out + slab * slab_nbytes;
    uint8_t* columns = base + format.slab_scales_nbytes(cols);
    std::memset(base, 0, slab_nbytes);
    for (size_t k = 0; k < format.slab_panels(); ++k) {
      const size_t panel = slab * format.slab_panels() + k;
      if (panel * kLanes >= rows) break;
      for (size_t b = 0; b < blocks; ++b) {
        const uint8_t* head = panels + panel * panel_nbytes + b / per_record * dense.record_nbytes(per_record);
        if (b % per_record == 0) {
          uint8_t* scales = base + b / per_record * record;
          std::memcpy(scales + k * kLanes * scale, head, kLanes * scale);
          std::memcpy(scales + slab_rows * scale + k * kLanes * minimum, head + kLanes * scale, kLanes * minimum);
        }
        const uint8_t* codes = head + dense.header_nbytes() + b % per_record * dense.block_nbytes();
        for (size_t lane = 0; lane < kLanes; ++lane) {
          const size_t row = k * kLanes + lane;
          for (size_t i = 0; i < kBlock; ++i) {
            const uint8_t code = get_code(dense, codes, lane, i);
            columns[offsets[b * kBlock + i] + column_byte(row % 64)] |= static_cast<uint8_t>(code << (row >= 64 ? 4 : 0));
          }
        }
      }
    }
  }
}

void pack_floats(const PackedFormat& format, const uint8_t* values, size_t rows, size_t cols, size_t begin, size_t end,
                 uint8_t* out) {
  if (format.element == Element::Float32Rows) {
    const size_t first = begin * kLanes, last = std::min(rows, end * kLanes);
    std::memset(out + first * cols * 4, 0, (end - begin) * format.panel_nbytes(cols));
    std::memcpy(out + first * cols * 4, values + first * cols * 4, (last - first) * cols * 4);
    return;
  }
  const size_t width = format.element == Element::Float32 ? 4 : 2, panel_nbytes = format.panel_nbytes(cols);
  const bool pairs = format.element == Element::BFloat16Pairs;
  if (pairs) std::memset(out + begin * panel_nbytes, 0, (end - begin) * panel_nbytes);
  for (size_t panel = begin; panel < end; ++panel) {
    uint8_t* base = out + panel * panel_nbytes;
    for (size_t lane = 0; lane < kLanes; ++lane) {
      const size_t row = panel * kLanes + lane;
      for (size_t k = 0; k < cols; ++k) {
        uint8_t* at = base + (pairs ? pair_offset(k, lane) : (k * kLanes + lane) * width);
        if (pairs && (row >= rows || (get_half(values, row * cols + k) & 0x7fff) < kSmallestBFloat)) continue;
        if (row < rows)
          std::memcpy(at, values + (row * cols + k) * width, width);
        else
          std::memset(at, 0, width);
      }
    }
  }
}

void unpack_row(const PackedMatrix& w, size_t row, float* out) {
  const PackedFormat& format = w.format;
  if (format.columns) return unpack_column_row(w, row, out);
  const uint8_t* base = w.panel(row / kLanes);
  const size_t lane = row % kLanes;
  if (format.element == Element::Float32Rows) {
    std::memcpy(out, base + lane * w.cols * 4, w.cols * 4);
    return;
  }
  if (!format.quantised()) {
    for (size_t k = 0; k < w.cols; ++k) {
      if (format.element == Element::Float32) {
        std::memcpy(out + k, base + (k * kLanes + lane) * 4, 4);
      } else if (format.element == Element::BFloat16Pairs) {
        out[k] = bf16_to_float(get_half(base + pair_offset(k, lane), 0));
      } else {
        const uint16_t bits = get_half(base + k * kLanes * 2, lane);
        out[k] = format.element == Element::Float16 ? half_to_float(bits) : bf16_to_float(bits);
      }
    }
    return;
  }
  if (format.sparse) return unpack_sparse_row(w, row, out);
  const size_t per_record = format.record_inputs / kBlock, subs = kBlock / format.sub_group;
  const size_t header = format.header_nbytes(), scale_nbytes = kLanes * format.scale_nbytes();
  const size_t scales_per_record = format.scales();
  const float offset = format.has_min ? 0.0f : static_cast<float>(1 << (format.bits - 1));
  for (size_t k = 0; k < w.cols; ++k) {
    const size_t block = k / kBlock, in_record = block % per_record;
    const uint8_t* head = base + block / per_record * format.record_nbytes(per_record);
    const uint8_t code = get_code(format, head + header + in_record * format.block_nbytes(), lane, k % kBlock);
    const float value = format.element == Element::Table ? format.table[code] : static_cast<float>(code) - offset;
    if (format.scale == ScaleType::Nested) {
      const uint8_t* sub = head + (format.has_min ? 64 : 32);
      const size_t s = in_record * subs + k % kBlock / format.sub_group;
      const float scale = half_to_float(get_half(head, lane)) * static_cast<int8_t>(sub[s * kLanes + lane]);
      const float min = format.has_min ? half_to_float(get_half(head + 32, lane)) * sub[(per_record * subs + s) * kLanes + lane] : 0.0f;
      out[k] = scale * value - min;
    } else {
      const size_t s = format.sub_group == 16 ? in_record * 2 + k % kBlock / 16 : 0;
      const float scale = get_scale(format, head + s * scale_nbytes, lane);
      const uint8_t* minima = head + scales_per_record * scale_nbytes + s * kLanes * format.minimum_nbytes();
      out[k] = scale * value + (format.has_min ? get_minimum(format, minima, lane, scale) : 0.0f);
    }
  }
}

}  // namespace edgewise
