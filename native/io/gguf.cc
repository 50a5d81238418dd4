#include "io/gguf.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <numeric>

namespace edgewise {
namespace {

// Far above any real model, low enough that a header costs little memory.
constexpr uint64_t kMostKeys = 1 << 16;
constexpr uint64_t kMostTensors = 1 << 16;
constexpr uint64_t kMostElements = 1 << 24;  // of one array
constexpr size_t kLongestKey = 65535;        // the format's own limit
constexpr size_t kLongestTensorName = 1024;
constexpr size_t kLargestHeader = size_t(1) << 28;
constexpr uint64_t kLargestAlignment = 1 << 20;

int element_nbytes(GgufType type) {
  switch (type) {
    case GgufType::U8:
    case GgufType::I8:
    case GgufType::Bool: return 1;
    case GgufType::U16:
    case GgufType::I16: return 2;
    case GgufType::U32:
    case GgufType::I32:
    case GgufType::F32: return 4;
    case GgufType::U64:
    case GgufType::I64:
    case GgufType::F64: return 8;
    default: return 0;
  }
}

// Types of other tools' files that we do not read, for a message that names them.
const char* foreign_type_name(uint32_t id) {
  switch (id) {
    case 9: return "Q8_1";
    case 15: return "Q8_K";
    case 16: return "IQ2_XXS";
    case 17: return "IQ2_XS";
    case 18: return "IQ3_XXS";
    case 19: return "IQ1_S";
    case 21: return "IQ3_S";
    case 22: return "IQ2_S";
    case 23: return "IQ4_XS";
    case 24: return "I8";
    case 25: return "I16";
    case 26: return "I32";
    case 27: return "I64";
    case 28: return "F64";
    case 29: return "IQ1_M";
    case 34: return "TQ1_0";
    case 35: return "TQ2_0";
    case 40: return "NVFP4";
    default: return nullptr;
  }
}

std::string number(uint64_t value) { return std::to_string(value); }

GgufType value_type(uint32_t id, size_t offset) {
  if (id > uint32_t(GgufType::F64))
    throw GgufError("value type " + number(id) + " of a key; expected 0 to 12", offset);
  return GgufType(id);
}

GgufKey read_key(GgufReader& reader) {
  GgufKey key{};
  const size_t start = reader.at();
  key.name = reader.string("the name of a key");
  if (key.name.empty() || key.name.size() > kLongestKey)
    throw GgufError("a key's name has " + number(key.name.size()) + " bytes; expected 1 to " + number(kLongestKey), start);
  const size_t type_at = reader.at();
  key.type = value_type(reader.u32("the type of a key"), type_at);
  key.count = 1;
  if (key.type == GgufType::Array) {
    key.is_array = true;
    const size_t element_at = reader.at();
    key.type = value_type(reader.u32("the element type of an array"), element_at);
    if (key.type == GgufType::Array)
      throw GgufError("an array of arrays under a key; expected an array of numbers, booleans or strings", element_at);
    const size_t count_at = reader.at();
    key.count = reader.u64("the length of an array");
    const uint64_t least = key.type == GgufType::String ? 8 : uint64_t(element_nbytes(key.type));
    if (key.count > kMostElements || key.count > reader.left() / least)
      throw GgufError("an array claims " + number(key.count) + " elements, but only " + number(reader.left()) +
                          " bytes follow (at most " + number(kMostElements) + " elements are read)",
                      count_at);
  }
  key.offset = reader.at();
  if (key.type == GgufType::String)
    for (uint64_t i = 0; i < key.count; ++i) reader.string("a string under a key");
  else
    reader.skip(key.count * uint64_t(element_nbytes(key.type)), "the value of a key");
  return key;
}

// a * b, or an error where that does not fit.
uint64_t product(uint64_t a, uint64_t b, const GgufTensor& tensor, size_t offset) {
  uint64_t result;
  if (__builtin_mul_overflow(a, b, &result) || result > (uint64_t(1) << 62))
    throw GgufError("dimensions whose product overflows", offset, tensor.name);
  return result;
}

// Reads a tensor's entry; its offset is still relative to the start of the data.
GgufTensor read_tensor(GgufReader& reader) {
  GgufTensor tensor{};
  const size_t start = reader.at();
  tensor.name = reader.string("the name of a tensor");
  if (tensor.name.empty() || tensor.name.size() > kLongestTensorName)
    throw GgufError("a tensor's name has " + number(tensor.name.size()) + " bytes; expected 1 to " +
                        number(kLongestTensorName),
                    start);
  const size_t dimensions_at = reader.at();
  const uint32_t dimensions = reader.u32("the number of dimensions of a tensor");
  if (dimensions < 1 || dimensions > 4)
    throw GgufError(number(dimensions) + " dimensions; expected 1 to 4", dimensions_at, tensor.name);
  tensor.dimensions = int(dimensions);
  uint64_t elements = 1;
  for (int i = 0; i < tensor.dimensions; ++i) {
    const size_t at = reader.at();
    tensor.shape[i] = reader.u64("a dimension of a tensor");
    if (tensor.shape[i] == 0) throw GgufError("a dimension is zero", at, tensor.name);
    elements = product(elements, tensor.shape[i], tensor, at);
  }
  const size_t type_at = reader.at();
  const uint32_t id = reader.u32("the type of a tensor");
  const auto type = block_type_by_ggml_id(id);
  if (!type) {
    const char* name = foreign_type_name(id);
    std::string known;
    for (int i = 0; i < kBlockTypes; ++i) known += std::string(i ? ", " : "") + layout(BlockType(i)).name;
    throw GgufError("block type " + number(id) + (name ? std::string(" (") + name + ")" : "") +
                        " is not read; expected one of " + known,
                    type_at, tensor.name, name != nullptr);
  }
  tensor.type = *type;
  const BlockLayout& form = layout(*type);
  if (tensor.shape[0] % uint64_t(form.values) != 0)
    throw GgufError("rows of " + number(tensor.shape[0]) + " values are not whole blocks of " + number(form.values) +
                        " (" + form.name + ")",
                    dimensions_at + 4, tensor.name);
  tensor.nbytes = product(elements / uint64_t(form.values), uint64_t(form.nbytes), tensor, dimensions_at + 4);
  tensor.offset = reader.u64("the offset of a tensor");
  return tensor;
}

// The value of general.alignment, or the format's default.
size_t alignment_of(const std::vector<GgufKey>& keys, std::span<const uint8_t> file) {
  for (const GgufKey& key : keys) {
    if (key.name != "general.alignment") continue;
    if (key.is_array || key.type != GgufType::U32)
      throw GgufError("general.alignment is not a 32-bit unsigned integer", key.offset);
    const uint32_t value = GgufReader(file, key.offset).u32("general.alignment");
    if (!std::has_single_bit(value) || value < 8 || value > kLargestAlignment)
      throw GgufError("general.alignment is " + number(value) + "; expected a power of two from 8 to " +
                          number(kLargestAlignment),
                      key.offset);
    return value;
  }
  return 32;
}

void refuse_duplicates(std::vector<std::string_view> names, const char* what, size_t offset) {
  std::sort(names.begin(), names.end());
  const auto twice = std::adjacent_find(names.begin(), names.end());
  if (twice != names.end()) throw GgufError(std::string(what) + " '" + std::string(*twice) + "' occurs twice", offset);
}

// Turns relative offsets into places in the file, all of them aligned, inside the file and apart.
void place_tensors(GgufHeader& header, size_t file_size) {
  for (GgufTensor& tensor : header.tensors) {
    if (tensor.offset % header.alignment != 0)
      throw GgufError("offset " + number(tensor.offset) + " is not a multiple of the alignment, " +
                          number(header.alignment),
                      header.data_offset, tensor.name);
    if (header.data_offset > file_size || tensor.offset > file_size - header.data_offset ||
        tensor.nbytes > file_size - header.data_offset - tensor.offset)
      throw GgufError("its " + number(tensor.nbytes) + " bytes at offset " + number(tensor.offset) +
                          " of the data reach beyond the end of the file (" + number(file_size) +
                          " bytes, data from byte " + number(header.data_offset) + "); the file is truncated or damaged",
                      file_size, tensor.name);
    tensor.offset += header.data_offset;
  }
  std::vector<uint32_t> order(header.tensors.size());
  std::iota(order.begin(), order.end(), 0u);
  const auto& tensors = header.tensors;
  std::sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) { return tensors[a].offset < tensors[b].offset; });
  for (size_t i = 1; i < order.size(); ++i) {
    const GgufTensor &before = tensors[order[i - 1]], &after = tensors[order[i]];
    if (before.offset + before.nbytes > after.offset)
      throw GgufError("overlaps tensor '" + std::string(before.name) + "', which occupies bytes " +
                          number(before.offset) + " to " + number(before.offset + before.nbytes),
                      after.offset, after.name);
  }
}

}  // namespace

void GgufReader::need(uint64_t nbytes, const char* what) const {
  if (nbytes > left())
    throw GgufError(std::string("the file ends inside ") + what + ": " + number(nbytes) + " bytes are needed, " +
                        number(left()) + " are left",
                    at_);
}

uint64_t GgufReader::integer(int nbytes, const char* what) {
  need(uint64_t(nbytes), what);
  uint64_t value = 0;
  for (int i = 0; i < nbytes; ++i) value |= uint64_t(file_[at_ + size_t(i)]) << (8 * i);
  at_ += size_t(nbytes);
  return value;
}

std::string_view GgufReader::string(const char* what) {
  const size_t start = at_;
  const uint64_t length = u64(what);
  if (length > left())
    throw GgufError(std::string(what) + " claims " + number(length) + " bytes, but only " + number(left()) + " follow",
                    start);
  const std::string_view text(reinterpret_cast<const char*>(file_.data()) + at_, size_t(length));
  at_ += size_t(length);
  return text;
}

void GgufReader::skip(uint64_t nbytes, const char* what) {
  need(nbytes, what);
  at_ += size_t(nbytes);
}

GgufHeader parse_gguf(std::span<const uint8_t> file) {
  if (file.size() < 4 || std::memcmp(file.data(), "GGUF", 4) != 0)
    throw GgufError("not a GGUF file: it does not begin with the four bytes 'GGUF'", 0);
  GgufReader reader(file, 4);
  GgufHeader header{};
  header.version = reader.u32("the version");
  if (header.version != 2 && header.version != 3) {
    if (header.version == 1 || (header.version & 0xffff) == 0)
      throw GgufError(header.version == 1 ? "version 1; versions 2 and 3 are read: convert the file with a newer tool"
                                          : "a big-endian file; little-endian files are read",
                      4, {}, true);
    throw GgufError("version " + number(header.version) + "; expected 2 or 3", 4);
  }
  const uint64_t n_tensors = reader.u64("the number of tensors");
  const uint64_t n_keys = reader.u64("the number of keys");
  if (n_tensors > kMostTensors || n_tensors > reader.left() / 32)  // an entry takes at least 32 bytes
    throw GgufError("the header claims " + number(n_tensors) + " tensors in a file of " + number(file.size()) +
                        " bytes (at most " + number(kMostTensors) + " are read); the file is truncated or damaged",
                    8);
  if (n_keys > kMostKeys || n_keys > reader.left() / 13)
    throw GgufError("the header claims " + number(n_keys) + " keys in a file of " + number(file.size()) +
                        " bytes (at most " + number(kMostKeys) + " are read); the file is truncated or damaged",
                    16);

  header.keys.reserve(n_keys);
  for (uint64_t i = 0; i < n_keys; ++i) {
    header.keys.push_back(read_key(reader));
    if (reader.at() > kLargestHeader)
      throw GgufError("the keys take more than " + number(kLargestHeader) + " bytes", reader.at());
  }
  std::vector<std::string_view> names;
  for (const GgufKey& key : header.keys) names.push_back(key.name);
  refuse_duplicates(std::move(names), "key", 24);
  header.alignment = alignment_of(header.keys, file);

  const size_t tensors_at = reader.at();
  header.tensors.reserve(n_tensors);
  for (uint64_t i = 0; i < n_tensors; ++i) header.tensors.push_back(read_tensor(reader));
  names.clear();
  for (const GgufTensor& tensor : header.tensors) names.push_back(tensor.name);
  refuse_duplicates(std::move(names), "tensor", tensors_at);
  header.data_offset = (reader.at() + header.alignment - 1) / header.alignment * header.alignment;
  place_tensors(header, file.size());
  return header;
}

}  // namespace edgewise
