#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <memory>
#include <stdexcept>

#include "bindings/bindings.h"
#include "io/blocks.h"

namespace nb = nanobind;

namespace edgewise {
namespace {

template <typename T>
using Matrix = nb::ndarray<const T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
template <typename T>
using NewMatrix = nb::ndarray<nb::numpy, T, nb::ndim<2>>;

template <typename T>
NewMatrix<T> take_matrix(std::unique_ptr<T[]> data, size_t rows, size_t columns) {
  nb::capsule owner(data.get(), [](void* p) noexcept { delete[] static_cast<T*>(p); });
  return NewMatrix<T>(data.release(), {rows, columns}, owner);
}

BlockType block_type(const std::string& name) {
  if (auto type = block_type_by_name(name)) return *type;
  std::string known;
  for (int i = 0; i < kBlockTypes; ++i) known += std::string(i ? ", " : "") + layout(BlockType(i)).name;
  throw std::invalid_argument("unknown block type '" + name + "'; expected one of " + known);
}

// Blocks per row, or an error when a row is not a whole number of blocks.
size_t blocks_per_row(const BlockLayout& form, size_t columns, int per_block, const char* unit) {
  if (columns % size_t(per_block) != 0)
    throw std::invalid_argument(std::string(form.name) + " expects rows of a multiple of " +
                                std::to_string(per_block) + " " + unit + "; given " + std::to_string(columns));
  return columns / size_t(per_block);
}

NewMatrix<float> decode(const std::string& name, Matrix<uint8_t> raw) {
  const BlockType type = block_type(name);
  const BlockLayout& form = layout(type);
  const size_t rows = raw.shape(0), blocks = blocks_per_row(form, raw.shape(1), form.nbytes, "bytes");
  std::unique_ptr<float[]> out(new float[rows * blocks * size_t(form.values)]);
  {
    nb::gil_scoped_release release;
    decode_blocks(type, raw.data(), rows * blocks, out.get());
  }
  return take_matrix(std::move(out), rows, blocks * size_t(form.values));
}

NewMatrix<uint8_t> encode(const std::string& name, Matrix<float> values) {
  const BlockType type = block_type(name);
  const BlockLayout& form = layout(type);
  const size_t rows = values.shape(0), blocks = blocks_per_row(form, values.shape(1), form.values, "values");
  std::unique_ptr<uint8_t[]> out(new uint8_t[rows * blocks * size_t(form.nbytes)]);
  {
    nb::gil_scoped_release release;
    encode_blocks(type, values.data(), rows * blocks, out.get());
  }
  return take_matrix(std::move(out), rows, blocks * size_t(form.nbytes));
}

// The index of the first block that holds a NaN or infinite scale, or -1.
int64_t nonfinite(const std::string& name, Matrix<uint8_t> raw) {
  const BlockType type = block_type(name);
  const BlockLayout& form = layout(type);
  const size_t count = raw.shape(0) * blocks_per_row(form, raw.shape(1), form.nbytes, "bytes");
  nb::gil_scoped_release release;
  const size_t found = first_nonfinite_block(type, raw.data(), count);
  return found == count ? -1 : int64_t(found);
}

nb::dict layouts() {
  nb::dict all;
  for (int i = 0; i < kBlockTypes; ++i) {
    const BlockLayout& form = layout(BlockType(i));
    all[form.name] = nb::make_tuple(form.ggml_id, form.values, form.nbytes, can_encode(BlockType(i)));
  }
  return all;
}

}  // namespace

void bind_io(nb::module_& m) {
  m.def("block_layouts", &layouts, "name -> (ggml id, values per block, bytes per block, can be written)");
  m.def("decode_blocks", &decode, nb::arg("type_name"), nb::arg("raw").noconvert(),
        "raw: (rows, bytes per row) uint8, contiguous -> (rows, values) float32");
  m.def("encode_blocks", &encode, nb::arg("type_name"), nb::arg("values").noconvert(),
        "values: (rows, columns) float32, contiguous -> (rows, bytes per row) uint8");
  m.def("first_nonfinite_block", &nonfinite, nb::arg("type_name"), nb::arg("raw").noconvert(),
        "raw: (rows, bytes per row) uint8 -> index of the first block with a NaN or infinite scale, or -1");
}

}  // namespace edgewise
