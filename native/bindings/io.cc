#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <sys/mman.h>

#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>

#include "bindings/bindings.h"
#include "io/blocks.h"
#include "io/gguf.h"

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

using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

std::span<const uint8_t> span_of(const Bytes& file) { return {file.data(), file.size()}; }

// A GgufError becomes a ValueError whose arguments are (message, byte offset, tensor name, unsupported).
[[noreturn]] void raise(const GgufError& error) {
  nb::tuple arguments = nb::make_tuple(nb::str(error.what()), error.offset,
                                       nb::bytes(error.tensor.data(), error.tensor.size()), error.unsupported);
  PyErr_SetObject(PyExc_ValueError, arguments.ptr());
  throw nb::python_error();
}

// UTF-8 as Python text.
nb::object text_at(std::string_view bytes, size_t offset, const char* what) {
  PyObject* text = PyUnicode_DecodeUTF8(bytes.data(), Py_ssize_t(bytes.size()), nullptr);
  if (text != nullptr) return nb::steal(text);
  PyErr_Clear();
  raise(GgufError(std::string(what) + " is not valid UTF-8", offset));
}

nb::tuple header(Bytes file) try {
  const std::span<const uint8_t> bytes = span_of(file);
  const GgufHeader parsed = parse_gguf(bytes);
  nb::list keys, tensors;
  for (const GgufKey& key : parsed.keys)
    keys.append(nb::make_tuple(text_at(key.name, size_t(key.name.data() - (const char*)bytes.data()), "a key's name"),
                               int(key.type), key.is_array, key.count, key.offset));
  for (const GgufTensor& tensor : parsed.tensors) {
    nb::list shape;
    for (int i = tensor.dimensions - 1; i >= 0; --i) shape.append(tensor.shape[i]);
    tensors.append(nb::make_tuple(
        text_at(tensor.name, size_t(tensor.name.data() - (const char*)bytes.data()), "a tensor's name"),
        layout(tensor.type).name, nb::tuple(shape), tensor.offset, tensor.nbytes));
  }
  return nb::make_tuple(parsed.version, parsed.alignment, parsed.data_offset, keys, tensors);
} catch (const GgufError& error) {
  raise(error);
}

nb::list strings(Bytes file, size_t offset, uint64_t count) try {
  nb::list texts;
  walk_gguf_strings(span_of(file), offset, count, [&](std::string_view bytes, size_t at) {
    texts.append(text_at(bytes, at, "a string"));
  });
  return texts;
} catch (const GgufError& error) {
  raise(error);
}

// Every page under an array: in one call, and without holding the interpreter, since a disk may have to be waited for.
// A kernel before 5.14 does not know how; then each page comes when it is first read.
void populate(nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu> pages) {
#if defined(MADV_POPULATE_READ)
  auto* start = const_cast<uint8_t*>(pages.data());
  const size_t nbytes = pages.size();
  nb::gil_scoped_release release;
  (void)madvise(start, nbytes, MADV_POPULATE_READ);
#else
  (void)pages;
#endif
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
  m.def("parse_gguf", &header, nb::arg("file").noconvert(),
        "file: uint8 -> (version, alignment, data offset, [(key, type, is array, count, offset)], "
        "[(tensor, type name, shape, offset, nbytes)]); ValueError(message, offset, tensor, unsupported)");
  m.def("gguf_strings", &strings, nb::arg("file").noconvert(), nb::arg("offset"), nb::arg("count"),
        "The strings of a key, as parse_gguf places them");
  m.def("populate", &populate, nb::arg("pages").noconvert(), "Map every page under a page-aligned uint8 array now");
}

}  // namespace edgewise
