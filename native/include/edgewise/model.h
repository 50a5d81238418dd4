// The weights of a Plan in packed form. Built once, then only read.
#pragma once
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "edgewise/kernels.h"
#include "edgewise/packed.h"

namespace edgewise {

// What the inputs of a linear are rounded to, as bits: linears that read the same may want several.
enum class Input : unsigned { Int8 = 1, Float32 = 2, BFloat16 = 4, Integer = 8 };

// What a linear needs to be multiplied with inputs on one grid; see IntegerRows.
struct Integers {
  Grid in;
  std::vector<int32_t> zero, correction, code_sum, multiplier, rest;
  std::vector<float> scale, remainder;
  IntegerRows rows;
};
// Inputs on the grid `in`, outputs on `out` or in floats. bias: (rows) or empty, added in units of a product. Throws where no
// kernel takes the weight's format, or an output code times the outputs' scale could leave 32 bits.
std::shared_ptr<const Integers> integers_of(const PackedMatrix& weight, const std::vector<float>& bias, const Grid& in,
                                            const std::optional<Grid>& out);

// Bits to shift by, so that factor * 2^shift has 30 bits: 1 to 62.
int shift_of(double factor);

struct Linear;

// Which inputs of a linear are read when a token is decoded, of a weight in columns: those whose |x| is above a threshold.
// The others go through a product of low rank, where there is one: out (in x).
struct ChosenInputs {
  std::vector<float> threshold;   // whole blocks of 32, infinite where there is no input
  std::vector<uint32_t> offset;   // of each input's codes in a slab
  std::shared_ptr<const Linear> in, out;  // (rank, cols), (rows, rank); or absent
  ChosenInputs(const PackedMatrix& weight, const float* thresholds);
};

// y = weight x + bias, plus what `plus` makes of x. With an inner linear, weight (rows, rank) reads (inner x) instead of x:
// a product of two thin matrices, which nothing ever multiplies out.
struct Linear {
  PackedMatrix weight;
  std::vector<float> bias;  // (rows), with zeros up to whole panels; or empty
  const float* bias_of(size_t panel) const { return bias.empty() ? nullptr : bias.data() + panel * kLanes; }
  size_t rows() const { return weight.rows; }
  size_t cols() const { return inner ? inner->cols() : weight.cols; }
  bool present() const { return weight.data != nullptr; }
  bool int8 = true;  // inputs are rounded to int8 per 32, where the weight is quantised
  std::shared_ptr<const Integers> integers;  // inputs are on a grid; the bias is in there
  std::shared_ptr<const ChosenInputs> chosen;  // the weight lies in columns
  std::shared_ptr<const Linear> inner;       // (rank, cols), without bias, inner or plus of its own
  std::shared_ptr<const Linear> plus;        // with an inner, without bias or plus of its own
  Input input() const {  // of what the weight reads
    if (integers) return Input::Integer;
    if (weight.format.element == Element::BFloat16Pairs) return Input::BFloat16;
    return int8 && weight.format.quantised() ? Input::Int8 : Input::Float32;
  }
};

struct Norm {
  enum class Kind { None, Rms, Layer } kind = Kind::None;
  std::vector<float> weight, bias;
  float eps = 0;
};

struct Rope {
  std::vector<float> inverse_frequency;  // (rotary / 2)
  float attention_factor = 1;
};

struct FeedForward {
  Linear gate, up, down;  // gate may be absent
  Gate function = Gate::Silu;
};

// A routed feed-forward: each token goes through top_k of the first `routed` experts.
struct Experts {
  Linear router, shared_gate;        // (routed, hidden); (1, hidden) or absent
  std::vector<FeedForward> experts;  // by index; the shared expert, which every token goes through, last
  size_t routed = 0, top_k = 0;
  bool normalise = false;  // the weights of a token's routed experts sum to one
  bool shared() const { return experts.size() > routed; }
  size_t per_token() const { return top_k + (shared() ? 1 : 0); }
};

// Added to scores by the distance from query to key, -reach .. reach, as further away at both ends.
struct RelativeBias {
  size_t reach = 0, stride = 0;
  std::vector<float> table;  // (heads, stride): sixteen more of the last at either end
  // values: (heads, 2 reach + 1).
  RelativeBias(const float* values, size_t heads, size_t reach);
  const float* of(size_t head) const { return table.data() + head * stride + reach + kLanes; }  // at distance 0
  size_t heads() const { return table.size() / stride; }
};

// Attention over what an encoder gave, between a layer's attention and its feed-forward.
struct Cross {
  Linear q, k, v, o;  // k and v read the encoder's states
  Norm norm;
  size_t heads = 0, kv_heads = 0, head_dim = 0;
  float scale = 1;
};

// Grids that a layer's activations are rounded to, beside those of its linears. attention: scores and sums are made of
// integers; it is complete, query and key included.
struct Rounding {
  std::optional<Grid> attention_in, query, key, feed_forward_in, sigmoid, act;
  std::optional<IntegerAttention> attention;
};

// Sinks: the first few positions and the last `window`, at the distances they have in a cache of just these.
enum class Visible { Causal, Sliding, Full, Sinks };

// Either part may be absent, with its linears and norms; heads and kv_heads are then 0.
struct Layer {
  Linear q, k, v, o, gate, up, down;  // gate may be absent; with experts, all three are
  Norm attention_norm, feed_forward_norm;
  Norm q_norm, k_norm;                       // (head_dim), of each head, or absent
  Norm after_attention, after_feed_forward;  // of what a part gives, before it is added, or absent
  size_t heads = 0, kv_heads = 0, head_dim = 0, value_dim = 0;  // head_dim of queries and keys
  float scale = 1;
  int rope = -1;  // index into Model::ropes
  Visible visible = Visible::Causal;
  size_t window = 0, sinks = 0;
  Gate function = Gate::Silu;
  bool post_norm = false;
  std::shared_ptr<const Experts> experts;
  std::shared_ptr<const RelativeBias> bias;  // one may serve many layers
  std::shared_ptr<const Cross> cross;
  std::shared_ptr<const Rounding> rounding = nullptr;
  std::vector<uint16_t> turns = {};  // (kv_heads, head_dim / 2): which frequency turns a pair of a key head; empty: in order
  bool attends() const { return q.present(); }
  bool feeds() const { return up.present() || experts; }
  const IntegerAttention* integer_attention() const { return rounding && rounding->attention ? &*rounding->attention : nullptr; }
};

struct Model {
  size_t hidden = 0, vocab = 0, context = 0;
  Linear embedding, head;  // head absent: an encoder
  std::vector<Layer> layers;
  std::vector<Rope> ropes;
  Norm final_norm, embedding_norm;
  std::vector<float> position_embedding;  // (positions, hidden)
  size_t position_offset = 0;
  std::vector<float> token_type_embedding;  // (types, hidden); type 0 is added
  float embedding_scale = 1, logit_scale = 1;
};

}  // namespace edgewise
