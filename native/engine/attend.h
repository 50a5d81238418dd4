// What attention to a slot's own positions and to an encoder's states share.
#pragma once
#include <algorithm>
#include <cstring>

#include "edgewise/session.h"

namespace edgewise {

// Where the biases of a few heads begin, each at distance 0.
inline void biases_of(const RelativeBias* bias, size_t head, size_t heads, const float** found) {
  if (bias == nullptr) return;
  for (size_t h = 0; h < heads; ++h) found[h] = bias->of(head + h);
}

// How query heads and tokens go together: those that share a pass over keys and values.
struct QueryGroups {
  size_t group, heads_at_once, passes, tokens_at_once;
  QueryGroups(size_t heads, size_t kv_heads)
      : group(heads / kv_heads), heads_at_once(std::min(group, kMaxQueries)), passes((group + heads_at_once - 1) / heads_at_once),
        tokens_at_once(std::max<size_t>(1, kMaxQueries / heads_at_once)) {}
};

// One thread: tokens from .. until - 1, at most as many as go together, with the heads of a pass over one key head.
// place(slot, head, values): keys and values of a head; range(token, begin, end): what a token sees of them;
// turn(q, heads, token): query heads as they are compared.
template <class Place, class Range, class Turn>
void Session::attend_tokens(size_t thread, const Attended& to, size_t from, size_t until, size_t kv_head, size_t pass, Place place,
                            Range range, Turn turn) {
  const QueryGroups g(to.heads, to.kv_heads);
  const size_t dim = to.layout.head_dim, padded = to.layout.padded();
  const size_t head = kv_head * g.group + pass * g.heads_at_once, heads = std::min(g.heads_at_once, g.group - pass * g.heads_at_once);
  float* scratch = thread_attention_[thread].floats();
  float* sums = scratch + kAttentionScratch;           // (queries, padded)
  float* parts = sums + kMaxQueries * kMaxHeadDim;     // the chunk at hand
  float* rotated = parts + kMaxQueries * kMaxHeadDim;  // (queries, dim)
  for (size_t t = from; t < until;) {  // tokens of one slot share a pass
    size_t next = t + 1;
    while (next < until && slots_[next] == slots_[t]) ++next;
    const size_t slot = static_cast<size_t>(slots_[t]), queries = (next - t) * heads;
    int32_t begins[kMaxQueries], stops[kMaxQueries], positions[kMaxQueries];
    const float* biases[kMaxQueries];
    int32_t lowest = INT32_MAX, highest = 0;
    for (size_t i = 0; i < queries; ++i) {
      const size_t token = t + i / heads;
      range(token, begins[i], stops[i]);
      positions[i] = positions_[token];
      lowest = std::min(lowest, begins[i]);
      highest = std::max(highest, stops[i]);
    }
    float* q = rotated;
    for (size_t i = 0; i < queries; i += heads) {
      std::memcpy(q + i * dim, q_.floats() + (t + i / heads) * q_stride_ + head * dim, heads * dim * sizeof(float));
      turn(q + i * dim, heads, t + i / heads);
      biases_of(to.bias, head, heads, biases + i);
    }
    const uint8_t* values;
    const uint8_t* keys = place(slot, kv_head, values);
    AttentionTask task{&to.layout, keys, values, q, dim, queries, begins, stops, to.scale};
    if (queries > kMaxQueries / 2) task.key_ahead.after = task.value_ahead.after = 0;  // what is read waits for products
    if (to.bias != nullptr) {
      task.bias = biases;
      task.position = positions;
      task.reach = static_cast<int32_t>(to.bias->reach);
    }
    float peak[kMaxQueries], weight[kMaxQueries], part_peak[kMaxQueries], part_weight[kMaxQueries];
    const size_t first = static_cast<size_t>(lowest) / kChunk, last = (static_cast<size_t>(highest) + kChunk - 1) / kChunk;
    for (size_t chunk = first; chunk < last; ++chunk) {
      if (chunk == first) {
        kernels_.attention.chunk(task, chunk, sums, peak, weight, scratch);
        continue;
      }
      kernels_.attention.chunk(task, chunk, parts, part_peak, part_weight, scratch);
      kernels_.attention.merge(queries, padded, sums, peak, weight, parts, part_peak, part_weight);
    }
    for (size_t i = 0; i < queries; ++i)
      kernels_.attention.finish(sums + i * padded, weight[i], dim,
                                attention_.floats() + (t + i / heads) * q_stride_ + (head + i % heads) * dim);
    t = next;
  }
}

// Runs on all threads at once: every token, head by head, so that keys and values of one stay in the cache while all
// queries meet them.
template <class Place, class Range, class Turn>
void Session::attend_rows(size_t thread, const Attended& to, Place place, Range range, Turn turn) {
  const QueryGroups g(to.heads, to.kv_heads);
  const size_t token_groups = (count_ + g.tokens_at_once - 1) / g.tokens_at_once;
  for (size_t item; (item = pool_.take(1)) < token_groups * to.kv_heads * g.passes;) {
    const size_t from = item % token_groups * g.tokens_at_once, kv_head = item / token_groups / g.passes;
    attend_tokens(thread, to, from, std::min(count_, from + g.tokens_at_once), kv_head, item / token_groups % g.passes, place, range, turn);
  }
  pool_.barrier();
}

}  // namespace edgewise
