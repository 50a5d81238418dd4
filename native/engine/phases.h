// What the phases of a layer share: how much a thread takes at once, norms, the inputs of linears.
#pragma once
#include <algorithm>
#include <cstring>

#include "edgewise/session.h"

namespace edgewise {

// The phases of a layer that read weights or keys and values; the head is the first phase after the last layer.
// Before some comes the first half of its linears, where they have two matrices.
enum Phase : size_t {
  kBeforeQueriesKeysValues, kQueriesKeysValues, kAttend, kBeforeOut, kOut, kCrossQueries, kCrossOut, kBeforeGateAndUp, kGateAndUp,
  kBeforeDown, kDown, kPhases, kHead = 0
};
inline constexpr size_t kUnplanned = SIZE_MAX;  // a phase whose weights are known only when it begins

inline size_t phase_of(size_t layer, Phase phase) { return layer * kPhases + phase; }

// Panels that a thread takes at once: enough that threads share the work evenly and that weights stay in the cache while
// a batch passes over them.
inline constexpr size_t kMostPanels = 16;
inline size_t panels_at_once(size_t panels, size_t threads, size_t tokens) {
  if (tokens == 1) return std::clamp<size_t>(panels / (threads * 6), 1, kMostPanels);
  return std::clamp<size_t>(panels / (threads * 4), 1, 8);
}

// A product of panels and tokens in items that threads take one by one: runs of panels, as equal as whole pairs allow,
// since float kernels hold two panels at a time. A run stays in the second-level cache while all tokens pass over it. Of
// many tokens it is wider, so that they pass less often, and threads share the tokens of a run.
struct Items {
  size_t pairs, runs, tiles, blocks = 1;
  Items(size_t panels, size_t panel_nbytes, size_t threads, size_t tokens, size_t per_thread)
      : pairs((panels + 1) / 2), tiles((tokens + kLanes - 1) / kLanes) {
    constexpr size_t kFewTokens = 256, kBlockTiles = 8, kRunNbytes = 384 << 10;
    size_t most = kMostPanels / 2;
    if (tokens > kFewTokens) {
      blocks = (tiles + kBlockTiles - 1) / kBlockTiles;
      most = std::clamp<size_t>(kRunNbytes / panel_nbytes, 2, kMostPanels);
    }
    runs = tokens == 1 ? (panels + panels_at_once(panels, threads, 1) - 1) / panels_at_once(panels, threads, 1)
                       : std::max((panels + most - 1) / most, (per_thread * threads + blocks - 1) / blocks);
    runs = std::clamp<size_t>(runs, 1, pairs);
  }
  size_t count() const { return runs * blocks; }
  size_t run_of(size_t item) const { return item / blocks; }
  size_t first_panel(size_t run) const { return pairs * run / runs * 2; }
  size_t first_tile(size_t item) const { return tiles * (item % blocks) / blocks; }
  size_t last_tile(size_t item) const { return tiles * (item % blocks + 1) / blocks; }
};

// What the kernel fetches over a tile of a run: its part of what is read next, or, of a few tokens, the run's own bytes
// just before their use.
inline Ahead ahead_of(const uint8_t* run, size_t nbytes, const uint8_t* next, size_t tile, size_t tiles) {
  Ahead ahead;
  if (tiles == 1) {
    ahead.later = run + Ahead::kDistance;
    ahead.nbytes = nbytes;
  } else if (next != nullptr) {
    ahead.later = next + nbytes * tile / tiles;
    ahead.nbytes = nbytes * (tile + 1) / tiles - nbytes * tile / tiles;
  }
  return ahead;
}

inline void apply_norm(const Kernels& kernels, const Norm& norm, const float* x, size_t n, float* y) {
  const float* bias = norm.bias.empty() ? nullptr : norm.bias.data();
  const float* weight = norm.weight.empty() ? nullptr : norm.weight.data();
  if (norm.kind == Norm::Kind::Rms)
    kernels.rows.rms_norm(x, weight, norm.eps, n, y);
  else if (norm.kind == Norm::Kind::Layer)
    kernels.rows.layer_norm(x, weight, bias, norm.eps, n, y);
  else if (x != y)
    std::memcpy(y, x, n * sizeof(float));
}

// What linears that read the same want it rounded to.
inline unsigned inputs_of(std::initializer_list<const Linear*> linears) {
  unsigned wanted = 0;
  for (const Linear* linear : linears) {
    if (!linear->present()) continue;
    wanted |= static_cast<unsigned>(linear->inner ? linear->inner->input() : linear->input());
    if (linear->plus) wanted |= static_cast<unsigned>(linear->plus->inner->input());
  }
  return wanted;
}

// Linears and their second terms that have two matrices, at most kMostBetween of them.
template <class Use>
void each_between(std::initializer_list<const Linear*> linears, Use use) {
  for (const Linear* linear : linears) {
    if (!linear->present()) continue;
    if (linear->inner) use(*linear);
    if (linear->plus) use(*linear->plus);
  }
}

// Where the first matrices of a phase are as small as that, a token's pass has every thread multiply all of them, which
// takes less time than threads need to meet.
inline constexpr size_t kAloneNbytes = 48 << 10;
inline bool each_alone(std::initializer_list<const Linear*> linears) {
  size_t nbytes = 0;
  each_between(linears, [&](const Linear& linear) { nbytes += linear.inner->weight.nbytes; });
  return nbytes <= kAloneNbytes;
}

// The grid of inputs that linears share; null where none has one.
inline const Grid* grid_of(std::initializer_list<const Linear*> linears) {
  for (const Linear* linear : linears)
    if (linear->integers) return &linear->integers->in;
  return nullptr;
}

// Activations of `tokens` rows in a buffer.
inline Session::Inputs Session::place(size_t tokens, size_t cols, size_t slots, unsigned wanted, uint8_t* buffer) {
  Inputs inputs;
  for (Activations* x : {&inputs.int8, &inputs.floats, &inputs.bfloats, &inputs.codes}) {
    x->tokens = tokens;
    x->cols = cols;
    x->slots = slots;
  }
  if (wanted & static_cast<unsigned>(Input::Int8)) {
    inputs.int8.place_int8(buffer);
    buffer += Activations::nbytes_int8(tokens, cols, slots);
  }
  if (wanted & static_cast<unsigned>(Input::Float32)) {
    inputs.floats.place_float(buffer);
    buffer += Activations::nbytes_float(tokens, cols, slots);
  }
  if (wanted & static_cast<unsigned>(Input::BFloat16)) {
    inputs.bfloats.place_bfloat(buffer);
    buffer += Activations::nbytes_bfloat(tokens, cols, slots);
  }
  if (wanted & static_cast<unsigned>(Input::Integer)) inputs.codes.place_int8(buffer);
  return inputs;
}

// n values of a token from the input `first` on, as far as there are inputs.
inline void Session::convert(const float* values, size_t first, size_t n, Inputs& inputs, size_t token) const {
  n = std::min(n, inputs.int8.cols - first);
  if (inputs.int8.q != nullptr) kernels_.rows.quantise(values, first, n, inputs.int8, token);
  if (inputs.floats.f != nullptr) kernels_.rows.place(values, first, n, inputs.floats, token);
  if (inputs.bfloats.bf != nullptr) kernels_.rows.place_bfloat(values, first, n, inputs.bfloats, token);
  if (inputs.codes.q != nullptr) kernels_.integer.quantise(*inputs.grid, values, first, n, inputs.codes, token);
}

// Inputs of a phase, rounded to all that is wanted. For one token every thread makes its own copy, which costs less than a
// barrier; for more, the threads share the rows. row(token, buffer) gives the token's input, in place or in the buffer.
template <class Row>
Session::Inputs Session::prepare(size_t thread, size_t cols, size_t tokens, unsigned wanted, Site site, Row row,
                                 const Grid* grid) {
  mark(thread, Operator::Inputs);
  const bool own = tokens == 1;
  Inputs inputs = place(tokens, cols, own ? 1 : kLanes, wanted, own ? thread_inputs_[thread].data() : shared_inputs_.data());
  inputs.grid = grid;

  float* scratch = thread_rows_[thread].floats();
  auto take = [&](size_t token) {
    const float* values = row(token, scratch);
    convert(values, 0, cols, inputs, token);
    if (capture_ && (!own || thread == 0))
      std::memcpy(captured_[static_cast<size_t>(site)].data() + token * cols, values, cols * sizeof(float));
  };
  if (own) {
    if (capture_ && thread == 0) captured_[static_cast<size_t>(site)].resize(cols);
    take(0);
    return inputs;
  }
  if (capture_) {
    if (thread == 0) captured_[static_cast<size_t>(site)].resize(tokens * cols);
    pool_.barrier();
  }
  // Whole tiles: two threads never write into one cache line of a tile.
  for (size_t tile; (tile = pool_.take(1)) * kLanes < tokens;)
    for (size_t token = tile * kLanes; token < std::min(tokens, (tile + 1) * kLanes); ++token) take(token);
  pool_.barrier();
  return inputs;
}

}  // namespace edgewise
