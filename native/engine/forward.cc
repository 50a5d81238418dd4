// One pass through a layer. Every function here runs on all threads at once; phases end with a barrier.
#include <algorithm>
#include <cstring>
#include <string>

#include "edgewise/pack.h"
#include "engine/phases.h"

namespace edgewise {

void Session::embed(size_t thread) {
  const Model& m = *model_;
  mark(thread, Operator::Embed);
  for (size_t t; (t = pool_.take(1)) < count_;) {
    float* row = x_.floats() + t * hidden_stride_;
    unpack_row(m.embedding.weight, static_cast<size_t>(tokens_[t]), row);
    if (m.embedding_scale != 1.0f)
      for (size_t i = 0; i < m.hidden; ++i) row[i] *= m.embedding_scale;
    if (!m.token_type_embedding.empty()) kernels_.rows.add(m.token_type_embedding.data(), m.hidden, row);
    if (!m.position_embedding.empty())
      kernels_.rows.add(m.position_embedding.data() + (static_cast<size_t>(positions_[t]) + m.position_offset) * m.hidden,
                        m.hidden, row);
    apply_norm(kernels_, m.embedding_norm, row, m.hidden, row);
  }
  pool_.barrier();
}

void Session::multiply(size_t thread, size_t phase, const Work* works, size_t n, const Inputs& given, size_t tokens) {
  if (thread == 0 && profile_.on()) profile_.mark(operator_of(phase));
  if (works[0].linear->weight.format.columns) return multiply_unpacked(thread, works, n, given, tokens);
  const Inputs inputs = n == 3   ? with_between(thread, phase, {works[0].linear, works[1].linear, works[2].linear}, given, tokens)
                        : n == 1 ? with_between(thread, phase, {works[0].linear}, given, tokens)
                                 : given;
  if (tokens == 1 && count_ == 1 && phase != kUnplanned) {
    multiply_one(thread, phase, works, n, inputs);
    return wait(thread);
  }
  size_t total = 0;
  for (size_t i = 0; i < n; ++i) total += works[i].linear->weight.panels();
  const Items items(total, works[0].linear->weight.panel_nbytes, config_.threads, tokens, config_.tuning.runs_per_thread);
  auto start_of = [&](size_t panel) -> const uint8_t* {
    for (size_t i = 0; i < n; panel -= works[i].linear->weight.panels(), ++i)
      if (panel < works[i].linear->weight.panels()) return works[i].linear->weight.panel(panel);
    return nullptr;
  };
  for (size_t item = pool_.take(1), after; item < items.count(); item = after) {
    after = pool_.take(1);
    const size_t run = items.run_of(item), from = items.first_panel(run), to = std::min(total, items.first_panel(run + 1));
    const bool moves = after < items.count() && items.run_of(after) != run;
    const uint8_t* next = moves ? start_of(items.first_panel(items.run_of(after))) : nullptr;
    const size_t first_tile = items.first_tile(item), last_tile = items.last_tile(item);
    size_t base = 0;
    for (size_t i = 0; i < n; base += works[i].linear->weight.panels(), ++i) {
      const Work& work = works[i];
      const PackedMatrix& weight = work.linear->weight;
      const size_t first = std::max(from, base), last = std::min(to, base + weight.panels());
      if (first >= last) continue;
      const Activations& x = inputs.of(*work.linear);
      const size_t panel = first - base, nbytes = (last - first) * weight.panel_nbytes;
      for (size_t tile = first_tile; tile < last_tile; ++tile) {
        const size_t count = std::min(x.slots, tokens - tile * x.slots);
        const Ahead ahead = ahead_of(weight.panel(panel), nbytes, next, tile - first_tile, last_tile - first_tile);
        multiply_panels(*work.linear, work.kernel, panel, last - first, inputs, tile, count,
                        {work.y + tile * x.slots * work.stride + panel * kLanes, work.stride, work.linear->bias_of(panel), work.add}, ahead);
      }
    }
  }
  pool_.barrier();
}

// down: where the results go as inputs of the next linear, tile by tile; null: into rows of ffn_.
void Session::gate_and_up(const Layer& layer, const LayerKernels& k, const Inputs& given, size_t thread, size_t phase, Inputs* down) {
  mark(thread, Operator::GateUp);
  if (in_columns(layer)) return gate_and_up_unpacked(layer, k, given, thread, down);
  const Inputs inputs = with_between(thread, phase, {&layer.up, &layer.gate}, given, count_);
  if (count_ == 1) {
    gate_and_up_one(layer, k, inputs, thread, phase);
    return wait(thread);
  }
  const size_t panels = layer.up.weight.panels(), tokens = count_;
  const bool gated = layer.gate.present();
  const Items items(panels, layer.up.weight.panel_nbytes, config_.threads, tokens, config_.tuning.runs_per_thread);
  const Activations& x_up = inputs.of(layer.up);
  float gate[kLanes * kMostPanels * kLanes], local[kLanes * kMostPanels * kLanes];
  for (size_t item = pool_.take(1), after; item < items.count(); item = after) {
    after = pool_.take(1);
    const size_t run = items.run_of(item), from = items.first_panel(run), n = std::min(panels, items.first_panel(run + 1)) - from;
    const size_t width = n * kLanes, next = after < items.count() ? items.first_panel(items.run_of(after)) : from;
    const size_t first_tile = items.first_tile(item), last_tile = items.last_tile(item);
    auto ahead = [&](const PackedMatrix& weight, size_t tile) {
      return ahead_of(weight.panel(from), n * weight.panel_nbytes, next == from ? nullptr : weight.panel(next), tile - first_tile,
                      last_tile - first_tile);
    };
    for (size_t tile = first_tile; tile < last_tile; ++tile) {
      const size_t count = std::min(x_up.slots, tokens - tile * x_up.slots);
      const size_t stride = down == nullptr ? ffn_stride_ : width;
      float* up = down == nullptr ? ffn_.floats() + tile * x_up.slots * stride + from * kLanes : local;
      multiply_panels(layer.up, k.up, from, n, inputs, tile, count, {up, stride, layer.up.bias_of(from)}, ahead(layer.up.weight, tile));
      if (gated)
        multiply_panels(layer.gate, k.gate, from, n, inputs, tile, count, {gate, width, layer.gate.bias_of(from)},
                        ahead(layer.gate.weight, tile));
      for (size_t t = 0; t < count; ++t) {
        this->gated(layer, gated ? gate + t * width : nullptr, up + t * stride, width);
        if (down != nullptr) convert(up + t * stride, from * kLanes, width, *down, tile * x_up.slots + t);
      }
    }
  }
  pool_.barrier();
}

namespace {

// The grid that the stream is rounded to as this norm of a layer reads it, or null.
const Grid* rounded_in(const Layer& layer, const Norm& norm) {
  if (!layer.rounding) return nullptr;
  const std::optional<Grid>& grid = &norm == &layer.attention_norm ? layer.rounding->attention_in : layer.rounding->feed_forward_in;
  return grid ? &*grid : nullptr;
}

}  // namespace

void Session::norm_rows(const Norm& norm, size_t thread) {
  mark(thread, Operator::Inputs);
  for (size_t t; (t = pool_.take(1)) < count_;) {
    float* row = x_.floats() + t * hidden_stride_;
    apply_norm(kernels_, norm, row, model_->hidden, row);
  }
  pool_.barrier();
}

// x += norm(branch), row by row.
void Session::add_normed(const Norm& norm) {
  for (size_t t; (t = pool_.take(1)) < count_;) {
    float* row = branch_.floats() + t * hidden_stride_;
    apply_norm(kernels_, norm, row, model_->hidden, row);
    kernels_.rows.add(row, model_->hidden, x_.floats() + t * hidden_stride_);
  }
  pool_.barrier();
}

// The operator that a phase's linears are.
Operator Session::operator_of(size_t phase) const {
  if (phase == kUnplanned) return profile_.unplanned;
  if (phase >= model_->layers.size() * kPhases) return Operator::Head;
  const size_t which = phase % kPhases;
  return which == kQueriesKeysValues ? Operator::Qkv : which == kOut ? Operator::Out : Operator::Down;
}

// Whether the norm at the end of a layer is left to the next one, which reads every row anyway.
bool Session::leaves_norm(size_t index, size_t last) const {
  return count_ > 1 && index + 1 < last && model_->layers[index].post_norm && model_->layers[index + 1].post_norm;
}

// Layers first .. last - 1 are run one after the other; of a layer that is run alone, only some parts.
void Session::run_layer(size_t index, size_t thread, size_t first, size_t last, unsigned parts) {
  const Layer& layer = model_->layers[index];
  if (decoding_ && in_columns(layer) && parts == kWhole) return run_columns(index, thread);
  const LayerKernels& k = layer_kernels_[index];
  const size_t hidden = model_->hidden;
  // The input of a part: normed before it, or, where norms come after, normed in place now if that is still to be done.
  auto normed = [&](const Norm& before, const Norm* pending) {
    return [this, &layer, &before, pending, post = layer.post_norm](size_t token, float* buffer) -> const float* {
      float* x = x_.floats() + token * hidden_stride_;
      if (post && pending != nullptr) apply_norm(kernels_, *pending, x, model_->hidden, x);
      if (post) return x;
      if (const Grid* grid = rounded_in(layer, before)) {
        kernels_.integer.snap(*grid, x, model_->hidden, buffer);
        x = buffer;
      }
      apply_norm(kernels_, before, x, model_->hidden, buffer);
      return buffer;
    };
  };
  const bool leaves_attention_norm = layer.post_norm && count_ > 1 && !layer.cross && parts == kWhole;

  if (parts & kAttendPart && layer.attends()) {
    const Norm* pending = index > first && leaves_norm(index - 1, last) ? &model_->layers[index - 1].feed_forward_norm : nullptr;
    const Inputs inputs = prepare(thread, hidden, count_, inputs_of({&layer.q, &layer.k, &layer.v}), Site::Attention,
                                  normed(layer.attention_norm, pending), grid_of({&layer.q, &layer.k, &layer.v}));
    const Work works[] = {{&layer.q, k.q, q_.floats(), q_stride_, false},
                          {&layer.k, k.k, k_.floats(), kv_stride_, false},
                          {&layer.v, k.v, v_.floats(), kv_stride_, false}};
    multiply(thread, phase_of(index, kQueriesKeysValues), works, 3, inputs, count_);
    mark(thread, Operator::Attention);
    if (layer.integer_attention() != nullptr)
      attend_in_integers(layer, index, thread);
    else if (kept_[index].present)
      splits_chunks(layer) ? attend_kept_one(layer, index, thread) : attend_kept(layer, index, thread);
    else if (splits_chunks(layer))
      attend_one(layer, index, thread);
    else
      attend_many(layer, index, thread);
  }
  if (parts & kOutputPart && layer.attends()) {
    const Inputs inputs = prepare(thread, layer.o.cols(), count_, inputs_of({&layer.o}), Site::Output,
                                  [&](size_t token, float* buffer) -> const float* {
                                    if (!splits_chunks(layer)) return attention_.floats() + token * q_stride_;
                                    merge_one(layer, index, thread, buffer);
                                    return buffer;
                                  }, grid_of({&layer.o}));
    const bool normed_after = layer.after_attention.kind != Norm::Kind::None;
    const Work work = {&layer.o, k.o, normed_after ? branch_.floats() : x_.floats(), hidden_stride_, !normed_after};
    multiply(thread, phase_of(index, kOut), &work, 1, inputs, count_);
    if (normed_after) add_normed(layer.after_attention);
    if (layer.post_norm && !leaves_attention_norm) norm_rows(layer.attention_norm, thread);
    if (layer.cross) attend_across(*layer.cross, index, thread);
  }
  if (!layer.feeds()) return;
  if (layer.experts) {
    if (parts & kFeedForwardPart) feed_experts(layer, k, thread);
    return;
  }
  // Of several tokens the feed-forward goes from one linear to the next without rows between them.
  const bool direct = count_ > 1 && !capture_ && parts == kWhole;
  Inputs down = direct ? place(count_, layer.down.cols(), kLanes, inputs_of({&layer.down}), ffn_.data()) : Inputs{};
  down.grid = grid_of({&layer.down});
  if (parts & kFeedForwardPart) {
    const Inputs inputs = prepare(thread, hidden, count_, inputs_of({&layer.gate, &layer.up}), Site::FeedForward,
                                  normed(layer.feed_forward_norm, leaves_attention_norm ? &layer.attention_norm : nullptr),
                                  grid_of({&layer.gate, &layer.up}));
    gate_and_up(layer, k, inputs, thread, phase_of(index, kGateAndUp), direct ? &down : nullptr);
  }
  if (parts & kDownPart) {
    if (!direct)
      down = prepare(thread, layer.down.cols(), count_, inputs_of({&layer.down}), Site::Down,
                     [&](size_t token, float*) { return ffn_.floats() + token * ffn_stride_; }, grid_of({&layer.down}));
    const bool normed_after = layer.after_feed_forward.kind != Norm::Kind::None;
    const Work work = {&layer.down, k.down, normed_after ? branch_.floats() : x_.floats(), hidden_stride_, !normed_after};
    multiply(thread, phase_of(index, kDown), &work, 1, down, count_);
    if (normed_after) add_normed(layer.after_feed_forward);
    if (layer.post_norm && !leaves_norm(index, last)) norm_rows(layer.feed_forward_norm, thread);
  }
}

void Session::head(const int32_t* rows, size_t n, float* out, size_t stride, size_t thread) {
  const Linear& linear = model_->head;
  if (reads_[thread].threads != pool_.in_use()) plan_reads(thread);
  const Inputs inputs =
      prepare(thread, linear.cols(), n, inputs_of({&linear}), Site::Attention, [&](size_t i, float* buffer) {
        apply_norm(kernels_, model_->final_norm, x_.floats() + static_cast<size_t>(rows[i]) * hidden_stride_, model_->hidden, buffer);
        return static_cast<const float*>(buffer);
      });
  const Work work = {&linear, head_kernel_, out, stride, false};
  multiply(thread, phase_of(model_->layers.size(), kHead), &work, 1, inputs, n);
  if (model_->logit_scale == 1.0f) return;
  for (size_t i; (i = pool_.take(1)) < n;)
    for (size_t v = 0; v < model_->vocab; ++v) out[i * stride + v] *= model_->logit_scale;
  pool_.barrier();
}

void Session::normed(const int32_t* rows, size_t n, float* out) {
  for (size_t i = 0; i < n; ++i) {
    if (rows[i] < 0 || static_cast<size_t>(rows[i]) >= count_)
      throw std::invalid_argument("row " + std::to_string(rows[i]) + " of a pass of " + std::to_string(count_) + " tokens");
    apply_norm(kernels_, model_->final_norm, x_.floats() + static_cast<size_t>(rows[i]) * hidden_stride_, model_->hidden,
               out + i * model_->hidden);
  }
}

}  // namespace edgewise
