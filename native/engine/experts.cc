// A routed feed-forward. Every function here runs on all threads at once, but for those that say otherwise.
//
// One token: every thread chooses its experts by itself, and their panels are shared by the threads. Several tokens are
// grouped by expert, so that a weight is read once for all of them. Either way a token's experts add to its state in
// ascending order of their index, the shared expert last, in steps of the same functions: its bits are its own.
#include <cmath>

#include "engine/phases.h"

namespace edgewise {

namespace {

// y += weight * x. Not inlined: one copy for one token and for groups, so that both round alike.
[[gnu::noinline]] void add_scaled(const float* x, float weight, size_t n, float* y) {
  for (size_t i = 0; i < n; ++i) y[i] += weight * x[i];
}

// What the gates and ups of all experts want their inputs rounded to.
unsigned inputs_of(const Experts& experts) {
  unsigned wanted = 0;
  for (const FeedForward& e : experts.experts) wanted |= edgewise::inputs_of({&e.gate, &e.up});
  return wanted;
}

}  // namespace

// Not of a phase: when the session is made.
void Session::add_experts(const Experts& experts, LayerKernels& kernels) {
  kernels.router = kernel_for(experts.router);
  kernels.shared_gate = kernel_for(experts.shared_gate);
  for (const FeedForward& e : experts.experts) kernels.experts.push_back({kernel_for(e.gate), kernel_for(e.up), kernel_for(e.down)});
  const size_t scores = (experts.routed + kLanes - 1) / kLanes * kLanes + (experts.shared_gate.present() ? kLanes : 0);
  router_stride_ = std::max(router_stride_, scores);
  per_token_ = std::max(per_token_, experts.per_token());
  most_experts_ = std::max(most_experts_, experts.experts.size());
}

// One thread: the experts of a token in ascending order, the shared one last, and what each is multiplied by.
void Session::choose(const Experts& experts, size_t token, int32_t* chosen, float* weights) const {
  const float* scores = router_.floats() + token * router_stride_;
  thread_local std::vector<double> probability;
  probability.resize(experts.routed);
  double peak = scores[0], total = 0, chosen_total = 0;
  for (size_t e = 1; e < experts.routed; ++e) peak = std::max<double>(peak, scores[e]);
  for (size_t e = 0; e < experts.routed; ++e) total += probability[e] = std::exp(scores[e] - peak);
  for (size_t c = 0; c < experts.top_k; ++c) {
    int32_t best = -1;  // of equal ones the first; a score that is NaN is taken only when nothing else is left
    for (size_t e = 0; e < experts.routed; ++e) {
      if (std::find(chosen, chosen + c, static_cast<int32_t>(e)) != chosen + c) continue;
      if (best < 0 || probability[e] > probability[static_cast<size_t>(best)]) best = static_cast<int32_t>(e);
    }
    chosen[c] = best;
  }
  std::sort(chosen, chosen + experts.top_k);
  for (size_t c = 0; c < experts.top_k; ++c) chosen_total += probability[static_cast<size_t>(chosen[c])];
  for (size_t c = 0; c < experts.top_k; ++c)
    weights[c] = static_cast<float>(probability[static_cast<size_t>(chosen[c])] / (experts.normalise ? chosen_total : total));
  if (!experts.shared()) return;
  chosen[experts.top_k] = static_cast<int32_t>(experts.routed);
  weights[experts.top_k] = 1;
  if (experts.shared_gate.present()) {
    const double score = scores[(experts.routed + kLanes - 1) / kLanes * kLanes];
    weights[experts.top_k] = static_cast<float>(1 / (1 + std::exp(-score)));
  }
}

// One thread: the order of tokens by expert, tokens of one expert in their own order.
void Session::group(const Experts& experts) {
  const size_t per_token = experts.per_token();
  std::vector<size_t> counts(experts.experts.size() + 1, 0);
  for (size_t i = 0; i < count_ * per_token; ++i) ++counts[static_cast<size_t>(chosen_[i]) + 1];
  groups_.clear();
  group_tiles_ = 0;
  const size_t tile_nbytes = inputs_nbytes(kLanes, kLanes);
  for (size_t e = 0; e < experts.experts.size(); ++e) {
    const size_t n = counts[e + 1];
    counts[e + 1] += counts[e];
    if (n == 0) continue;
    const FeedForward& expert = experts.experts[e];
    uint8_t* buffer = expert_inputs_.data() + group_tiles_ * tile_nbytes;
    groups_.push_back({e, counts[e], n, group_tiles_,
                       place(n, expert.up.cols(), kLanes, edgewise::inputs_of({&expert.gate, &expert.up}), buffer),
                       place(n, expert.down.cols(), kLanes, edgewise::inputs_of({&expert.down}), buffer)});
    group_tiles_ += (n + kLanes - 1) / kLanes;
  }
  for (size_t i = 0; i < count_ * per_token; ++i) {
    const size_t at = counts[static_cast<size_t>(chosen_[i])]++;
    order_[at] = static_cast<int32_t>(i / per_token);
    order_weights_[at] = chosen_weights_[i];
  }
}

// One panel of act(gate) * up for the tokens of a tile, into rows of ffn_.
void Session::expert_panel(const FeedForward& expert, const ExpertKernels& k, const Inputs& inputs, size_t tile, size_t panel,
                           size_t count, float* y) const {
  float gate[kLanes * kLanes], up[kLanes * kLanes];
  const size_t row = panel * kLanes, rows = std::min(kLanes, expert.up.rows() - row);
  k.up(expert.up.weight, panel, 1, inputs.of(expert.up), tile, 0, count,
       {up, kLanes, expert.up.bias_of(panel)}, {});
  if (expert.gate.present())
    k.gate(expert.gate.weight, panel, 1, inputs.of(expert.gate), tile, 0, count,
           {gate, kLanes, expert.gate.bias_of(panel)}, {});
  kernels_.rows.gate(expert.function, expert.gate.present() ? gate : nullptr, up, count * kLanes);
  for (size_t t = 0; t < count; ++t) std::memcpy(y + t * ffn_stride_ + row, up + t * kLanes, rows * sizeof(float));
}

void Session::feed_one(const Experts& experts, const LayerKernels& k, const Inputs& inputs, size_t thread) {
  thread_local std::vector<int32_t> chosen;
  thread_local std::vector<float> weights;
  thread_local std::vector<Inputs> middle;
  const size_t n = experts.per_token();
  chosen.resize(n);
  weights.resize(n);
  middle.resize(n);
  choose(experts, 0, chosen.data(), weights.data());

  size_t total = 0;
  for (int32_t e : chosen) total += experts.experts[static_cast<size_t>(e)].up.weight.panels();
  const size_t step = panels_at_once(2 * total, config_.threads, 1);
  for (size_t from; (from = pool_.take(step)) < total;) {
    const size_t to = std::min(total, from + step);
    size_t base = 0;
    for (size_t c = 0; c < n; ++c) {
      const size_t e = static_cast<size_t>(chosen[c]), panels = experts.experts[e].up.weight.panels();
      for (size_t panel = std::max(from, base); panel < std::min(to, base + panels); ++panel)
        expert_panel(experts.experts[e], k.experts[e], inputs, 0, panel - base, 1, ffn_.floats() + c * ffn_stride_);
      base += panels;
    }
  }
  pool_.barrier();

  const size_t one = inputs_nbytes(1, 1);
  for (size_t c = 0; c < n; ++c) {
    const Linear& down = experts.experts[static_cast<size_t>(chosen[c])].down;
    middle[c] = place(1, down.cols(), 1, edgewise::inputs_of({&down}), thread_experts_[thread].data() + c * one);
    convert(ffn_.floats() + c * ffn_stride_, 0, down.cols(), middle[c], 0);
  }
  const size_t hidden = model_->hidden, panels = (hidden + kLanes - 1) / kLanes;
  const size_t down_step = panels_at_once(panels * n, config_.threads, 1);
  float out[kLanes];
  for (size_t from; (from = pool_.take(down_step)) < panels;)
    for (size_t panel = from; panel < std::min(panels, from + down_step); ++panel)
      for (size_t c = 0; c < n; ++c) {
        const size_t e = static_cast<size_t>(chosen[c]), row = panel * kLanes, rows = std::min(kLanes, hidden - row);
        const Linear& down = experts.experts[e].down;
        k.experts[e].down(down.weight, panel, 1, middle[c].of(down), 0, 0, 1,
                          {out, kLanes, down.bias_of(panel)}, {});
        add_scaled(out, weights[c], rows, x_.floats() + row);
      }
  pool_.barrier();
}

// Inputs of every group, tile by tile; row(entry) gives the input of that entry of the order.
template <class Row>
void Session::convert_groups(Inputs Group::*inputs, Row row) {
  for (size_t tile; (tile = pool_.take(1)) < group_tiles_;) {
    Group& g = *std::prev(std::upper_bound(groups_.begin(), groups_.end(), tile, [](size_t t, const Group& group) { return t < group.tile; }));
    Inputs& x = g.*inputs;
    for (size_t i = (tile - g.tile) * kLanes; i < std::min(g.count, (tile - g.tile + 1) * kLanes); ++i)
      convert(row(g.first + i), 0, x.int8.cols, x, i);
  }
  pool_.barrier();
}

void Session::feed_groups(const Experts& experts, const LayerKernels& k) {
  convert_groups(&Group::inputs, [&](size_t entry) { return branch_.floats() + static_cast<size_t>(order_[entry]) * hidden_stride_; });

  size_t total = 0;
  for (const Group& g : groups_) total += experts.experts[g.expert].up.weight.panels();
  const size_t step = panels_at_once(2 * total, config_.threads, count_);
  for (size_t from; (from = pool_.take(step)) < total;) {
    const size_t to = std::min(total, from + step);
    size_t base = 0;
    for (const Group& g : groups_) {
      const FeedForward& expert = experts.experts[g.expert];
      const size_t panels = expert.up.weight.panels();
      const size_t first = std::max(from, base), last = std::min(to, base + panels);
      for (size_t tile = 0; first < last && tile * kLanes < g.count; ++tile)
        for (size_t panel = first; panel < last; ++panel)
          expert_panel(expert, k.experts[g.expert], g.inputs, tile, panel - base, std::min(kLanes, g.count - tile * kLanes),
                       ffn_.floats() + (g.first + tile * kLanes) * ffn_stride_);
      base += panels;
    }
  }
  pool_.barrier();

  convert_groups(&Group::middle, [&](size_t entry) { return ffn_.floats() + entry * ffn_stride_; });

  // A thread takes all experts of a panel, so that nobody else adds to the same places.
  const size_t hidden = model_->hidden, panels = (hidden + kLanes - 1) / kLanes;
  const size_t down_step = panels_at_once(panels * groups_.size(), config_.threads, count_);
  float out[kLanes * kLanes];
  for (size_t from; (from = pool_.take(down_step)) < panels;)
    for (const Group& g : groups_) {
      const Linear& down = experts.experts[g.expert].down;
      const Activations& x = g.middle.of(down);
      for (size_t tile = 0; tile * kLanes < g.count; ++tile)
        for (size_t panel = from; panel < std::min(panels, from + down_step); ++panel) {
          const size_t count = std::min(kLanes, g.count - tile * kLanes), row = panel * kLanes, rows = std::min(kLanes, hidden - row);
          k.experts[g.expert].down(down.weight, panel, 1, x, tile, 0, count, {out, kLanes, down.bias_of(panel)}, {});
          for (size_t t = 0; t < count; ++t) {
            const size_t entry = g.first + tile * kLanes + t;
            add_scaled(out + t * kLanes, order_weights_[entry], rows,
                       x_.floats() + static_cast<size_t>(order_[entry]) * hidden_stride_ + row);
          }
        }
    }
  pool_.barrier();
}

void Session::feed_experts(const Layer& layer, const LayerKernels& k, size_t thread) {
  const Experts& experts = *layer.experts;
  const bool own = count_ == 1;
  if (thread == 0) profile_.unplanned = Operator::Experts;
  const Inputs inputs = prepare(thread, model_->hidden, count_,
                                edgewise::inputs_of({&experts.router, &experts.shared_gate}) | (own ? inputs_of(experts) : 0), Site::FeedForward,
                                [&](size_t token, float* buffer) -> const float* {
                                  float* row = own ? buffer : branch_.floats() + token * hidden_stride_;
                                  apply_norm(kernels_, layer.feed_forward_norm, x_.floats() + token * hidden_stride_, model_->hidden, row);
                                  return row;
                                });
  const size_t shared_score = (experts.routed + kLanes - 1) / kLanes * kLanes;
  const Work works[] = {{&experts.router, k.router, router_.floats(), router_stride_, false},
                        {&experts.shared_gate, k.shared_gate, router_.floats() + shared_score, router_stride_, false}};
  multiply(thread, kUnplanned, works, experts.shared_gate.present() ? 2 : 1, inputs, count_);
  if (own) return feed_one(experts, k, inputs, thread);

  const size_t per_token = experts.per_token();
  for (size_t t; (t = pool_.take(1)) < count_;) choose(experts, t, chosen_.data() + t * per_token, chosen_weights_.data() + t * per_token);
  pool_.barrier();
  if (thread == 0) group(experts);
  pool_.barrier();
  feed_groups(experts, k);
}

}  // namespace edgewise
