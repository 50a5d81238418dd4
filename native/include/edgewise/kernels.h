// What the engine calls: one table of functions per instruction tier, chosen once.
#pragma once
#include "edgewise/cpu.h"
#include "edgewise/packed.h"

namespace edgewise {

// What a kernel fetches into the cache while it reads: for bytes at p, those at p + before as long as p < turn, those at
// p + after from there on. The distance covers the latency of memory at full bandwidth.
struct Ahead {
  static constexpr ptrdiff_t kDistance = 6144;
  const uint8_t* turn = nullptr;
  ptrdiff_t before = 0, after = kDistance;  // after is 0 where nothing is to be fetched
  EDGEWISE_INLINE bool fetches() const { return after != 0; }
  EDGEWISE_INLINE const uint8_t* of(const uint8_t* p) const { return p + (p < turn ? before : after); }
  // With several tokens the same bytes are read once for each tile of them, and every tile fetches a part of what comes
  // next, at an even pace.
  const uint8_t* later = nullptr;
  size_t nbytes = 0;
};

// Where products go: row r of panel p of a call for its token t is y[t * stride + 16 p + r].
struct Products {
  float* y;
  size_t stride;
  const float* bias = nullptr;  // of the call's first row on, whole panels; added first
  bool add = false;             // onto what y holds
};

// Rows of panels panel..panel+panels-1 times tokens slot..slot+count-1 of a tile. Whole panels are written: the padding
// rows of the last one give zeros.
using MatmulKernel = void (*)(const PackedMatrix& w, size_t panel, size_t panels, const Activations& x, size_t tile,
                              size_t slot, size_t count, const Products& out, const Ahead& ahead);

// Which inputs of a token are read: those above their thresholds, four at a time within a block of 32.
struct Chosen {
  size_t blocks = 0, count = 0;     // count: inputs that are read
  uint32_t* until = nullptr;        // (blocks + 1): quads before each block, and all of them
  uint32_t* offset = nullptr;       // (4 each quad): bytes from the first column of a slab; past a block's last one, that one
  int8_t* q = nullptr;              // (4 each quad): codes of the inputs; past a block's last one, zero
  int32_t* negated_sum = nullptr;   // of the codes that are read, by block
  float *sum = nullptr, *scale = nullptr;
  EDGEWISE_INLINE size_t quads() const { return until[blocks]; }
  static size_t nbytes(size_t cols);
  void place(uint8_t* buffer, size_t cols);
};

// Weights in columns. A slab's results are those of its rows that exist, in whole panels.
struct ColumnKernels {
  // values: (cols) of a token; threshold, offset: (whole blocks), no input beyond cols passes. x: the same values in codes.
  // An input is read where |value| > threshold. rest, where given: (whole blocks) the values of the others, and zeros.
  void (*choose)(const float* values, size_t cols, const float* threshold, const uint32_t* offset, const Activations& x,
                 Chosen& chosen, float* rest);
  // Rows of a slab times the inputs that are read. next: the slab read after it, of whichever matrix, and what of it.
  void (*multiply)(const PackedMatrix& w, size_t slab, const Chosen& x, const Products& out, const uint8_t* next,
                   const PackedMatrix* next_of, const Chosen* next_x);
  // A slab as panels, slab_panels() of them, to be multiplied with many tokens.
  void (*panels)(const PackedMatrix& w, size_t slab, const uint32_t* offset, uint8_t* out);
};

enum class Gate { Silu, Gelu, GeluTanh, Relu };

// Keys and values of one head: positions in tiles of 16 (keys) and one after the other (values). Of bfloat16, keys lie in
// pairs of dimensions and values in pairs of positions, as products take them.
//
// Four bits come in groups of positions that are packed together, from eight bits, once they are complete:
// value = scale * code + minimum, codes 0 .. 15, scale and minimum in float16, of keys one pair for each dimension of a
// group, of values one for each position (KIVI, Liu et al., arXiv:2402.02750, section 3.2). A group of keys: scales and
// minima of all dimensions, then tiles of 16 positions, each the codes of a packed panel. A group of values: scales and
// minima of all positions, then for four positions and 32 dimensions 64 bytes: byte 4 i + j has dimension i of position j
// in its low nibble, dimension i + 16 in its high one.
enum class KvType : uint8_t { Float32, Float16, BFloat16, Int8, Int4 };

inline constexpr size_t kKvGroup = 64;  // positions; a divisor of kChunk

struct KvLayout {
  KvType type = KvType::Float16;
  size_t head_dim = 0, value_dim = 0;  // of a key, and of a value
  EDGEWISE_INLINE size_t padded() const { return (head_dim + kBlock - 1) / kBlock * kBlock; }
  EDGEWISE_INLINE size_t value_padded() const { return (value_dim + kBlock - 1) / kBlock * kBlock; }
  size_t key_tile_nbytes() const;   // 16 positions; of four bits, their part of a group
  size_t value_nbytes() const;      // one position; likewise
  PackedFormat key_format() const;  // quantised keys are packed matrices whose rows are positions
};

inline constexpr size_t kChunk = 256;    // positions that one softmax partial covers: fixed, so that bits do not move
inline constexpr size_t kMaxHeadDim = 512;
inline constexpr size_t kMaxQueries = 12;  // queries that share a pass over keys and values
inline constexpr size_t kGroupsAtOnce = 8;  // such groups that meet a chunk of positions while it is in the cache

// Partial attention of up to kMaxQueries queries over one chunk of positions.
struct AttentionTask {
  const KvLayout* layout;
  const uint8_t* keys;    // of the head, from position 0
  const uint8_t* values;
  const float* q;         // (queries, q_stride)
  size_t q_stride, queries;
  const int32_t* begin;   // each query sees positions begin <= p < end
  const int32_t* end;
  float scale;
  // Added to the score of a key by its distance from the query. bias[i][d] for d from -reach - 16 to reach + 15, and what
  // lies beyond is as at -reach and at reach; null: nothing is added.
  const float* const* bias = nullptr;
  const int32_t* position = nullptr;  // of each query
  int32_t reach = 0;
  Ahead key_ahead = {}, value_ahead = {};
};

struct RowKernels {
  // y = norm(x) over n values; bias may be null. weight may be null (ones).
  void (*rms_norm)(const float* x, const float* weight, float eps, size_t n, float* y);
  void (*layer_norm)(const float* x, const float* weight, const float* bias, float eps, size_t n, float* y);
  // y = x + y, over n values.
  void (*add)(const float* x, size_t n, float* y);
  // up = f(gate) * up, or f(up) when gate is null, over n values (a multiple of 16).
  void (*gate)(Gate function, const float* gate, float* up, size_t n);
  // n values of one token, from input `first` on (the first of a block), into its slot of x: rounded to int8, as they
  // are, or rounded to bfloat16. The last block is padded with zeros.
  void (*quantise)(const float* values, size_t first, size_t n, Activations& x, size_t token);
  void (*place)(const float* values, size_t first, size_t n, Activations& x, size_t token);
  void (*place_bfloat)(const float* values, size_t first, size_t n, Activations& x, size_t token);
  // Where the highest of n values is, the first of equal ones; NaN is passed over, and without any number it is 0.
  size_t (*highest)(const float* x, size_t n);
  // Sum of e^(x - peak) over n values, peak their maximum.
  float (*sum_of_exponentials)(const float* x, float peak, size_t n);
};

struct AttentionKernels {
  // Write one position's key and value (head_dim and value_dim floats), in any format but four bits.
  void (*store_key)(const KvLayout& layout, const float* key, size_t position, uint8_t* keys);
  void (*store_value)(const KvLayout& layout, const float* value, size_t position, uint8_t* values);
  // A group in four bits, from where its keys and values lie in eight.
  void (*pack_group)(const KvLayout& eight, const uint8_t* keys, const uint8_t* values, uint8_t* packed_keys, uint8_t* packed_values);
  // One chunk: out (queries, padded value_dim) unnormalised, peak and weight (queries). scratch: kAttentionScratch floats.
  void (*chunk)(const AttentionTask& task, size_t chunk, float* out, float* peak, float* weight, float* scratch);
  // Merge later partials of up to kMaxQueries queries, rows of n values, into earlier ones; finish divides by the weight.
  void (*merge)(size_t queries, size_t n, float* out, float* peak, float* weight, const float* later, const float* later_peak,
                const float* later_weight);
  void (*finish)(const float* sum, float weight, size_t n, float* out);
};
// Attention over keys and values of eight bits in one scale each, in integers. q, k, v, scores, probabilities and outputs
// lie on grids; code of a score = sum (q - zero)(k - zero) times score_multiplier / 2^score_shift, rounded half up, plus
// zero, clamped; of an output likewise from the sum of probability times value.
//
// Keys lie in tiles of 16 positions: the sum of each position's codes (16 int32), then its codes as signed bytes, four
// dimensions of each position at a time. Values lie by four positions: 16 dimensions at a time, four bytes of each.
struct IntegerAttention {
  size_t head_dim = 0;
  Grid query, key, value, score, probability, out;
  int32_t score_multiplier = 0, out_multiplier = 0;
  int score_shift = 1, out_shift = 1;
  EDGEWISE_INLINE size_t padded() const { return (head_dim + kBlock - 1) / kBlock * kBlock; }
  EDGEWISE_INLINE size_t key_tile_nbytes() const { return 64 + kLanes * padded(); }
  EDGEWISE_INLINE size_t values_nbytes(size_t positions) const { return (positions + 3) / 4 * 4 * padded(); }
  // Bytes of scratch for so many positions.
  EDGEWISE_INLINE static size_t scratch_nbytes(size_t positions) { return ((positions + 15) / 16 + 1) * 16 * 7; }
};

struct IntegerKernels {
  // Null for a format without a kernel: bits, and one scale to a row.
  MatmulKernel (*matmul)(const PackedFormat& format);
  // Of the 16 rows of a panel: sum of their codes (signed, padding included), scales, zero points of signed codes.
  void (*describe)(const PackedMatrix& w, size_t panel, int32_t* code_sum, float* scale, int32_t* zero);
  // n values of one token, from input `first` on (the first of a block), into its slot of x: unsigned codes and their sums.
  void (*quantise)(const Grid& grid, const float* values, size_t first, size_t n, Activations& x, size_t token);
  // y = x rounded to the grid, n values.
  void (*snap)(const Grid& grid, const float* x, size_t n, float* y);
  // up = f(gate) up, or f(up) without a gate; silu(g) = g sigmoid(g), the sigmoid and f(g) rounded where they have a grid.
  void (*gate)(Gate function, const Grid* sigmoid, const Grid* act, const float* gate, float* up, size_t n);
  // Write one position of a head; attend to positions begin .. end - 1 with one query, (head_dim) each.
  void (*store_key)(const IntegerAttention& a, const float* key, size_t position, uint8_t* keys);
  void (*store_value)(const IntegerAttention& a, const float* value, size_t position, uint8_t* values);
  void (*attend)(const IntegerAttention& a, const float* q, size_t begin, size_t end, const uint8_t* keys, const uint8_t* values,
                 float* out, uint8_t* scratch);
};

inline constexpr size_t kAttentionScratch = kMaxQueries * kChunk + kLanes * kMaxHeadDim;

struct Kernels {
  Tier tier;
  // Null for a format without a kernel. Unquantised weights take float inputs whatever is asked, bfloat16 pairs bfloat16.
  MatmulKernel (*matmul)(const PackedFormat& format, bool int8_inputs);
  RowKernels rows;
  AttentionKernels attention;
  IntegerKernels integer;
  ColumnKernels columns;
};

// The table of a tier that this processor can run.
const Kernels& kernels(Tier tier);

#define EDGEWISE_TIER(tier, name)                                           \
  namespace name {                                                          \
  MatmulKernel matmul_kernel(const PackedFormat& format, bool int8_inputs); \
  RowKernels row_kernels();                                                 \
  AttentionKernels attention_kernels();                                     \
  IntegerKernels integer_kernels();                                         \
  ColumnKernels column_kernels();                                           \
  }
#include "edgewise/tiers.inc"
#undef EDGEWISE_TIER

}  // namespace edgewise
