// Codes and scales as packed.h has them. Included inside a tier's namespace, after its lane header.

namespace {

// Codes of inputs 4i..4i+3 of a block, for i = 0..7.
template <int Bits>
inline void unpack(const uint8_t* p, Codes* c);

template <>
inline void unpack<8>(const uint8_t* p, Codes* c) {
  for (int i = 0; i < 8; ++i) c[i] = load_codes(p + 64 * i);
}

template <>
inline void unpack<4>(const uint8_t* p, Codes* c) {
  const Codes mask = set1_codes(0x0F);
  for (int i = 0; i < 4; ++i) {
    Codes pair = load_codes(p + 64 * i);
    c[2 * i] = both(pair, mask);
    c[2 * i + 1] = both(shift_right(pair, 4), mask);
  }
}

template <>
inline void unpack<2>(const uint8_t* p, Codes* c) {
  const Codes mask = set1_codes(0x03);
  for (int i = 0; i < 2; ++i) {
    Codes quad = load_codes(p + 64 * i);
    c[4 * i] = both(quad, mask);
    c[4 * i + 1] = both(shift_right(quad, 2), mask);
    c[4 * i + 2] = both(shift_right(quad, 4), mask);
    c[4 * i + 3] = both(shift_right(quad, 6), mask);
  }
}

template <>
inline void unpack<1>(const uint8_t* p, Codes* c) {
  const Codes plane = load_codes(p), one = set1_codes(1);
  for (int j = 0; j < 8; ++j) c[j] = both(shift_right(plane, j), one);
}

// Bit j of a plane at bit position Place, nothing else.
template <int Place>
inline Codes bit_of(Codes plane, int j) {
  if (j < Place) return shift_left(both(plane, set1_codes(static_cast<uint8_t>(1 << j))), Place - j);
  return both(shift_right(plane, j - Place), set1_codes(1 << Place));
}

// Bit j of the plane belongs to c[j]; it lands at bit position Place.
template <int Place>
inline void add_bit_plane(const uint8_t* p, Codes* c) {
  const Codes plane = load_codes(p);
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) c[j] = either(c[j], bit_of<Place>(plane, j));
}

template <>
inline void unpack<3>(const uint8_t* p, Codes* c) {
  unpack<2>(p, c);
  add_bit_plane<2>(p + 128, c);
}

template <>
inline void unpack<5>(const uint8_t* p, Codes* c) {
  unpack<4>(p, c);
  add_bit_plane<4>(p + 256, c);
}

template <>
inline void unpack<6>(const uint8_t* p, Codes* c) {
  Codes high[8];
  unpack<4>(p, c);
  unpack<2>(p + 256, high);
  for (int j = 0; j < 8; ++j) c[j] = either(c[j], shift_left(high[j], 4));
}

inline Floats load_scale(const uint8_t* p, ScaleType type) {
  if (type == ScaleType::Float16) return load_half(reinterpret_cast<const uint16_t*>(p));
  if (type == ScaleType::Float32) return load(reinterpret_cast<const float*>(p));
  return load_half_exponent(p);
}

}  // namespace
