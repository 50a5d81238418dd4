// The same for weights that keep two of every four inputs, in the compressed form that packed.h describes: each lane selects
// its inputs by a look-up among sixteen, so that half of the products are made and dropped weights are never read.
//
// Order of additions: as for the other formats, the scaled integer dot product of a block, then its minimum.

namespace {

template <int N>
struct Number {
  static constexpr int value = N;
};

// What makes a code signed before it is multiplied: nothing (a minimum is added), half of the range, or a zero point.
enum class Centre { None, Half, Zero };

// One unit of 128 inputs: the indices of the four loads of a block of 32 inputs.
template <int Bits>
struct SparseUnit {
  static constexpr size_t block_nbytes = kLanes * kBlock * Bits / 8, nbytes = 3 * 64 + 2 * block_nbytes;
  Codes place[2], step, offset, next;

  // What is the same for every unit.
  inline SparseUnit() {
    alignas(64) uint8_t groups[64];
    alignas(16) uint8_t after[16];
    for (uint8_t i = 0; i < 64; ++i) groups[i] = static_cast<uint8_t>(i % 4 * 4);
    for (uint8_t i = 0; i < 16; ++i) after[i] = static_cast<uint8_t>((i % 4 + 1 + i / 4 % 2) % 4);
    offset = load_codes(groups);
    next = table(after);
  }
  inline void open(const uint8_t* p) {
    place[0] = load_codes(p);
    place[1] = load_codes(p + 64);
    step = load_codes(p + 128);
  }
  template <int Pair>
  inline void pair(Codes* index) const {
    const Codes first = both(shift_right(place[Pair / 4], Pair % 4 * 2), set1_codes(3));
    index[0] = either(first, offset);
    index[1] = either(look_up(next, either(first, bit_of<2>(step, Pair))), offset);
  }
  template <int Block>
  inline void indices(Codes* index) const {
    pair<2 * Block>(index);
    pair<2 * Block + 1>(index + 2);
  }
};

// Scales and minima of the blocks of a record: one for all, or of groups of 32 or 64 inputs in a record of one unit.
struct SparseScales {
  const PackedFormat& format;
  const size_t scale_nbytes, minimum_nbytes, scales, record_blocks;
  const uint8_t* head = nullptr;
  size_t left = 0;  // blocks of the record at hand
  Floats whole{};
  Codes whole_centre{};
  Codes lanes{};  // index of each byte's lane

  explicit inline SparseScales(const PackedFormat& f)
      : format(f), scale_nbytes(kLanes * f.scale_nbytes()), minimum_nbytes(kLanes * f.minimum_nbytes()),
        scales(f.record_inputs / f.sparse_group), record_blocks(f.record_inputs / kBlock) {
    alignas(64) uint8_t lane[64];
    for (uint8_t i = 0; i < 64; ++i) lane[i] = i / 4;
    lanes = load_codes(lane);
  }
  // The places and codes of the next unit, p being where the one before ends or the panel begins.
  template <Centre kCentre>
  inline const uint8_t* unit(const uint8_t* p) {
    if (left == 0) {
      head = p;
      p += scales * (scale_nbytes + minimum_nbytes);
      left = record_blocks;
      whole = load_scale(head, format.scale);
      if constexpr (kCentre == Centre::Zero) whole_centre = look_up(table(minima(0)), lanes);
    }
    left -= 4;
    return p;
  }
  inline size_t header_nbytes() const { return scales * (scale_nbytes + minimum_nbytes); }
  // b: of the block within its unit.
  inline size_t group(size_t b) const { return scales == 1 ? 0 : scales == 2 ? b / 2 : b; }
  inline Floats scale(size_t b) const { return scales == 1 ? whole : load_scale(head + group(b) * scale_nbytes, format.scale); }
  inline const uint8_t* minima(size_t b) const { return head + scales * scale_nbytes + group(b) * minimum_nbytes; }
  inline Floats minimum(size_t b) const { return load_scale(minima(b), format.scale); }
  template <int Bits, Centre kCentre>
  inline Codes centre(size_t b) const {
    if constexpr (kCentre == Centre::Zero) return scales == 1 ? whole_centre : look_up(table(minima(b)), lanes);
    return set1_codes(1 << (Bits - 1));
  }
};

template <int Bits, Centre kCentre, int Tokens>
inline void sparse_tile(const PackedMatrix& w, const uint8_t* p, const Activations& x, size_t tile, size_t slot,
                        const Products& out, const Ahead& ahead, Fetch& fetch) {
  using Unit = SparseUnit<Bits>;
  const size_t blocks = x.blocks(), slots = x.slots;
  Unit unit;
  SparseScales scales(w.format);
  const Codes one = set1_codes(1), ones[4] = {one, one, one, one};
  const Ints ones_start = start_selected(ones, 4);

  Floats sum[Tokens];
  for (int t = 0; t < Tokens; ++t) sum[t] = zero();

  auto block = [&](auto number, Codes* c, size_t first) __attribute__((always_inline)) {
    constexpr int Block = decltype(number)::value;
    if (first + Block >= blocks) return;
    Codes index[4];
    unit.template indices<Block>(index);
    const Floats scale = scales.scale(Block);
    Floats minimum = zero();
    if constexpr (kCentre == Centre::None) {
      minimum = scales.minimum(Block);
    } else {
      const Codes centre = scales.template centre<Bits, kCentre>(Block);
      for (int i = 0; i < 4; ++i) c[i] = sub(c[i], centre);
    }
    const Ints start = start_selected(c, 4);
    const size_t at = (tile * blocks + first + Block) * slots + slot;
#pragma GCC unroll 16
    for (int t = 0; t < Tokens; ++t) {
      const int8_t* q = x.q + (at + t) * kBlock;
      const Floats step = set1(x.scale[at + t]);
      const Codes low = selectable(q), high = selectable(q + 16);
      const Codes s[4] = {look_up(low, index[0]), look_up(low, index[1]), look_up(high, index[2]), look_up(high, index[3])};
      Ints d = start;
      for (int i = 0; i < 4; ++i) d = dot4_selected(d, c[i], s[i]);
      sum[t] = fma(to_floats(d), mul(scale, step), sum[t]);
      if constexpr (kCentre == Centre::None) {
        Ints total = ones_start;
        for (int i = 0; i < 4; ++i) total = dot4_selected(total, one, s[i]);
        sum[t] = fma(to_floats(total), mul(minimum, step), sum[t]);
      }
    }
  };

  for (size_t first = 0; first < blocks; first += 4) {
    if (Tokens == 1 && scales.left == 0)
      for (size_t line = 0; line < scales.header_nbytes(); line += 64) prefetch(ahead.of(p) + line);
    p = scales.template unit<kCentre>(p);
    if constexpr (Tokens == 1)
      for (size_t line = 0; line < Unit::nbytes; line += 64) prefetch(ahead.of(p) + line);
    else
      fetch.block();
    unit.open(p);
    Codes c[8];
    unpack<Bits>(p + 3 * 64, c);
    block(Number<0>{}, c, first);
    block(Number<1>{}, c + 4, first);
    unpack<Bits>(p + 3 * 64 + Unit::block_nbytes, c);
    block(Number<2>{}, c, first);
    block(Number<3>{}, c + 4, first);
    p += Unit::nbytes;
  }
  put<1, Tokens>(out, sum);
}

template <int Bits, Centre kCentre>
void sparse_panels(const PackedMatrix& w, size_t panel, size_t panels, const Activations& x, size_t tile, size_t slot,
                   size_t count, const Products& out, const Ahead& ahead) {
  Fetch fetch = fetch_of(ahead, panels * passes_of(count, kTile), (x.blocks() + 3) / 4);
  for (size_t i = 0; i < panels; ++i) {
    const uint8_t* p = w.panel(panel + i);
    const Products part = from_panel(out, i);
    size_t t = 0;
    for (; t + kTile <= count; t += kTile) sparse_tile<Bits, kCentre, kTile>(w, p, x, tile, slot + t, from_token(part, t), ahead, fetch);
    if constexpr (kTile > 4)
      for (; t + 4 <= count; t += 4) sparse_tile<Bits, kCentre, 4>(w, p, x, tile, slot + t, from_token(part, t), ahead, fetch);
    for (; t < count; ++t) sparse_tile<Bits, kCentre, 1>(w, p, x, tile, slot + t, from_token(part, t), ahead, fetch);
  }
}

// On float inputs: the kept values of a block are put where they belong, then multiplied as a dense block.
template <int Bits, Centre kCentre>
void sparse_decoded_panels(const PackedMatrix& w, size_t panel, size_t panels, const Activations& x, size_t tile, size_t slot,
                           size_t count, const Products& out, const Ahead&) {
  using Unit = SparseUnit<Bits>;
  const size_t blocks = (w.cols + kBlock - 1) / kBlock;
  const float* f = x.f + (tile * x.blocks() * x.slots + slot) * kBlock;
  for (size_t i = 0; i < panels; ++i)
    for (size_t t = 0; t < count; ++t) {
      const uint8_t* p = w.panel(panel + i);
      Unit unit;
      SparseScales scales(w.format);
      Floats sum[1] = {zero()};
      auto block = [&](auto number, const Codes* c, size_t first) {
        constexpr int Block = decltype(number)::value;
        const size_t b = first + Block;
        if (b >= blocks) return;
        Codes index[4];
        unit.template indices<Block>(index);
        const Floats scale = scales.scale(Block);
        float dense[kBlock * kLanes] = {}, value[kLanes], place[kLanes];
        for (size_t load = 0; load < 4; ++load)
          for (int j = 0; j < 4; ++j) {
            if constexpr (kCentre == Centre::None) {
              store(value, add(mul(scale, byte_of(c[load], j)), scales.minimum(Block)));
            } else {  // signed bytes are put among the unsigned ones and taken back
              const Codes code = sub(sub(c[load], scales.template centre<Bits, kCentre>(Block)), set1_codes(128));
              store(value, mul(scale, sub(byte_of(code, j), set1(128.0f))));
            }
            store(place, byte_of(index[load], j));
            for (size_t lane = 0; lane < kLanes; ++lane)
              dense[(load / 2 * 16 + static_cast<size_t>(place[lane])) * kLanes + lane] = value[lane];
          }
        const float* inputs = f + (b * x.slots + t) * kBlock;
        for (size_t k = 0; k < kBlock && b * kBlock + k < w.cols; ++k)
          sum[0] = fma(load(dense + k * kLanes), set1(inputs[k]), sum[0]);
      };
      for (size_t first = 0; first < blocks; first += 4) {
        p = scales.template unit<kCentre>(p);
        unit.open(p);
        Codes c[8];
        unpack<Bits>(p + 3 * 64, c);
        block(Number<0>{}, c, first);
        block(Number<1>{}, c + 4, first);
        unpack<Bits>(p + 3 * 64 + Unit::block_nbytes, c);
        block(Number<2>{}, c, first);
        block(Number<3>{}, c + 4, first);
        p += Unit::nbytes;
      }
      put<1, 1>(from_token(from_panel(out, i), t), sum);
    }
}

MatmulKernel sparse_kernel(const PackedFormat& format, bool int8_inputs) {
  const Centre centre = !format.has_min ? Centre::Half : format.zero_points ? Centre::Zero : Centre::None;
  if (format.element != Element::Integer || format.scale == ScaleType::Nested) return nullptr;
#define EDGEWISE_MATMUL(bits_, kind_, nested_, halves_)
#define EDGEWISE_SPARSE(bits_, centre_)                     \
  if (format.bits == bits_ && centre == Centre::centre_)    \
    return int8_inputs ? &sparse_panels<bits_, Centre::centre_> : &sparse_decoded_panels<bits_, Centre::centre_>;
#include "kernels/matmul/kernels.inc"
#undef EDGEWISE_SPARSE
#undef EDGEWISE_MATMUL
  return nullptr;
}

}  // namespace
