// Layers whose activations lie on grids fixed beforehand: what their linears need, and their attention.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

#include "engine/phases.h"

namespace edgewise {

std::shared_ptr<const Integers> integers_of(const PackedMatrix& weight, const std::vector<float>& bias, const Grid& in,
                                            const std::optional<Grid>& out) {
  const PackedFormat& format = weight.format;
  const Kernels& kernels = edgewise::kernels(tier_in_use());
  if (kernels.integer.matmul(format) == nullptr || format.record_inputs < weight.cols)
    throw std::invalid_argument("static activations take weights of 2, 3, 4 or 8 bits with one scale to a row or to all rows, without minima");
  if (in.top > 255) throw std::invalid_argument("static inputs of a linear have at most 8 bits");
  auto made = std::make_shared<Integers>();
  const size_t rows = weight.panels() * kLanes;
  made->in = in;
  made->zero.resize(rows);
  made->correction.resize(rows);
  made->code_sum.resize(rows);
  made->scale.resize(rows);
  made->rest.resize(rows);
  made->remainder.resize(rows);
  for (size_t panel = 0; panel < weight.panels(); ++panel)
    kernels.integer.describe(weight, panel, made->code_sum.data() + panel * kLanes, made->scale.data() + panel * kLanes,
                             made->zero.data() + panel * kLanes);
  // Codes of inputs that do not exist are zero before they are centred.
  const int64_t cols = static_cast<int64_t>(weight.cols), padding = static_cast<int64_t>((weight.cols + kBlock - 1) / kBlock * kBlock) - cols;
  const int64_t centre = format.has_min && format.bits == 8 ? 128 : 0, widest = format.has_min ? 1 << format.bits : 1 << (format.bits - 1);
  double largest = 0;
  for (size_t r = 0; r < rows; ++r) {
    if (r >= weight.rows) {  // nothing lies there, and nothing reads what comes out
      made->zero[r] = made->correction[r] = 0;
      made->scale[r] = 0;
      continue;
    }
    made->scale[r] *= in.scale;
    const int64_t codes = made->code_sum[r] + padding * centre;
    double correction = -static_cast<double>(in.zero) * static_cast<double>(codes - cols * made->zero[r]);
    if (!bias.empty()) {
      const double unit = static_cast<double>(made->scale[r]), units = std::nearbyint(static_cast<double>(bias[r]) / unit);
      const double left = static_cast<double>(bias[r]) - units * unit;
      correction += units;
      made->remainder[r] = static_cast<float>(left);
      if (out) made->rest[r] = static_cast<int32_t>(std::nearbyint(left / out->scale));
    }
    const double furthest = static_cast<double>(cols * in.top * widest) + std::fabs(correction);
    if (!(furthest < 0x1p31))
      throw std::invalid_argument("row " + std::to_string(r) + ": sums of products, with the bias, leave 32 bits");
    made->correction[r] = static_cast<int32_t>(correction);
    if (out && !(furthest * std::fabs(static_cast<double>(made->scale[r])) / out->scale < 0x1p31))
      throw std::invalid_argument("row " + std::to_string(r) + ": the scale of the outputs, " + std::to_string(out->scale) +
                                  ", is too small for its sums");
    if (out) largest = std::max(largest, std::fabs(static_cast<double>(made->scale[r])) / out->scale);
  }
  IntegerRows& r = made->rows;
  if (out) {
    r.out = *out;
    r.shift = shift_of(largest);
    for (float scale : made->scale)
      made->multiplier.push_back(static_cast<int32_t>(std::nearbyint(std::ldexp(static_cast<double>(scale) / out->scale, r.shift))));
    r.multiplier = made->multiplier.data();
  }
  r.zero = made->zero.data();
  r.correction = made->correction.data();
  r.code_sum = made->code_sum.data();
  r.scale = made->scale.data();
  r.rest = made->rest.data();
  r.remainder = made->remainder.data();
  return made;
}

int shift_of(double factor) {
  if (!(factor > 0)) return 1;
  int exponent;
  std::frexp(factor, &exponent);  // factor = m 2^exponent, m in [1/2, 1)
  return std::clamp(30 - exponent, 1, 62);
}

void Session::gated(const Layer& layer, const float* gate, float* up, size_t n) const {
  const Rounding* rounding = layer.rounding.get();
  if (rounding == nullptr || (!rounding->sigmoid && !rounding->act)) return kernels_.rows.gate(layer.function, gate, up, n);
  kernels_.integer.gate(layer.function, rounding->sigmoid ? &*rounding->sigmoid : nullptr, rounding->act ? &*rounding->act : nullptr, gate,
                        up, n);
}

// Keys and values of all tokens first, then every token and head by itself: sums of integers need no order.
void Session::attend_in_integers(const Layer& layer, size_t index, size_t thread) {
  const IntegerAttention& a = *layer.integer_attention();
  const size_t dim = layer.head_dim, group = layer.heads / layer.kv_heads;
  auto place = [&](size_t token) { return std::pair(static_cast<size_t>(slots_[token]), static_cast<size_t>(positions_[token])); };
  for (size_t item; (item = pool_.take(1)) < layer.kv_heads * count_;) {
    const size_t token = item % count_, head = item / count_;
    const auto [slot, position] = place(token);
    float* key = k_.floats() + token * kv_stride_ + head * dim;
    turn(layer, layer.k_norm, key, 1, token, head);
    kernels_.integer.store_key(a, key, position, keys(index, slot, head));
    kernels_.integer.store_value(a, v_.floats() + token * kv_stride_ + head * dim, position, values(index, slot, head));
  }
  pool_.barrier();
  for (size_t item; (item = pool_.take(1)) < layer.heads * count_;) {
    const size_t token = item % count_, head = item / count_;
    const auto [slot, position] = place(token);
    float* q = q_.floats() + token * q_stride_ + head * dim;
    turn(layer, layer.q_norm, q, 1, token, head / group);
    int32_t begin, end;
    visible_range(layer, token, begin, end);
    kernels_.integer.attend(a, q, static_cast<size_t>(begin), static_cast<size_t>(end), keys(index, slot, head / group),
                            values(index, slot, head / group), attention_.floats() + token * q_stride_ + head * dim,
                            thread_scores_[thread].data());
  }
  pool_.barrier();
}

}  // namespace edgewise
