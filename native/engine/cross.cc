// Attention over an encoder's states: h += o(attend(q(norm(h)))), between a layer's attention and its feed-forward.
//
// Keys and values of the states are made once for a slot, by every layer, and are then only read. There is no mask, no
// rotary embedding and no bias. Functions run on all threads at once, but for those that say otherwise.
#include <string>

#include "engine/attend.h"
#include "engine/phases.h"

namespace edgewise {

namespace {
constexpr size_t aligned64(size_t n) { return (n + 63) / 64 * 64; }
}  // namespace

// Not of a phase: when the session is made, layer by layer; null for a layer without cross-attention.
void Session::add_cross(const Cross* cross, LayerKernels& kernels) {
  cross_.emplace_back();
  if (cross == nullptr) return;
  if (config_.source == 0) throw std::invalid_argument("a session of a model with cross-attention needs room for a source");
  kernels.cross_q = kernel_for(cross->q);
  kernels.cross_k = kernel_for(cross->k);
  kernels.cross_v = kernel_for(cross->v);
  kernels.cross_o = kernel_for(cross->o);
  const size_t room = (config_.source + kLanes - 1) / kLanes * kLanes;
  CrossKv& kv = cross_.back();
  kv.layout = {config_.kv == KvType::Int4 ? KvType::Int8 : config_.kv, cross->head_dim, cross->head_dim};  // there at once, never packed
  kv.offset = cross_nbytes_;
  kv.key_nbytes = aligned64(room / kLanes * kv.layout.key_tile_nbytes());
  kv.value_nbytes = aligned64(room * kv.layout.value_nbytes());
  cross_nbytes_ += config_.slots * cross->kv_heads * (kv.key_nbytes + kv.value_nbytes);
}

uint8_t* Session::cross_keys(size_t layer, size_t slot, size_t head) const {
  const CrossKv& kv = cross_[layer];
  const size_t heads = model_->layers[layer].cross->kv_heads;
  return cross_kv_.data() + kv.offset + (slot * heads + head) * (kv.key_nbytes + kv.value_nbytes);
}

// Not of a phase.
void Session::set_source(size_t slot, const float* states, size_t n, size_t width) {
  truncate(slot, 0);
  if (cross_nbytes_ == 0) throw std::invalid_argument("this model has no cross-attention: it attends to no source");
  if (n == 0) throw std::invalid_argument("a source has at least one state");
  if (n > config_.source)
    throw ContextOverflow("a source of " + std::to_string(n) + " states is longer than the " + std::to_string(config_.source) +
                          " that the session has room for");
  for (const Layer& layer : model_->layers)
    if (layer.cross && layer.cross->k.cols() != width)
      throw std::invalid_argument("states have " + std::to_string(width) + " values; cross-attention reads " +
                                  std::to_string(layer.cross->k.cols()));
  source_lengths_[slot] = 0;
  const Profile::Counting counting(profile_);
  profile_.unplanned = Operator::Cross;
  pool_.run([&](size_t thread) {
    for (size_t index = 0; index < model_->layers.size(); ++index)
      if (model_->layers[index].cross)
        for (size_t first = 0; first < n; first += config_.batch)
          store_source(*model_->layers[index].cross, index, slot, states, first, std::min(config_.batch, n - first), thread);
  });
  source_lengths_[slot] = n;
}

// Keys and values of states [first, first + n).
void Session::store_source(const Cross& cross, size_t index, size_t slot, const float* states, size_t first, size_t n, size_t thread) {
  const LayerKernels& k = layer_kernels_[index];
  const size_t width = cross.k.cols();
  const Inputs inputs = prepare(thread, width, n, inputs_of({&cross.k, &cross.v}), Site::Source,
                                [&](size_t i, float*) { return states + (first + i) * width; });
  const Work works[] = {{&cross.k, k.cross_k, k_.floats(), kv_stride_, false}, {&cross.v, k.cross_v, v_.floats(), kv_stride_, false}};
  multiply(thread, kUnplanned, works, 2, inputs, n);
  const CrossKv& kv = cross_[index];
  for (size_t head; (head = pool_.take(1)) < cross.kv_heads;) {
    uint8_t* keys = cross_keys(index, slot, head);
    for (size_t i = 0; i < n; ++i) {
      kernels_.attention.store_key(kv.layout, k_.floats() + i * kv_stride_ + head * cross.head_dim, first + i, keys);
      kernels_.attention.store_value(kv.layout, v_.floats() + i * kv_stride_ + head * cross.head_dim, first + i, keys + kv.key_nbytes);
    }
  }
  pool_.barrier();
}

void Session::attend_across(const Cross& cross, size_t index, size_t thread) {
  const LayerKernels& k = layer_kernels_[index];
  if (thread == 0) profile_.unplanned = Operator::Cross;
  {
    const Inputs inputs = prepare(thread, model_->hidden, count_, inputs_of({&cross.q}), Site::Cross,
                                  [&](size_t token, float* buffer) -> const float* {
                                    apply_norm(kernels_, cross.norm, x_.floats() + token * hidden_stride_, model_->hidden, buffer);
                                    return buffer;
                                  });
    const Work work = {&cross.q, k.cross_q, q_.floats(), q_stride_, false};
    multiply(thread, phase_of(index, kCrossQueries), &work, 1, inputs, count_);
  }
  const CrossKv& kv = cross_[index];
  mark(thread, Operator::Cross);
  attend_rows(
      thread, {kv.layout, cross.heads, cross.kv_heads, cross.scale, nullptr},
      [&](size_t slot, size_t head, const uint8_t*& values) {
        const uint8_t* keys = cross_keys(index, slot, head);
        values = keys + kv.key_nbytes;
        return keys;
      },
      [&](size_t token, int32_t& begin, int32_t& end) {
        begin = 0;
        end = static_cast<int32_t>(source_lengths_[static_cast<size_t>(slots_[token])]);
      },
      [](float*, size_t, size_t, size_t) {});
  const Inputs inputs = prepare(thread, cross.o.cols(), count_, inputs_of({&cross.o}), Site::CrossOutput,
                                [&](size_t token, float*) { return attention_.floats() + token * q_stride_; });
  const Work work = {&cross.o, k.cross_o, x_.floats(), hidden_stride_, true};
  multiply(thread, phase_of(index, kCrossOut), &work, 1, inputs, count_);
}

}  // namespace edgewise
