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

// Some queries of one slot that share passes over a key head, and what they have come to.
struct QueryGroup {
  size_t token = 0, queries = 0;  // the first token
  size_t first = 0, last = 0;     // chunks that any of them sees
  int32_t begins[kMaxQueries], stops[kMaxQueries], positions[kMaxQueries];
  const float* biases[kMaxQueries];
  float peak[kMaxQueries], weight[kMaxQueries];
};

// One thread: tokens from .. until - 1, with the heads of a pass over one key head. Several groups of a slot meet a chunk
// of positions while it is in the cache, each in its own order of chunks.
// place(slot, head, values): keys and values of a head; range(token, begin, end): what a token sees of them;
// turn(q, heads, token, kv_head): query heads as they are compared.
template <class Place, class Range, class Turn>
void Session::attend_tokens(size_t thread, const Attended& to, size_t from, size_t until, size_t kv_head, size_t pass, Place place,
                            Range range, Turn turn) {
  const QueryGroups g(to.heads, to.kv_heads);
  const size_t dim = to.layout.head_dim, values_dim = to.layout.value_dim, padded = to.layout.value_padded();
  const size_t head = kv_head * g.group + pass * g.heads_at_once, heads = std::min(g.heads_at_once, g.group - pass * g.heads_at_once);
  float* scratch = thread_attention_[thread].floats();
  float* parts = scratch + kAttentionScratch;             // (queries, padded) of the chunk at hand
  float* sums = parts + kMaxQueries * padded;             // (groups, queries, padded)
  float* q = sums + kGroupsAtOnce * kMaxQueries * padded; // (groups, queries, dim)
  const size_t sums_stride = kMaxQueries * padded, q_stride = kMaxQueries * dim;
  QueryGroup groups[kGroupsAtOnce];
  for (size_t t = from; t < until;) {
    const size_t slot = static_cast<size_t>(slots_[t]);
    size_t count = 0, first = SIZE_MAX, last = 0;
    for (; t < until && count < kGroupsAtOnce && static_cast<size_t>(slots_[t]) == slot; ++count) {
      QueryGroup& own = groups[count];
      own.token = t;
      own.queries = 0;
      int32_t lowest = INT32_MAX, highest = 0;
      for (; t < until && t < own.token + g.tokens_at_once && slots_[t] == slots_[own.token]; ++t) {
        float* turned = q + count * q_stride + own.queries * dim;
        std::memcpy(turned, q_.floats() + t * q_stride_ + head * dim, heads * dim * sizeof(float));
        turn(turned, heads, t, kv_head);
        biases_of(to.bias, head, heads, own.biases + own.queries);
        int32_t begin, end;
        range(t, begin, end);
        lowest = std::min(lowest, begin);
        highest = std::max(highest, end);
        for (size_t i = 0; i < heads; ++i, ++own.queries) {
          own.begins[own.queries] = begin;
          own.stops[own.queries] = end;
          own.positions[own.queries] = positions_[t];
        }
      }
      own.first = static_cast<size_t>(lowest) / kChunk;
      own.last = (static_cast<size_t>(highest) + kChunk - 1) / kChunk;
      first = std::min(first, own.first);
      last = std::max(last, own.last);
    }
    const uint8_t* values;
    const uint8_t* keys = place(slot, kv_head, values);
    for (size_t chunk = first; chunk < last; ++chunk)
      for (size_t i = 0; i < count; ++i) {
        QueryGroup& own = groups[i];
        if (chunk < own.first || chunk >= own.last) continue;
        AttentionTask task{&to.layout, keys, values, q + i * q_stride, dim, own.queries, own.begins, own.stops, to.scale};
        if (i > 0) task.key_ahead.after = task.value_ahead.after = 0;  // the first group has fetched the chunk
        if (to.bias != nullptr) {
          task.bias = own.biases;
          task.position = own.positions;
          task.reach = static_cast<int32_t>(to.bias->reach);
        }
        if (chunk == own.first) {
          kernels_.attention.chunk(task, chunk, sums + i * sums_stride, own.peak, own.weight, scratch);
          continue;
        }
        float peak[kMaxQueries], weight[kMaxQueries];
        kernels_.attention.chunk(task, chunk, parts, peak, weight, scratch);
        kernels_.attention.merge(own.queries, padded, sums + i * sums_stride, own.peak, own.weight, parts, peak, weight);
      }
    for (size_t i = 0; i < count; ++i)
      for (size_t k = 0; k < groups[i].queries; ++k)
        kernels_.attention.finish(sums + i * sums_stride + k * padded, groups[i].weight[k], values_dim,
                                  attention_.floats() + (groups[i].token + k / heads) * q_stride_ + (head + k % heads) * values_dim);
  }
}

// Runs on all threads at once: every token, head by head, so that keys and values of one stay in the cache while all
// queries meet them; as many groups at once as leave a few items for each thread.
template <class Place, class Range, class Turn>
void Session::attend_rows(size_t thread, const Attended& to, Place place, Range range, Turn turn) {
  constexpr size_t kItemsPerThread = 4;
  const QueryGroups g(to.heads, to.kv_heads);
  const size_t groups = (count_ + g.tokens_at_once - 1) / g.tokens_at_once * to.kv_heads * g.passes;
  const size_t together = std::clamp<size_t>(groups / (kItemsPerThread * config_.threads), 1, kGroupsAtOnce) * g.tokens_at_once;
  const size_t runs = (count_ + together - 1) / together;
  for (size_t item; (item = pool_.take(1)) < runs * to.kv_heads * g.passes;) {
    const size_t from = item % runs * together, kv_head = item / runs / g.passes;
    attend_tokens(thread, to, from, std::min(count_, from + together), kv_head, item / runs % g.passes, place, range, turn);
  }
  pool_.barrier();
}

}  // namespace edgewise
