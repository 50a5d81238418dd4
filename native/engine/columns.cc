// Layers whose weights lie in columns. A token that is decoded reads only the inputs above its thresholds (Zhang et al.,
// "R-Sparse", arXiv:2504.19449, sections 3.4 and 4); of a prompt slabs become panels, one at a time in each thread, and go
// through the dense kernels, to the same bits as a model in panels. Every function here runs on all threads at once.
#include <limits>

#include "edgewise/pack.h"
#include "engine/phases.h"

namespace edgewise {

namespace {

constexpr size_t kTogether = 3;  // linears that read one input: queries, keys and values
constexpr size_t kTilesAtOnce = 8;  // of sixteen tokens, that pass over an unpacked slab

size_t whole_blocks(size_t n) { return (n + kBlock - 1) / kBlock * kBlock; }
size_t aligned(size_t nbytes) { return (nbytes + 63) / 64 * 64; }

// Panels of a slab that hold rows.
size_t panels_in(const PackedMatrix& w, size_t slab) {
  return std::min(w.format.slab_panels(), w.panels() - slab * w.format.slab_panels());
}

}  // namespace

ChosenInputs::ChosenInputs(const PackedMatrix& weight, const float* thresholds)
    : threshold(whole_blocks(weight.cols), std::numeric_limits<float>::infinity()), offset(column_offsets(weight.cols)) {
  std::copy_n(thresholds, weight.cols, threshold.begin());
}

void Session::add_columns() {
  size_t slabs = 0;
  for (const Layer& layer : model_->layers)
    for (const Linear* linear : {&layer.q, &layer.k, &layer.v, &layer.o, &layer.gate, &layer.up, &layer.down}) {
      const PackedMatrix& w = linear->weight;
      if (!linear->present() || !w.format.columns) continue;
      PackedFormat dense = w.format;
      dense.columns = false;
      slabs = std::max(slabs, aligned(dense.slab_panels() * dense.panel_nbytes(w.cols)));
    }
  const size_t floats = aligned(whole_blocks(max_cols_) * 4);
  const size_t each = Chosen::nbytes(max_cols_) + 2 * floats + 2 * inputs_nbytes(1, 1);
  for (size_t t = 0; t < config_.threads; ++t) {
    thread_chosen_.emplace_back(kTogether * each);
    thread_slabs_.emplace_back(2 * slabs);
  }
  forget_counts();
}

void Session::forget_counts() {
  inputs_read_.assign(columns_ ? model_->layers.size() * kCounted : 0, 0);
  tokens_decoded_ = 0;
}

// The input of linears that read the same, rounded, and what each of them reads of it. first: of the linears, among those
// that are counted. Every thread makes its own.
template <class Row>
void Session::choose_inputs(size_t thread, size_t index, size_t first, std::initializer_list<const Linear*> linears, size_t token,
                            Site site, Row row, Choosing* out) {
  mark(thread, Operator::Inputs);
  const size_t cols = (*linears.begin())->cols();
  Inputs inputs = place(1, cols, 1, static_cast<unsigned>(Input::Int8), thread_inputs_[thread].data());
  const float* values = row(token, thread_rows_[thread].floats());
  kernels_.rows.quantise(values, 0, cols, inputs.int8, 0);
  if (capture_ && thread == 0) {
    std::vector<float>& kept = captured_[static_cast<size_t>(site)];
    kept.resize(count_ * cols);
    std::memcpy(kept.data() + token * cols, values, cols * sizeof(float));
  }
  const size_t floats = aligned(whole_blocks(max_cols_) * 4), one = inputs_nbytes(1, 1);
  uint8_t* buffer = thread_chosen_[thread].data();
  size_t number = 0;
  for (const Linear* linear : linears) {
    Choosing& made = out[number++];
    made.linear = linear;
    made.chosen.place(buffer, cols);
    buffer += Chosen::nbytes(max_cols_);
    float* rest = reinterpret_cast<float*>(buffer);
    float* product = reinterpret_cast<float*>(buffer + floats);
    uint8_t* rest_inputs = buffer + 2 * floats;
    uint8_t* product_inputs = rest_inputs + one;
    buffer = product_inputs + one;
    const ChosenInputs& chosen = *linear->chosen;
    kernels_.columns.choose(values, cols, chosen.threshold.data(), chosen.offset.data(), inputs.int8, made.chosen,
                            chosen.in ? rest : nullptr);
    if (thread == 0) inputs_read_[index * kCounted + first + number - 1] += made.chosen.count;
    if (!chosen.in) continue;
    const size_t rank = chosen.in->rows();
    Inputs others = place(1, cols, 1, static_cast<unsigned>(chosen.in->input()), rest_inputs);
    convert(rest, 0, cols, others, 0);
    const PackedMatrix& w = chosen.in->weight;
    kernels_.matmul(w.format, chosen.in->input() == Input::Int8)(w, 0, w.panels(), others.of(*chosen.in), 0, 0, 1,
                                                                 {product, w.panels() * kLanes}, {});
    Inputs second = place(1, rank, 1, static_cast<unsigned>(chosen.out->input()), product_inputs);
    convert(product, 0, rank, second, 0);
    made.residual = second.of(*chosen.out);
  }
}

// Rows of a slab, its low rank included. next: what the thread reads after it.
void Session::multiply_slab(const Choosing& of, size_t slab, float* y, bool add, const Choosing* next, size_t next_slab) const {
  const Linear& linear = *of.linear;
  const PackedMatrix& w = linear.weight;
  const size_t panel = slab * w.format.slab_panels();
  const PackedMatrix* next_of = next == nullptr ? nullptr : &next->linear->weight;
  kernels_.columns.multiply(w, slab, of.chosen, {y, w.rows, linear.bias_of(panel), add}, next_of == nullptr ? nullptr : next_of->slab(next_slab),
                            next_of, next == nullptr ? nullptr : &next->chosen);
  if (!linear.chosen->out) return;
  const Linear& out = *linear.chosen->out;
  kernels_.matmul(out.weight.format, out.input() == Input::Int8)(out.weight, panel, panels_in(w, slab), of.residual, 0, 0, 1,
                                                                 {y, w.rows, nullptr, true}, {});
}

// The beginning of a thread's first slab is fetched at once: nothing else asked for it.
static void fetch_first(const PackedMatrix& w, size_t slab, const Chosen& x) {
  constexpr size_t kScales = 1024, kInputs = 96;
  const uint8_t* base = w.slab(slab);
  const uint8_t* columns = base + w.format.slab_scales_nbytes(w.cols);
  for (size_t line = 0; line < kScales; line += 64) __builtin_prefetch(base + line);
  for (size_t i = 0; i < std::min(kInputs, 4 * x.quads()); ++i) __builtin_prefetch(columns + x.offset[i]);
}

// each(slab, next), where next is the slab after it or SIZE_MAX. One token: threads that are done take from others. Of
// several tokens a thread takes the same slabs for each, so that nothing is waited for between them.
template <class Each>
void Session::each_slab(size_t thread, size_t slabs, Each each) {
  auto span = [&](size_t from, size_t to, size_t after) {
    for (size_t slab = from; slab < to; ++slab) each(slab, slab + 1 < to ? slab + 1 : after);
  };
  const auto [from, to] = Pool::stretch(slabs, thread, pool_.in_use());
  if (count_ > 1) return span(from, to, SIZE_MAX);
  pool_.share(thread, slabs);
  for (Pool::Share share; pool_.take_share(thread, 1, 8, share);)
    span(share.from, share.to, share.own && share.to < to ? share.to : SIZE_MAX);
}

void Session::multiply_columns(size_t thread, const Choosing* of, const Work* works, size_t n, size_t token) {
  size_t total = 0;
  for (size_t i = 0; i < n; ++i) total += works[i].linear->weight.slabs();
  auto at = [&](size_t slab) {
    size_t i = 0;
    for (; slab >= works[i].linear->weight.slabs(); ++i) slab -= works[i].linear->weight.slabs();
    return std::pair(i, slab);
  };
  if (const auto [from, to] = Pool::stretch(total, thread, pool_.in_use()); from < to) {
    const auto [i, slab] = at(from);
    fetch_first(works[i].linear->weight, slab, of[i].chosen);
  }
  each_slab(thread, total, [&](size_t item, size_t after) {
    const auto [i, slab] = at(item);
    const auto [next, next_slab] = after == SIZE_MAX ? std::pair<size_t, size_t>(0, 0) : at(after);
    const Work& work = works[i];
    multiply_slab(of[i], slab, work.y + token * work.stride + slab * work.linear->weight.format.slab_rows(), work.add,
                  after == SIZE_MAX ? nullptr : of + next, next_slab);
  });
}

const float* Session::norm_row(const Norm& norm, size_t token, float* buffer) const {
  apply_norm(kernels_, norm, x_.floats() + token * hidden_stride_, model_->hidden, buffer);
  return buffer;
}

// One layer over tokens that are decoded.
void Session::run_columns(size_t index, size_t thread) {
  if (model_->layers[index].attends()) attend_columns(index, thread);
  if (model_->layers[index].feeds()) feed_columns(index, thread);
}

void Session::attend_columns(size_t index, size_t thread) {
  const Layer& layer = model_->layers[index];
  Choosing of[kTogether];
  for (size_t t = 0; t < count_; ++t) {
    choose_inputs(thread, index, 0, {&layer.q, &layer.k, &layer.v}, t, Site::Attention, [&](size_t token, float* buffer) { return norm_row(layer.attention_norm, token, buffer); }, of);
    mark(thread, Operator::Qkv);
    const Work works[] = {{&layer.q, nullptr, q_.floats(), q_stride_, false},
                          {&layer.k, nullptr, k_.floats(), kv_stride_, false},
                          {&layer.v, nullptr, v_.floats(), kv_stride_, false}};
    multiply_columns(thread, of, works, 3, t);
  }
  wait(thread);
  mark(thread, Operator::Attention);
  if (kept_[index].present)
    splits_chunks(layer) ? attend_kept_one(layer, index, thread) : attend_kept(layer, index, thread);
  else if (splits_chunks(layer))
    attend_one(layer, index, thread);
  else
    attend_many(layer, index, thread);
  const bool attention_normed = layer.after_attention.kind != Norm::Kind::None;
  for (size_t t = 0; t < count_; ++t) {
    choose_inputs(thread, index, 3, {&layer.o}, t, Site::Output, [&](size_t token, float* buffer) -> const float* {
      if (!splits_chunks(layer)) return attention_.floats() + token * q_stride_;
      merge_one(layer, index, thread, buffer);
      return buffer;
    }, of);
    mark(thread, Operator::Out);
    const Work work = {&layer.o, nullptr, attention_normed ? branch_.floats() : x_.floats(), hidden_stride_, !attention_normed};
    multiply_columns(thread, of, &work, 1, t);
  }
  wait(thread);
  if (attention_normed) add_normed(layer.after_attention);
}

void Session::feed_columns(size_t index, size_t thread) {
  const Layer& layer = model_->layers[index];
  Choosing of[kTogether];
  const bool gate = layer.gate.present();
  auto row = [&](size_t token, float* buffer) { return norm_row(layer.feed_forward_norm, token, buffer); };
  for (size_t t = 0; t < count_; ++t) {
    if (gate)
      choose_inputs(thread, index, 4, {&layer.gate, &layer.up}, t, Site::FeedForward, row, of);
    else
      choose_inputs(thread, index, 5, {&layer.up}, t, Site::FeedForward, row, of + 1);
    mark(thread, Operator::GateUp);
    const size_t rows = layer.up.weight.format.slab_rows();
    if (const auto [from, to] = Pool::stretch(layer.up.weight.slabs(), thread, pool_.in_use()); from < to)
      fetch_first(layer.up.weight, from, of[1].chosen);
    each_slab(thread, layer.up.weight.slabs(), [&](size_t slab, size_t after) {
      float gates[512];  // rows of a slab
      float* up = ffn_.floats() + t * ffn_stride_ + slab * rows;
      const Choosing* next = after == SIZE_MAX ? nullptr : of + 1;
      multiply_slab(of[1], slab, up, false, gate ? of : next, gate ? slab : after);
      if (gate) multiply_slab(of[0], slab, gates, false, next, after);
      gated(layer, gate ? gates : nullptr, up, panels_in(layer.up.weight, slab) * kLanes);
    });
  }
  wait(thread);
  const bool down_normed = layer.after_feed_forward.kind != Norm::Kind::None;
  for (size_t t = 0; t < count_; ++t) {
    choose_inputs(thread, index, 6, {&layer.down}, t, Site::Down, [&](size_t token, float*) {
      return static_cast<const float*>(ffn_.floats() + token * ffn_stride_);
    }, of);
    mark(thread, Operator::Down);
    const Work work = {&layer.down, nullptr, down_normed ? branch_.floats() : x_.floats(), hidden_stride_, !down_normed};
    multiply_columns(thread, of, &work, 1, t);
  }
  wait(thread);
  if (down_normed) add_normed(layer.after_feed_forward);
}

// A slab as a matrix in panels, in the thread's own memory. place: 0 or 1, which half of it.
PackedMatrix Session::unpacked(const Linear& linear, size_t slab, size_t thread, size_t place) const {
  const PackedMatrix& w = linear.weight;
  PackedMatrix made;
  made.format = w.format;
  made.format.columns = false;
  made.rows = panels_in(w, slab) * kLanes;
  made.cols = w.cols;
  made.panel_nbytes = made.format.panel_nbytes(w.cols);
  made.nbytes = made.panels() * made.panel_nbytes;
  uint8_t* data = thread_slabs_[thread].data() + place * thread_slabs_[thread].nbytes() / 2;
  kernels_.columns.panels(w, slab, linear.chosen->offset.data(), data);
  made.data = data;
  return made;
}

// Products of a prompt: threads take slabs and tokens one by one.
void Session::multiply_unpacked(size_t thread, const Work* works, size_t n, const Inputs& inputs, size_t tokens) {
  size_t total = 0;
  for (size_t i = 0; i < n; ++i) total += works[i].linear->weight.slabs();
  const size_t tiles = (tokens + kLanes - 1) / kLanes, blocks = (tiles + kTilesAtOnce - 1) / kTilesAtOnce;
  for (size_t item; (item = pool_.take(1)) < total * blocks;) {
    size_t i = 0, slab = item / blocks;
    for (; slab >= works[i].linear->weight.slabs(); ++i) slab -= works[i].linear->weight.slabs();
    const Work& work = works[i];
    const PackedMatrix w = unpacked(*work.linear, slab, thread, 0);
    const Activations& x = inputs.of(*work.linear);
    const size_t panel = slab * w.format.slab_panels(), block = item % blocks;
    for (size_t tile = tiles * block / blocks; tile < tiles * (block + 1) / blocks; ++tile)
      work.kernel(w, 0, w.panels(), x, tile, 0, std::min(x.slots, tokens - tile * x.slots),
                  {work.y + tile * x.slots * work.stride + panel * kLanes, work.stride, work.linear->bias_of(panel), work.add}, {});
  }
  pool_.barrier();
}

void Session::gate_and_up_unpacked(const Layer& layer, const LayerKernels& k, const Inputs& inputs, size_t thread, Inputs* down) {
  const bool gated = layer.gate.present();
  const Activations& x = inputs.of(layer.up);
  const size_t tiles = (count_ + kLanes - 1) / kLanes, blocks = (tiles + kTilesAtOnce - 1) / kTilesAtOnce;
  float gate[kLanes * kMostPanels * kLanes], local[kLanes * kMostPanels * kLanes];
  for (size_t item; (item = pool_.take(1)) < layer.up.weight.slabs() * blocks;) {
    const size_t slab = item / blocks, block = item % blocks;
    const PackedMatrix up_panels = unpacked(layer.up, slab, thread, 0);
    const PackedMatrix gate_panels = gated ? unpacked(layer.gate, slab, thread, 1) : PackedMatrix{};
    const size_t n = up_panels.panels(), width = n * kLanes, panel = slab * layer.up.weight.format.slab_panels();
    for (size_t tile = tiles * block / blocks; tile < tiles * (block + 1) / blocks; ++tile) {
      const size_t count = std::min(x.slots, count_ - tile * x.slots), stride = down == nullptr ? ffn_stride_ : width;
      float* up = down == nullptr ? ffn_.floats() + tile * x.slots * stride + panel * kLanes : local;
      k.up(up_panels, 0, n, x, tile, 0, count, {up, stride, layer.up.bias_of(panel)}, {});
      if (gated) k.gate(gate_panels, 0, n, x, tile, 0, count, {gate, width, layer.gate.bias_of(panel)}, {});
      for (size_t t = 0; t < count; ++t) {
        this->gated(layer, gated ? gate + t * width : nullptr, up + t * stride, width);
        if (down != nullptr) convert(up + t * stride, panel * kLanes, width, *down, tile * x.slots + t);
      }
    }
  }
  pool_.barrier();
}

}  // namespace edgewise
