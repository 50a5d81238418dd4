// y = W x of one token where only some inputs are read: weights in columns, see packed.h. Included once per tier, inside its
// namespace.
//
// Additions go in the order of matmul.inl.h: with every input read, results are those of the dense kernel to the bit.

#include "kernels/codes.inl.h"

namespace {

// Bytes of columns that are fetched ahead of their use, and of scales.
constexpr size_t kQuadsAhead = 24, kScalesAhead = 1024, kUnpackAhead = 48;

void choose(const float* values, size_t cols, const float* threshold, const uint32_t* offset, const Activations& x, Chosen& chosen,
            float* rest) {
  size_t at = 0, count = 0;
  for (size_t b = 0; b < chosen.blocks; ++b) {
    chosen.until[b] = static_cast<uint32_t>(at / 4);
    Ints codes = zero_ints();
    const size_t begin = at;
    for (size_t half = 0; half < kBlock; half += kLanes) {
      const size_t from = b * kBlock + half;
      if (from >= cols) {
        if (rest != nullptr) store(rest + from, zero());
        continue;
      }
      const Floats value = load_tail(values + from, cols - from);
      const uint32_t mask = above(abs(value), load(threshold + from));
      if (rest != nullptr) {
        store(rest + from, value);
        for (uint32_t left = mask; left != 0; left &= left - 1) rest[from + static_cast<size_t>(__builtin_ctz(left))] = 0.0f;
      }
      codes = keep(mask, offset + from, x.q + from, chosen.offset + at, chosen.q + at, codes);
      at += static_cast<size_t>(__builtin_popcount(mask));
    }
    count += at - begin;
    const int32_t total = reduce_add(codes);
    const uint32_t last = at > begin ? chosen.offset[at - 1] : 0;
#pragma GCC unroll 3
    for (size_t i = 0; i < 3; ++i) {  // up to a whole quad; what is written beyond is written over
      chosen.offset[at + i] = last;
      chosen.q[at + i] = 0;
    }
    at = (at + 3) / 4 * 4;
    chosen.negated_sum[b] = -total;
    chosen.scale[b] = x.scale[b];
    chosen.sum[b] = x.scale[b] * static_cast<float>(total);
  }
  chosen.until[chosen.blocks] = static_cast<uint32_t>(at / 4);
  chosen.count = count;
}

// value = scale * code + minimum: a minimum of its own, or one that a zero point gives.
inline Floats minimum_of(const uint8_t* p, const PackedFormat& format, Floats scale) {
  if (format.zero_points) return sub(zero(), mul(load_uint8(p), scale));
  return load_scale(p, format.scale);
}

inline void fetch_quad(const uint8_t* columns, const uint32_t* offset) {
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) prefetch(columns + offset[j]);
}

// Panels: 16 rows each; at four bits the second four of them are the high nibbles.
template <int Bits, bool Minimum, int Panels>
inline void slab_product(const PackedMatrix& w, const uint8_t* slab, const Chosen& x, const Products& out, size_t panels,
                         const uint8_t* next, const PackedMatrix* next_of, const Chosen* next_x) {
  const PackedFormat& format = w.format;
  const size_t rows = format.slab_rows(), width = format.scale_nbytes(), minimum_width = format.minimum_nbytes();
  const size_t record_nbytes = rows * (width + minimum_width), per_record = format.record_inputs / kBlock, quads = x.quads();
  const uint8_t* columns = slab + format.slab_scales_nbytes(w.cols);
  const uint8_t* next_columns = next == nullptr ? nullptr : next + next_of->format.slab_scales_nbytes(next_of->cols);
  const size_t next_quads = next == nullptr ? 0 : next_x->quads();
  const Codes mask = set1_codes(15);
  if (next != nullptr)
    for (size_t line = 0; line < kScalesAhead; line += 64) prefetch(next + line);
  Floats sum[Panels];
  for (int k = 0; k < Panels; ++k) sum[k] = zero();
  for (size_t b = 0; b < x.blocks; ++b) {
    const size_t first = x.until[b], last = x.until[b + 1];
    if (first == last) continue;
    const uint8_t* scales = slab + b / per_record * record_nbytes;
    if (b % per_record == 0)
      for (size_t line = 0; line < record_nbytes; line += 64) prefetch(scales + kScalesAhead + line);
    Ints d[Panels];
#pragma GCC unroll 8
    for (int k = 0; k < Panels; ++k)
      d[k] = Bits == 8 ? start_full(x.negated_sum[b]) : Minimum ? zero_ints() : shift_left(set1_ints(x.negated_sum[b]), Bits - 1);
    for (size_t quad = first; quad < last; ++quad) {
      if (const size_t later = quad + kQuadsAhead; later < quads)
        fetch_quad(columns, x.offset + 4 * later);
      else if (later - quads < next_quads)
        fetch_quad(next_columns, next_x->offset + 4 * (later - quads));
      const uint32_t* at = x.offset + 4 * quad;
      const int8_t* q = x.q + 4 * quad;
      const Codes in[4] = {load_codes(columns + at[0]), load_codes(columns + at[1]), load_codes(columns + at[2]), load_codes(columns + at[3])};
      Codes side[4];
      interleave(in, side);
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        if constexpr (Bits == 8) {
          d[k] = dot4_full(d[k], side[k], q);
        } else {
          d[k] = dot4(d[k], both(side[k], mask), q);
          if constexpr (Panels == 8) d[4 + k] = dot4(d[4 + k], both(shift_right(side[k], 4), mask), q);
        }
      }
    }
    const Floats step = set1(x.scale[b]), total = set1(x.sum[b]);
#pragma GCC unroll 8
    for (int k = 0; k < Panels; ++k) {
      const size_t row = static_cast<size_t>(k) * kLanes;
      const Floats scale = load_scale(scales + row * width, format.scale);
      sum[k] = fma(to_floats(d[k]), mul(scale, step), sum[k]);
      if constexpr (Minimum) {
        Floats least = minimum_of(scales + rows * width + row * minimum_width, format, scale);
        if constexpr (Bits == 8) least = fma(set1(128.0f), scale, least);  // bytes are centred at 128
        sum[k] = fma(least, total, sum[k]);
      }
    }
  }
  for (size_t k = 0; k < panels; ++k) {
    if (out.bias != nullptr) sum[k] = add(sum[k], load(out.bias + k * kLanes));
    if (out.add) sum[k] = add(load(out.y + k * kLanes), sum[k]);
    store(out.y + k * kLanes, sum[k]);
  }
}

template <int Bits, bool Minimum>
void slab_of(const PackedMatrix& w, size_t slab, const Chosen& x, const Products& out, const uint8_t* next, const PackedMatrix* next_of,
             const Chosen* next_x) {
  const size_t most = w.format.slab_panels(), left = w.panels() - slab * most, panels = left < most ? left : most;
  if constexpr (Bits == 4)
    if (panels > 4) return slab_product<Bits, Minimum, 8>(w, w.slab(slab), x, out, panels, next, next_of, next_x);
  slab_product<Bits, Minimum, 4>(w, w.slab(slab), x, out, panels, next, next_of, next_x);
}

void multiply_slab(const PackedMatrix& w, size_t slab, const Chosen& x, const Products& out, const uint8_t* next,
                   const PackedMatrix* next_of, const Chosen* next_x) {
  const bool minimum = w.format.has_min;
  auto kernel = w.format.bits == 8 ? (minimum ? &slab_of<8, true> : &slab_of<8, false>) : minimum ? &slab_of<4, true> : &slab_of<4, false>;
  kernel(w, slab, x, out, next, next_of, next_x);
}

void slab_panels(const PackedMatrix& w, size_t slab, const uint32_t* offset, uint8_t* out) {
  PackedFormat dense = w.format;
  dense.columns = false;
  const size_t inputs = (w.cols + kBlock - 1) / kBlock * kBlock, rows = dense.slab_rows();
  const size_t per_record = dense.record_inputs / kBlock, width = kLanes * dense.scale_nbytes(), minimum_width = kLanes * dense.minimum_nbytes();
  const size_t record_nbytes = rows * (dense.scale_nbytes() + dense.minimum_nbytes()), panel_nbytes = dense.panel_nbytes(w.cols);
  const size_t panels = dense.slab_panels();
  const uint8_t* base = w.slab(slab);
  const uint8_t* columns = base + dense.slab_scales_nbytes(w.cols);
  const Codes low = set1_codes(0x0f), high = set1_codes(0xf0);
  const size_t last = inputs - 1;
  size_t input = 0, at = 0;  // of the next input; of the block, in a panel
  for (size_t b = 0; b < inputs / kBlock; ++b) {
    if (b % per_record == 0) {
      const uint8_t* scales = base + b / per_record * record_nbytes;
      for (size_t k = 0; k < panels; ++k) {
        __builtin_memcpy(out + k * panel_nbytes + at, scales + k * width, width);
        if (minimum_width > 0)
          __builtin_memcpy(out + k * panel_nbytes + at + width, scales + panels * width + k * minimum_width, minimum_width);
      }
      at += width + minimum_width;
    }
    for (size_t i = 0; i < 8; ++i) {
      const bool pairs = dense.bits == 4;
      Codes side[8];
      for (size_t half = 0; half < (pairs ? 2 : 1); ++half) {
        Codes in[4];
        for (Codes& column : in) {
          column = load_codes(columns + offset[input]);
          prefetch(columns + offset[input + kUnpackAhead < last ? input + kUnpackAhead : last]);
          ++input;
        }
        interleave(in, side + 4 * half);
      }
      if (pairs) {  // eight inputs to a load: the first four in low nibbles
        for (size_t k = 0; k < 4; ++k) {
          const Codes first = either(both(side[k], low), both(shift_left(both(side[4 + k], low), 4), high));
          const Codes second = either(both(shift_right(both(side[k], high), 4), low), both(side[4 + k], high));
          store_codes(out + k * panel_nbytes + at, first);
          store_codes(out + (4 + k) * panel_nbytes + at, second);
        }
        ++i;
      } else {
        for (size_t k = 0; k < 4; ++k) store_codes(out + k * panel_nbytes + at, side[k]);
      }
      at += 64;
    }
  }
}

}  // namespace

ColumnKernels column_kernels() { return {&choose, &multiply_slab, &slab_panels}; }
