// Keys and values of every format, and attention to them.
#include "tests/check.h"

namespace edgewise {

void check_attention(Tier tier, const AttentionKernels& found, const AttentionKernels& reference) {
  struct { const char* name; KvType type; } const types[] = {{"attention on float32", KvType::Float32},
      {"attention on float16", KvType::Float16}, {"attention on bfloat16", KvType::BFloat16},
      {"attention on int8", KvType::Int8}, {"attention on int4", KvType::Int4}};
  for (const auto& [name, type] : types) {
    Case test(tier, name);
    Random random{9};
    struct { size_t dim, value_dim; } const sizes[] = {{16, 16}, {33, 33}, {64, 64}, {80, 80}, {48, 64}, {64, 24}, {20, 72}};
    for (const auto& [dim, value_dim] : sizes) {
      KvLayout layout;
      layout.type = type;
      layout.head_dim = dim, layout.value_dim = value_dim;
      const bool grouped = type == KvType::Int4;
      const size_t positions = grouped ? 5 * kKvGroup : 300, padded = layout.padded(), value_padded = layout.value_padded();
      KvLayout stored = layout;  // groups are packed from eight bits
      if (grouped) stored.type = KvType::Int8;
      Buffer keys((positions + kLanes - 1) / kLanes * stored.key_tile_nbytes()), key_copy(keys.size);
      Buffer values(positions * stored.value_nbytes()), value_copy(values.size);
      for (size_t p = 0; p < positions; ++p) {
        std::vector<float> row = filled<float>(std::max(dim, value_dim), [&] { return random.value(); });
        if (p == 9) row.assign(row.size(), 0.0f);
        if (p / kKvGroup == 2) row[1] = 3.0f;  // one value in a whole group of keys
        reference.store_key(stored, row.data(), p, keys.data);
        found.store_key(stored, row.data(), p, key_copy.data);
        reference.store_value(stored, row.data(), p, values.data);
        found.store_value(stored, row.data(), p, value_copy.data);
      }
      test.buffers(key_copy, keys, "keys");
      test.buffers(value_copy, values, "values");
      if (grouped) {
        Buffer packed_keys(positions / kLanes * layout.key_tile_nbytes()), packed_key_copy(packed_keys.size);
        Buffer packed_values(positions * layout.value_nbytes()), packed_value_copy(packed_values.size);
        for (size_t p = 0; p < positions; p += kKvGroup) {
          const size_t at = p / kLanes * stored.key_tile_nbytes(), to = p / kLanes * layout.key_tile_nbytes();
          auto pack = [&](const AttentionKernels& kernels, Buffer& k, Buffer& v) {
            kernels.pack_group(stored, keys.data + at, values.data + p * stored.value_nbytes(), k.data + to, v.data + p * layout.value_nbytes());
          };
          pack(reference, packed_keys, packed_values);
          pack(found, packed_key_copy, packed_value_copy);
        }
        test.buffers(packed_key_copy, packed_keys, "packed keys");
        test.buffers(packed_value_copy, packed_values, "packed values");
        std::swap(keys, packed_keys);
        std::swap(values, packed_values);
      }

      for (size_t queries = 1; queries <= kMaxQueries; queries += dim == 64 ? 1 : 4) {
        const std::vector<float> q = filled<float>(queries * padded, [&] { return random.value(); });
        std::vector<int32_t> begin(queries), end(queries);
        for (size_t i = 0; i < queries; ++i) {
          end[i] = 1 + random.below(static_cast<int>(positions));
          begin[i] = random.below(3) == 0 ? random.below(end[i] + 5) : 0;
          if (queries % 4 == 1) begin[i] = 0, end[i] = i == 2 ? 255 : static_cast<int32_t>(positions);  // most see all
        }
        AttentionTask task{&layout, keys.data, values.data, q.data(), padded, queries, begin.data(), end.data(),
                           1.0f / std::sqrt(static_cast<float>(dim))};
        // Every other time a bias by distance: tables of all queries side by side, from -reach - 16 to reach + 15.
        const int reach = 1 + random.below(80);
        const std::vector<float> table = filled<float>(queries * 2 * (static_cast<size_t>(reach) + kLanes), [&] { return random.value(); });
        std::vector<const float*> bias(queries);
        std::vector<int32_t> position(queries);
        for (size_t i = 0; i < queries; ++i) {
          bias[i] = table.data() + (2 * i + 1) * (static_cast<size_t>(reach) + kLanes);
          position[i] = random.below(static_cast<int>(positions));
        }
        if (random.below(2)) task.bias = bias.data(), task.position = position.data(), task.reach = reach;
        struct State {
          Buffer out, peak, weight, scratch;
          State(size_t n, size_t padded) : out(4 * n * padded, 0), peak(4 * n, 0), weight(4 * n, 0), scratch(4 * kAttentionScratch, 0) {}
        };
        State first(queries, value_padded), second(queries, value_padded), plain_first(queries, value_padded), plain_second(queries, value_padded);
        auto run = [&](const AttentionKernels& kernels, State& a, State& b) {
          kernels.chunk(task, 0, a.out.floats(), a.peak.floats(), a.weight.floats(), a.scratch.floats());
          kernels.chunk(task, 1, b.out.floats(), b.peak.floats(), b.weight.floats(), b.scratch.floats());
          kernels.merge(queries, value_padded, a.out.floats(), a.peak.floats(), a.weight.floats(), b.out.floats(), b.peak.floats(), b.weight.floats());
          for (size_t i = 0; i < queries; ++i)
            kernels.finish(a.out.floats() + i * value_padded, a.weight.floats()[i], value_dim, b.out.floats() + i * value_padded);
        };
        run(found, first, second);
        run(reference, plain_first, plain_second);
        test.floats(first.out.floats(), plain_first.out.floats(), queries * value_padded, "merged sums");
        test.floats(first.peak.floats(), plain_first.peak.floats(), queries, "peaks");
        test.floats(first.weight.floats(), plain_first.weight.floats(), queries, "weights");
        test.floats(second.out.floats(), plain_second.out.floats(), queries * value_padded, "outputs");
      }
    }
  }
}

}  // namespace edgewise
