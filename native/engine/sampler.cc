#include "edgewise/sampler.h"

#include <algorithm>
#include <cmath>

#include "edgewise/kernels.h"

namespace edgewise {

double log_sum_exp(const float* logits, size_t n) {
  const float peak = *std::max_element(logits, logits + n);
  double sum = 0;
  for (size_t i = 0; i < n; ++i) sum += std::exp(logits[i] - peak);
  return std::log(sum) + peak;
}

// SplitMix64: one 64-bit state, the same sequence on every platform.
double Sampler::uniform() {
  uint64_t z = (state_ += 0x9E3779B97F4A7C15ull);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return static_cast<double>((z ^ (z >> 31)) >> 11) * 0x1p-53;
}

void Sampler::observe(int32_t token) {
  recent_.push_back(token);
  while (recent_.size() > config_.penalty_window) recent_.pop_front();
}

Choice Sampler::sample(const float* logits, size_t vocab) {
  const RowKernels& rows = kernels(tier_in_use()).rows;
  const float* scores = logits;
  if (config_.repetition_penalty != 1.0f && !recent_.empty()) {
    adjusted_.assign(logits, logits + vocab);
    std::vector<int32_t> seen(recent_.begin(), recent_.end());
    std::sort(seen.begin(), seen.end());
    seen.erase(std::unique(seen.begin(), seen.end()), seen.end());
    for (int32_t token : seen) {
      float& score = adjusted_[static_cast<size_t>(token)];
      score = score > 0 ? score / config_.repetition_penalty : score * config_.repetition_penalty;
    }
    scores = adjusted_.data();
  }

  Choice choice;
  if (config_.temperature <= 0) {
    choice.token = static_cast<int32_t>(rows.highest(scores, vocab));
  } else {
    auto better = [](const auto& a, const auto& b) { return a.first != b.first ? a.first > b.first : a.second < b.second; };
    // Relative to the best one, so that a temperature near zero cannot overflow: the best is 0, and others are below.
    const float peak = scores[rows.highest(scores, vocab)];
    candidates_.resize(vocab);
    for (size_t i = 0; i < vocab; ++i)
      candidates_[i] = {scores[i] == peak ? 0.0f : (scores[i] - peak) / config_.temperature, static_cast<int32_t>(i)};
    if (config_.top_k > 0 && static_cast<size_t>(config_.top_k) < vocab) {
      const auto cut = candidates_.begin() + config_.top_k;
      std::nth_element(candidates_.begin(), cut, candidates_.end(), better);
      candidates_.resize(static_cast<size_t>(config_.top_k));
    }
    double total = 0;
    for (const auto& c : candidates_) total += std::exp(static_cast<double>(c.first));
    if (config_.top_p < 1) {
      std::sort(candidates_.begin(), candidates_.end(), better);
      double kept = 0;
      size_t n = 0;
      while (n < candidates_.size() && kept < config_.top_p * total) {
        kept += std::exp(static_cast<double>(candidates_[n].first));
        ++n;
      }
      candidates_.resize(std::max<size_t>(n, 1));
      total = n == 0 ? 1.0 : kept;
    }
    if (config_.min_p > 0) {  // p >= min_p * p_max, as a bound on the scaled logit; the best one always stays
      const float bound = std::log(config_.min_p);
      std::erase_if(candidates_, [&](const auto& c) { return c.first < bound; });
      total = 0;
      for (const auto& c : candidates_) total += std::exp(static_cast<double>(c.first));
    }
    double rest = uniform() * total;
    choice.token = candidates_.back().second;
    for (const auto& c : candidates_) {
      rest -= std::exp(static_cast<double>(c.first));
      if (rest < 0) {
        choice.token = c.second;
        break;
      }
    }
  }

  // A step of decoding waits for this, so single precision has to do: about 1e-6 of a nat.
  const bool greedy = scores == logits && config_.temperature <= 0;
  const float peak = logits[greedy ? static_cast<size_t>(choice.token) : rows.highest(logits, vocab)];
  const double norm = peak + std::log(rows.sum_of_exponentials(logits, peak, vocab));
  choice.logprob = static_cast<float>(logits[choice.token] - norm);
  if (config_.logprobs > 0) {
    const size_t n = std::min(config_.logprobs, vocab);
    std::vector<int32_t> order(vocab);
    for (size_t i = 0; i < vocab; ++i) order[i] = static_cast<int32_t>(i);
    std::partial_sort(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(n), order.end(), [&](int32_t a, int32_t b) {
      return logits[a] != logits[b] ? logits[a] > logits[b] : a < b;
    });
    for (size_t i = 0; i < n; ++i)
      choice.alternatives.emplace_back(order[i], static_cast<float>(logits[order[i]] - norm));
  }
  observe(choice.token);
  return choice;
}

}  // namespace edgewise
