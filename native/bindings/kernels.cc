// Packing and single kernels, for engine/load.py and for the tests that hold each kernel against NumPy.
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "bindings/bindings.h"
#include "bindings/packed.h"
#include "edgewise/kernels.h"
#include "edgewise/model.h"
#include "edgewise/pack.h"

namespace nb = nanobind;

namespace edgewise {

namespace {

template <class T>
using Vector = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <class T>
using Matrix = nb::ndarray<const T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
template <class T>
using Output = nb::ndarray<T, nb::c_contig, nb::device::cpu>;

BlockType block_type(const std::string& name) {
  auto type = block_type_by_name(name);
  if (!type) throw std::invalid_argument("unknown block type " + name);
  return *type;
}

// Formats of our own: element "int", "table", "float32", "float16", "bfloat16", "bfloat16 pairs" for
// bfloat16 inputs, "float32 rows" to look rows up in; scales are half precision or float.
// zero_points: minima are zero points, kept as bytes. sparse: two of four inputs are kept, and a group counts dropped ones too.
PackedFormat make_format(const std::string& element, int bits, bool has_min, const std::string& scale, size_t group,
                         const std::vector<int>& table, bool zero_points, bool sparse) {
  PackedFormat format;
  if (element == "float32" || element == "float32 rows") {
    format = packed_format_of(BlockType::F32);
    if (element != "float32") format.element = Element::Float32Rows;
    return format;
  }
  if (element == "float16") return packed_format_of(BlockType::F16);
  if (element == "bfloat16" || element == "bfloat16 pairs") {
    format = packed_format_of(BlockType::BF16);
    if (element != "bfloat16") format.element = Element::BFloat16Pairs;
    return format;
  }
  if (element != "int" && element != "table") throw std::invalid_argument("unknown element " + element);
  format.element = element == "int" ? Element::Integer : Element::Table;
  format.bits = static_cast<uint8_t>(bits);
  format.has_min = has_min;
  if (scale == "fp16") format.scale = ScaleType::Float16;
  else if (scale == "fp32") format.scale = ScaleType::Float32;
  else if (scale == "e8m0") format.scale = ScaleType::Exponent;
  else throw std::invalid_argument("unknown scale " + scale);
  format.zero_points = zero_points;
  if (zero_points && !has_min) throw std::invalid_argument("a zero point stands for a minimum, which the format lacks");
  if (sparse) {
    if (group == 0 || group % 32 != 0 || (group > 64 && group % kSparseUnit != 0))
      throw std::invalid_argument("a scale of a sparse weight covers 32, 64 or a multiple of 128 inputs; given " + std::to_string(group));
    format.sparse = true;
    format.sparse_group = static_cast<uint32_t>(group);
    format.record_inputs = static_cast<uint32_t>(std::max(group, kSparseUnit));
  } else if (group == 16) {
    format.sub_group = 16;
  } else {
    if (group == 0 || group % kBlock != 0)
      throw std::invalid_argument("a scale covers 16 inputs or a multiple of 32; given " + std::to_string(group));
    format.record_inputs = static_cast<uint32_t>(group);
  }
  if (format.element == Element::Table) {
    if (table.size() != 16) throw std::invalid_argument("a table has 16 entries; given " + std::to_string(table.size()));
    for (size_t i = 0; i < 16; ++i) format.table[i] = static_cast<int8_t>(table[i]);
  }
  if (kernels(Tier::Reference).matmul(format, true) == nullptr)
    throw std::invalid_argument("no kernel for " + std::to_string(bits) + "-bit codes " + (has_min ? "with" : "without") +
                                " minimum, a scale per " + std::to_string(group) + " inputs");
  return format;
}

void check_output(const PackedFormat& format, size_t rows, size_t cols, const Output<uint8_t>& out) {
  const size_t expected = packed_nbytes(format, rows, cols);
  if (out.size() != expected)
    throw std::invalid_argument("packed output has " + std::to_string(out.size()) + " bytes; expected " + std::to_string(expected));
}

Tier tier_of(const std::string& name) {
  if (const std::optional<Tier> tier = tier_named(name)) return *tier;
  throw std::invalid_argument("tier " + name + ": expected " + tier_names());
}

// x (tokens, cols) W^T -> y (tokens, rows), with `slots` tokens in a tile, on the tier of that name.
void matmul(const PackedMatrix& w, Matrix<float> x, Output<float> y, const std::string& tier, bool int8) {
  const Kernels& table = kernels(tier_of(tier));
  const size_t tokens = x.shape(0);
  if (x.shape(1) != w.cols || y.size() != tokens * w.rows) throw std::invalid_argument("matmul: shapes do not agree");
  Activations a;
  a.tokens = tokens;
  a.cols = w.cols;
  a.slots = tokens == 1 ? 1 : kLanes;
  std::vector<uint8_t> buffer(std::max(Activations::nbytes_int8(tokens, w.cols, a.slots), Activations::nbytes_float(tokens, w.cols, a.slots)));
  int8 = int8 && w.format.quantised();
  if (int8) {
    a.place_int8(buffer.data());
    for (size_t t = 0; t < tokens; ++t) table.rows.quantise(x.data() + t * w.cols, 0, w.cols, a, t);
  } else if (w.format.element == Element::BFloat16Pairs) {
    a.place_bfloat(buffer.data());
    for (size_t t = 0; t < tokens; ++t) table.rows.place_bfloat(x.data() + t * w.cols, 0, w.cols, a, t);
  } else {
    a.place_float(buffer.data());
    for (size_t t = 0; t < tokens; ++t) table.rows.place(x.data() + t * w.cols, 0, w.cols, a, t);
  }
  const MatmulKernel kernel = table.matmul(w.format, int8);
  const size_t stride = w.panels() * kLanes;
  std::vector<float> out(a.slots * stride);
  for (size_t tile = 0; tile < a.tiles(); ++tile) {
    const size_t count = std::min(a.slots, tokens - tile * a.slots);
    kernel(w, 0, w.panels(), a, tile, 0, count, {out.data(), stride}, {});
    for (size_t t = 0; t < count; ++t)
      std::memcpy(y.data() + (tile * a.slots + t) * w.rows, out.data() + t * stride, w.rows * sizeof(float));
  }
}

void apply_rows(const std::string& name, Matrix<float> x, Vector<float> weight, Vector<float> bias, float eps, Output<float> y,
                const std::string& tier) {
  const RowKernels& rows = kernels(tier_of(tier)).rows;
  const size_t n = x.shape(1);
  if (y.size() != x.size()) throw std::invalid_argument("rows: shapes do not agree");
  for (size_t t = 0; t < x.shape(0); ++t) {
    const float* in = x.data() + t * n;
    float* out = y.data() + t * n;
    const float* w = weight.size() ? weight.data() : nullptr;
    if (name == "rms_norm") rows.rms_norm(in, w, eps, n, out);
    else if (name == "layer_norm") rows.layer_norm(in, w, bias.size() ? bias.data() : nullptr, eps, n, out);
    else {
      const Gate function = name == "silu" ? Gate::Silu : name == "gelu" ? Gate::Gelu : name == "gelu_tanh" ? Gate::GeluTanh : Gate::Relu;
      std::memcpy(out, in, n * sizeof(float));
      rows.gate(function, nullptr, out, n);
    }
  }
}

}  // namespace

void bind_kernels(nb::module_& m) {
  nb::class_<PackedFormat>(m, "PackedFormat", "Layout of packed rows; see packed.h")
      .def(nb::new_([](const std::string& element, int bits, bool has_min, const std::string& scale, size_t group,
                       const std::vector<int>& table, bool zero_points, bool sparse) {
             return make_format(element, bits, has_min, scale, group, table, zero_points, sparse);
           }),
           nb::arg("element"), nb::arg("bits") = 0, nb::arg("has_min") = false, nb::arg("scale") = "fp16", nb::arg("group") = 32,
           nb::arg("table") = std::vector<int>{}, nb::arg("zero_points") = false, nb::arg("sparse") = false)
      .def_static("of_blocks", [](const std::string& type) { return packed_format_of(block_type(type)); }, nb::arg("type"))
      .def("nbytes", [](const PackedFormat& f, size_t rows, size_t cols) { return packed_nbytes(f, rows, cols); },
           nb::arg("rows"), nb::arg("cols"), "Bytes of a packed (rows, cols) matrix")
      .def("in_columns", [](PackedFormat f) {
             if (!fits_columns(f)) throw std::invalid_argument("no kernel for weights of this format in columns: 4 or 8 bits, a scale for at least 32 inputs");
             f.columns = true;
             return f;
           }, "The same codes and scales, input by input")
      .def_prop_ro("columns", [](const PackedFormat& f) { return f.columns; })
      .def_prop_ro("bits", [](const PackedFormat& f) { return f.bits; })
      .def_prop_ro("quantised", &PackedFormat::quantised);

  nb::class_<PackedMatrix>(m, "PackedMatrix", "A packed weight over bytes that stay alive with it")
      .def(nb::new_([](const PackedFormat& format, size_t rows, size_t cols, nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu> data) {
             if (data.size() != packed_nbytes(format, rows, cols))
               throw std::invalid_argument("packed data has " + std::to_string(data.size()) + " bytes; expected " +
                                           std::to_string(packed_nbytes(format, rows, cols)));
             PackedMatrix w;
             w.format = format;
             w.rows = rows;
             w.cols = cols;
             w.data = data.data();
             w.nbytes = data.size();
             w.panel_nbytes = format.panel_nbytes(cols);
             // The array may be dropped on a thread without the interpreter's lock: take it for that.
             w.owner = std::shared_ptr<const void>(new nb::object(nb::cast(data)), [](const void* p) {
               nb::gil_scoped_acquire lock;
               delete static_cast<const nb::object*>(p);
             });
             return w;
           }),
           nb::arg("format"), nb::arg("rows"), nb::arg("cols"), nb::arg("data"))
      .def_ro("rows", &PackedMatrix::rows)
      .def_ro("cols", &PackedMatrix::cols)
      .def_ro("nbytes", &PackedMatrix::nbytes)
      .def_prop_ro("columns", [](const PackedMatrix& w) { return w.format.columns; })
      .def_prop_ro("bits", [](const PackedMatrix& w) { return w.format.bits; })
      .def("row", [](const PackedMatrix& w, size_t row, Output<float> out) {
             if (row >= w.rows || out.size() != w.cols) throw std::invalid_argument("row: out of range or wrong size");
             unpack_row(w, row, out.data());
           }, nb::arg("row"), nb::arg("out"), "One row as float32 into out (cols,)");

  m.def("pack_blocks", [](const std::string& type, Matrix<uint8_t> raw, size_t cols, Output<uint8_t> out) {
          const BlockType t = block_type(type);
          const BlockLayout& l = layout(t);
          const size_t rows = raw.shape(0);
          if (cols % static_cast<size_t>(l.values) != 0 || raw.shape(1) != cols / static_cast<size_t>(l.values) * static_cast<size_t>(l.nbytes))
            throw std::invalid_argument("pack_blocks: rows of " + std::to_string(raw.shape(1)) + " bytes are not " +
                                        std::to_string(cols) + " values of " + type);
          const PackedFormat format = packed_format_of(t);
          check_output(format, rows, cols, out);
          nb::gil_scoped_release release;
          pack_blocks(t, raw.data(), rows, cols, 0, (rows + kLanes - 1) / kLanes, out.data());
        }, nb::arg("type"), nb::arg("raw"), nb::arg("cols"), nb::arg("out"));
  m.def("pack_codes", [](const PackedFormat& format, Matrix<uint8_t> codes, Matrix<float> scales, Matrix<float> minima, size_t group, Output<uint8_t> out) {
          const size_t rows = codes.shape(0), cols = codes.shape(1);
          if (group == 0) throw std::invalid_argument("pack_codes: group is zero");
          const size_t groups = (cols + group - 1) / group;
          if (scales.shape(0) != rows || scales.shape(1) != groups || (format.has_min && (minima.shape(0) != rows || minima.shape(1) != groups)))
            throw std::invalid_argument("pack_codes: expected scales and minima of (" + std::to_string(rows) + ", " + std::to_string(groups) + ")");
          const size_t per_scale = format.sub_group == 16 ? 16 : format.record_inputs;
          if (group % per_scale != 0 && per_scale < cols) throw std::invalid_argument("pack_codes: group does not hold whole records");
          check_output(format, rows, cols, out);
          nb::gil_scoped_release release;
          pack_codes(format, codes.data(), scales.data(), minima.data(), group, rows, cols, 0, (rows + kLanes - 1) / kLanes, out.data());
        }, nb::arg("format"), nb::arg("codes"), nb::arg("scales"), nb::arg("minima"), nb::arg("group"), nb::arg("out"));
  m.def("pack_columns", [](const PackedFormat& format, Vector<uint8_t> panels, size_t rows, size_t cols, Output<uint8_t> out) {
          PackedFormat dense = format;
          dense.columns = false;
          if (!format.columns || panels.size() != packed_nbytes(dense, rows, cols))
            throw std::invalid_argument("pack_columns: expected a format in columns, and panels of (" + std::to_string(rows) + ", " + std::to_string(cols) + ")");
          check_output(format, rows, cols, out);
          nb::gil_scoped_release release;
          pack_columns(format, panels.data(), rows, cols, 0, (rows + format.slab_rows() - 1) / format.slab_rows(), out.data());
        }, nb::arg("format"), nb::arg("panels"), nb::arg("rows"), nb::arg("cols"), nb::arg("out"));
  m.def("multiply_columns", [](const PackedMatrix& w, Vector<float> x, Vector<float> thresholds, Output<float> y, const std::string& tier) {
          const Kernels& table = kernels(tier_of(tier));
          if (!w.format.columns || x.size() != w.cols || thresholds.size() != w.cols || y.size() != w.rows)
            throw std::invalid_argument("multiply_columns: a weight in columns, x and thresholds (cols,), y (rows,)");
          const ChosenInputs inputs(w, thresholds.data());
          Activations a;
          a.tokens = 1;
          a.cols = w.cols;
          std::vector<uint8_t> codes(Activations::nbytes_int8(1, w.cols, 1)), buffer(Chosen::nbytes(w.cols));
          a.place_int8(codes.data());
          table.rows.quantise(x.data(), 0, w.cols, a, 0);
          Chosen chosen;
          chosen.place(buffer.data(), w.cols);
          table.columns.choose(x.data(), w.cols, inputs.threshold.data(), inputs.offset.data(), a, chosen, nullptr);
          std::vector<float> out(w.panels() * kLanes);
          for (size_t slab = 0; slab < w.slabs(); ++slab)
            table.columns.multiply(w, slab, chosen, {out.data() + slab * w.format.slab_rows(), 0}, nullptr, nullptr, nullptr);
          std::memcpy(y.data(), out.data(), w.rows * sizeof(float));
          return chosen.count;
        }, nb::arg("w"), nb::arg("x"), nb::arg("thresholds"), nb::arg("y"), nb::arg("tier"),
        "y (rows,) = W x over the inputs whose |x| is above their threshold; returns how many these are");
  m.def("panels_of", [](const PackedMatrix& w, Output<uint8_t> out, const std::string& tier) {
          PackedFormat dense = w.format;
          dense.columns = false;
          check_output(dense, w.rows, w.cols, out);
          std::vector<uint8_t> slab(w.format.slab_panels() * dense.panel_nbytes(w.cols));
          const size_t nbytes = dense.panel_nbytes(w.cols);
          const std::vector<uint32_t> offsets = column_offsets(w.cols);
          for (size_t i = 0; i < w.slabs(); ++i) {
            kernels(tier_of(tier)).columns.panels(w, i, offsets.data(), slab.data());
            const size_t first = i * w.format.slab_panels(), count = std::min(w.format.slab_panels(), w.panels() - first);
            std::memcpy(out.data() + first * nbytes, slab.data(), count * nbytes);
          }
        }, nb::arg("w"), nb::arg("out"), nb::arg("tier"), "A weight in columns as panels, by a tier's kernel");
  m.def("pack_sparse", [](const PackedFormat& format, Matrix<uint8_t> codes, Matrix<uint8_t> places, Matrix<float> scales,
                          Matrix<float> minima, size_t group, Output<uint8_t> out) {
          const size_t rows = codes.shape(0), cols = 2 * codes.shape(1);
          if (!format.sparse || group == 0 || cols % 4 != 0 || places.shape(0) != rows || places.shape(1) != codes.shape(1))
            throw std::invalid_argument("pack_sparse: expected codes and places of one shape, rows of whole groups, a sparse format");
          const size_t groups = (cols / 2 + group - 1) / group;
          if (scales.shape(0) != rows || scales.shape(1) != groups || (format.has_min && (minima.shape(0) != rows || minima.shape(1) != groups)))
            throw std::invalid_argument("pack_sparse: expected scales and minima of (" + std::to_string(rows) + ", " + std::to_string(groups) + ")");
          if (2 * group % format.sparse_group != 0 && format.sparse_group < cols)
            throw std::invalid_argument("pack_sparse: group does not hold whole groups of the format");
          for (size_t i = 0; i < rows * cols / 2; i += 2)
            if (places.data()[i] > 3 || places.data()[i + 1] > 3 || places.data()[i] == places.data()[i + 1])
              throw std::invalid_argument("pack_sparse: a group of four keeps two different places of 0 to 3");
          check_output(format, rows, cols, out);
          nb::gil_scoped_release release;
          pack_sparse(format, codes.data(), places.data(), scales.data(), minima.data(), group, rows, cols, 0,
                      (rows + kLanes - 1) / kLanes, out.data());
        }, nb::arg("format"), nb::arg("codes"), nb::arg("places"), nb::arg("scales"), nb::arg("minima"), nb::arg("group"), nb::arg("out"));
  m.def("pack_floats", [](const PackedFormat& format, Matrix<uint8_t> values, size_t cols, Output<uint8_t> out) {
          const size_t rows = values.shape(0), width = format.element == Element::Float32 || format.element == Element::Float32Rows ? 4 : 2;
          if (format.quantised() || values.shape(1) != cols * width) throw std::invalid_argument("pack_floats: bytes do not agree with the format");
          check_output(format, rows, cols, out);
          nb::gil_scoped_release release;
          pack_floats(format, values.data(), rows, cols, 0, (rows + kLanes - 1) / kLanes, out.data());
        }, nb::arg("format"), nb::arg("values"), nb::arg("cols"), nb::arg("out"));
  m.def("matmul", &matmul, nb::arg("w"), nb::arg("x"), nb::arg("y"), nb::arg("tier"), nb::arg("int8") = true, nb::call_guard<nb::gil_scoped_release>(),
        "y (tokens, rows) = x (tokens, cols) W^T by the kernel of a tier; int8: inputs of quantised weights are rounded");
  m.def("apply_rows", &apply_rows, nb::arg("name"), nb::arg("x"), nb::arg("weight"), nb::arg("bias"), nb::arg("eps"), nb::arg("y"), nb::arg("tier"),
        "rms_norm, layer_norm, silu, gelu, gelu_tanh or relu of each row, by a tier's kernel");
  m.def("highest", [](Vector<float> x, const std::string& tier) { return kernels(tier_of(tier)).rows.highest(x.data(), x.size()); },
        nb::arg("x"), nb::arg("tier"), "where the highest value is, by a tier's kernel");
  m.def("sum_of_exponentials", [](Vector<float> x, float peak, const std::string& tier) {
          return kernels(tier_of(tier)).rows.sum_of_exponentials(x.data(), peak, x.size());
        }, nb::arg("x"), nb::arg("peak"), nb::arg("tier"), "sum of e^(x - peak), by a tier's kernel");
  m.def("quantised_kernels", [] {
          std::vector<std::string> names;
#define EDGEWISE_MATMUL(bits, kind, nested, halves) names.emplace_back(#bits " " #kind " " #nested " " #halves);
#include "kernels/matmul/kernels.inc"
#undef EDGEWISE_MATMUL
          return names;
        }, "The lines of kernels.inc: bits, kind, nested, halves");
  m.def("sparse_kernels", [] {
          std::vector<std::string> names;
#define EDGEWISE_MATMUL(bits, kind, nested, halves)
#define EDGEWISE_SPARSE(bits, centre) names.emplace_back(#bits " " #centre);
#include "kernels/matmul/kernels.inc"
#undef EDGEWISE_SPARSE
#undef EDGEWISE_MATMUL
          return names;
        }, "The sparse lines of kernels.inc: bits, what codes are centred on");
}

}  // namespace edgewise
