// Layers of an encoder over many tokens, block by block: a thread takes some of them through all that lies between two attentions, so
// that what they become stays in its cache, and threads meet once for each layer. Every weight is read once for each block:
// a decoder of many more weights, whose prompts are as long, loses a tenth by that.
#include <algorithm>

#include "engine/attend.h"
#include "engine/phases.h"

namespace edgewise {

namespace {

// What the last linear of a feed-forward reads is the widest of a block: beside weights that pass by, it fits half of the
// second-level cache of the processors of today.
constexpr size_t kBlockNbytes = 400 << 10;
// Weights pass by once for every block: of fewer tiles, they would not come as fast as they are multiplied.
constexpr size_t kLeastTiles = 3, kMostTiles = 8;

size_t width_of(Input input) { return input == Input::Int8 ? 1 : input == Input::BFloat16 ? 2 : 4; }

struct Blocks {
  size_t tiles, count, most;  // tiles of the pass; blocks; tiles of the largest
  Blocks(size_t tokens, size_t threads, size_t token_nbytes) : tiles((tokens + kLanes - 1) / kLanes) {
    const size_t fitting = std::clamp<size_t>(kBlockNbytes / (token_nbytes * kLanes), kLeastTiles, kMostTiles);
    count = ((tiles + fitting - 1) / fitting + threads - 1) / threads * threads;
    most = (tiles + count - 1) / count;
  }
  // Whether threads are busy alike.
  bool even(size_t threads) const { return most >= kLeastTiles && most * (count / threads) * threads <= tiles + tiles / 8; }
  size_t first_tile(size_t block) const { return tiles * block / count; }
};

Blocks blocks_of(const Model& model, size_t tokens, size_t threads) {
  const Linear& down = model.layers.front().down;
  return Blocks(tokens, threads, down.cols() * width_of(down.input()));
}

}  // namespace

bool Session::goes_in_blocks(size_t first, size_t last) const {
  if (first == last || capture_) return false;
  for (size_t l = first; l < last; ++l) {
    const Layer& layer = model_->layers[l];
    if (!layer.attends() || !layer.feeds()) return false;
    if (layer.visible != Visible::Full || kept_[l].present || layer.experts || layer.cross) return false;
    if (layer.after_attention.kind != Norm::Kind::None || layer.after_feed_forward.kind != Norm::Kind::None) return false;
  }
  const Blocks blocks = blocks_of(*model_, count_, pool_.in_use());
  return blocks.even(pool_.in_use()) && blocks.most * kLanes * config_.threads <= (config_.batch + kLanes - 1) / kLanes * kLanes;
}

void Session::run_blocks(size_t thread, size_t first, size_t last) {
  const Blocks blocks = blocks_of(*model_, count_, pool_.in_use());
  for (size_t l = first; l <= last; ++l) {
    pool_.share(thread, blocks.count);
    for (Pool::Share share; pool_.take_share(thread, 1, 1, share);) {
      const size_t from = blocks.first_tile(share.from) * kLanes, until = std::min(count_, blocks.first_tile(share.to) * kLanes);
      const TokenBlock block{from, until - from, blocks.most * kLanes};
      if (l > first) end_layer(l - 1, thread, block);
      const bool pending = l > first && model_->layers[l - 1].post_norm;
      if (l < last) begin_layer(l, thread, block, pending ? &model_->layers[l - 1].feed_forward_norm : nullptr);
    }
    pool_.barrier();
  }
  const Layer& end = model_->layers[last - 1];
  if (end.post_norm) norm_rows(end.feed_forward_norm, thread);
}

// Inputs of a linear in the thread's part of the buffer.
template <class Row>
Session::Inputs Session::prepare_block(size_t thread, const TokenBlock& block, size_t cols, unsigned wanted, Row row) {
  mark(thread, Operator::Inputs);
  Inputs inputs = place(block.count, cols, kLanes, wanted, shared_inputs_.data() + thread * inputs_nbytes(block.most, kLanes));
  float* scratch = thread_rows_[thread].floats();
  for (size_t i = 0; i < block.count; ++i) convert(row(block.first + i, scratch), 0, cols, inputs, i);
  return inputs;
}

void Session::multiply_block(const Work* works, size_t n, const Inputs& inputs, const TokenBlock& block) {
  constexpr size_t kRun = 8;
  const size_t tiles = (block.count + kLanes - 1) / kLanes;
  for (size_t i = 0; i < n; ++i) {
    const PackedMatrix& weight = works[i].linear->weight;
    for (size_t panel = 0; panel < weight.panels(); panel += kRun) {
      const size_t panels = std::min(kRun, weight.panels() - panel);
      const uint8_t* next = i + 1 < n ? works[i + 1].linear->weight.data : nullptr;
      if (panel + kRun < weight.panels()) next = weight.panel(panel + kRun);
      for (size_t tile = 0; tile < tiles; ++tile) {
        float* y = works[i].y + (block.first + tile * kLanes) * works[i].stride + panel * kLanes;
        multiply_panels(*works[i].linear, works[i].kernel, panel, panels, inputs, tile, std::min(kLanes, block.count - tile * kLanes),
                        {y, works[i].stride, works[i].linear->bias_of(panel), works[i].add},
                        ahead_of(weight.panel(panel), panels * weight.panel_nbytes, next, tile, tiles));
      }
    }
  }
}

// From a layer's input to its keys and values. pending: a norm of the layer before that is still to be done, in place.
void Session::begin_layer(size_t index, size_t thread, const TokenBlock& block, const Norm* pending) {
  const Layer& layer = model_->layers[index];
  const LayerKernels& k = layer_kernels_[index];
  auto normed = [&](size_t token, float* buffer) {
    float* x = x_.floats() + token * hidden_stride_;
    if (pending != nullptr) apply_norm(kernels_, *pending, x, model_->hidden, x);
    if (layer.post_norm) return x;
    apply_norm(kernels_, layer.attention_norm, x, model_->hidden, buffer);
    return buffer;
  };
  Inputs inputs = prepare_block(thread, block, model_->hidden, inputs_of({&layer.q, &layer.k, &layer.v}), normed);
  mark(thread, Operator::Qkv);
  inputs = with_between_block(thread, {&layer.q, &layer.k, &layer.v}, inputs, block);
  const Work works[] = {{&layer.k, k.k, k_.floats(), kv_stride_, false},
                        {&layer.v, k.v, v_.floats(), kv_stride_, false},
                        {&layer.q, k.q, q_.floats(), q_stride_, false}};
  multiply_block(works, 3, inputs, block);
  mark(thread, Operator::Attention);
  for (size_t head = 0; head < layer.kv_heads; ++head)
    for (size_t i = 0; i < block.count; ++i) store_position(layer, index, block.first + i, head);
}

// From a layer's queries to its output, but for a norm after it.
void Session::end_layer(size_t index, size_t thread, const TokenBlock& block) {
  const Layer& layer = model_->layers[index];
  const LayerKernels& k = layer_kernels_[index];
  mark(thread, Operator::Attention);
  attend_block(layer, index, thread, block.first, block.first + block.count);
  {
    Inputs inputs = prepare_block(thread, block, layer.o.cols(), inputs_of({&layer.o}),
                                  [&](size_t token, float*) { return attention_.floats() + token * q_stride_; });
    mark(thread, Operator::Out);
    inputs = with_between_block(thread, {&layer.o}, inputs, block);
    const Work work = {&layer.o, k.o, x_.floats(), hidden_stride_, true};
    multiply_block(&work, 1, inputs, block);
  }
  Inputs down = place(block.count, layer.down.cols(), kLanes, inputs_of({&layer.down}),
                      ffn_.data() + thread * block.most * ffn_stride_ * ffn_value_nbytes_);
  {
    Inputs inputs =
        prepare_block(thread, block, model_->hidden, inputs_of({&layer.gate, &layer.up}), [&](size_t token, float* buffer) {
          float* x = x_.floats() + token * hidden_stride_;
          if (!layer.post_norm) {
            apply_norm(kernels_, layer.feed_forward_norm, x, model_->hidden, buffer);
            return buffer;
          }
          apply_norm(kernels_, layer.attention_norm, x, model_->hidden, x);
          return x;
        });
    mark(thread, Operator::GateUp);
    inputs = with_between_block(thread, {&layer.up, &layer.gate}, inputs, block);
    feed_block(layer, k, inputs, block, down);
  }
  mark(thread, Operator::Down);
  down = with_between_block(thread, {&layer.down}, down, block);
  const Work work = {&layer.down, k.down, x_.floats(), hidden_stride_, true};
  multiply_block(&work, 1, down, block);
}

// Through gate and up to the inputs of the last linear.
void Session::feed_block(const Layer& layer, const LayerKernels& k, const Inputs& inputs, const TokenBlock& block, Inputs& down) {
  constexpr size_t kRun = 8, width = kRun * kLanes;
  const size_t panels = layer.up.weight.panels(), tiles = (block.count + kLanes - 1) / kLanes;
  const bool gated = layer.gate.present();
  float gate[kLanes * width], up[kLanes * width];
  for (size_t panel = 0; panel < panels; panel += kRun) {
    const size_t n = std::min(kRun, panels - panel);
    for (size_t tile = 0; tile < tiles; ++tile) {
      const size_t count = std::min(kLanes, block.count - tile * kLanes);
      auto multiplied = [&](const Linear& linear, MatmulKernel kernel, float* y) {
        const PackedMatrix& weight = linear.weight;
        const uint8_t* next = panel + kRun < panels ? weight.panel(panel + kRun) : nullptr;
        multiply_panels(linear, kernel, panel, n, inputs, tile, count, {y, width, linear.bias_of(panel)},
                        ahead_of(weight.panel(panel), n * weight.panel_nbytes, next, tile, tiles));
      };
      multiplied(layer.up, k.up, up);
      if (gated) multiplied(layer.gate, k.gate, gate);
      for (size_t t = 0; t < count; ++t) {
        kernels_.rows.gate(layer.function, gated ? gate + t * width : nullptr, up + t * width, n * kLanes);
        convert(up + t * width, panel * kLanes, n * kLanes, down, tile * kLanes + t);
      }
    }
  }
}

}  // namespace edgewise
