// Layers that do not keep all positions alike: the first few and the newest group apart, older ones in four bits, or only
// those of a window, in a ring.
//
// Which form of a key a query meets depends on its position and nothing else: a query at p sees the positions of its own
// group of 64 in eight bits, those of all groups before in four, and the first few in eight. In passes over many tokens
// several groups are complete at the end; each lies in eight bits until the pass has attended to it.
//
// Sinks (StreamingLLM, Xiao et al., arXiv:2309.17453, section 3.2): distances are those in the cache. Keys in the window
// are turned by their own position and so is the query, which leaves their distance; to the sinks the query is turned by
// its place in the cache, min(p, sinks + window - 1), as though what was given up had never been.
//
// Functions that take a thread run on all threads at once.
#include <numeric>

#include "engine/attend.h"
#include "engine/phases.h"

namespace edgewise {

namespace {
constexpr size_t aligned64(size_t n) { return (n + 63) / 64 * 64; }
constexpr size_t rounded(size_t n, size_t to) { return (n + to - 1) / to * to; }
// In four bits the first positions stay in eight: much attention rests on them, and they fill one tile.
constexpr size_t kFirst = kLanes;
}  // namespace

void Session::add_kept(const Layer& layer) {
  Kept kept;
  const bool ring = layer.visible == Visible::Sinks || (endless_ && layer.visible == Visible::Sliding);
  kept.grouped = config_.kv == KvType::Int4 && layer.visible != Visible::Full;
  kept.present = kept.grouped || ring;
  if (kept.present) {
    kept.keeps_sinks = layer.visible == Visible::Sinks;
    kept.sinks = kept.keeps_sinks ? layer.sinks : kept.grouped ? kFirst : 0;
    kept.window = layer.visible == Visible::Causal ? 0 : layer.window;
    kept.far = {config_.kv, layer.head_dim, layer.value_dim};
    kept.near = {kept.grouped ? KvType::Int8 : config_.kv, layer.head_dim, layer.value_dim};
    const size_t step = kept.grouped ? kKvGroup : kLanes, all = rounded(config_.context, step);
    kept.room = ring ? std::min(rounded(kept.window + config_.batch - 1, kChunk), all) : all;
    const size_t first = rounded(kept.sinks, kLanes), newest = kept.grouped ? kKvGroup : 0;
    size_t at = 0;
    auto place = [&](size_t nbytes) {
      const size_t begin = at;
      at += aligned64(nbytes);
      return begin;
    };
    place(first / kLanes * kept.near.key_tile_nbytes());
    kept.sink_values = place(first * kept.near.value_nbytes());
    kept.far_keys = place(kept.room / kLanes * kept.far.key_tile_nbytes());
    kept.far_values = place(kept.room * kept.far.value_nbytes());
    kept.newest_keys = place(newest / kLanes * kept.near.key_tile_nbytes());
    place(newest * kept.near.value_nbytes());
    kept.nbytes = at;
    if (kept.grouped) fresh_nbytes_ = std::max(fresh_nbytes_, layer.kv_heads * kept.newest_nbytes());
  }
  keeps_ |= kept.present;
  grouped_ |= kept.grouped;
  kept_.push_back(kept);
}

// The most parts that a query of the layer added last may meet.
size_t Session::kept_parts(const Layer&) const {
  const Kept& kept = kept_.back();
  const size_t span = kept.window == 0 ? kept.room : std::min(kept.window, kept.room);
  return 2 + (span + kChunk - 2) / kChunk + 1;
}

size_t Session::resumable(size_t slot, size_t length) const {
  length = std::min(length, lengths_.at(slot));
  if (!keeps_) return length;
  if (grouped_ && length / kKvGroup != static_cast<size_t>(newest_group_[slot])) length = length / kKvGroup * kKvGroup;
  for (const Kept& kept : kept_) {
    if (!kept.present || kept.window == 0 || reached_[slot] <= kept.room) continue;
    const size_t lowest = std::max(kept.sinks, static_cast<size_t>(kept.first_seen(static_cast<int32_t>(length))));
    if (lowest < length && lowest + kept.room < reached_[slot]) length = grouped_ ? 0 : std::min(length, kept.sinks);
  }
  return length;
}

// The tokens of a pass by slot and group.
void Session::order_fresh() {
  ordered_.resize(count_);
  fresh_of_.resize(count_);
  std::iota(ordered_.begin(), ordered_.end(), 0);
  std::stable_sort(ordered_.begin(), ordered_.end(), [&](int32_t a, int32_t b) { return slots_[a] < slots_[b]; });
  fresh_groups_.clear();
  size_t places = 0;
  for (size_t i = 0, next; i < count_; i = next) {
    const int32_t token = ordered_[i], slot = slots_[token], group = positions_[token] / static_cast<int32_t>(kKvGroup);
    for (next = i; next < count_; ++next) {
      const int32_t other = ordered_[next];
      if (slots_[other] != slot || positions_[other] / static_cast<int32_t>(kKvGroup) != group) break;
      fresh_of_[other] = static_cast<int32_t>(fresh_groups_.size());
    }
    const bool newest = next == count_ || slots_[ordered_[next]] != slot;
    const bool carries = !newest && positions_[token] % static_cast<int32_t>(kKvGroup) != 0;
    fresh_groups_.push_back({static_cast<size_t>(slot), group, i, next - i, newest, carries, newest ? 0 : places++});
    newest_group_[slot] = group;
    reached_[slot] = std::max(reached_[slot], lengths_[slot]);
  }
}

// Where the keys of a fresh group lie in eight bits, its values behind them.
uint8_t* Session::fresh_keys(size_t index, const Fresh& fresh, size_t head) const {
  const Kept& kept = kept_[index];
  if (fresh.newest) return keys(index, fresh.slot, head) + kept.newest_keys;
  return fresh_.data() + fresh.place * fresh_nbytes_ + head * kept.newest_nbytes();
}

// Key (turned already) and value of a token where a head keeps them: among the sinks, and with the rest. newest: keys of its
// group in eight bits; the last of a group packs it.
void Session::store_kept(const Layer& layer, size_t index, size_t token, size_t head, const float* key, uint8_t* newest, bool to_sinks,
                         bool to_rest) {
  const Kept& kept = kept_[index];
  const size_t position = static_cast<size_t>(positions_[token]);
  const float* value = v_.floats() + token * kv_stride_ + head * layer.value_dim;
  uint8_t* base = keys(index, static_cast<size_t>(slots_[token]), head);
  auto store = [&](const KvLayout& layout, uint8_t* to_keys, uint8_t* to_values, size_t place) {
    kernels_.attention.store_key(layout, key, place, to_keys);
    kernels_.attention.store_value(layout, value, place, to_values);
  };
  if (to_sinks && position < kept.sinks) store(kept.near, base, base + kept.sink_values, position);
  if (!to_rest) return;
  if (!kept.grouped) {
    if (position >= kept.sinks) store(kept.far, base + kept.far_keys, base + kept.far_values, position % kept.room);
    return;
  }
  uint8_t* newest_values = newest + kept.newest_keys_nbytes();
  store(kept.near, newest, newest_values, position % kKvGroup);
  if (position % kKvGroup != kKvGroup - 1) return;
  const size_t place = (position - (kKvGroup - 1)) % kept.room;
  kernels_.attention.pack_group(kept.near, newest, newest_values, base + kept.far_keys + place / kLanes * kept.far.key_tile_nbytes(),
                                base + kept.far_values + place * kept.far.value_nbytes());
}

void Session::store_fresh(const Layer& layer, size_t index, const Fresh& fresh, size_t head) {
  uint8_t* newest = kept_[index].grouped ? fresh_keys(index, fresh, head) : nullptr;
  for (size_t i = fresh.first; i < fresh.first + fresh.count; ++i) {
    const size_t token = static_cast<size_t>(ordered_[i]);
    float* key = k_.floats() + token * kv_stride_ + head * layer.head_dim;
    turn(layer, layer.k_norm, key, 1, token, head);
    store_kept(layer, index, token, head, key, newest, true, true);
  }
}

// What queries at positions lowest .. highest, of one group, meet.
Session::Parts Session::parts_of(const Kept& kept, int32_t lowest, int32_t highest) const {
  const int32_t sinks = static_cast<int32_t>(kept.sinks), chunk = static_cast<int32_t>(kChunk);
  const int32_t begin = std::max(sinks, kept.first_seen(lowest)), end = kept.far_end(highest);
  Parts parts{sinks > 0 && (kept.keeps_sinks || kept.first_seen(lowest) < sinks), kept.grouped, 0, 0};
  if (begin < end) parts.first_chunk = begin / chunk, parts.last_chunk = (end + chunk - 1) / chunk;
  return parts;
}

// head: where the head's keys and values begin; newest: those of the queries' own group; position: of one of them.
Session::Part Session::part_of(const Kept& kept, const Parts& parts, size_t number, const uint8_t* head, const uint8_t* newest,
                               int32_t position) const {
  if (parts.sinks && number == 0) return {Part::Sinks, &kept.near, head, head + kept.sink_values, 0};
  const size_t chunk = static_cast<size_t>(parts.first_chunk) + number - static_cast<size_t>(parts.sinks);
  if (chunk < static_cast<size_t>(parts.last_chunk)) {
    const size_t place = chunk * kChunk % rounded(kept.room, kChunk);
    return {Part::Far, &kept.far, head + kept.far_keys + place / kLanes * kept.far.key_tile_nbytes(),
            head + kept.far_values + place * kept.far.value_nbytes(), static_cast<int32_t>(chunk * kChunk)};
  }
  return {Part::Newest, &kept.near, newest, newest + kept.newest_keys_nbytes(), kept.far_end(position)};
}

// What the query at a position sees of a part, counted from the part's first position.
void Session::range_in(const Kept& kept, const Part& part, int32_t position, int32_t& begin, int32_t& end) const {
  const int32_t sinks = static_cast<int32_t>(kept.sinks), window = kept.first_seen(position);
  if (part.kind == Part::Sinks) {
    begin = kept.keeps_sinks ? 0 : window;
    end = std::min(sinks, position + 1);
  } else {
    begin = std::max(sinks, window);
    end = part.kind == Part::Far ? kept.far_end(position) : position + 1;
    begin = std::max(begin, part.first) - part.first;
    end = std::max(end, part.first) - part.first;
  }
  if (begin > end) begin = end;
}

// The position that a query is turned to where it meets a part.
size_t Session::turned_for(const Kept& kept, const Part& part, size_t position) const {
  return part.kind == Part::Sinks && kept.keeps_sinks ? std::min(position, kept.sinks + kept.window - 1) : position;
}

// One token: its parts are split over the threads as well as its heads; merge_one puts them together.
void Session::attend_kept_one(const Layer& layer, size_t index, size_t thread) {
  const Kept& kept = kept_[index];
  const size_t group = layer.heads / layer.kv_heads, padded = kept.far.value_padded(), slot = static_cast<size_t>(slots_[0]);
  const int32_t position = positions_[0];
  const Parts parts = parts_of(kept, position, position);
  const size_t count = parts.count();
  float* local = thread_attention_[thread].floats() + kAttentionScratch;
  pool_.share(thread, layer.kv_heads * count);
  for (Pool::Share share; pool_.take_share(thread, 1, 1, share);) {
    const size_t number = share.from % count, kv_head = share.from / count, head = kv_head * group;
    uint8_t* base = keys(index, slot, kv_head);
    const Part part = part_of(kept, parts, number, base, base + kept.newest_keys, position);
    const bool in_sinks = part.kind == Part::Sinks && position < static_cast<int32_t>(kept.sinks), last = number == count - 1;
    if (in_sinks || last) {  // the only items that read the new position
      float key[kMaxHeadDim];
      std::memcpy(key, k_.floats() + kv_head * layer.head_dim, layer.head_dim * sizeof(float));
      turn(layer, layer.k_norm, key, 1, 0, kv_head);
      store_kept(layer, index, 0, kv_head, key, base + kept.newest_keys, in_sinks, last);
    }
    std::memcpy(local, q_.floats() + head * layer.head_dim, group * layer.head_dim * sizeof(float));
    const size_t turned = turned_for(kept, part, static_cast<size_t>(position));
    turn_to(layer, layer.q_norm, local, group, 0, kv_head, turned);
    int32_t begins[kMaxQueries], stops[kMaxQueries], positions[kMaxQueries];
    const float* biases[kMaxQueries];
    range_in(kept, part, position, begins[0], stops[0]);
    std::fill_n(begins, kMaxQueries, begins[0]);
    std::fill_n(stops, kMaxQueries, stops[0]);
    std::fill_n(positions, kMaxQueries, static_cast<int32_t>(turned) - part.first);
    AttentionTask task{part.layout, part.keys, part.values, local, layer.head_dim, group, begins, stops, layer.scale};
    if (layer.bias) {
      biases_of(layer.bias.get(), head, group, biases);
      task.bias = biases;
      task.position = positions;
      task.reach = static_cast<int32_t>(layer.bias->reach);
    }
    float* out = partial_.floats() + number * layer.heads * (padded + 2);
    kernels_.attention.chunk(task, 0, out + head * padded, out + layer.heads * padded + head,
                             out + layer.heads * (padded + 1) + head, thread_attention_[thread].floats());
  }
  wait(thread);
}

// Tokens from .. until - 1, at most as many as go together, with the heads of a pass over one key head.
void Session::attend_kept_tokens(const Layer& layer, size_t index, size_t thread, size_t from, size_t until, size_t kv_head, size_t pass) {
  const Kept& kept = kept_[index];
  const QueryGroups g(layer.heads, layer.kv_heads);
  const size_t dim = layer.head_dim, value_dim = layer.value_dim, padded = kept.far.value_padded();
  const size_t head = kv_head * g.group + pass * g.heads_at_once, heads = std::min(g.heads_at_once, g.group - pass * g.heads_at_once);
  float* scratch = thread_attention_[thread].floats();
  float* sums = scratch + kAttentionScratch;           // (queries, padded)
  float* partial = sums + kMaxQueries * kMaxHeadDim;   // the part at hand
  float* turned = partial + kMaxQueries * kMaxHeadDim; // (queries, dim)
  for (size_t t = from; t < until;) {  // tokens of one slot and group share a pass
    size_t next = t + 1;
    while (next < until && fresh_of_[next] == fresh_of_[t] && slots_[next] == slots_[t]) ++next;
    const Fresh& fresh = fresh_groups_[static_cast<size_t>(fresh_of_[t])];
    const size_t queries = (next - t) * heads;
    const uint8_t* base = keys(index, fresh.slot, kv_head);
    const uint8_t* newest = kept.grouped ? fresh_keys(index, fresh, kv_head) : nullptr;
    const Parts parts = parts_of(kept, positions_[t], positions_[next - 1]);
    int32_t begins[kMaxQueries], stops[kMaxQueries], positions[kMaxQueries];
    const float* biases[kMaxQueries];
    float peak[kMaxQueries], weight[kMaxQueries], part_peak[kMaxQueries], part_weight[kMaxQueries];
    for (size_t number = 0; number < parts.count(); ++number) {
      const Part part = part_of(kept, parts, number, base, newest, positions_[t]);
      for (size_t i = 0; i < queries; i += heads) {
        const size_t token = t + i / heads, to = turned_for(kept, part, static_cast<size_t>(positions_[token]));
        if (number < 2) {  // turned once for the sinks and once for all others
          std::memcpy(turned + i * dim, q_.floats() + token * q_stride_ + head * dim, heads * dim * sizeof(float));
          turn_to(layer, layer.q_norm, turned + i * dim, heads, token, kv_head, to);
        }
        biases_of(layer.bias.get(), head, heads, biases + i);
        range_in(kept, part, positions_[token], begins[i], stops[i]);
        std::fill_n(begins + i, heads, begins[i]);
        std::fill_n(stops + i, heads, stops[i]);
        std::fill_n(positions + i, heads, static_cast<int32_t>(to) - part.first);
      }
      AttentionTask task{part.layout, part.keys, part.values, turned, dim, queries, begins, stops, layer.scale};
      if (queries > kMaxQueries / 2) task.key_ahead.after = task.value_ahead.after = 0;  // what is read waits for products
      if (layer.bias) {
        task.bias = biases;
        task.position = positions;
        task.reach = static_cast<int32_t>(layer.bias->reach);
      }
      if (number == 0) {
        kernels_.attention.chunk(task, 0, sums, peak, weight, scratch);
        continue;
      }
      kernels_.attention.chunk(task, 0, partial, part_peak, part_weight, scratch);
      kernels_.attention.merge(queries, padded, sums, peak, weight, partial, part_peak, part_weight);
    }
    for (size_t i = 0; i < queries; ++i)
      kernels_.attention.finish(sums + i * padded, weight[i], value_dim, attention_.floats() + (t + i / heads) * q_stride_ + (head + i % heads) * value_dim);
    t = next;
  }
}

void Session::attend_kept(const Layer& layer, size_t index, size_t thread) {
  const Kept& kept = kept_[index];
  // What a slot's newest group brings along from before moves away first, where the pass goes on to another group.
  if (kept.grouped && std::any_of(fresh_groups_.begin(), fresh_groups_.end(), [](const Fresh& fresh) { return fresh.carries; })) {
    for (size_t item; (item = pool_.take(1)) < fresh_groups_.size() * layer.kv_heads;) {
      const Fresh& fresh = fresh_groups_[item / layer.kv_heads];
      const size_t head = item % layer.kv_heads;
      if (fresh.carries) std::memcpy(fresh_keys(index, fresh, head), keys(index, fresh.slot, head) + kept.newest_keys, kept.newest_nbytes());
    }
    pool_.barrier();
  }
  // Keys and values of all tokens, later ones of a slot see earlier ones of the same pass; by groups, which are whole tiles:
  // two threads never write into one.
  for (size_t item; (item = pool_.take(1)) < fresh_groups_.size() * layer.kv_heads;)
    store_fresh(layer, index, fresh_groups_[item / layer.kv_heads], item % layer.kv_heads);
  pool_.barrier();
  const QueryGroups g(layer.heads, layer.kv_heads);
  const size_t token_groups = (count_ + g.tokens_at_once - 1) / g.tokens_at_once;
  for (size_t item; (item = pool_.take(1)) < token_groups * layer.kv_heads * g.passes;) {
    const size_t from = item % token_groups * g.tokens_at_once, kv_head = item / token_groups / g.passes;
    attend_kept_tokens(layer, index, thread, from, std::min(count_, from + g.tokens_at_once), kv_head, item / token_groups % g.passes);
  }
  pool_.barrier();
}

}  // namespace edgewise
