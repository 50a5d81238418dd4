// Attention over the keys and values of a slot. Every function here runs on all threads at once.
#include "engine/attend.h"
#include "engine/phases.h"

namespace edgewise {

RelativeBias::RelativeBias(const float* values, size_t heads, size_t reach) : reach(reach), stride(2 * (reach + kLanes)) {
  const size_t known = 2 * reach + 1;
  for (size_t head = 0; head < heads; ++head, values += known) {
    table.insert(table.end(), kLanes, values[0]);
    table.insert(table.end(), values, values + known);
    table.insert(table.end(), kLanes - 1, values[known - 1]);
  }
}

// Query or key heads as attention compares them: each normed where the layer asks for it, then rotated by halves,
// (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin), x1 and x2 the halves of the rotary dimensions.
void Session::turn(const Layer& layer, const Norm& norm, float* heads, size_t count, size_t token, size_t kv_head) const {
  turn_to(layer, norm, heads, count, token, kv_head, static_cast<size_t>(positions_[token]));
}

// kv_head: theirs. position: the token's own, or one below the limit of the tables.
void Session::turn_to(const Layer& layer, const Norm& norm, float* heads, size_t count, size_t token, size_t kv_head, size_t position) const {
  if (norm.kind != Norm::Kind::None)
    for (size_t h = 0; h < count; ++h) {
      float* x = heads + h * layer.head_dim;
      kernels_.rows.rms_norm(x, norm.weight.data(), norm.eps, layer.head_dim, x);
    }
  if (layer.rope < 0) return;
  const size_t r = static_cast<size_t>(layer.rope);
  size_t half = model_->ropes[r].inverse_frequency.size();
  const bool late = position >= rope_limit_;
  const float* cosine = (late ? late_cosine_[r].data() + token * half : cosine_[r].data() + position * half);
  const float* sine = (late ? late_sine_[r].data() + token * half : sine_[r].data() + position * half);
  float kept[2][kMaxHeadDim / 2];
  if (!layer.turns.empty()) {
    half = layer.head_dim / 2;
    const uint16_t* from = layer.turns.data() + kv_head * half;
    for (size_t i = 0; i < half; ++i) kept[0][i] = cosine[from[i]], kept[1][i] = sine[from[i]];
    cosine = kept[0], sine = kept[1];
  }
  for (size_t h = 0; h < count; ++h) {
    float* x = heads + h * layer.head_dim;
    for (size_t i = 0; i < half; ++i) {
      const float a = x[i], b = x[half + i];
      x[i] = a * cosine[i] - b * sine[i];
      x[half + i] = b * cosine[i] + a * sine[i];
    }
  }
}

void Session::visible_range(const Layer& layer, size_t token, int32_t& begin, int32_t& end) const {
  const int32_t position = positions_[token];
  begin = 0;
  end = position + 1;
  if (layer.visible == Visible::Full)
    end = ends_[static_cast<size_t>(slots_[token])];
  else if (layer.visible == Visible::Sliding)
    begin = std::max<int32_t>(0, end - static_cast<int32_t>(layer.window));
}

// With more heads to a group than share a pass, the general way is taken for one token too.
bool Session::splits_chunks(const Layer& layer) const {
  return count_ == 1 && layer.heads <= kMaxQueries * layer.kv_heads && layer.integer_attention() == nullptr;
}

// The first chunk that the token of this pass sees, and the one after the last.
std::pair<size_t, size_t> Session::visible_chunks(const Layer& layer) const {
  int32_t begin, end;
  visible_range(layer, 0, begin, end);
  return {static_cast<size_t>(begin) / kChunk, (static_cast<size_t>(end) + kChunk - 1) / kChunk};
}

// One token: its visible chunks are split over the threads as well as its heads; merge_one puts them together.
void Session::attend_one(const Layer& layer, size_t index, size_t thread) {
  const KvLayout& layout = kv_layout_[index];
  const size_t group = layer.heads / layer.kv_heads, padded = layout.value_padded(), slot = static_cast<size_t>(slots_[0]);
  int32_t begin, end;
  visible_range(layer, 0, begin, end);
  const auto [first, last] = visible_chunks(layer);
  const size_t chunks = last - first, own_chunk = static_cast<size_t>(positions_[0]) / kChunk;
  int32_t begins[kMaxQueries], stops[kMaxQueries], positions[kMaxQueries];
  const float* biases[kMaxQueries];
  std::fill_n(begins, kMaxQueries, begin);
  std::fill_n(stops, kMaxQueries, end);
  std::fill_n(positions, kMaxQueries, positions_[0]);
  float* local = thread_attention_[thread].floats() + kAttentionScratch;
  ReadAhead& reads = reads_[thread].ahead;
  reads.seek(phase_of(index, kAttend));
  pool_.share(thread, layer.kv_heads * chunks);

  for (Pool::Share share; pool_.take_share(thread, 1, 1, share);) {
    const size_t chunk = first + share.from % chunks, kv_head = share.from / chunks, head = kv_head * group;
    uint8_t *head_keys = keys(index, slot, kv_head), *head_values = values(index, slot, kv_head);
    if (chunk == own_chunk) {  // the only item that reads the new position
      float key[kMaxHeadDim];
      std::memcpy(key, k_.floats() + kv_head * layer.head_dim, layer.head_dim * sizeof(float));
      turn(layer, layer.k_norm, key, 1, 0, kv_head);
      kernels_.attention.store_key(layout, key, static_cast<size_t>(positions_[0]), head_keys);
      kernels_.attention.store_value(layout, v_.floats() + kv_head * layer.value_dim, static_cast<size_t>(positions_[0]), head_values);
    }
    std::memcpy(local, q_.floats() + head * layer.head_dim, group * layer.head_dim * sizeof(float));
    turn(layer, layer.q_norm, local, group, 0, kv_head);
    AttentionTask task{&layout, head_keys, head_values, local, layer.head_dim, group, begins, stops, layer.scale};
    if (share.own) {
      const auto [key_nbytes, value_nbytes] = chunk_nbytes(index, chunk);
      task.key_ahead = reads.over(head_keys + chunk * kChunk / kLanes * layout.key_tile_nbytes(), key_nbytes);
      task.value_ahead = reads.over(head_values + chunk * kChunk * layout.value_nbytes(), value_nbytes);
    }
    if (layer.bias) {
      biases_of(layer.bias.get(), head, group, biases);
      task.bias = biases;
      task.position = positions;
      task.reach = static_cast<int32_t>(layer.bias->reach);
    }
    float* out = partial_.floats() + (chunk - first) * layer.heads * (padded + 2);
    kernels_.attention.chunk(task, chunk, out + head * padded, out + layer.heads * padded + head,
                             out + layer.heads * (padded + 1) + head, thread_attention_[thread].floats());
  }
  wait(thread);
}

// out: (heads * value_dim). Chunks are merged in order, as attend_many does.
void Session::merge_one(const Layer& layer, size_t index, size_t thread, float* out) const {
  const size_t padded = kv_layout_[index].value_padded();
  const auto [first, last] = visible_chunks(layer);
  float* sums = thread_attention_[thread].floats() + kAttentionScratch;
  float peaks[kMaxQueries], weights[kMaxQueries];
  const int32_t position = positions_[0];
  const size_t chunks = kept_[index].present ? parts_of(kept_[index], position, position).count() : last - first;
  for (size_t head = 0; head < layer.heads; head += kMaxQueries) {
    const size_t heads = std::min(kMaxQueries, layer.heads - head);
    for (size_t chunk = 0; chunk < chunks; ++chunk) {
      const float* part = partial_.floats() + chunk * layer.heads * (padded + 2);
      const float *values = part + head * padded, *part_peaks = part + layer.heads * padded + head;
      const float* part_weights = part_peaks + layer.heads;
      if (chunk == 0) {
        std::memcpy(sums, values, heads * padded * sizeof(float));
        std::copy_n(part_peaks, heads, peaks);
        std::copy_n(part_weights, heads, weights);
      } else {
        kernels_.attention.merge(heads, padded, sums, peaks, weights, values, part_peaks, part_weights);
      }
    }
    for (size_t i = 0; i < heads; ++i)
      kernels_.attention.finish(sums + i * padded, weights[i], layer.value_dim, out + (head + i) * layer.value_dim);
  }
}

void Session::store_position(const Layer& layer, size_t index, size_t token, size_t head) {
  const size_t slot = static_cast<size_t>(slots_[token]), position = static_cast<size_t>(positions_[token]);
  float* key = k_.floats() + token * kv_stride_ + head * layer.head_dim;
  turn(layer, layer.k_norm, key, 1, token, head);
  kernels_.attention.store_key(kv_layout_[index], key, position, keys(index, slot, head));
  kernels_.attention.store_value(kv_layout_[index], v_.floats() + token * kv_stride_ + head * layer.value_dim, position, values(index, slot, head));
}

// One thread: tokens from .. until - 1, head by head, so that keys and values of one stay in the cache while all queries
// meet them.
void Session::attend_block(const Layer& layer, size_t index, size_t thread, size_t from, size_t until) {
  const Attended to{kv_layout_[index], layer.heads, layer.kv_heads, layer.scale, layer.bias.get()};
  const QueryGroups g(layer.heads, layer.kv_heads);
  for (size_t head = 0; head < layer.kv_heads; ++head)
    for (size_t pass = 0; pass < g.passes; ++pass)
      attend_tokens(
          thread, to, from, until, head, pass,
          [&](size_t slot, size_t kv_head, const uint8_t*& head_values) {
            head_values = values(index, slot, kv_head);
            return keys(index, slot, kv_head);
          },
          [&](size_t token, int32_t& begin, int32_t& end) { visible_range(layer, token, begin, end); },
          [&](float* q, size_t heads, size_t token, size_t kv_head) { turn(layer, layer.q_norm, q, heads, token, kv_head); });
}

void Session::attend_many(const Layer& layer, size_t index, size_t thread) {
  const KvLayout& layout = kv_layout_[index];
  const size_t dim = layer.head_dim;
  auto store = [&](size_t t, size_t head) { store_position(layer, index, t, head); };
  const Attended to{layout, layer.heads, layer.kv_heads, layer.scale, layer.bias.get()};
  auto place = [&](size_t slot, size_t head, const uint8_t*& heads_values) {
    heads_values = values(index, slot, head);
    return keys(index, slot, head);
  };
  auto range = [&](size_t token, int32_t& begin, int32_t& end) { visible_range(layer, token, begin, end); };
  auto turned = [&](float* q, size_t heads, size_t token, size_t kv_head) { turn(layer, layer.q_norm, q, heads, token, kv_head); };

  // Where there are enough heads of sequences for all threads, one stores the keys and values of a head and attends to them
  // while they are in its cache.
  constexpr size_t kHeadsPerThread = 4;
  const size_t heads = sequences_.empty() ? 0 : (sequences_.size() - 1) * layer.kv_heads;
  if (heads >= kHeadsPerThread * config_.threads) {
    const QueryGroups g(layer.heads, layer.kv_heads);
    for (size_t item; (item = pool_.take(1)) < heads;) {
      const size_t sequence = item / layer.kv_heads, head = item % layer.kv_heads;
      const size_t first = sequences_[sequence], last = sequences_[sequence + 1];
      for (size_t t = first; t < last; ++t) {
        // Rows are too far apart for the processor to see where this leads: queries are wanted soon, too.
        constexpr size_t kRows = 8;
        for (size_t i = 0; i < dim; i += kLanes) {
          __builtin_prefetch(k_.floats() + (t + kRows) * kv_stride_ + head * dim + i);
          __builtin_prefetch(v_.floats() + (t + kRows) * kv_stride_ + head * layer.value_dim + i);
          __builtin_prefetch(q_.floats() + t * q_stride_ + head * g.group * dim + i);
        }
        store(t, head);
      }
      for (size_t pass = 0; pass < g.passes; ++pass)
        attend_tokens(thread, to, first, last, head, pass, place, range, turned);
    }
    pool_.barrier();
    return;
  }

  // Else all keys and values first: later tokens of a slot see earlier ones of the same pass. A thread takes as many tokens
  // as a key tile has positions; what it writes into a tile is the bytes of its own positions.
  for (size_t tile; (tile = pool_.take(1)) * kLanes < count_;)
    for (size_t head = 0; head < layer.kv_heads; ++head)
      for (size_t t = tile * kLanes; t < std::min(count_, (tile + 1) * kLanes); ++t) store(t, head);
  pool_.barrier();
  attend_rows(thread, to, place, range, turned);
}

}  // namespace edgewise
