// Runs a Model: sequences in slots, each with its keys and values; batches of tokens from any of them.
#pragma once
#include <algorithm>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <vector>

#include "edgewise/ahead.h"
#include "edgewise/model.h"
#include "edgewise/pool.h"
#include "edgewise/profile.h"
#include "edgewise/sampler.h"

namespace edgewise {

struct ContextOverflow : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Memory that the system hands out zeroed and only when touched.
class Pages {
 public:
  Pages() = default;
  explicit Pages(size_t nbytes);
  ~Pages();
  Pages(Pages&& other) noexcept : data_(other.data_), nbytes_(other.nbytes_) { other.data_ = nullptr; }
  Pages& operator=(Pages&& other) noexcept;
  uint8_t* data() const { return data_; }
  float* floats() const { return reinterpret_cast<float*>(data_); }
  size_t nbytes() const { return nbytes_; }

 private:
  uint8_t* data_ = nullptr;
  size_t nbytes_ = 0;
};

struct SessionConfig {
  KvType kv = KvType::Float16;
  size_t context = 0;  // positions per slot
  size_t slots = 1;
  size_t threads = 1;
  size_t batch = 256;  // tokens in one pass
  size_t source = 0;   // states of an encoder per slot, for layers with cross-attention
  Tuning tuning = {};
};

// Inputs of a layer's linears, kept when capture is on.
enum class Site { Attention, Output, FeedForward, Down, Source, Cross, CrossOutput };

class Session {
 public:
  // beside: a session whose threads this one uses too; the two never run at once.
  Session(std::shared_ptr<const Model> model, const SessionConfig& config, const Session* beside = nullptr);

  // One pass over up to `batch` tokens: token i continues slot slots[i] at that slot's next position.
  // Several tokens of one slot are in order. Afterwards hidden() holds their states, ready for logits().
  void forward(const int32_t* tokens, const int32_t* slots, size_t count);

  // The same in steps, for policies that act between layers.
  void begin(const int32_t* tokens, const int32_t* slots, size_t count);
  void run_layers(size_t first, size_t last);

  // Passes from here on decode: layers whose weights lie in columns read only the inputs above their thresholds, token by
  // token. Prompts are dense, and so is forward(), unless this is on; generate() always decodes what it samples.
  void set_decoding(bool on) { decoding_ = on; }
  bool decoding() const { return decoding_; }
  // What was read since the counts were last set to zero: per layer and linear (q, k, v, o, gate, up, down) the inputs that
  // were above their thresholds, summed over the tokens that were decoded.
  static constexpr size_t kCounted = 7;
  const std::vector<uint64_t>& inputs_read() const { return inputs_read_; }
  uint64_t tokens_decoded() const { return tokens_decoded_; }
  void forget_counts();

  // One layer in four parts, of passes of at least two tokens: for callers that look at what lies between them and change
  // the weights before they are used. Attention: queries, keys, values and what they attend to; Output: the sum after it;
  // FeedForward: up to the inputs of Down (of experts: all of it); Down: the layer's result.
  void run_part(size_t layer, Site part);
  // What a part's linears read, (count, cols). Between parts, the inputs of Output and Down may be set: those of another
  // pass over the same tokens, whose hidden states are back as well.
  size_t input_cols(size_t layer, Site part) const;
  void inputs(size_t layer, Site part, float* out);
  void set_inputs(size_t layer, Site part, const float* values);

  // What the tokens of a slot attend to across: states (n, width) of an encoder. Keys and values of every layer are made
  // once, here; the slot starts anew.
  void set_source(size_t slot, const float* states, size_t n, size_t width);
  size_t source_length(size_t slot) const { return source_lengths_.at(slot); }

  size_t count() const { return count_; }
  float* hidden() { return x_.floats(); }
  size_t hidden_stride() const { return hidden_stride_; }

  // Logits of `n` rows of the last pass, (n, vocab) row by row.
  void logits(const int32_t* rows, size_t n, float* out);
  // Log-probability of targets[i] after row rows[i].
  void log_probs(const int32_t* rows, const int32_t* targets, size_t n, double* out);
  // Final-normed hidden states of rows of the last pass, (n, hidden).
  void normed(const int32_t* rows, size_t n, float* out);

  // Tokens of a prompt in passes; keeps the logits of the last one for generate().
  void prefill(size_t slot, const int32_t* tokens, size_t n);
  // Up to n tokens, each sampled from the logits before it; stops after a stop token (reported, not fed).
  std::vector<Choice> generate(size_t slot, Sampler& sampler, size_t n, const std::vector<int32_t>& stop);
  const std::vector<float>& last_logits() const { return last_logits_; }

  size_t length(size_t slot) const { return lengths_.at(slot); }
  // A slot goes on from an earlier position. What lies before is as it was then, or was given up: positions that left a
  // window, and in four bits the newest group in eight. resumable: the greatest length, at most this, that truncate takes.
  void truncate(size_t slot, size_t length);
  size_t resumable(size_t slot, size_t length) const;
  size_t kv_nbytes() const { return kv_.nbytes() + cross_kv_.nbytes(); }
  size_t scratch_nbytes() const;
  size_t threads() const { return pool_.threads(); }
  Tier tier() const { return kernels_.tier; }
  const SessionConfig& config() const { return config_; }
  const Model& model() const { return *model_; }

  // Counts from zero where the time goes, or stops counting.
  void set_profile(bool on) { profile_.turn(on); }
  const Profile::Seconds& profile() const { return profile_.seconds(); }

  void set_capture(bool on) { capture_ = on; }
  // (count, cols) of the last layer run; empty when capture is off.
  const std::vector<float>& captured(Site site) const { return captured_[static_cast<size_t>(site)]; }

 private:
  struct Work {  // one linear over the inputs of a phase
    const Linear* linear;
    MatmulKernel kernel;
    float* y;
    size_t stride;
    bool add;
  };
  struct Between {  // what lies between the two matrices of a linear
    const Linear* linear;
    Activations values;
  };
  static constexpr size_t kMostBetween = 6;  // of the linears of a phase
  struct Inputs {
    Activations int8, floats, bfloats, codes;
    const Grid* grid = nullptr;  // of codes
    const Between* between = nullptr;
    size_t betweens = 0;
    const Activations& of(const Linear& linear) const {
      if (linear.inner)
        for (size_t i = 0; i < betweens; ++i)
          if (between[i].linear == &linear) return between[i].values;
      if (linear.input() == Input::Integer) return codes;
      return linear.input() == Input::Int8 ? int8 : linear.input() == Input::Float32 ? floats : bfloats;
    }
  };
  struct ExpertKernels {
    MatmulKernel gate, up, down;
  };
  struct LayerKernels {
    MatmulKernel q, k, v, o, gate, up, down;
    MatmulKernel router = nullptr, shared_gate = nullptr;
    MatmulKernel cross_q = nullptr, cross_k = nullptr, cross_v = nullptr, cross_o = nullptr;
    std::vector<ExpertKernels> experts = {};
  };
  struct Group {  // the tokens of a pass that go through one expert: entries first .. first + count of the order
    size_t expert, first, count, tile;  // tile: number of the first of its tiles among all
    Inputs inputs, middle;              // of gate and up; of down
  };

  struct TokenBlock {  // tokens of a pass that one thread takes through a layer
    size_t first, count, most;  // most: tokens of the largest block, whole tiles
  };
  struct Attended {  // what queries look at
    const KvLayout& layout;
    size_t heads, kv_heads;
    float scale;
    const RelativeBias* bias;
  };
  struct CrossKv {  // of one layer: where the keys and values of an encoder's states lie
    KvLayout layout = {};
    size_t offset = 0, key_nbytes = 0, value_nbytes = 0;  // of slot 0; of one head
  };

  // A layer that does not keep all positions alike. Of a head there lie, one after the other: the first `sinks` positions;
  // the others, in a ring of `room` positions where only a window is kept; with keys and values in four bits the newest
  // group, in eight. A query at position p sees its own group in eight bits and all groups before in four, whatever is
  // stored by then.
  struct Kept {
    bool present = false, grouped = false, keeps_sinks = false;
    size_t sinks = 0, window = 0;  // window 0: all positions
    KvLayout near = {}, far = {};  // of sinks and newest; of the others
    size_t room = 0;
    size_t sink_values = 0, far_keys = 0, far_values = 0, newest_keys = 0, newest_values = 0, nbytes = 0;
    size_t newest_nbytes() const { return nbytes - newest_keys; }  // keys, then values
    size_t newest_keys_nbytes() const { return (kKvGroup / kLanes * near.key_tile_nbytes() + 63) / 64 * 64; }
    // The first position in the window of the query at p, and the one after the last that it sees among `far`.
    int32_t first_seen(int32_t p) const { return window == 0 ? 0 : std::max<int32_t>(0, p + 1 - static_cast<int32_t>(window)); }
    int32_t far_end(int32_t p) const { return grouped ? p / static_cast<int32_t>(kKvGroup) * static_cast<int32_t>(kKvGroup) : p + 1; }
  };
  // Positions of one group that a pass brings to a slot, and where they are stored before they are packed.
  struct Fresh {
    size_t slot;
    int32_t group;
    size_t first, count;  // among ordered_
    bool newest, carries;  // of the slot's groups in this pass, the last; some of its positions came before
    size_t place;          // in fresh_, unless newest
  };
  // What a query meets in one call of the kernel.
  struct Parts {
    bool sinks, newest;
    int32_t first_chunk, last_chunk;
    size_t count() const { return static_cast<size_t>(sinks) + static_cast<size_t>(last_chunk - first_chunk) + static_cast<size_t>(newest); }
  };
  struct Part {
    enum Kind { Sinks, Far, Newest } kind;
    const KvLayout* layout;
    const uint8_t *keys, *values;
    int32_t first;  // position at which keys and values begin
  };

  // A linear over one token whose inputs are chosen.
  struct Choosing {
    const Linear* linear;
    Chosen chosen;
    Activations residual;  // what the low rank's first matrix gives, as its second one wants it; unused without them
  };
  bool in_columns(const Layer& layer) const { return (layer.attends() ? layer.q : layer.up).weight.format.columns; }
  void add_columns();
  void run_columns(size_t index, size_t thread);
  void attend_columns(size_t index, size_t thread);
  void feed_columns(size_t index, size_t thread);
  const float* norm_row(const Norm& norm, size_t token, float* buffer) const;
  template <class Row>
  void choose_inputs(size_t thread, size_t index, size_t first, std::initializer_list<const Linear*> linears, size_t token, Site site,
                     Row row, Choosing* out);
  void multiply_slab(const Choosing& of, size_t slab, float* y, bool add, const Choosing* next, size_t next_slab) const;
  template <class Each>
  void each_slab(size_t thread, size_t slabs, Each each);
  void multiply_columns(size_t thread, const Choosing* of, const Work* works, size_t n, size_t token);
  void multiply_unpacked(size_t thread, const Work* works, size_t n, const Inputs& inputs, size_t tokens);
  void gate_and_up_unpacked(const Layer& layer, const LayerKernels& k, const Inputs& inputs, size_t thread, Inputs* down);
  PackedMatrix unpacked(const Linear& linear, size_t slab, size_t thread, size_t place) const;

  void mark(size_t thread, Operator now) {
    if (thread == 0 && profile_.on()) profile_.mark(now);
  }
  Operator operator_of(size_t phase) const;
  MatmulKernel kernel_for(const Linear& linear);
  MatmulKernel kernel_of(const Linear& linear) const;
  void add_between(std::initializer_list<const Linear*> linears);
  Inputs with_between(size_t thread, size_t phase, std::initializer_list<const Linear*> linears, Inputs inputs, size_t tokens);
  Inputs with_between_block(size_t thread, std::initializer_list<const Linear*> linears, Inputs inputs, const TokenBlock& block);
  size_t place_between(size_t thread, std::initializer_list<const Linear*> linears, Inputs& inputs, size_t tokens, size_t slots,
                       uint8_t* buffer);
  void keep_between(Between& between, const float* values, size_t first, size_t n, size_t token) const;
  void between_panels(Between& between, const Inputs& inputs, size_t panel, size_t panels, size_t first_tile, size_t last_tile);
  void multiply_panels(const Linear& linear, MatmulKernel kernel, size_t panel, size_t panels, const Inputs& inputs, size_t tile,
                       size_t count, const Products& out, const Ahead& ahead) const;
  void embed(size_t thread);
  static constexpr unsigned kAttendPart = 1, kOutputPart = 2, kFeedForwardPart = 4, kDownPart = 8, kWhole = 15;
  void run_layer(size_t index, size_t thread, size_t first, size_t last, unsigned parts = kWhole);
  const Layer& part_of(size_t layer, Site part) const;
  bool leaves_norm(size_t index, size_t last) const;
  bool goes_in_blocks(size_t first, size_t last) const;
  void run_blocks(size_t thread, size_t first, size_t last);
  void begin_layer(size_t index, size_t thread, const TokenBlock& block, const Norm* pending);
  void end_layer(size_t index, size_t thread, const TokenBlock& block);
  template <class Row>
  Inputs prepare_block(size_t thread, const TokenBlock& block, size_t cols, unsigned wanted, Row row);
  void feed_block(const Layer& layer, const LayerKernels& k, const Inputs& inputs, const TokenBlock& block, Inputs& down);
  void multiply_block(const Work* works, size_t n, const Inputs& inputs, const TokenBlock& block);
  template <class Row>
  Inputs prepare(size_t thread, size_t cols, size_t tokens, unsigned wanted, Site site, Row row, const Grid* grid = nullptr);
  void multiply(size_t thread, size_t phase, const Work* works, size_t n, const Inputs& inputs, size_t tokens);
  void multiply_one(size_t thread, size_t phase, const Work* works, size_t n, const Inputs& inputs);
  void read_panels(const Linear& linear, MatmulKernel kernel, size_t from, size_t to, const Inputs& inputs, float* y, bool add,
                   ReadAhead* reads) const;
  void gate_and_up_one(const Layer& layer, const LayerKernels& k, const Inputs& inputs, size_t thread, size_t phase);
  void plan_reads(size_t thread);
  void plan_weights(size_t thread);
  std::pair<size_t, size_t> visible_chunks(const Layer& layer) const;
  std::pair<size_t, size_t> chunk_nbytes(size_t layer, size_t chunk) const;
  void wait(size_t thread);
  void add_experts(const Experts& experts, LayerKernels& kernels);
  void feed_experts(const Layer& layer, const LayerKernels& k, size_t thread);
  void feed_one(const Experts& experts, const LayerKernels& k, const Inputs& inputs, size_t thread);
  void feed_groups(const Experts& experts, const LayerKernels& k);
  void choose(const Experts& experts, size_t token, int32_t* chosen, float* weights) const;
  void group(const Experts& experts);
  static Inputs place(size_t tokens, size_t cols, size_t slots, unsigned wanted, uint8_t* buffer);
  void convert(const float* values, size_t first, size_t n, Inputs& inputs, size_t token) const;
  size_t inputs_nbytes(size_t tokens, size_t slots) const;
  template <class Row>
  void convert_groups(Inputs Group::*inputs, Row row);
  void expert_panel(const FeedForward& expert, const ExpertKernels& k, const Inputs& inputs, size_t tile, size_t panel,
                    size_t count, float* y) const;
  void gate_and_up(const Layer& layer, const LayerKernels& k, const Inputs& inputs, size_t thread, size_t phase, Inputs* down);
  bool splits_chunks(const Layer& layer) const;
  void attend_one(const Layer& layer, size_t index, size_t thread);
  void merge_one(const Layer& layer, size_t index, size_t thread, float* out) const;
  void attend_many(const Layer& layer, size_t index, size_t thread);
  void store_position(const Layer& layer, size_t index, size_t token, size_t head);
  void attend_block(const Layer& layer, size_t index, size_t thread, size_t from, size_t until);
  template <class Place, class Range, class Turn>
  void attend_tokens(size_t thread, const Attended& to, size_t from, size_t until, size_t kv_head, size_t pass, Place place, Range range,
                     Turn turn);
  template <class Place, class Range, class Turn>
  void attend_rows(size_t thread, const Attended& to, Place place, Range range, Turn turn);
  void add_cross(const Cross* cross, LayerKernels& kernels);
  void attend_across(const Cross& cross, size_t index, size_t thread);
  void store_source(const Cross& cross, size_t index, size_t slot, const float* states, size_t first, size_t n, size_t thread);
  uint8_t* cross_keys(size_t layer, size_t slot, size_t head) const;
  void add_kept(const Layer& layer);
  size_t kept_parts(const Layer& layer) const;
  void order_fresh();
  uint8_t* fresh_keys(size_t index, const Fresh& fresh, size_t head) const;
  void store_fresh(const Layer& layer, size_t index, const Fresh& fresh, size_t head);
  void store_kept(const Layer& layer, size_t index, size_t token, size_t head, const float* key, uint8_t* newest, bool to_sinks, bool to_rest);
  Parts parts_of(const Kept& kept, int32_t lowest, int32_t highest) const;
  Part part_of(const Kept& kept, const Parts& parts, size_t number, const uint8_t* head, const uint8_t* newest, int32_t position) const;
  void range_in(const Kept& kept, const Part& part, int32_t position, int32_t& begin, int32_t& end) const;
  void attend_kept_one(const Layer& layer, size_t index, size_t thread);
  void attend_kept(const Layer& layer, size_t index, size_t thread);
  void attend_kept_tokens(const Layer& layer, size_t index, size_t thread, size_t from, size_t until, size_t kv_head, size_t pass);
  size_t turned_for(const Kept& kept, const Part& part, size_t position) const;
  void visible_range(const Layer& layer, size_t token, int32_t& begin, int32_t& end) const;
  void attend_in_integers(const Layer& layer, size_t index, size_t thread);
  void gated(const Layer& layer, const float* gate, float* up, size_t n) const;
  void norm_rows(const Norm& norm, size_t thread);
  void head(const int32_t* rows, size_t n, float* out, size_t stride, size_t thread);
  void turn(const Layer& layer, const Norm& norm, float* heads, size_t count, size_t token, size_t kv_head) const;
  void turn_to(const Layer& layer, const Norm& norm, float* heads, size_t count, size_t token, size_t kv_head, size_t position) const;
  void add_normed(const Norm& norm);
  uint8_t* keys(size_t layer, size_t slot, size_t head) const;
  uint8_t* values(size_t layer, size_t slot, size_t head) const;
  void ensure_rope(size_t positions);
  template <class Consume>
  void each_logits(const int32_t* rows, size_t n, Consume consume);

  std::shared_ptr<const Model> model_;
  SessionConfig config_;
  const Kernels& kernels_;
  std::shared_ptr<Pool> threads_;
  Pool& pool_;
  Profile profile_;
  MatmulKernel head_kernel_ = nullptr;
  std::vector<LayerKernels> layer_kernels_;

  std::vector<KvLayout> kv_layout_;      // per layer
  std::vector<size_t> kv_offset_;        // per layer, of slot 0
  std::vector<size_t> key_head_nbytes_;  // per layer
  std::vector<size_t> value_head_nbytes_;
  std::vector<Kept> kept_;               // per layer
  bool keeps_ = false, grouped_ = false, endless_ = false;  // some layer is kept; some in groups of four bits; each has a window
  size_t rope_limit_ = 0;                // positions from here on are turned by tables of the pass
  std::vector<size_t> reached_;          // per slot, the furthest that it was filled since it was empty
  std::vector<int32_t> newest_group_;    // per slot, which group lies in eight bits
  std::vector<Fresh> fresh_groups_;
  std::vector<int32_t> ordered_, fresh_of_;  // tokens of a pass slot by slot; per token, its entry of fresh_groups_
  Pages fresh_;                          // groups of a pass that are packed within it
  size_t fresh_nbytes_ = 0;              // of one, of all heads
  Pages kv_;
  std::vector<CrossKv> cross_;           // per layer, where any has cross-attention
  size_t cross_nbytes_ = 0;
  Pages cross_kv_;
  std::vector<size_t> source_lengths_;   // per slot

  struct alignas(64) Reads {  // what a thread reads of the weights in a pass over one token
    ReadAhead ahead;
    size_t threads = 0;  // among how many it was split
  };
  std::vector<Reads> reads_;

  size_t count_ = 0;
  std::vector<int32_t> tokens_, slots_, positions_, ends_;
  std::vector<size_t> sequences_;  // first token of each slot, and count_; empty where a slot's tokens lie apart
  std::vector<size_t> lengths_;
  size_t hidden_stride_ = 0, q_stride_ = 0, kv_stride_ = 0, ffn_stride_ = 0, ffn_value_nbytes_ = 4;
  Pages x_, q_, k_, v_, attention_, ffn_;
  Pages branch_;                      // what a part gives, where it is normed before it is added
  Pages router_;                      // scores of every token's experts, then of its shared gate
  size_t router_stride_ = 0, per_token_ = 0, most_experts_ = 0;
  std::vector<int32_t> chosen_;       // (batch, per_token) experts of each token, ascending
  std::vector<float> chosen_weights_;
  std::vector<int32_t> order_;        // tokens by expert
  std::vector<float> order_weights_;
  std::vector<Group> groups_;
  size_t group_tiles_ = 0;
  Pages expert_inputs_;               // inputs of all groups
  std::vector<Pages> thread_experts_; // ... of one token's experts, of each thread
  Pages shared_inputs_;               // activations of a phase, when the threads split the rows
  std::vector<Pages> thread_inputs_;  // ... of each thread, when every thread makes its own
  std::vector<Pages> thread_rows_;
  std::vector<Pages> thread_attention_;
  Pages between_, between_rows_;      // inputs between two matrices: of all tokens; of one, before they are rounded
  size_t between_tile_nbytes_ = 0, between_one_nbytes_ = 0, between_width_ = 0;
  std::vector<Pages> thread_between_; // ... of one token, of each thread, and their floats
  struct alignas(64) Betweens {
    Between list[kMostBetween];
  };
  std::vector<Betweens> thread_betweens_;
  Pages partial_;                     // chunks of one token's attention
  size_t max_cols_ = 0;
  bool decoding_ = false;
  bool columns_ = false;                    // some layer's weights lie in columns
  std::vector<uint64_t> inputs_read_;       // (layers, kCounted)
  uint64_t tokens_decoded_ = 0;
  std::vector<Pages> thread_chosen_;        // of each thread: chosen inputs of three linears, and what their low rank needs
  std::vector<Pages> thread_slabs_;         // ... two slabs as panels
  bool bfloats_ = false;  // some linear takes bfloat16 inputs
  bool integers_ = false; // ... inputs on a grid
  std::vector<Pages> thread_scores_;  // of integer attention
  Pages logits_;
  size_t logits_rows_ = 0, logits_stride_ = 0;
  std::vector<float> last_logits_;
  bool have_logits_ = false;
  int32_t pending_ = -1;

  std::vector<std::vector<float>> cosine_, sine_;  // per rope: (positions, rotary / 2)
  size_t rope_positions_ = 0;
  std::vector<std::vector<float>> late_cosine_, late_sine_;  // per rope: (tokens of the pass, rotary / 2)

  bool capture_ = false;
  std::vector<float> captured_[7];
};

}  // namespace edgewise
