// Operations on rows of activations.
#include "tests/check.h"

namespace edgewise {

namespace {

const size_t kSizes[] = {1, 2, 15, 16, 17, 31, 32, 33, 48, 64, 100, 127, 128, 257, 576};

}  // namespace

void check_rows(Tier tier, const RowKernels& found, const RowKernels& expected) {
  Case rms(tier, "rms_norm"), layer(tier, "layer_norm"), add(tier, "add"), place(tier, "place"), quantise(tier, "quantise");
  Random random{3};
  for (size_t n : kSizes)
    for (float size : {1e-4f, 1.0f, 1e4f}) {
      const std::vector<float> x = filled<float>(n, [&] { return random.value() * size; });
      const std::vector<float> weight = filled<float>(n, [&] { return random.value(); });
      const std::vector<float> bias = filled<float>(n, [&] { return random.value(); });
      Buffer y(4 * n, 0xAB), z(4 * n, 0xAB);
      for (int with = 0; with < 4; ++with) {
        const float* w = with & 1 ? weight.data() : nullptr;
        const float* b = with & 2 ? bias.data() : nullptr;
        found.rms_norm(x.data(), w, 1e-6f, n, y.floats());
        expected.rms_norm(x.data(), w, 1e-6f, n, z.floats());
        rms.buffers(y, z, "row");
        found.layer_norm(x.data(), w, b, 1e-5f, n, y.floats());
        expected.layer_norm(x.data(), w, b, 1e-5f, n, z.floats());
        layer.buffers(y, z, "row");
      }
      found.add(x.data(), n, y.floats());
      expected.add(x.data(), n, z.floats());
      add.buffers(y, z, "row");

      for (size_t tokens : {size_t{1}, size_t{5}, size_t{17}}) {
        Activations a, b;
        a.tokens = tokens, a.cols = n, a.slots = tokens == 1 ? 1 : kLanes;
        b = a;
        Buffer p(Activations::nbytes_int8(tokens, n, a.slots)), q(p.size);
        a.place_int8(p.data), b.place_int8(q.data);
        Buffer f(Activations::nbytes_float(tokens, n, a.slots)), g(f.size);
        a.place_float(f.data), b.place_float(g.data);
        Buffer h(Activations::nbytes_bfloat(tokens, n, a.slots)), i(h.size);
        a.place_bfloat(h.data), b.place_bfloat(i.data);
        for (size_t t = 0; t < tokens; ++t) {
          std::vector<float> row = filled<float>(n, [&] { return random.value() * size; });
          if (t == 2) row.assign(n, 0.0f);
          found.quantise(row.data(), 0, row.size(), a, t);
          expected.quantise(row.data(), 0, row.size(), b, t);
          found.place(row.data(), 0, row.size(), a, t);
          expected.place(row.data(), 0, row.size(), b, t);
          found.place_bfloat(row.data(), 0, row.size(), a, t);
          expected.place_bfloat(row.data(), 0, row.size(), b, t);
        }
        place.buffers(h, i, "bfloat16 inputs");
        quantise.buffers(p, q, "codes, scales and sums");
        place.buffers(f, g, "inputs");
      }
    }
  struct { const char* name; Gate function; } const gates[] = {
      {"silu", Gate::Silu}, {"gelu", Gate::Gelu}, {"gelu_tanh", Gate::GeluTanh}, {"relu", Gate::Relu}};
  for (const auto& [name, function] : gates) {
    Case test(tier, name);
    for (size_t n : kSizes) {
      std::vector<float> gate = filled<float>(n, [&] { return random.value() * 4.0f; });
      for (size_t i = 0; i < n; i += 11) gate[i] = random.uniform() * 120.0f;
      if (n > 40) gate[7] = INFINITY, gate[21] = -INFINITY, gate[33] = -0.0f, gate[35] = NAN;
      const std::vector<float> up = filled<float>(n, [&] { return random.value(); });
      for (bool gated : {true, false}) {
        std::vector<float> y = gated ? up : gate, z = y;
        found.gate(function, gated ? gate.data() : nullptr, y.data(), n);
        expected.gate(function, gated ? gate.data() : nullptr, z.data(), n);
        test.floats(y.data(), z.data(), n, gated ? "gated" : "alone");
      }
    }
  }
}

}  // namespace edgewise
