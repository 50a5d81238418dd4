// y (tokens, rows of some panels) = x W^T, for every packed format. Included once per tier, inside its namespace.
//
// Order of additions, the same for one token and for many: blocks of a row in order; within a block the scaled integer
// dot product first, then the minimum. Integers are exact, so only these float operations decide the bits.

#include "kernels/codes.inl.h"

namespace {

// The sums of a tile, panel by panel, to where they belong.
template <int Panels, int Tokens>
inline void put(const Products& out, Floats* sum) {
#pragma GCC unroll 4
  for (int i = 0; i < Panels; ++i) {
    if (out.bias != nullptr) {
      const Floats bias = load(out.bias + static_cast<size_t>(i) * kLanes);
#pragma GCC unroll 16
      for (int t = 0; t < Tokens; ++t) sum[i * Tokens + t] = add(sum[i * Tokens + t], bias);
    }
  }
  if (out.add) {
#pragma GCC unroll 16
    for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 4
      for (int i = 0; i < Panels; ++i) {
        const float* y = out.y + static_cast<size_t>(t) * out.stride + static_cast<size_t>(i) * kLanes;
        sum[i * Tokens + t] = add(load(y), sum[i * Tokens + t]);
      }
  }
#pragma GCC unroll 16
  for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 4
    for (int i = 0; i < Panels; ++i)
      store(out.y + static_cast<size_t>(t) * out.stride + static_cast<size_t>(i) * kLanes, sum[i * Tokens + t]);
}

// What a call for several tokens fetches, evenly over the blocks of all its passes over panels.
struct Fetch {
  const uint8_t* at;
  size_t step;  // bytes in a block
  inline void block() {
    for (size_t i = 0; i < step; i += 64) prefetch(at + i);
    at += step;
  }
};
// Passes of several tokens over a panel, or one.
inline size_t passes_of(size_t count, size_t tile) {
  const size_t passes = count / tile + (tile > 4 ? count % tile / 4 : 0);
  return passes > 0 ? passes : 1;
}
inline Fetch fetch_of(const Ahead& ahead, size_t passes, size_t blocks) {
  return {ahead.later, (ahead.nbytes + passes * blocks - 1) / (passes * blocks)};
}

// The output of later tokens, and of later panels.
inline Products from_token(const Products& out, size_t token) { return {out.y + token * out.stride, out.stride, out.bias, out.add}; }
inline Products from_panel(const Products& out, size_t panel) {
  return {out.y + panel * kLanes, out.stride, out.bias == nullptr ? nullptr : out.bias + panel * kLanes, out.add};
}

// value = scale * code + minimum: a minimum of its own, or one that a zero point gives.
inline Floats load_minimum(const uint8_t* p, const PackedFormat& format, Floats scale) {
  if (format.zero_points) return sub(zero(), mul(load_uint8(p), scale));
  return load_scale(p, format.scale);
}

enum class Kind { Symmetric, Minimum, Table };

template <int Bits_, Kind kKind_, bool Nested_, bool Halves_, bool Plain_ = false>
struct Format {
  static constexpr int Bits = Bits_;
  static constexpr Kind kKind = kKind_;
  static constexpr bool Nested = Nested_;  // integer sub-scales under a half-precision scale
  static constexpr bool Halves = Halves_;  // two scales in a block of 32 inputs
  static constexpr bool Plain = Plain_;    // one half-precision scale, and minimum, for each block: nothing left to ask
};

// A dot product of 16 or 32 inputs, codes already centred.
template <class F, int From, int To, bool Short>
inline Ints dot(const Codes* c, const int8_t* x, int32_t negated_sum) {
  constexpr bool full = F::Bits == 8 || F::kKind == Kind::Table;  // bytes centred at 128
  Ints sum;
  if constexpr (full)
    sum = start_full(negated_sum);
  else if constexpr (F::kKind == Kind::Symmetric)
    sum = shift_left(set1_ints(negated_sum), F::Bits - 1);
  else
    sum = zero_ints();
  if constexpr (Short) {
    Ints other = zero_ints();
    for (int i = From; i < To; i += 2) {
      sum = full ? dot4_full(sum, c[i], x + 4 * i) : dot4(sum, c[i], x + 4 * i);
      other = full ? dot4_full(other, c[i + 1], x + 4 * (i + 1)) : dot4(other, c[i + 1], x + 4 * (i + 1));
    }
    return add(sum, other);
  }
  for (int i = From; i < To; ++i) {
    if constexpr (full)
      sum = dot4_full(sum, c[i], x + 4 * i);
    else
      sum = dot4(sum, c[i], x + 4 * i);
  }
  return sum;
}

// Scales and minima of the block at hand, for its two halves (equal where one scale covers the block).
struct Scales {
  Floats low, high, min_low, min_high;
};

// Walks the records of a panel: head() at the start of each, then scales() and codes for each block of it.
template <class F>
struct PanelReader {
  static constexpr size_t block_nbytes = kLanes * kBlock * F::Bits / 8;
  const PackedFormat& format;
  const size_t general_per_record, general_header;
  const uint8_t* p;
  const uint8_t* record = nullptr;
  Floats super{}, super_min{};

  explicit inline PanelReader(const PackedFormat& f, const uint8_t* panel)
      : format(f), general_per_record(F::Plain ? 1 : f.record_inputs / kBlock), general_header(F::Plain ? 0 : f.header_nbytes()),
        p(panel) {}

  inline size_t per_record() const { return F::Plain ? 1 : F::Nested ? 8 : general_per_record; }
  inline size_t header() const { return F::Plain ? (F::kKind == Kind::Minimum ? 4 : 2) * kLanes : general_header; }
  inline ScaleType scale_type() const { return F::Plain ? ScaleType::Float16 : format.scale; }
  inline size_t scale_nbytes() const { return F::Plain ? 2 * kLanes : kLanes * format.scale_nbytes(); }

  inline void head() {
    record = p;
    p += header();
    if constexpr (F::Nested) {
      super = load_half(reinterpret_cast<const uint16_t*>(record));
      if constexpr (F::kKind == Kind::Minimum) super_min = load_half(reinterpret_cast<const uint16_t*>(record + 32));
    } else if constexpr (!F::Halves) {
      super = load_scale(record, scale_type());
      if constexpr (F::kKind == Kind::Minimum)
        super_min = F::Plain ? load_scale(record + scale_nbytes(), scale_type()) : load_minimum(record + scale_nbytes(), format, super);
    }
  }

  // b: of the block within its record.
  inline Scales scales(size_t b) const {
    constexpr size_t subs = F::Halves ? 2 : 1;
    Scales s{super, super, super_min, super_min};
    if constexpr (F::Nested) {
      const uint8_t* sub = record + (F::kKind == Kind::Minimum ? 64 : 32) + b * subs * kLanes;
      s.low = mul(load_int8(reinterpret_cast<const int8_t*>(sub)), super);
      s.high = F::Halves ? mul(load_int8(reinterpret_cast<const int8_t*>(sub + kLanes)), super) : s.low;
      if constexpr (F::kKind == Kind::Minimum) {
        const uint8_t* m = sub + per_record() * subs * kLanes;
        s.min_low = mul(load_uint8(m), super_min);
        s.min_high = F::Halves ? mul(load_uint8(m + kLanes), super_min) : s.min_low;
      }
    } else if constexpr (F::Halves) {
      const uint8_t* at = record + b * 2 * scale_nbytes();
      s.low = load_scale(at, scale_type());
      s.high = load_scale(at + scale_nbytes(), scale_type());
      if constexpr (F::kKind == Kind::Minimum) {
        const size_t width = kLanes * format.minimum_nbytes();
        const uint8_t* m = record + per_record() * 2 * scale_nbytes() + b * 2 * width;
        s.min_low = load_minimum(m, format, s.low);
        s.min_high = load_minimum(m + width, format, s.high);
      }
    }
    return s;
  }

  inline void codes(Codes* c) {
    unpack<F::Bits>(p, c);
    p += block_nbytes;
  }
};

inline Codes centred_table(const PackedFormat& format) {
  uint8_t bytes[16];
  for (int i = 0; i < 16; ++i) bytes[i] = static_cast<uint8_t>(format.table[i] + 128);
  return table(bytes);
}

template <class F, int Tokens>
inline void panel_tile(const PackedMatrix& w, const uint8_t* p, const Activations& x, size_t tile, size_t slot,
                       const Products& out, const Ahead& ahead, Fetch& fetch) {
  const size_t blocks = x.blocks(), slots = x.slots;
  PanelReader<F> reader(w.format, p);
  Codes centred{};
  if constexpr (F::kKind == Kind::Table) centred = centred_table(w.format);

  Floats sum[Tokens];
  for (int t = 0; t < Tokens; ++t) sum[t] = zero();

  for (size_t first_block = 0; first_block < blocks; first_block += reader.per_record()) {
    if constexpr (Tokens == 1)
      for (size_t line = 0; line < reader.header(); line += 64) prefetch(ahead.of(reader.p) + line);
    reader.head();
    const size_t left = blocks - first_block, count = F::Plain || left >= reader.per_record() ? reader.per_record() : left;
    for (size_t b = 0; b < count; ++b) {
      if constexpr (Tokens == 1)
        for (size_t line = 0; line < reader.block_nbytes; line += 64) prefetch(ahead.of(reader.p) + line);
      else
        fetch.block();
      Scales scales = reader.scales(b);
      if constexpr (F::Bits == 8 && F::kKind == Kind::Minimum) {  // bytes are centred at 128
        scales.min_low = fma(set1(128.0f), scales.low, scales.min_low);
        scales.min_high = fma(set1(128.0f), scales.high, scales.min_high);
      }
      Codes c[8];
      reader.codes(c);
      if constexpr (F::kKind == Kind::Table)
        for (int i = 0; i < 8; ++i) c[i] = look_up(centred, c[i]);

      const size_t at = (tile * blocks + first_block + b) * slots + slot;
      // Unrolled whole, so that the sums stay in registers.
#pragma GCC unroll 16
      for (int t = 0; t < Tokens; ++t) {
        const int8_t* q = x.q + (at + t) * kBlock;
        const Floats step = set1(x.scale[at + t]);
        if constexpr (F::Halves) {
          const int32_t low = x.negated_sum_low[at + t];
          Ints d0 = dot<F, 0, 4, (Tokens < 4)>(c, q, low);
          Ints d1 = dot<F, 4, 8, (Tokens < 4)>(c, q, x.negated_sum[at + t] - low);
          sum[t] = fma(to_floats(d0), mul(scales.low, step), sum[t]);
          sum[t] = fma(to_floats(d1), mul(scales.high, step), sum[t]);
          if constexpr (F::kKind == Kind::Minimum) {
            // The minima of K-quants are subtracted, those of plain formats added.
            const Floats low_sum = set1(x.sum_low[at + t]), high_sum = set1(x.sum_high[at + t]);
            sum[t] = F::Nested ? fnma(scales.min_low, low_sum, sum[t]) : fma(scales.min_low, low_sum, sum[t]);
            sum[t] = F::Nested ? fnma(scales.min_high, high_sum, sum[t]) : fma(scales.min_high, high_sum, sum[t]);
          }
        } else {
          Ints d = dot<F, 0, 8, (Tokens < 4)>(c, q, x.negated_sum[at + t]);
          sum[t] = fma(to_floats(d), mul(scales.low, step), sum[t]);
          if constexpr (F::kKind == Kind::Minimum) {
            const Floats total = set1(x.sum[at + t]);
            sum[t] = F::Nested ? fnma(scales.min_low, total, sum[t]) : fma(scales.min_low, total, sum[t]);
          }
        }
      }
    }
  }
  put<1, Tokens>(out, sum);
}

// Two panels of 8-bit codes for each input that is spread over the lanes: codes come as fast as they are multiplied.
template <class F, int Tokens>
inline void pair_tile(const PackedMatrix& w, const uint8_t* p, const Activations& x, size_t tile, size_t slot, const Products& out,
                      Fetch& fetch) {
  const size_t blocks = x.blocks();
  PanelReader<F> readers[2] = {PanelReader<F>(w.format, p), PanelReader<F>(w.format, p + w.panel_nbytes)};
  Floats sum[2 * Tokens];
  for (int i = 0; i < 2 * Tokens; ++i) sum[i] = zero();
  for (size_t b = 0; b < blocks; ++b) {
    fetch.block();
    const size_t at = (tile * blocks + b) * x.slots + slot;
    const int8_t* q = x.q + at * kBlock;
    for (PanelReader<F>& reader : readers) reader.head();
    Ints d[2 * Tokens];
#pragma GCC unroll 16
    for (int t = 0; t < Tokens; ++t) d[t] = d[Tokens + t] = start_full(x.negated_sum[at + static_cast<size_t>(t)]);
#pragma GCC unroll 8
    for (size_t i = 0; i < 8; ++i) {
      const Codes low = load_codes(readers[0].p + 64 * i), high = load_codes(readers[1].p + 64 * i);
#pragma GCC unroll 16
      for (int t = 0; t < Tokens; ++t) {
        d[t] = dot4_full(d[t], low, q + static_cast<size_t>(t) * kBlock + 4 * i);
        d[Tokens + t] = dot4_full(d[Tokens + t], high, q + static_cast<size_t>(t) * kBlock + 4 * i);
      }
    }
#pragma GCC unroll 16
    for (int t = 0; t < Tokens; ++t) {
      const Floats step = set1(x.scale[at + static_cast<size_t>(t)]);
      sum[t] = fma(to_floats(d[t]), mul(readers[0].super, step), sum[t]);
      sum[Tokens + t] = fma(to_floats(d[Tokens + t]), mul(readers[1].super, step), sum[Tokens + t]);
    }
    for (PanelReader<F>& reader : readers) reader.p += reader.block_nbytes;
  }
  put<2, Tokens>(out, sum);
}

// The same weights on float inputs: each value is made as the file's own decoder makes it, then multiplied.
template <class F, int Tokens>
inline void decoded_tile(const PackedMatrix& w, const uint8_t* p, const float* x, size_t slots, const Products& out) {
  PanelReader<F> reader(w.format, p);
  const size_t blocks = (w.cols + kBlock - 1) / kBlock;
  constexpr bool table_codes = F::kKind == Kind::Table;
  Codes centred{};
  if constexpr (table_codes) centred = centred_table(w.format);
  const Floats centre = set1(table_codes ? 128.0f : F::kKind == Kind::Symmetric ? static_cast<float>(1 << (F::Bits - 1)) : 0.0f);
  Floats sum[Tokens];
  for (int t = 0; t < Tokens; ++t) sum[t] = zero();
  for (size_t b = 0; b < blocks; ++b) {
    if (b % reader.per_record() == 0) reader.head();
    const Scales scales = reader.scales(b % reader.per_record());
    Codes c[8];
    reader.codes(c);
    for (int i = 0; i < 8; ++i) {
      if constexpr (table_codes) c[i] = look_up(centred, c[i]);
      const Floats scale = i < 4 ? scales.low : scales.high, min = i < 4 ? scales.min_low : scales.min_high;
      for (int j = 0; j < 4; ++j) {
        const size_t k = b * kBlock + static_cast<size_t>(4 * i + j);
        if (k >= w.cols) break;
        Floats value = mul(scale, sub(byte_of(c[i], j), centre));
        if constexpr (F::kKind == Kind::Minimum) value = F::Nested ? sub(value, min) : add(value, min);
#pragma GCC unroll 16
        for (int t = 0; t < Tokens; ++t) sum[t] = fma(value, set1(x[(b * slots + static_cast<size_t>(t)) * kBlock + k % kBlock]), sum[t]);
      }
    }
  }
  put<1, Tokens>(out, sum);
}

template <class F>
void decoded_panels(const PackedMatrix& w, size_t panel, size_t panels, const Activations& x, size_t tile, size_t slot,
                    size_t count, const Products& out, const Ahead&) {
  const float* f = x.f + (tile * x.blocks() * x.slots + slot) * kBlock;
  for (size_t i = 0; i < panels; ++i) {
    const Products part = from_panel(out, i);
    size_t t = 0;
    for (; t + 4 <= count; t += 4) decoded_tile<F, 4>(w, w.panel(panel + i), f + t * kBlock, x.slots, from_token(part, t));
    for (; t < count; ++t) decoded_tile<F, 1>(w, w.panel(panel + i), f + t * kBlock, x.slots, from_token(part, t));
  }
}

template <class F>
void quantised_panels(const PackedMatrix& w, size_t panel, size_t panels, const Activations& x, size_t tile, size_t slot,
                      size_t count, const Products& out, const Ahead& ahead) {
  constexpr int kPair = 4;
  constexpr bool pairs = kTile >= 16 && F::Plain && F::Bits == 8 && F::kKind == Kind::Symmetric;
  size_t i = 0;
  if constexpr (pairs) {
    Fetch fetch = fetch_of(ahead, panels / 2 * (kTile / kPair) + 1, x.blocks());
    for (; count == kTile && i + 2 <= panels; i += 2)
      for (size_t t = 0; t < kTile; t += kPair)
        pair_tile<F, kPair>(w, w.panel(panel + i), x, tile, slot + t, from_token(from_panel(out, i), t), fetch);
  }
  Fetch fetch = fetch_of(ahead, panels * passes_of(count, kTile), x.blocks());
  for (; i < panels; ++i) {
    const uint8_t* p = w.panel(panel + i);
    const Products part = from_panel(out, i);
    size_t t = 0;
    for (; t + kTile <= count; t += kTile) panel_tile<F, kTile>(w, p, x, tile, slot + t, from_token(part, t), ahead, fetch);
    if constexpr (kTile > 4)
      for (; t + 4 <= count; t += 4) panel_tile<F, 4>(w, p, x, tile, slot + t, from_token(part, t), ahead, fetch);
    for (; t < count; ++t) panel_tile<F, 1>(w, p, x, tile, slot + t, from_token(part, t), ahead, fetch);
  }
}

template <Element E>
inline Floats load_column(const uint8_t* p, size_t k) {
  if constexpr (E == Element::Float32) return load(reinterpret_cast<const float*>(p) + kLanes * k);
  if constexpr (E == Element::Float16) return load_half(reinterpret_cast<const uint16_t*>(p) + kLanes * k);
  if constexpr (E == Element::BFloat16) return load_bfloat(reinterpret_cast<const uint16_t*>(p) + kLanes * k);
}

// Panels x Tokens sums in registers: each column and each input that is loaded serves several of them.
template <Element E, int Panels, int Tokens>
inline void float_tile(const uint8_t* p, size_t panel_nbytes, size_t cols, const float* x, size_t slots, const Products& out,
                       const Ahead& ahead, Fetch& fetch) {
  constexpr size_t width = E == Element::Float32 ? 64 : 32;
  Floats sum[Panels * Tokens];
  for (int i = 0; i < Panels * Tokens; ++i) sum[i] = zero();
  for (size_t first = 0; first < cols; first += kBlock, x += slots * kBlock) {
    const size_t count = cols - first < kBlock ? cols - first : kBlock;
    if constexpr (Tokens > 1) fetch.block();
    for (size_t k = 0; k < count; ++k) {
      Floats w[Panels];
#pragma GCC unroll 4
      for (int i = 0; i < Panels; ++i) {
        const uint8_t* panel = p + static_cast<size_t>(i) * panel_nbytes;
        if constexpr (Tokens == 1) prefetch(ahead.of(panel + (first + k) * width));
        w[i] = load_column<E>(panel, first + k);
      }
#pragma GCC unroll 16
      for (int t = 0; t < Tokens; ++t) {
        const Floats input = set1(x[static_cast<size_t>(t) * kBlock + k]);
#pragma GCC unroll 4
        for (int i = 0; i < Panels; ++i) sum[i * Tokens + t] = fma(w[i], input, sum[i * Tokens + t]);
      }
    }
  }
  put<Panels, Tokens>(out, sum);
}

template <Element E, int Panels, int Tokens>
inline void float_tiles(const PackedMatrix& w, size_t panel, const Activations& x, const float* f, size_t count,
                        const Products& out, const Ahead& ahead, Fetch& fetch) {
  const uint8_t* p = w.panel(panel);
  size_t t = 0;
  for (; t + Tokens <= count; t += Tokens)
    float_tile<E, Panels, Tokens>(p, w.panel_nbytes, w.cols, f + t * kBlock, x.slots, from_token(out, t), ahead, fetch);
  if constexpr (Tokens > 4)
    for (; t + 4 <= count; t += 4)
      float_tile<E, Panels, 4>(p, w.panel_nbytes, w.cols, f + t * kBlock, x.slots, from_token(out, t), ahead, fetch);
  for (; t < count; ++t)
    float_tile<E, Panels, 1>(p, w.panel_nbytes, w.cols, f + t * kBlock, x.slots, from_token(out, t), ahead, fetch);
}

inline Fetch float_fetch(const Ahead& ahead, size_t panels, size_t count, size_t blocks) {
  if constexpr (kTile < 16) return fetch_of(ahead, panels * passes_of(count, kTile), blocks);
  return fetch_of(ahead, panels / 2 * passes_of(count, kTile / 2) + panels % 2 * passes_of(count, kTile), blocks);
}

template <Element E>
void float_panels(const PackedMatrix& w, size_t panel, size_t panels, const Activations& x, size_t tile, size_t slot,
                  size_t count, const Products& out, const Ahead& ahead) {
  const float* f = x.f + (tile * x.blocks() * x.slots + slot) * kBlock;
  Fetch fetch = float_fetch(ahead, panels, count, x.blocks());
  size_t i = 0;
  if constexpr (kTile >= 16)
    for (; i + 2 <= panels; i += 2) float_tiles<E, 2, kTile / 2>(w, panel + i, x, f, count, from_panel(out, i), ahead, fetch);
  for (; i < panels; ++i) float_tiles<E, 1, kTile>(w, panel + i, x, f, count, from_panel(out, i), ahead, fetch);
}

template <int Panels, int Tokens>
inline void bfloat_tile(const uint8_t* p, size_t panel_nbytes, size_t cols, const uint16_t* x, size_t slots, const Products& out,
                        const Ahead& ahead, Fetch& fetch) {
  Floats sum[Panels * Tokens];
  for (int i = 0; i < Panels * Tokens; ++i) sum[i] = zero();
  auto block = [&](size_t count) __attribute__((always_inline)) {
    if constexpr (Tokens > 1) fetch.block();
    for (size_t k = 0; k < count; k += 2, p += 64) {
      Codes w[Panels];
#pragma GCC unroll 4
      for (int i = 0; i < Panels; ++i) {
        const uint8_t* panel = p + static_cast<size_t>(i) * panel_nbytes;
        if constexpr (Tokens == 1) prefetch(ahead.of(panel));
        w[i] = load_codes(panel);
      }
#pragma GCC unroll 16
      for (int t = 0; t < Tokens; ++t) {
#pragma GCC unroll 4
        for (int i = 0; i < Panels; ++i)
          sum[i * Tokens + t] = dot2(sum[i * Tokens + t], w[i], x + static_cast<size_t>(t) * kBlock + k);
      }
    }
  };
  size_t first = 0;
  for (; first + kBlock <= cols; first += kBlock, x += slots * kBlock) block(kBlock);
  if (first < cols) block(cols - first);
  put<Panels, Tokens>(out, sum);
}

template <int Panels, int Tokens>
inline void bfloat_tiles(const PackedMatrix& w, size_t panel, const Activations& x, const uint16_t* bf, size_t count,
                         const Products& out, const Ahead& ahead, Fetch& fetch) {
  const uint8_t* p = w.panel(panel);
  size_t t = 0;
  for (; t + Tokens <= count; t += Tokens)
    bfloat_tile<Panels, Tokens>(p, w.panel_nbytes, w.cols, bf + t * kBlock, x.slots, from_token(out, t), ahead, fetch);
  if constexpr (Tokens > 4)
    for (; t + 4 <= count; t += 4)
      bfloat_tile<Panels, 4>(p, w.panel_nbytes, w.cols, bf + t * kBlock, x.slots, from_token(out, t), ahead, fetch);
  for (; t < count; ++t)
    bfloat_tile<Panels, 1>(p, w.panel_nbytes, w.cols, bf + t * kBlock, x.slots, from_token(out, t), ahead, fetch);
}

void bfloat_panels(const PackedMatrix& w, size_t panel, size_t panels, const Activations& x, size_t tile, size_t slot,
                   size_t count, const Products& out, const Ahead& ahead) {
  const uint16_t* bf = x.bf + (tile * x.blocks() * x.slots + slot) * kBlock;
  Fetch fetch = float_fetch(ahead, panels, count, x.blocks());
  size_t i = 0;
  if constexpr (kTile >= 16)
    for (; i + 2 <= panels; i += 2) bfloat_tiles<2, kTile / 2>(w, panel + i, x, bf, count, from_panel(out, i), ahead, fetch);
  for (; i < panels; ++i) bfloat_tiles<1, kTile>(w, panel + i, x, bf, count, from_panel(out, i), ahead, fetch);
}

}  // namespace

#include "kernels/matmul/sparse.inl.h"

MatmulKernel matmul_kernel(const PackedFormat& format, bool int8_inputs) {
  switch (format.element) {
    case Element::Float32: return &float_panels<Element::Float32>;
    case Element::Float16: return &float_panels<Element::Float16>;
    case Element::BFloat16: return &float_panels<Element::BFloat16>;
    case Element::BFloat16Pairs: return &bfloat_panels;
    default: break;
  }
  if (format.sparse) return sparse_kernel(format, int8_inputs);
  const Kind kind = format.element == Element::Table ? Kind::Table : format.has_min ? Kind::Minimum : Kind::Symmetric;
  const bool nested = format.scale == ScaleType::Nested, halves = format.sub_group == 16;
  const bool plain = format.scale == ScaleType::Float16 && format.record_inputs == kBlock && !format.zero_points;
#define EDGEWISE_MATMUL(bits_, kind_, nested_, halves_)                                                        \
  if (format.bits == bits_ && kind == Kind::kind_ && nested == nested_ && halves == halves_) {                 \
    if (!int8_inputs) return &decoded_panels<Format<bits_, Kind::kind_, nested_, halves_>>;                    \
    if (plain && !nested_ && !halves_)                                                                         \
      return &quantised_panels<Format<bits_, Kind::kind_, nested_, halves_, !nested_ && !halves_>>;            \
    return &quantised_panels<Format<bits_, Kind::kind_, nested_, halves_>>;                                    \
  }
#include "kernels/matmul/kernels.inc"
#undef EDGEWISE_MATMUL
  return nullptr;
}
