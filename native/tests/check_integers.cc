// Products and attention in integers, and rounding to grids.
#include "tests/check.h"

namespace edgewise {

namespace {

const size_t kSizes[] = {1, 2, 15, 16, 17, 31, 32, 33, 48, 64, 100, 127, 128, 257, 576};

}  // namespace

void check_integers(Tier tier, const IntegerKernels& found, const IntegerKernels& reference) {
  Random random{13};
  auto grid = [&](int bits) {
    const int top = (1 << bits) - 1;
    return Grid{0.01f + 0.02f * (random.uniform() + 1.0f), random.below(top + 1), top};
  };
  {
    Case snap(tier, "snap"), codes(tier, "quantise to a grid"), gates(tier, "gates on grids");
    for (size_t n : kSizes) {
      std::vector<float> x = filled<float>(n, [&] { return random.value(); });
      if (n > 16) x[3] = INFINITY, x[5] = -INFINITY, x[7] = NAN, x[9] = 1e30f;
      Buffer y(4 * n, 0xAB), z(4 * n, 0xAB);
      for (int bits : {8, 16}) {
        const Grid on = grid(bits), act = grid(8), sigmoid{1.0f / 255.0f, 0, 255};
        found.snap(on, x.data(), n, y.floats());
        reference.snap(on, x.data(), n, z.floats());
        snap.buffers(y, z, "row");
        for (Gate function : {Gate::Silu, Gate::Gelu, Gate::GeluTanh, Gate::Relu})
          for (int with = 0; with < 4; ++with) {
            const std::vector<float> gate = filled<float>(n, [&] { return random.value(); });
            const Grid *s = with & 1 ? &sigmoid : nullptr, *a = with & 2 ? &act : nullptr;
            found.gate(function, s, a, with == 3 ? nullptr : gate.data(), y.floats(), n);
            reference.gate(function, s, a, with == 3 ? nullptr : gate.data(), z.floats(), n);
            gates.buffers(y, z, "row");
          }
      }
      Activations a, b;
      a.tokens = 17, a.cols = n, a.slots = kLanes;
      b = a;
      Buffer p(Activations::nbytes_int8(17, n, kLanes)), q(p.size);
      a.place_int8(p.data), b.place_int8(q.data);
      const Grid on = grid(8);
      for (size_t t = 0; t < 17; ++t) {
        found.quantise(on, x.data(), 0, n, a, t);
        reference.quantise(on, x.data(), 0, n, b, t);
      }
      codes.buffers(p, q, "codes and sums");
    }
  }
  for (int bits : {2, 3, 4, 8})
    for (bool zero : {false, true}) {
      Case test(tier, zero ? "integer products, zero points" : "integer products");
      for (size_t cols : {size_t{7}, size_t{64}, size_t{100}, size_t{576}}) {
        PackedFormat format;
        format.element = Element::Integer;
        format.bits = static_cast<uint8_t>(bits);
        format.has_min = format.zero_points = zero;
        format.scale = bits == 8 ? ScaleType::Float32 : ScaleType::Float16;
        format.record_inputs = static_cast<uint32_t>((cols + kBlock - 1) / kBlock * kBlock);
        PackedMatrix w;
        w.format = format;
        w.rows = 3 * kLanes;
        w.cols = cols;
        w.panel_nbytes = format.panel_nbytes(cols);
        w.nbytes = 3 * w.panel_nbytes;
        Buffer data(w.nbytes);
        for (size_t panel = 0; panel < 3; ++panel) fill_panel(random, format, cols, data.data + panel * w.panel_nbytes, w.panel_nbytes);
        w.data = data.data;
        int32_t sums[3 * kLanes], zeros[3 * kLanes], multiplier[3 * kLanes], correction[3 * kLanes], other_sums[kLanes], other_zeros[kLanes];
        int32_t rest[3 * kLanes];
        float scales[3 * kLanes], remainder[3 * kLanes], other_scales[kLanes];
        for (size_t panel = 0; panel < 3; ++panel) {
          reference.describe(w, panel, sums + panel * kLanes, scales + panel * kLanes, zeros + panel * kLanes);
          found.describe(w, panel, other_sums, other_scales, other_zeros);
          test.same(other_sums, sums + panel * kLanes, kLanes, "sums of codes");
          test.same(other_zeros, zeros + panel * kLanes, kLanes, "zero points");
          test.floats(other_scales, scales + panel * kLanes, kLanes, "scales");
        }
        for (size_t r = 0; r < 3 * kLanes; ++r) {
          correction[r] = random.below(1 << 20) - (1 << 19);
          multiplier[r] = static_cast<int32_t>(random.next() >> 33);
          rest[r] = random.below(9) - 4;
          remainder[r] = random.value();
        }
        IntegerRows rows{zeros, correction, sums, multiplier, rest, scales, remainder, 40, grid(16)};
        w.integers = &rows;
        for (size_t tokens : {size_t{1}, size_t{16}, size_t{21}})
          for (bool rounded : {true, false}) {
            rows.multiplier = rounded ? multiplier : nullptr;
            Activations x;
            x.tokens = tokens, x.cols = cols, x.slots = tokens == 1 ? 1 : kLanes;
            Buffer buffer(Activations::nbytes_int8(tokens, cols, x.slots));
            x.place_int8(buffer.data);
            for (size_t t = 0; t < tokens; ++t) {
              std::vector<float> row = filled<float>(cols, [&] { return random.value(); });
              if (t == 3) row.assign(cols, 1e9f);
              reference.quantise({0.03f, 100, 255}, row.data(), 0, cols, x, t);
            }
            const size_t tile = tokens == 21 ? 1 : 0, count = tokens == 21 ? 5 : tokens, stride = 2 * kLanes + 3;
            for (bool add : {false, true}) {
              Buffer y(4 * stride * count), z(y.size);
              for (size_t i = 0; i < stride * count; ++i) y.floats()[i] = z.floats()[i] = static_cast<float>(i % 7) - 3.0f;
              found.matmul(format)(w, 1, 2, x, tile, 0, count, {y.floats(), stride, nullptr, add}, {});
              reference.matmul(format)(w, 1, 2, x, tile, 0, count, {z.floats(), stride, nullptr, add}, {});
              test.floats(y.floats(), z.floats(), stride * count, "outputs");
              test.same(y.data + y.size, z.data + z.size, 64, "behind the outputs");
            }
          }
      }
    }
  Case test(tier, "attention in integers");
  for (size_t dim : {size_t{16}, size_t{33}, size_t{64}, size_t{80}}) {
    IntegerAttention a{dim, grid(8), grid(8), grid(8), grid(16), {1.0f / 65535.0f, 0, 65535}, grid(8), 1 << 30, 1 << 30, 36, 45};
    const size_t positions = 150;
    Buffer keys((positions + 15) / 16 * a.key_tile_nbytes()), other_keys(keys.size), values(a.values_nbytes(positions + 16)), other_values(values.size);
    for (size_t p = 0; p < positions; ++p) {
      const std::vector<float> row = filled<float>(dim, [&] { return random.value(); });
      found.store_key(a, row.data(), p, keys.data);
      reference.store_key(a, row.data(), p, other_keys.data);
      found.store_value(a, row.data(), p, values.data);
      reference.store_value(a, row.data(), p, other_values.data);
    }
    test.buffers(keys, other_keys, "keys");
    test.buffers(values, other_values, "values");
    Buffer scratch(IntegerAttention::scratch_nbytes(positions)), y(4 * dim, 0xAB), z(4 * dim, 0xAB);
    for (int round = 0; round < 40; ++round) {
      const std::vector<float> q = filled<float>(dim, [&] { return random.value(); });
      const size_t end = 1 + static_cast<size_t>(random.below(static_cast<int>(positions)));
      const size_t begin = round % 3 ? 0 : static_cast<size_t>(random.below(static_cast<int>(end)));
      found.attend(a, q.data(), begin, end, keys.data, values.data, y.floats(), scratch.data);
      reference.attend(a, q.data(), begin, end, keys.data, values.data, z.floats(), scratch.data);
      test.buffers(y, z, "outputs");
    }
  }
}

}  // namespace edgewise
