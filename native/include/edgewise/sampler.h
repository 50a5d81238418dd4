// From logits to a token.
#pragma once
#include <cstddef>
#include <cstdint>
#include <deque>
#include <utility>
#include <vector>

namespace edgewise {

struct SamplerConfig {
  float temperature = 0;  // 0: greedy
  int32_t top_k = 0;      // 0: off
  float top_p = 1;        // 1: off
  float min_p = 0;        // 0: off
  float repetition_penalty = 1;
  size_t penalty_window = 64;  // how many of the last tokens are penalised
  uint64_t seed = 0;
  size_t logprobs = 0;    // how many alternatives to report
};

struct Choice {
  int32_t token = 0;
  float logprob = 0;  // of the token under the model's own distribution, before any warping
  std::vector<std::pair<int32_t, float>> alternatives;
};

class Sampler {
 public:
  explicit Sampler(const SamplerConfig& config) : config_(config), state_(config.seed) {}

  // Filters apply in the order penalty, temperature, top-k, top-p, min-p. Ties go to the lower token number.
  Choice sample(const float* logits, size_t vocab);
  // Tells the sampler of a token of the prompt, so that the penalty sees it.
  void observe(int32_t token);

 private:
  double uniform();

  SamplerConfig config_;
  uint64_t state_;
  std::deque<int32_t> recent_;
  std::vector<float> adjusted_;
  std::vector<std::pair<float, int32_t>> candidates_;
};

// log(sum(exp(logits))), accumulated in double.
double log_sum_exp(const float* logits, size_t n);

}  // namespace edgewise
