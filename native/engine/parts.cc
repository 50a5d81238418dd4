// A layer part by part, with what lies between the parts in the hands of the caller.
#include <string>

#include "engine/phases.h"

namespace edgewise {

const Layer& Session::part_of(size_t layer, Site part) const {
  if (layer >= model_->layers.size()) throw std::invalid_argument("layer " + std::to_string(layer) + " of " + std::to_string(model_->layers.size()));
  if (part != Site::Attention && part != Site::Output && part != Site::FeedForward && part != Site::Down)
    throw std::invalid_argument("the parts of a layer are attention, output, feed_forward and down");
  if (count_ < 2) throw std::invalid_argument("a layer is run in parts for passes of at least two tokens");
  const bool there = part == Site::Attention || part == Site::Output ? model_->layers[layer].attends() : model_->layers[layer].feeds();
  if (!there) throw std::invalid_argument("layer " + std::to_string(layer) + " has no such part");
  if (model_->layers[layer].cross) throw std::invalid_argument("a layer with cross-attention is not run in parts");
  return model_->layers[layer];
}

void Session::run_part(size_t index, Site part) {
  part_of(index, part);
  const unsigned parts = 1u << static_cast<unsigned>(part);
  static_assert(1u << static_cast<unsigned>(Site::Attention) == kAttendPart && 1u << static_cast<unsigned>(Site::Output) == kOutputPart &&
                1u << static_cast<unsigned>(Site::FeedForward) == kFeedForwardPart && 1u << static_cast<unsigned>(Site::Down) == kDownPart);
  const Profile::Counting counting(profile_);
  pool_.run([=, this](size_t thread) {
    plan_reads(thread);
    run_layer(index, thread, index, index + 1, parts);
  });
}

size_t Session::input_cols(size_t index, Site part) const {
  const Layer& layer = part_of(index, part);
  return part == Site::Output ? layer.o.cols() : part == Site::Down ? layer.down.cols() : model_->hidden;
}

void Session::inputs(size_t index, Site part, float* out) {
  const Layer& layer = part_of(index, part);
  const size_t cols = input_cols(index, part);
  pool_.run([&, this](size_t) {
    for (size_t t; (t = pool_.take(1)) < count_;) {
      const float* x = x_.floats() + t * hidden_stride_;
      float* row = out + t * cols;
      if (part == Site::Output)
        std::memcpy(row, attention_.floats() + t * q_stride_, cols * sizeof(float));
      else if (part == Site::Down)
        std::memcpy(row, ffn_.floats() + t * ffn_stride_, cols * sizeof(float));
      else if (layer.post_norm)
        std::memcpy(row, x, cols * sizeof(float));
      else
        apply_norm(kernels_, part == Site::Attention ? layer.attention_norm : layer.feed_forward_norm, x, cols, row);
    }
    pool_.barrier();
  });
}

void Session::set_inputs(size_t index, Site part, const float* values) {
  part_of(index, part);
  if (part != Site::Output && part != Site::Down)
    throw std::invalid_argument("the inputs of output and down are set; those of the others come from the hidden states");
  const size_t cols = input_cols(index, part), stride = part == Site::Output ? q_stride_ : ffn_stride_;
  float* rows = part == Site::Output ? attention_.floats() : ffn_.floats();
  for (size_t t = 0; t < count_; ++t) std::memcpy(rows + t * stride, values + t * cols, cols * sizeof(float));
}

}  // namespace edgewise
