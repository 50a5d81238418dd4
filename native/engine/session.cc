#include "edgewise/session.h"

#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <new>
#include <string>
#include <utility>

#include "edgewise/pack.h"
#include "engine/phases.h"

namespace edgewise {

namespace {
constexpr size_t padded16(size_t n) { return (n + kLanes - 1) / kLanes * kLanes; }
constexpr size_t aligned64(size_t n) { return (n + 63) / 64 * 64; }
// Logits are made for groups of rows, so that their buffer stays below this.
constexpr size_t kLogitsNbytes = 8 << 20;

// Whether every layer has a window, some of them with sinks: positions go on without end.
bool is_endless(const Model& model) {
  bool sinks = false;
  for (const Layer& layer : model.layers) {
    if (!layer.attends()) continue;
    if (layer.visible != Visible::Sinks && layer.visible != Visible::Sliding) return false;
    sinks |= layer.visible == Visible::Sinks;
  }
  return sinks && model.position_embedding.empty();
}

// Tables reach as far as positions go, or a cache; what comes later is computed for each pass.
size_t rope_limit(const Model& model, size_t context) {
  size_t reach = 0;
  for (const Layer& layer : model.layers) reach = std::max(reach, layer.sinks + layer.window);
  return is_endless(model) ? std::min(reach, context) : context;
}
}  // namespace

Pages::Pages(size_t nbytes) : nbytes_(nbytes) {
  if (nbytes == 0) return;
  void* p = mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  data_ = static_cast<uint8_t*>(p);
}

Pages::~Pages() {
  if (data_ != nullptr) munmap(data_, nbytes_);
}

Pages& Pages::operator=(Pages&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(nbytes_, other.nbytes_);
  return *this;
}

MatmulKernel Session::kernel_for(const Linear& linear) {
  if (!linear.present()) return nullptr;
  for (const Linear* also : {linear.inner.get(), linear.plus.get()})
    if (also != nullptr) kernel_for(*also);
  bfloats_ |= linear.input() == Input::BFloat16;
  integers_ |= linear.input() == Input::Integer;
  if (linear.integers) return kernels_.integer.matmul(linear.weight.format);
  PackedFormat format = linear.weight.format;
  columns_ |= format.columns;
  format.columns = false;
  MatmulKernel kernel = kernels_.matmul(format, linear.input() == Input::Int8);
  if (kernel == nullptr) throw std::invalid_argument("a weight has a packed format without a matmul kernel");
  return kernel;
}

Session::Session(std::shared_ptr<const Model> model, const SessionConfig& config, const Session* beside)
    : model_(std::move(model)), config_(config), kernels_(kernels(tier_in_use())),
      threads_(beside != nullptr ? beside->threads_ : std::make_shared<Pool>(std::max<size_t>(config.threads, 1), config.tuning)),
      pool_(*threads_), profile_(pool_) {
  const Model& m = *model_;
  config_.threads = pool_.threads();
  config_.context = std::max<size_t>(config.context, 1);
  endless_ = is_endless(m);
  rope_limit_ = rope_limit(m, config_.context);
  const size_t room = padded16(config_.context);  // keys lie in tiles of sixteen positions
  config_.batch = std::max<size_t>(config.batch, 1);

  size_t kv_nbytes = 0, head_width = 0, q_width = 0, kv_width = 0, ffn_width = 0, partial = 0;
  bool normed_after = false;
  max_cols_ = m.hidden;
  for (const Layer& layer : m.layers) {
    const Linear* linears[] = {&layer.q, &layer.k, &layer.v, &layer.o, &layer.gate, &layer.up, &layer.down};
    for (const Linear* linear : linears)
      if (linear->present()) max_cols_ = std::max(max_cols_, linear->cols());
    layer_kernels_.push_back({kernel_for(layer.q), kernel_for(layer.k), kernel_for(layer.v), kernel_for(layer.o),
                              kernel_for(layer.gate), kernel_for(layer.up), kernel_for(layer.down)});
    // The last linear and its second term may want their inputs in two forms, which together are wider than floats.
    if (std::popcount(inputs_of({&layer.down})) > 1) ffn_value_nbytes_ = 8;
    add_between({&layer.q, &layer.k, &layer.v});
    add_between({&layer.o});
    add_between({&layer.up, &layer.gate});
    add_between({&layer.down});
    // All positions are there before any query where each sees all: they are never packed.
    const bool at_once = config_.kv == KvType::Int4 && layer.visible == Visible::Full;
    KvLayout layout{at_once ? KvType::Int8 : config_.kv, layer.head_dim, layer.value_dim};
    kv_layout_.push_back(layout);
    const IntegerAttention* integers = layer.integer_attention();
    if (!layer.attends()) {
      kept_.emplace_back();
      key_head_nbytes_.push_back(0);
      value_head_nbytes_.push_back(0);
    } else if (integers != nullptr) {  // codes of eight bits, whatever the cache of other layers holds
      kept_.emplace_back();
      key_head_nbytes_.push_back(aligned64(room / kLanes * integers->key_tile_nbytes()));
      value_head_nbytes_.push_back(aligned64(integers->values_nbytes(room)));
      if (thread_scores_.empty())
        for (size_t t = 0; t < config_.threads; ++t) thread_scores_.emplace_back(IntegerAttention::scratch_nbytes(room));
    } else {
      add_kept(layer);
      const bool present = kept_.back().present;
      key_head_nbytes_.push_back(present ? kept_.back().nbytes : aligned64(room / kLanes * layout.key_tile_nbytes()));
      value_head_nbytes_.push_back(present ? 0 : aligned64(room * layout.value_nbytes()));
    }
    const Kept& kept = kept_.back();
    kv_offset_.push_back(kv_nbytes);
    kv_nbytes += config_.slots * layer.kv_heads * (key_head_nbytes_.back() + value_head_nbytes_.back());
    head_width = std::max({head_width, layout.padded(), layout.value_padded()});
    const size_t widest = std::max(layer.head_dim, layer.value_dim);
    q_width = std::max(q_width, layer.heads * widest);
    kv_width = std::max(kv_width, layer.kv_heads * widest);
    ffn_width = std::max(ffn_width, layer.up.rows());
    normed_after |= layer.after_attention.kind != Norm::Kind::None || layer.after_feed_forward.kind != Norm::Kind::None;
    if (layer.experts) {
      const Experts& experts = *layer.experts;
      for (const FeedForward& expert : experts.experts) {
        ffn_width = std::max(ffn_width, expert.up.rows());
        max_cols_ = std::max({max_cols_, expert.up.cols(), expert.down.cols()});
      }
      add_experts(experts, layer_kernels_.back());
    }
    add_cross(layer.cross.get(), layer_kernels_.back());
    if (layer.cross) {
      const Cross& cross = *layer.cross;
      max_cols_ = std::max({max_cols_, cross.k.cols(), cross.o.cols()});
      head_width = std::max(head_width, cross_.back().layout.padded());
      q_width = std::max(q_width, cross.heads * cross.head_dim);
      kv_width = std::max(kv_width, cross.kv_heads * cross.head_dim);
    }
    const size_t chunks = kept.present ? kept_parts(layer) : (config_.context + kChunk - 1) / kChunk;
    partial = std::max(partial, layer.heads * chunks * (layout.value_padded() + 2));
  }
  if (m.head.present()) head_kernel_ = kernel_for(m.head);
  kv_ = Pages(kv_nbytes);
  if (grouped_) {  // a slot's tokens lie in one group more than they fill, and its last group is stored in place
    const size_t groups = config_.batch / kKvGroup + std::min(config_.slots, std::max<size_t>(config_.batch / 2, 1));
    fresh_ = Pages(groups * fresh_nbytes_);
  }
  cross_kv_ = Pages(cross_nbytes_);

  hidden_stride_ = padded16(m.hidden);
  q_stride_ = padded16(q_width);
  kv_stride_ = padded16(kv_width);
  ffn_stride_ = (ffn_width + kBlock - 1) / kBlock * kBlock;  // whole blocks: inputs of the last linear lie here too
  const size_t n = config_.batch;
  x_ = Pages(n * hidden_stride_ * 4);
  q_ = Pages(n * q_stride_ * 4);
  k_ = Pages(n * kv_stride_ * 4);
  v_ = Pages(n * kv_stride_ * 4);
  attention_ = Pages(n * q_stride_ * 4);
  ffn_ = Pages(padded16(n) * std::max<size_t>(per_token_, 1) * ffn_stride_ * ffn_value_nbytes_);
  if (normed_after || per_token_ > 0) branch_ = Pages(n * hidden_stride_ * 4);
  partial_ = Pages(partial * 4);
  const size_t whole = std::max<size_t>(n, kLanes);
  shared_inputs_ = Pages(inputs_nbytes(whole, kLanes));
  const size_t one = inputs_nbytes(1, 1);
  if (between_width_ > 0) {
    between_ = Pages((whole + kLanes - 1) / kLanes * between_tile_nbytes_);
    between_rows_ = Pages(between_width_ * 4);
  }
  if (per_token_ > 0) {
    const size_t entries = n * per_token_;
    const size_t tiles = (entries + (kLanes - 1) * std::min(entries, most_experts_)) / kLanes;
    router_ = Pages(n * router_stride_ * 4);
    chosen_.resize(entries);
    chosen_weights_.resize(entries);
    order_.resize(entries);
    order_weights_.resize(entries);
    expert_inputs_ = Pages(tiles * inputs_nbytes(kLanes, kLanes));
  }
  // Queries, their sums, and one group's sums of a chunk.
  const size_t queries_room = std::max(3 * kMaxQueries * kMaxHeadDim, (2 * kGroupsAtOnce + 1) * kMaxQueries * head_width);
  for (size_t t = 0; t < config_.threads; ++t) {
    if (per_token_ > 0) thread_experts_.emplace_back(per_token_ * one);
    thread_inputs_.emplace_back(one);
    if (between_width_ > 0) thread_between_.emplace_back(between_one_nbytes_ + between_width_ * 4);
    thread_rows_.emplace_back(padded16(max_cols_) * 4);
    thread_attention_.emplace_back((kAttentionScratch + queries_room) * 4);
  }
  if (m.head.present()) {
    logits_stride_ = padded16(m.vocab);
    logits_rows_ = std::clamp<size_t>(kLogitsNbytes / (logits_stride_ * 4), 1, kLanes);
    logits_ = Pages(logits_rows_ * logits_stride_ * 4);
  }
  if (columns_) add_columns();
  thread_betweens_.resize(config_.threads);
  reads_.resize(config_.threads);
  for (Reads& reads : reads_) reads.ahead.limit(config_.tuning);
  lengths_.assign(config_.slots, 0);
  reached_.assign(config_.slots, 0);
  newest_group_.assign(config_.slots, 0);
  source_lengths_.assign(config_.slots, 0);
  cosine_.resize(m.ropes.size());
  sine_.resize(m.ropes.size());
  late_cosine_.resize(m.ropes.size());
  late_sine_.resize(m.ropes.size());
}

// Of every kind that a linear may want, at the widest.
size_t Session::inputs_nbytes(size_t tokens, size_t slots) const {
  return Activations::nbytes_int8(tokens, max_cols_, slots) + Activations::nbytes_float(tokens, max_cols_, slots) +
         (bfloats_ ? Activations::nbytes_bfloat(tokens, max_cols_, slots) : 0) +
         (integers_ ? Activations::nbytes_int8(tokens, max_cols_, slots) : 0);
}

size_t Session::scratch_nbytes() const {
  size_t total = x_.nbytes() + q_.nbytes() + k_.nbytes() + v_.nbytes() + attention_.nbytes() + ffn_.nbytes() + branch_.nbytes() +
                 router_.nbytes() + expert_inputs_.nbytes() + shared_inputs_.nbytes() + partial_.nbytes() + logits_.nbytes() + fresh_.nbytes() +
                 between_.nbytes() + between_rows_.nbytes();
  for (const Pages& pages : thread_between_) total += pages.nbytes();
  for (const Pages& pages : thread_inputs_) total += pages.nbytes();
  for (const Pages& pages : thread_experts_) total += pages.nbytes();
  for (const Pages& pages : thread_rows_) total += pages.nbytes();
  for (const Pages& pages : thread_attention_) total += pages.nbytes();
  for (const Pages& pages : thread_scores_) total += pages.nbytes();
  for (const Pages& pages : thread_chosen_) total += pages.nbytes();
  for (const Pages& pages : thread_slabs_) total += pages.nbytes();
  const size_t turns = rope_limit_ + (rope_limit_ < config_.context ? config_.batch : 0);
  for (const Rope& rope : model_->ropes) total += 2 * rope.inverse_frequency.size() * turns * sizeof(float);
  return total;
}

uint8_t* Session::keys(size_t layer, size_t slot, size_t head) const {
  const size_t heads = model_->layers[layer].kv_heads;
  return kv_.data() + kv_offset_[layer] + (slot * heads + head) * (key_head_nbytes_[layer] + value_head_nbytes_[layer]);
}

uint8_t* Session::values(size_t layer, size_t slot, size_t head) const {
  return keys(layer, slot, head) + key_head_nbytes_[layer];
}

void Session::truncate(size_t slot, size_t length) {
  if (length > lengths_.at(slot))
    throw std::invalid_argument("truncate to " + std::to_string(length) + " positions, but the slot holds " +
                                std::to_string(lengths_[slot]));
  if (const size_t most = resumable(slot, length); most < length)
    throw std::invalid_argument("truncate to " + std::to_string(length) + " positions: what its next token sees was given up; " +
                                std::to_string(most) + " can be gone on from");
  lengths_[slot] = length;
  if (length == 0) reached_[slot] = 0;
  have_logits_ = false;
  pending_ = -1;
}

// Cosine and sine of the angles of a position, (rotary / 2) each.
static void write_turn(const Rope& rope, size_t position, float* cosine, float* sine) {
  for (size_t i = 0; i < rope.inverse_frequency.size(); ++i) {
    const double angle = static_cast<double>(position) * static_cast<double>(rope.inverse_frequency[i]);
    cosine[i] = static_cast<float>(std::cos(angle) * rope.attention_factor);
    sine[i] = static_cast<float>(std::sin(angle) * rope.attention_factor);
  }
}

void Session::ensure_rope(size_t positions) {
  positions = std::min(positions, rope_limit_);
  if (positions > rope_positions_) {
    // Grow in steps, so that a long generation does not do this for every token.
    const size_t upto = std::min(rope_limit_, std::max(positions, rope_positions_ + 512));
    for (size_t r = 0; r < model_->ropes.size(); ++r) {
      const Rope& rope = model_->ropes[r];
      const size_t half = rope.inverse_frequency.size();
      cosine_[r].resize(upto * half);
      sine_[r].resize(upto * half);
      for (size_t p = rope_positions_; p < upto; ++p) write_turn(rope, p, cosine_[r].data() + p * half, sine_[r].data() + p * half);
    }
    rope_positions_ = upto;
  }
  if (rope_limit_ == config_.context) return;
  for (size_t r = 0; r < model_->ropes.size(); ++r) {
    const Rope& rope = model_->ropes[r];
    const size_t half = rope.inverse_frequency.size();
    late_cosine_[r].resize(config_.batch * half);
    late_sine_[r].resize(config_.batch * half);
    for (size_t t = 0; t < count_; ++t)
      if (static_cast<size_t>(positions_[t]) >= rope_limit_)
        write_turn(rope, static_cast<size_t>(positions_[t]), late_cosine_[r].data() + t * half, late_sine_[r].data() + t * half);
  }
}

void Session::begin(const int32_t* tokens, const int32_t* slots, size_t count) {
  const Model& m = *model_;
  if (count == 0 || count > config_.batch)
    throw std::invalid_argument("a pass takes 1 to " + std::to_string(config_.batch) + " tokens; given " + std::to_string(count));
  std::vector<size_t> next = lengths_;
  positions_.resize(count);
  size_t highest = 0;
  for (size_t i = 0; i < count; ++i) {
    if (tokens[i] < 0 || static_cast<size_t>(tokens[i]) >= m.vocab)
      throw std::invalid_argument("token " + std::to_string(tokens[i]) + " is outside the vocabulary of " + std::to_string(m.vocab));
    if (slots[i] < 0 || static_cast<size_t>(slots[i]) >= config_.slots)
      throw std::invalid_argument("slot " + std::to_string(slots[i]) + ", but the session has " + std::to_string(config_.slots));
    if (cross_nbytes_ > 0 && source_lengths_[static_cast<size_t>(slots[i])] == 0)
      throw std::invalid_argument("slot " + std::to_string(slots[i]) + " has no source to attend to: call set_source() first");
    const size_t position = next[static_cast<size_t>(slots[i])]++;
    if (position >= config_.context)
      throw ContextOverflow("position " + std::to_string(position) + " is beyond the context of " +
                            std::to_string(config_.context) + " positions");
    if (!m.position_embedding.empty() && (position + m.position_offset + 1) * m.hidden > m.position_embedding.size())
      throw ContextOverflow("position " + std::to_string(position) + " has no position embedding");
    positions_[i] = static_cast<int32_t>(position);
    highest = std::max(highest, position + 1);
  }
  tokens_.assign(tokens, tokens + count);
  slots_.assign(slots, slots + count);
  count_ = count;
  lengths_ = std::move(next);
  ends_.resize(config_.slots);
  for (size_t s = 0; s < config_.slots; ++s) ends_[s] = static_cast<int32_t>(lengths_[s]);
  sequences_.clear();
  for (size_t i = 0; i < count; ++i) {
    if (i > 0 && slots[i] == slots[i - 1]) continue;
    if (std::any_of(sequences_.begin(), sequences_.end(), [&](size_t first) { return slots[first] == slots[i]; })) {
      sequences_.clear();
      break;
    }
    sequences_.push_back(i);
  }
  if (!sequences_.empty()) sequences_.push_back(count);
  if (keeps_) order_fresh();
  have_logits_ = false;
  pending_ = -1;
  const Profile::Counting counting(profile_);
  ensure_rope(highest);
  pool_.run([this](size_t thread) { embed(thread); });
}

void Session::run_layers(size_t first, size_t last) {
  if (first > last || last > model_->layers.size())
    throw std::invalid_argument("layers " + std::to_string(first) + " to " + std::to_string(last) + " of " +
                                std::to_string(model_->layers.size()));
  const Profile::Counting counting(profile_);
  if (decoding_ && columns_ && first == 0) tokens_decoded_ += count_;
  pool_.run([=, this](size_t thread) {
    if (goes_in_blocks(first, last)) return run_blocks(thread, first, last);
    plan_reads(thread);
    for (size_t layer = first; layer < last; ++layer) run_layer(layer, thread, first, last);
  });
}

void Session::forward(const int32_t* tokens, const int32_t* slots, size_t count) {
  begin(tokens, slots, count);
  run_layers(0, model_->layers.size());
}

template <class Consume>
void Session::each_logits(const int32_t* rows, size_t n, Consume consume) {
  if (!model_->head.present()) throw std::invalid_argument("this model is an encoder: it has no logits");
  for (size_t i = 0; i < n; ++i)
    if (rows[i] < 0 || static_cast<size_t>(rows[i]) >= count_)
      throw std::invalid_argument("row " + std::to_string(rows[i]) + " of a pass of " + std::to_string(count_) + " tokens");
  const Profile::Counting counting(profile_);
  for (size_t done = 0; done < n; done += logits_rows_) {
    const size_t part = std::min(logits_rows_, n - done);
    pool_.run([&](size_t thread) {
      head(rows + done, part, logits_.floats(), logits_stride_, thread);
    });
    for (size_t i = 0; i < part; ++i) consume(done + i, logits_.floats() + i * logits_stride_);
  }
}

void Session::logits(const int32_t* rows, size_t n, float* out) {
  const size_t vocab = model_->vocab;
  each_logits(rows, n, [&](size_t i, const float* row) { std::memcpy(out + i * vocab, row, vocab * sizeof(float)); });
}

void Session::log_probs(const int32_t* rows, const int32_t* targets, size_t n, double* out) {
  const size_t vocab = model_->vocab;
  for (size_t i = 0; i < n; ++i)
    if (targets[i] < 0 || static_cast<size_t>(targets[i]) >= vocab)
      throw std::invalid_argument("target " + std::to_string(targets[i]) + " is outside the vocabulary of " + std::to_string(vocab));
  each_logits(rows, n, [&](size_t i, const float* row) {
    out[i] = static_cast<double>(row[targets[i]]) - log_sum_exp(row, vocab);
  });
}

void Session::prefill(size_t slot, const int32_t* tokens, size_t n) {
  if (n == 0) throw std::invalid_argument("a prompt has at least one token");
  if (lengths_.at(slot) + n > config_.context)
    throw ContextOverflow(std::to_string(lengths_[slot] + n) + " tokens do not fit the context of " +
                          std::to_string(config_.context));
  const std::vector<int32_t> slots(std::min(n, config_.batch), static_cast<int32_t>(slot));
  for (size_t done = 0; done < n; done += config_.batch) forward(tokens + done, slots.data(), std::min(config_.batch, n - done));
  const Profile::Counting counting(profile_);
  const int32_t last = static_cast<int32_t>(count_ - 1);
  last_logits_.resize(model_->vocab);
  logits(&last, 1, last_logits_.data());
  have_logits_ = true;
}

std::vector<Choice> Session::generate(size_t slot, Sampler& sampler, size_t n, const std::vector<int32_t>& stop) {
  std::vector<Choice> choices;
  const Profile::Counting counting(profile_);
  while (choices.size() < n) {
    if (pending_ >= 0) {  // the token sampled last is fed only when another is wanted
      const int32_t token = pending_;
      const bool decoding = std::exchange(decoding_, true);
      try {
        prefill(slot, &token, 1);
      } catch (...) {
        decoding_ = decoding;
        throw;
      }
      decoding_ = decoding;
    }
    if (!have_logits_) throw std::invalid_argument("generate() continues a prompt: call prefill() first");
    mark(0, Operator::Sampling);
    choices.push_back(sampler.sample(last_logits_.data(), model_->vocab));
    mark(0, Operator::Other);
    pending_ = choices.back().token;
    if (std::find(stop.begin(), stop.end(), pending_) != stop.end()) break;
  }
  return choices;
}

}  // namespace edgewise
