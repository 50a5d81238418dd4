// Included once per tier, inside its namespace, after its lane header.

namespace {

void write_bytes(Codes codes, float* out) {
  for (int j = 0; j < 4; ++j) store(out + 16 * j, byte_of(codes, j));
}

}  // namespace

LaneFunctions lane_functions() {
  LaneFunctions f{};
#define UNARY(name) f.name = [](const float* a, float* out) { store(out, name(load(a))); };
#define BINARY(name) f.name = [](const float* a, const float* b, float* out) { store(out, name(load(a), load(b))); };
#define TERNARY(name) \
  f.name = [](const float* a, const float* b, const float* c, float* out) { store(out, name(load(a), load(b), load(c))); };
#define LOAD(name, type) f.name = [](const type* p, float* out) { store(out, name(p)); };
  f.copy = [](const float* a, float* out) { store(out, load(a)); };
  UNARY(abs)
  UNARY(round_even)
  BINARY(add)
  BINARY(sub)
  BINARY(mul)
  BINARY(div)
  BINARY(max)
  BINARY(min)
  BINARY(scale_by_power)
  TERNARY(fma)
  TERNARY(fnma)
  LOAD(load_half, uint16_t)
  LOAD(load_bfloat, uint16_t)
  LOAD(load_half_exponent, uint8_t)
  LOAD(load_int8, int8_t)
  LOAD(load_uint8, uint8_t)
#undef UNARY
#undef BINARY
#undef TERNARY
#undef LOAD
  f.first = [](int n, const float* a, const float* b, float* out) { store(out, first(n, load(a), load(b))); };
  f.store_half = [](const float* a, uint16_t* out) { store_half(out, load(a)); };
  f.store_bfloat = [](const float* a, uint16_t* out) { store_bfloat(out, load(a)); };
  f.round_to_ints = [](const float* a, int8_t* bytes, float* floats, int32_t* sum) {
    const Ints rounded = to_ints(load(a));
    store_int8(bytes, rounded);
    store(floats, to_floats(rounded));
    *sum = reduce_add(rounded);
  };
  f.reduce_add = [](const float* a) { return reduce_add(load(a)); };
  f.reduce_max = [](const float* a) { return reduce_max(load(a)); };
  f.look_up = [](const uint8_t* p, const uint8_t* codes, float* out) {
    write_bytes(look_up(table(p), both(load_codes(codes), set1_codes(15))), out);
  };
  f.shift_codes = [](const uint8_t* codes, int n, uint8_t mask, float* right, float* left) {
    const Codes c = load_codes(codes);
    write_bytes(both(shift_right(c, n), set1_codes(mask)), right);
    write_bytes(either(shift_left(both(c, set1_codes(1)), n), c), left);
  };
  f.dot4 = [](int32_t sum, const uint8_t* codes, const int8_t* x, int count, float* out) {
    Ints total = shift_left(set1_ints(sum), 1);
    for (int i = 0; i < count; ++i) total = dot4(total, load_codes(codes + 64 * i), x + 4 * i);
    store(out, to_floats(total));
  };
  f.dot2 = [](const float* sum, const uint16_t* pairs, const uint16_t* x, float* out) {
    store(out, dot2(load(sum), load_codes(reinterpret_cast<const uint8_t*>(pairs)), x));
  };
  f.dot4_full = [](int32_t negated_sum, const uint8_t* codes, const int8_t* x, int count, float* out) {
    Ints total = start_full(negated_sum);
    for (int i = 0; i < count; ++i) total = dot4_full(total, load_codes(codes + 64 * i), x + 4 * i);
    store(out, to_floats(total));
  };
  f.dot4_selected = [](const uint8_t* weights, const uint8_t* index, const int8_t* x, int count, float* out) {
    Codes w[4];
    for (int i = 0; i < count; ++i) w[i] = sub(load_codes(weights + 64 * i), set1_codes(128));
    const Codes inputs = selectable(x);
    Ints total = start_selected(w, count);
    for (int i = 0; i < count; ++i) total = dot4_selected(total, w[i], look_up(inputs, load_codes(index + 64 * i)));
    store(out, to_floats(total));
  };
  f.dot4_unsigned = [](const int32_t* sums, const uint8_t* weights, const uint8_t* x, int count, bool narrow, float* out) {
    Ints total = start_unsigned(load_ints(sums));
    for (int i = 0; i < count; ++i) {
      const Codes w = load_codes(weights + 64 * i);
      total = narrow ? dot4_unsigned_narrow(total, w, x + 4 * i) : dot4_unsigned(total, w, x + 4 * i);
    }
    store(out, to_floats(total));
  };
  f.interleave = [](const uint8_t* columns, float* out) {
    Codes in[4], side[4];
    for (int j = 0; j < 4; ++j) in[j] = load_codes(columns + 64 * j);
    interleave(in, side);
    for (int k = 0; k < 4; ++k) write_bytes(side[k], out + 64 * k);
  };
  f.above = [](const float* a, const float* b) { return above(load(a), load(b)); };
  f.rescale = [](const int32_t* a, const int32_t* b, const int32_t* multiplier, int shift, float* low, float* high) {
    const Ints r = rescale(mul(load_ints(a), load_ints(b)), load_ints(multiplier), shift);
    store(low, to_floats(clamp(r, -32768, 32767)));
    store(high, to_floats(clamp(rescale(r, set1_ints(1), 16), -70000, 70000)));
  };
  return f;
}
