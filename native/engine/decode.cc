// A pass over one token: every weight is read once, so each thread reads its own stretches in a known order and fetches
// them ahead. Every function here runs on all threads at once.
#include "engine/phases.h"

namespace edgewise {

namespace {

// Panels that a thread takes from a stretch, and those of gate and up.
constexpr size_t kFewest = 1, kFewestPairs = 2, kMost = 8;
// Panels in one call of a kernel: what is fetched meanwhile spans few stretches.
constexpr size_t kAtOnce = 4;

template <class Linears>
size_t panels_of(const Linears& linears) {
  size_t total = 0;
  for (const Linear* linear : linears) total += linear->weight.panels();
  return total;
}

}  // namespace

// The weights in the order in which multiply_one and gate_and_up_one take a thread's own panels, for as many threads as
// take part now.
void Session::plan_weights(size_t thread) {
  ReadAhead& ahead = reads_[thread].ahead;
  const size_t threads = pool_.in_use(), layers = model_->layers.size();
  reads_[thread].threads = threads;
  ahead.reset(layers * kPhases + 1);
  auto in_turn = [&](size_t phase, const auto& linears) {
    const auto [from, to] = Pool::stretch(panels_of(linears), thread, threads);
    size_t base = 0;
    for (const Linear* linear : linears) {
      const PackedMatrix& w = linear->weight;
      const size_t first = std::max(from, base), last = std::min(to, base + w.panels());
      if (first < last) ahead.add(phase, w.panel(first - base), (last - first) * w.panel_nbytes);
      base += w.panels();
    }
  };
  using Linears = std::initializer_list<const Linear*>;
  auto before = [&](size_t phase, Linears linears) {
    std::vector<const Linear*> inner;
    if (!each_alone(linears)) each_between(linears, [&](const Linear& linear) { inner.push_back(linear.inner.get()); });
    in_turn(phase, inner);
  };
  for (size_t i = 0; i < layers; ++i) {
    const Layer& layer = model_->layers[i];
    if (in_columns(layer)) continue;  // which ones is known when its inputs are
    if (layer.attends()) {
      before(phase_of(i, kBeforeQueriesKeysValues), {&layer.q, &layer.k, &layer.v});
      in_turn(phase_of(i, kQueriesKeysValues), Linears{&layer.q, &layer.k, &layer.v});
      before(phase_of(i, kBeforeOut), {&layer.o});
      in_turn(phase_of(i, kOut), Linears{&layer.o});
    }
    if (layer.cross) {
      in_turn(phase_of(i, kCrossQueries), Linears{&layer.cross->q});
      in_turn(phase_of(i, kCrossOut), Linears{&layer.cross->o});
    }
    if (!layer.up.present()) continue;  // of experts, which ones is not known beforehand
    before(phase_of(i, kBeforeGateAndUp), {&layer.up, &layer.gate});
    const auto [from, to] = Pool::stretch(layer.up.weight.panels(), thread, threads);
    for (size_t panel = from, n; panel < to; panel += n) {
      n = Pool::own_share(to - panel, kFewestPairs, kMost);
      for (const Linear* linear : {&layer.up, &layer.gate})
        if (linear->present()) ahead.add(phase_of(i, kGateAndUp), linear->weight.panel(panel), n * linear->weight.panel_nbytes);
    }
    before(phase_of(i, kBeforeDown), {&layer.down});
    in_turn(phase_of(i, kDown), Linears{&layer.down});
  }
  if (model_->head.present()) in_turn(phase_of(layers, kHead), Linears{&model_->head});
}

// What this pass reads: the weights, and the keys and values of the slot as attend_one takes them.
void Session::plan_reads(size_t thread) {
  if (count_ > 1) return;
  if (reads_[thread].threads != pool_.in_use()) plan_weights(thread);
  ReadAhead& ahead = reads_[thread].ahead;
  const size_t slot = static_cast<size_t>(slots_[0]);
  for (size_t i = 0; i < model_->layers.size(); ++i) {
    const Layer& layer = model_->layers[i];
    ahead.clear(phase_of(i, kAttend));
    if (!layer.attends() || !splits_chunks(layer) || kept_[i].present) continue;
    const auto [first, last] = visible_chunks(layer);
    const auto [from, to] = Pool::stretch(layer.kv_heads * (last - first), thread, pool_.in_use());
    for (size_t item = from; item < to; ++item) {
      const size_t chunk = first + item % (last - first), head = item / (last - first);
      const auto [key_nbytes, value_nbytes] = chunk_nbytes(i, chunk);
      ahead.add(phase_of(i, kAttend), keys(i, slot, head) + chunk * kChunk / kLanes * kv_layout_[i].key_tile_nbytes(), key_nbytes);
      ahead.add(phase_of(i, kAttend), values(i, slot, head) + chunk * kChunk * kv_layout_[i].value_nbytes(), value_nbytes);
    }
  }
  ahead.begin();
}

// Bytes of a chunk's keys and values that the token of this pass reads.
std::pair<size_t, size_t> Session::chunk_nbytes(size_t layer, size_t chunk) const {
  int32_t begin, end;
  visible_range(model_->layers[layer], 0, begin, end);
  const size_t positions = std::min((chunk + 1) * kChunk, static_cast<size_t>(end)) - chunk * kChunk;
  return {(positions + kLanes - 1) / kLanes * kv_layout_[layer].key_tile_nbytes(), positions * kv_layout_[layer].value_nbytes()};
}

// The end of a phase: waiting threads fetch what they will read next.
void Session::wait(size_t thread) {
  if (count_ > 1) return pool_.barrier();
  pool_.barrier([&ahead = reads_[thread].ahead] { ahead.fetch(512); });
}

// Products of panels [from, to) of a linear; y is where the first of them goes.
void Session::read_panels(const Linear& linear, MatmulKernel kernel, size_t from, size_t to, const Inputs& inputs, float* y,
                          bool add, ReadAhead* reads) const {
  const PackedMatrix& w = linear.weight;
  for (size_t panel = from, n; panel < to; panel += n) {
    n = std::min(kAtOnce, to - panel);
    const Ahead ahead = reads != nullptr ? reads->over(w.panel(panel), n * w.panel_nbytes) : Ahead{};
    multiply_panels(linear, kernel, panel, n, inputs, 0, 1, {y + (panel - from) * kLanes, n * kLanes, linear.bias_of(panel), add}, ahead);
  }
}

void Session::multiply_one(size_t thread, size_t phase, const Work* works, size_t n, const Inputs& inputs) {
  ReadAhead& reads = reads_[thread].ahead;
  size_t total = 0;
  for (size_t i = 0; i < n; ++i) total += works[i].linear->weight.panels();
  pool_.share(thread, total);
  reads.seek(phase);
  for (Pool::Share share; pool_.take_share(thread, kFewest, kMost, share);) {
    size_t base = 0;
    for (size_t i = 0; i < n; base += works[i].linear->weight.panels(), ++i) {
      const size_t from = std::max(share.from, base), to = std::min(share.to, base + works[i].linear->weight.panels());
      if (from < to)
        read_panels(*works[i].linear, works[i].kernel, from - base, to - base, inputs, works[i].y + (from - base) * kLanes,
                    works[i].add, share.own ? &reads : nullptr);
    }
  }
}

void Session::gate_and_up_one(const Layer& layer, const LayerKernels& k, const Inputs& inputs, size_t thread, size_t phase) {
  ReadAhead& reads = reads_[thread].ahead;
  pool_.share(thread, layer.up.weight.panels());
  reads.seek(phase);
  float gate[kMost * kLanes];
  for (Pool::Share share; pool_.take_share(thread, kFewestPairs, kMost, share);) {
    ReadAhead* own = share.own ? &reads : nullptr;
    float* up = ffn_.floats() + share.from * kLanes;
    read_panels(layer.up, k.up, share.from, share.to, inputs, up, false, own);
    if (layer.gate.present()) read_panels(layer.gate, k.gate, share.from, share.to, inputs, gate, false, own);
    gated(layer, layer.gate.present() ? gate : nullptr, up, (share.to - share.from) * kLanes);
  }
}

}  // namespace edgewise
