// Weights in columns: which inputs are chosen, products of a slab, and the way back to panels.
#include "tests/check.h"

#include <cmath>

namespace edgewise {

void check_columns(Tier tier, const Kernels& found, const Kernels& reference) {
  Random random{17};
  for (int bits : {4, 8})
    for (int minimum = 0; minimum < 3; ++minimum)
      for (uint32_t group : {32u, 64u, 128u}) {
        Case test(tier, bits == 4 ? "columns of 4 bits" : "columns of 8 bits");
        PackedFormat format;
        format.element = Element::Integer;
        format.bits = static_cast<uint8_t>(bits);
        format.has_min = minimum > 0;
        format.zero_points = minimum == 2;
        format.scale = group == 64 ? ScaleType::Float32 : ScaleType::Float16;
        format.record_inputs = group;
        format.columns = true;
        PackedFormat dense = format;
        dense.columns = false;
        for (size_t cols : {size_t{1}, size_t{32}, size_t{100}, size_t{288}}) {
          PackedMatrix w;
          w.format = format;
          w.rows = format.slab_rows() + 3 * kLanes;
          w.cols = cols;
          w.panel_nbytes = format.slab_nbytes(cols);
          w.nbytes = 2 * w.panel_nbytes;
          Buffer data(w.nbytes);
          for (size_t i = 0; i < w.nbytes; ++i) data.data[i] = random.byte();
          for (size_t slab = 0; slab < 2; ++slab) {  // scales are made to be finite; zero points may be any byte
            uint8_t* at = data.data + slab * w.panel_nbytes;
            const size_t rows = format.slab_rows(), width = format.scale_nbytes(), record = rows * (width + format.minimum_nbytes());
            for (size_t r = 0; r * group < cols; ++r)
              for (size_t i = 0; i < (format.zero_points ? rows * width : record); i += width) {
                const float value = random.value();
                const uint16_t half = static_cast<uint16_t>(random.below(0x400) | random.below(19) << 10 | random.below(2) << 15);
                std::memcpy(at + r * record + i, width == 4 ? static_cast<const void*>(&value) : &half, width);
              }
          }
          w.data = data.data;
          const size_t whole = (cols + kBlock - 1) / kBlock * kBlock;
          std::vector<float> thresholds(whole, INFINITY);
          std::vector<uint32_t> offsets(whole);
          for (size_t i = 0; i < whole; ++i) offsets[i] = static_cast<uint32_t>(i * 5 % whole * 64);
          const std::vector<float> bias = filled<float>(w.panels() * kLanes, [&] { return random.value(); });
          for (float share : {0.0f, 0.4f, 1.0f, -1.0f}) {  // none, some, all; the last: no block but one
            const std::vector<float> values = filled<float>(cols, [&] { return random.value(); });
            for (size_t i = 0; i < cols; ++i) thresholds[i] = share < 0 ? (i / kBlock == 1 ? 0.0f : 1e30f) : random.uniform() * 0.5f + 0.5f < share ? -1.0f : 1e30f;
            Activations x;
            x.tokens = 1, x.cols = cols;
            Buffer codes(Activations::nbytes_int8(1, cols, 1)), a(Chosen::nbytes(cols)), b(Chosen::nbytes(cols)), rest(4 * whole), other(4 * whole);
            x.place_int8(codes.data);
            reference.rows.quantise(values.data(), 0, cols, x, 0);
            Chosen ours, theirs;
            ours.place(a.data, cols);
            theirs.place(b.data, cols);
            found.columns.choose(values.data(), cols, thresholds.data(), offsets.data(), x, ours, rest.floats());
            reference.columns.choose(values.data(), cols, thresholds.data(), offsets.data(), x, theirs, other.floats());
            const size_t quads = theirs.quads();
            test.same(ours.until, theirs.until, theirs.blocks + 1, "quads");
            test.same(ours.offset, theirs.offset, 4 * quads, "offsets");
            test.same(ours.q, theirs.q, 4 * quads, "codes");
            test.same(ours.negated_sum, theirs.negated_sum, theirs.blocks, "sums of codes");
            test.floats(ours.sum, theirs.sum, theirs.blocks, "sums");
            test.floats(ours.scale, theirs.scale, theirs.blocks, "scales");
            test.same(&ours.count, &theirs.count, 1, "count");
            test.buffers(rest, other, "the others");
            for (size_t slab = 0; slab < 2; ++slab)
              for (bool add : {false, true}) {
                Buffer y(4 * (slab == 0 ? format.slab_rows() : 3 * kLanes)), z(y.size);
                for (size_t i = 0; i < y.size / 4; ++i) y.floats()[i] = z.floats()[i] = static_cast<float>(i % 7) - 3.0f;
                const Products out{y.floats(), 0, add ? bias.data() : nullptr, add}, expected{z.floats(), 0, out.bias, add};
                found.columns.multiply(w, slab, ours, out, slab == 0 ? w.slab(1) : nullptr, &w, &ours);
                reference.columns.multiply(w, slab, theirs, expected, nullptr, nullptr, nullptr);
                test.buffers(y, z, "products");
              }
          }
          Buffer panels(format.slab_panels() * dense.panel_nbytes(cols)), plain(panels.size);
          for (size_t slab = 0; slab < 2; ++slab) {
            found.columns.panels(w, slab, offsets.data(), panels.data);
            reference.columns.panels(w, slab, offsets.data(), plain.data);
            test.buffers(panels, plain, "panels");
          }
        }
      }
}

}  // namespace edgewise
