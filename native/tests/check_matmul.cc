// Every line of kernels.inc, and the float formats.
#include "tests/check.h"

namespace edgewise {

// Random codes are codes of any width; scales are made to be finite, now and then subnormal or zero.
void fill_panel(Random& random, const PackedFormat& format, size_t cols, uint8_t* p, size_t nbytes) {
  for (size_t i = 0; i < nbytes; ++i) p[i] = random.byte();
  auto half = [&](uint8_t* at) {
    const uint16_t bits = static_cast<uint16_t>(random.below(0x400) | random.below(19) << 10 | random.below(2) << 15);
    std::memcpy(at, &bits, 2);
  };
  if (!format.quantised()) {
    for (size_t i = 0; i < kLanes * cols; ++i) {
      const float value = random.value();
      const uint16_t brain = static_cast<uint16_t>(std::bit_cast<uint32_t>(value) >> 16);
      if (format.element == Element::Float32) std::memcpy(p + 4 * i, &value, 4);
      else if (format.element == Element::BFloat16 || format.element == Element::BFloat16Pairs) std::memcpy(p + 2 * i, &brain, 2);
      else half(p + 2 * i);
    }
    return;
  }
  const size_t per_record = format.record_inputs / kBlock, blocks = (cols + kBlock - 1) / kBlock;
  const size_t record = format.sparse ? format.header_nbytes() + per_record / 4 * format.unit_nbytes() : format.record_nbytes(per_record);
  for (size_t block = 0; block < blocks; block += per_record, p += record) {
    if (format.scale == ScaleType::Nested) {
      for (size_t i = 0; i < (format.has_min ? 2 : 1) * kLanes; ++i) half(p + 2 * i);
      continue;
    }
    // Zero points behind the scales may be any byte.
    const size_t width = format.scale_nbytes(), header = format.zero_points ? format.scales() * kLanes * width : format.header_nbytes();
    for (size_t at = 0; at < header; at += width) {
      const float value = random.value();
      if (width == 4) std::memcpy(p + at, &value, 4);
      else if (width == 2) half(p + at);
      else p[at] = static_cast<uint8_t>(random.below(20) == 0 ? random.below(2) : 100 + random.below(40));
    }
  }
}

namespace {

void check_matmul(Case& test, const Kernels& found, const Kernels& reference, const PackedFormat& format, bool int8_inputs, bool whole_records) {
  const MatmulKernel kernel = found.matmul(format, int8_inputs), plain = reference.matmul(format, int8_inputs);
  if (kernel == nullptr || plain == nullptr) return test.miss("no kernel", 0, 0, 0);
  Random random{5};
  static const size_t any[] = {1, 31, 32, 33, 100, 128, 288}, whole[] = {256, 768};
  for (size_t c = 0; c < (whole_records ? 2u : 7u); ++c) {
    const size_t cols = whole_records ? whole[c] : any[c];
    PackedMatrix w;
    w.format = format;
    w.rows = 3 * kLanes;
    w.cols = cols;
    w.panel_nbytes = format.panel_nbytes(cols);
    w.nbytes = 3 * w.panel_nbytes;
    // Kernels prefetch past the end but do not read there.
    Buffer data(w.nbytes);
    for (size_t panel = 0; panel < 3; ++panel) fill_panel(random, format, cols, data.data + panel * w.panel_nbytes, w.panel_nbytes);
    w.data = data.data;
    const std::vector<float> bias = filled<float>(3 * kLanes, [&] { return random.value(); });
    for (size_t tokens : {size_t{1}, size_t{16}, size_t{21}}) {
      Activations x;
      x.tokens = tokens, x.cols = cols, x.slots = tokens == 1 ? 1 : kLanes;
      Buffer codes(Activations::nbytes_int8(tokens, cols, x.slots)), floats(Activations::nbytes_float(tokens, cols, x.slots));
      Buffer halves(Activations::nbytes_bfloat(tokens, cols, x.slots));
      x.place_int8(codes.data);
      x.place_float(floats.data);
      x.place_bfloat(halves.data);
      for (size_t t = 0; t < tokens; ++t) {
        const std::vector<float> row = filled<float>(cols, [&] { return random.value(); });
        reference.rows.quantise(row.data(), 0, row.size(), x, t);
        reference.rows.place(row.data(), 0, row.size(), x, t);
        reference.rows.place_bfloat(row.data(), 0, row.size(), x, t);
      }
      struct { size_t tile, slot, count; } const parts[] = {{0, 0, tokens < 16 ? tokens : 16}, {1, 0, 5}, {0, 3, 7}, {0, 15, 1}, {1, 2, 2}};
      for (size_t part = 0; part < (tokens == 1 ? 1u : tokens == 16 ? 1u : 5u); ++part) {
        const auto [tile, slot, count] = parts[part];
        if (tokens == 21 && part == 0) continue;
        // One panel and several, onto what is there and not, with a bias and without.
        struct { size_t first, panels; bool add, bias; } const calls[] = {{0, 3, false, true}, {1, 1, true, false}, {1, 2, true, true}};
        for (const auto& [first, panels, add, with_bias] : calls) {
          const size_t stride = panels * kLanes + 3;
          Buffer y(4 * stride * count), z(y.size);
          for (size_t i = 0; i < stride * count; ++i) y.floats()[i] = z.floats()[i] = static_cast<float>(i % 7) - 3.0f;
          const float* offset = with_bias ? bias.data() : nullptr;
          kernel(w, first, panels, x, tile, slot, count, {y.floats(), stride, offset, add}, {});
          plain(w, first, panels, x, tile, slot, count, {z.floats(), stride, offset, add}, {});
          test.floats(y.floats(), z.floats(), stride * count, "outputs");
          test.same(y.data + y.size, z.data + z.size, 64, "behind the outputs");
        }
      }
    }
  }
}

enum class Kind { Symmetric, Minimum, Table };
enum class Centre { None, Half, Zero };

void check_line(Tier tier, const Kernels& found, const Kernels& reference, int bits, Kind kind, bool nested, bool halves, const char* name) {
  for (bool int8_inputs : {true, false})
    for (ScaleType scale : {ScaleType::Float16, ScaleType::Float32, ScaleType::Exponent}) {
      Case test(tier, name);
      PackedFormat format;
      format.element = kind == Kind::Table ? Element::Table : Element::Integer;
      format.bits = static_cast<uint8_t>(bits);
      format.has_min = kind == Kind::Minimum;
      format.scale = nested ? ScaleType::Nested : scale;
      format.sub_group = halves ? 16 : 32;
      format.record_inputs = nested ? 256 : halves || scale == ScaleType::Float16 ? 32 : scale == ScaleType::Float32 ? 64 : 128;
      for (int i = 0; i < 16; ++i) format.table[i] = static_cast<int8_t>(i * 17 - 128 + (i == 15 ? 0 : i % 3));
      check_matmul(test, found, reference, format, int8_inputs, nested);
      if (nested) break;
    }
  if (kind != Kind::Minimum || nested) return;
  for (bool int8_inputs : {true, false}) {
    Case test(tier, name);
    PackedFormat format;
    format.element = Element::Integer;
    format.bits = static_cast<uint8_t>(bits);
    format.has_min = format.zero_points = true;
    format.sub_group = halves ? 16 : 32;
    format.record_inputs = halves ? 32 : 64;
    check_matmul(test, found, reference, format, int8_inputs, false);
  }
}

void check_sparse(Tier tier, const Kernels& found, const Kernels& reference, int bits, Centre centre, const char* name) {
  for (bool int8_inputs : {true, false})
    for (uint32_t group : {32u, 64u, 128u, 256u}) {
      Case test(tier, name);
      PackedFormat format;
      format.element = Element::Integer;
      format.bits = static_cast<uint8_t>(bits);
      format.has_min = centre != Centre::Half;
      format.zero_points = centre == Centre::Zero;
      format.scale = group == 256 ? ScaleType::Float32 : ScaleType::Float16;
      format.sparse = true;
      format.sparse_group = group;
      format.record_inputs = group < 128 ? 128 : group;
      check_matmul(test, found, reference, format, int8_inputs, false);
    }
}

}  // namespace

void check_matmuls(Tier tier, const Kernels& found, const Kernels& reference) {
  struct { const char* name; Element element; } const dense[] = {
      {"float32", Element::Float32}, {"float16", Element::Float16}, {"bfloat16", Element::BFloat16},
      {"bfloat16 pairs", Element::BFloat16Pairs}};
  for (const auto& [name, element] : dense) {
    Case test(tier, name);
    PackedFormat format;
    format.element = element;
    format.bits = element == Element::Float32 ? 32 : 16;
    check_matmul(test, found, reference, format, false, false);
  }
#define EDGEWISE_MATMUL(bits, kind, nested, halves) \
  check_line(tier, found, reference, bits, Kind::kind, nested, halves, #bits " bits, " #kind ", " #nested ", " #halves);
#define EDGEWISE_SPARSE(bits, centre) check_sparse(tier, found, reference, bits, Centre::centre, #bits " bits, " #centre ", two of four");
#include "kernels/matmul/kernels.inc"
#undef EDGEWISE_SPARSE
#undef EDGEWISE_MATMUL
}

}  // namespace edgewise
