// The header of a GGUF file: keys and tensor places, checked against the bytes that are there. Files are hostile.
#pragma once
#include <cstddef>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "io/blocks.h"

namespace edgewise {

// What is wrong, at which byte of the file, and with which tensor ("" where none is concerned).
// unsupported: the file is well formed, but of a kind that is not read here.
struct GgufError : std::runtime_error {
  GgufError(const std::string& message, size_t offset, std::string_view tensor = {}, bool unsupported = false)
      : std::runtime_error(message), offset(offset), tensor(tensor), unsupported(unsupported) {}
  size_t offset;
  std::string tensor;
  bool unsupported;
};

enum class GgufType : uint32_t { U8, I8, U16, I16, U32, I32, F32, Bool, String, Array, U64, I64, F64 };

// One key. Names point into the file; values stay there: `count` elements of `type` from byte `offset` on,
// every one of them checked to lie inside the file.
struct GgufKey {
  std::string_view name;
  GgufType type;  // of the value, or of an array's elements; never Array
  bool is_array;
  uint64_t count;  // 1 unless an array
  size_t offset;
};

struct GgufTensor {
  std::string_view name;
  BlockType type;
  int dimensions;
  uint64_t shape[4];  // as stored: fastest first
  size_t offset;      // from the start of the file
  size_t nbytes;
};

struct GgufHeader {
  uint32_t version;
  size_t alignment;
  size_t data_offset;
  std::vector<GgufKey> keys;
  std::vector<GgufTensor> tensors;
};

// Memory: at most about 12 MB, whatever the counts in the file say. Throws GgufError.
GgufHeader parse_gguf(std::span<const uint8_t> file);

// The `count` strings (64-bit length, bytes) from `offset` on, calling take(bytes, offset of the bytes) for each.
template <typename Take>
void walk_gguf_strings(std::span<const uint8_t> file, size_t offset, uint64_t count, Take take);

// Bounds-checked little-endian reads.
class GgufReader {
 public:
  explicit GgufReader(std::span<const uint8_t> file, size_t at = 0) : file_(file), at_(at) {}
  size_t at() const { return at_; }
  size_t left() const { return file_.size() - at_; }
  uint32_t u32(const char* what) { return uint32_t(integer(4, what)); }
  uint64_t u64(const char* what) { return integer(8, what); }
  std::string_view string(const char* what);
  void skip(uint64_t nbytes, const char* what);

 private:
  uint64_t integer(int nbytes, const char* what);
  void need(uint64_t nbytes, const char* what) const;
  std::span<const uint8_t> file_;
  size_t at_;
};

template <typename Take>
void walk_gguf_strings(std::span<const uint8_t> file, size_t offset, uint64_t count, Take take) {
  if (offset > file.size()) throw GgufError("strings beyond the end of the file", file.size());
  GgufReader reader(file, offset);
  for (uint64_t i = 0; i < count; ++i) {
    const std::string_view text = reader.string("a string of an array");
    take(text, reader.at() - text.size());
  }
}

}  // namespace edgewise
