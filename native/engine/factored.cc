// Linears of two thin matrices, y = left (right x), alone or beside a weight that they correct.
//
// What lies between the two is rounded as the left one wants its inputs and stays in the cache: of many tokens it goes
// from the kernel's sums of a run of panels straight into the tiles that the next kernel reads, and never as rows of
// floats; of one token it is as many floats as the rank. No step depends on how tokens or panels are shared out, so the
// bits of a product do not either.
#include "engine/phases.h"

namespace edgewise {

namespace {

// Panels and tiles that a thread takes at once; whole blocks of 32, since these are rounded together.
constexpr size_t kRun = 8, kTiles = 4;

size_t nbytes_of(Input input, size_t tokens, size_t cols, size_t slots) {
  if (input == Input::Int8) return Activations::nbytes_int8(tokens, cols, slots);
  return input == Input::BFloat16 ? Activations::nbytes_bfloat(tokens, cols, slots) : Activations::nbytes_float(tokens, cols, slots);
}

}  // namespace

MatmulKernel Session::kernel_of(const Linear& linear) const {
  return kernels_.matmul(linear.weight.format, linear.input() == Input::Int8);
}

// Makes room for what lies between the matrices of linears that are multiplied in one phase.
void Session::add_between(std::initializer_list<const Linear*> linears) {
  size_t tile = 0, one = 0, width = 0;
  each_between(linears, [&](const Linear& linear) {
    const size_t rank = linear.weight.cols;
    tile += nbytes_of(linear.input(), kLanes, rank, kLanes);
    one += nbytes_of(linear.input(), 1, rank, 1);
    width += (rank + kLanes - 1) / kLanes * kLanes;
  });
  between_tile_nbytes_ = std::max(between_tile_nbytes_, tile);
  between_one_nbytes_ = std::max(between_one_nbytes_, one);
  between_width_ = std::max(between_width_, width);
}

// Lays them over a buffer; returns how many there are.
size_t Session::place_between(size_t thread, std::initializer_list<const Linear*> linears, Inputs& inputs, size_t tokens, size_t slots,
                              uint8_t* buffer) {
  Between* list = thread_betweens_[thread].list;
  size_t n = 0;
  each_between(linears, [&](const Linear& linear) {
    Activations x;
    x.tokens = tokens, x.cols = linear.weight.cols, x.slots = slots;
    const Input input = linear.input();
    if (input == Input::Int8)
      x.place_int8(buffer);
    else if (input == Input::BFloat16)
      x.place_bfloat(buffer);
    else
      x.place_float(buffer);
    buffer += nbytes_of(input, tokens, x.cols, slots);
    list[n++] = {&linear, x};
  });
  inputs.between = list;
  inputs.betweens = n;
  return n;
}

// n sums of a token from `first` on, rounded.
void Session::keep_between(Between& between, const float* values, size_t first, size_t n, size_t token) const {
  Activations& x = between.values;
  n = std::min(n, x.cols - first);
  if (x.q != nullptr)
    kernels_.rows.quantise(values, first, n, x, token);
  else if (x.f != nullptr)
    kernels_.rows.place(values, first, n, x, token);
  else
    kernels_.rows.place_bfloat(values, first, n, x, token);
}

// Products of panels of the first matrix and tiles of tokens.
void Session::between_panels(Between& between, const Inputs& inputs, size_t panel, size_t panels, size_t first_tile, size_t last_tile) {
  const Linear& inner = *between.linear->inner;
  const PackedMatrix& weight = inner.weight;
  const MatmulKernel kernel = kernel_of(inner);
  float sums[kLanes * kRun * kLanes];
  const size_t width = panels * kLanes;
  for (size_t tile = first_tile; tile < last_tile; ++tile) {
    const size_t count = std::min(kLanes, between.values.tokens - tile * kLanes);
    kernel(weight, panel, panels, inputs.of(inner), tile, 0, count, {sums, width},
           ahead_of(weight.panel(panel), panels * weight.panel_nbytes, nullptr, tile - first_tile, last_tile - first_tile));
    for (size_t t = 0; t < count; ++t) keep_between(between, sums + t * width, panel * kLanes, width, tile * kLanes + t);
  }
}

// The inputs of a phase with what the second matrices of its linears read. On all threads at once.
Session::Inputs Session::with_between(size_t thread, size_t phase, std::initializer_list<const Linear*> linears, Inputs inputs, size_t tokens) {
  if (between_width_ == 0) return inputs;
  const bool own = tokens == 1;
  const size_t n = place_between(thread, linears, inputs, tokens, own ? 1 : kLanes, own ? thread_between_[thread].data() : between_.data());
  if (n == 0) return inputs;
  Between* list = thread_betweens_[thread].list;
  if (own) {
    const bool alone = each_alone(linears);
    float* y = alone ? reinterpret_cast<float*>(thread_between_[thread].data() + between_one_nbytes_) : between_rows_.floats();
    Work works[kMostBetween];
    for (size_t i = 0; i < n; ++i) {
      const Linear& inner = *list[i].linear->inner;
      works[i] = {&inner, kernel_of(inner), y, 0, false};
      if (alone) read_panels(inner, works[i].kernel, 0, inner.weight.panels(), inputs, y, false, nullptr);
      y += inner.weight.panels() * kLanes;
    }
    if (!alone) {
      multiply_one(thread, phase - 1, works, n, inputs);
      wait(thread);
    }
    for (size_t i = 0; i < n; ++i) keep_between(list[i], works[i].y, 0, list[i].values.cols, 0);
    return inputs;
  }
  const size_t tiles = (tokens + kLanes - 1) / kLanes, blocks = (tiles + kTiles - 1) / kTiles;
  size_t base = 0, item = pool_.take(1);
  for (size_t i = 0; i < n; ++i) {
    const size_t panels = list[i].linear->inner->weight.panels(), items = (panels + kRun - 1) / kRun * blocks;
    for (; item < base + items; item = pool_.take(1)) {
      const size_t panel = (item - base) / blocks * kRun, block = (item - base) % blocks;
      between_panels(list[i], inputs, panel, std::min(kRun, panels - panel), tiles * block / blocks, tiles * (block + 1) / blocks);
    }
    base += items;
  }
  pool_.barrier();
  return inputs;
}

// The same for tokens that one thread takes through a layer.
Session::Inputs Session::with_between_block(size_t thread, std::initializer_list<const Linear*> linears, Inputs inputs, const TokenBlock& block) {
  if (between_width_ == 0) return inputs;
  const size_t n = place_between(thread, linears, inputs, block.count, kLanes,
                                 between_.data() + thread * (block.most / kLanes) * between_tile_nbytes_);
  Between* list = thread_betweens_[thread].list;
  for (size_t i = 0; i < n; ++i) {
    const size_t panels = list[i].linear->inner->weight.panels();
    for (size_t panel = 0; panel < panels; panel += kRun)
      between_panels(list[i], inputs, panel, std::min(kRun, panels - panel), 0, (block.count + kLanes - 1) / kLanes);
  }
  return inputs;
}

// Panels of a linear and of its second term.
void Session::multiply_panels(const Linear& linear, MatmulKernel kernel, size_t panel, size_t panels, const Inputs& inputs, size_t tile,
                              size_t count, const Products& out, const Ahead& ahead) const {
  kernel(linear.weight, panel, panels, inputs.of(linear), tile, 0, count, out, ahead);
  if (linear.plus) {
    const Linear& plus = *linear.plus;
    kernel_of(plus)(plus.weight, panel, panels, inputs.of(plus), tile, 0, count, {out.y, out.stride, nullptr, true}, {});
  }
}

}  // namespace edgewise
