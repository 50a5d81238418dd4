// Model and Session for engine/load.py and engine/model.py.
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <stdexcept>

#include "bindings/bindings.h"
#include "bindings/packed.h"
#include "edgewise/session.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace edgewise {

namespace {

using Floats = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;
using Tokens = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

std::vector<float> copy(const std::optional<Floats>& values) {
  if (!values) return {};
  return {values->data(), values->data() + values->size()};
}

Linear make_linear(const PackedMatrix& weight, const std::optional<Floats>& bias, bool int8) {
  Linear linear{weight, copy(bias), int8};
  if (!linear.bias.empty() && linear.bias.size() != weight.rows)
    throw std::invalid_argument("a bias has " + std::to_string(linear.bias.size()) + " values; its weight has " +
                                std::to_string(weight.rows) + " rows");
  if (!linear.bias.empty()) linear.bias.resize(weight.panels() * kLanes);
  return linear;
}

Norm make_norm(const std::string& kind, const std::optional<Floats>& weight, const std::optional<Floats>& bias, float eps) {
  if (kind != "rms" && kind != "layer") throw std::invalid_argument("unknown norm " + kind);
  return {kind == "rms" ? Norm::Kind::Rms : Norm::Kind::Layer, copy(weight), copy(bias), eps};
}

IntegerAttention integer_attention_of(const Layer& layer, const Grid& query, const Grid& key, const Grid& value, const Grid& score,
                                      const Grid& probability, const Grid& out) {
  for (const Grid& grid : {query, key, value})
    if (grid.top > 255) throw std::invalid_argument("query, key and value of attention in integers have at most 8 bits");
  if (!layer.attends() || layer.value_dim != layer.head_dim) throw std::invalid_argument("attention in integers takes keys and values of one width");
  if (layer.bias || layer.cross) throw std::invalid_argument("attention in integers takes no bias by distance and no second source");
  IntegerAttention a{layer.head_dim, query, key, value, score, probability, out};
  // Sums are below head_dim 255^2 and, probabilities adding up to one and a rounding each, 2^16 times 2 times 255.
  const double to_score = static_cast<double>(query.scale) * key.scale * layer.scale / score.scale;
  const double to_out = static_cast<double>(probability.scale) * value.scale / out.scale;
  if (!(to_score * 65025.0 * static_cast<double>(layer.head_dim) < 0x1p31) || !(to_out * 0x1p25 < 0x1p31))
    throw std::invalid_argument("the scale of scores or of what attention gives is too small for its sums");
  a.score_shift = shift_of(to_score);
  a.score_multiplier = static_cast<int32_t>(std::nearbyint(std::ldexp(to_score, a.score_shift)));
  a.out_shift = shift_of(to_out);
  a.out_multiplier = static_cast<int32_t>(std::nearbyint(std::ldexp(to_out, a.out_shift)));
  return a;
}

void check_layer(const Model& m, const Layer& l, size_t index) {
  auto fail = [&](const std::string& what) { throw std::invalid_argument("layer " + std::to_string(index) + ": " + what); };
  if ((!l.attends() || !l.feeds()) && (l.post_norm || l.cross || l.bias)) fail("a layer without one of its parts is normed before, and has no bias and no second source");
  auto shape = [&](const Linear& w, const char* name, size_t rows, size_t cols) {
    if (w.rows() != rows || w.cols() != cols)
      fail(std::string(name) + " is (" + std::to_string(w.rows()) + ", " + std::to_string(w.cols()) + "); expected (" +
           std::to_string(rows) + ", " + std::to_string(cols) + ")");
  };
  if (l.attends()) {
    if (l.heads == 0 || l.kv_heads == 0 || l.heads % l.kv_heads != 0) fail("heads is not a multiple of kv_heads");
    for (const size_t dim : {l.head_dim, l.value_dim})
      if (dim == 0 || dim > kMaxHeadDim) fail("a head has " + std::to_string(dim) + " dimensions; at most " + std::to_string(kMaxHeadDim));
    shape(l.q, "q", l.heads * l.head_dim, m.hidden);
    shape(l.k, "k", l.kv_heads * l.head_dim, m.hidden);
    shape(l.v, "v", l.kv_heads * l.value_dim, m.hidden);
    shape(l.o, "o", m.hidden, l.heads * l.value_dim);
  } else if (l.heads != 0 || l.kv_heads != 0 || l.k.present() || l.v.present() || l.o.present()) {
    fail("heads without queries");
  }
  auto gated = [&](const Linear& gate, const Linear& up, const Linear& down) {
    shape(up, "up", up.rows(), m.hidden);
    if (gate.present()) shape(gate, "gate", up.rows(), m.hidden);
    shape(down, "down", m.hidden, up.rows());
  };
  size_t linears = 0, columns = 0;
  for (const Linear* linear : {&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down}) {
    linears += linear->present();
    columns += linear->present() && linear->weight.format.columns;
    if (linear->weight.format.columns != (linear->chosen != nullptr)) fail("weights in columns, and no others, have thresholds for their inputs");
  }
  if (columns != 0 && (columns != linears || l.experts || l.cross || l.post_norm || l.bias || l.visible == Visible::Full))
    fail("weights lie in columns in all linears of a layer or in none, of a decoder without experts that norms before each part");
  if (columns != 0 && l.gate.present() && l.gate.weight.slabs() != l.up.weight.slabs()) fail("gate and up have codes of one width in columns");
  if (l.experts) {
    const Experts& e = *l.experts;
    if (e.routed == 0 || e.top_k == 0 || e.top_k > e.routed || e.experts.size() < e.routed || e.experts.size() > e.routed + 1)
      fail("a token goes through " + std::to_string(e.top_k) + " of " + std::to_string(e.routed) + " experts, but there are " +
           std::to_string(e.experts.size()));
    shape(e.router, "router", e.routed, m.hidden);
    if (e.shared_gate.present()) shape(e.shared_gate, "shared gate", 1, m.hidden);
    for (const FeedForward& expert : e.experts) gated(expert.gate, expert.up, expert.down);
    if (l.post_norm || l.after_feed_forward.kind != Norm::Kind::None) fail("what experts give is added as it is");
  } else if (l.feeds()) {
    gated(l.gate, l.up, l.down);
  } else if (l.gate.present() || l.down.present()) {
    fail("a feed-forward without its up");
  }
  if (l.bias && l.bias->heads() != l.heads)
    fail("a bias of " + std::to_string(l.bias->heads()) + " heads; attention has " + std::to_string(l.heads));
  if (l.cross) {
    const Cross& c = *l.cross;
    if (c.heads == 0 || c.kv_heads == 0 || c.heads % c.kv_heads != 0) fail("cross-attention: heads is not a multiple of kv_heads");
    if (c.head_dim == 0 || c.head_dim > kMaxHeadDim)
      fail("cross-attention: head_dim is " + std::to_string(c.head_dim) + "; at most " + std::to_string(kMaxHeadDim));
    if (l.post_norm) fail("cross-attention follows attention that is normed before");
    shape(c.q, "cross q", c.heads * c.head_dim, m.hidden);
    shape(c.k, "cross k", c.kv_heads * c.head_dim, c.k.cols());
    shape(c.v, "cross v", c.kv_heads * c.head_dim, c.k.cols());
    shape(c.o, "cross o", m.hidden, c.heads * c.head_dim);
    if (c.norm.weight.size() != m.hidden) fail("the norm before cross-attention does not fit hidden");
  }
  if ((l.visible == Visible::Sliding || l.visible == Visible::Sinks) && l.window == 0) fail("a window has at least one position");
  if (l.rope >= 0) {
    if (static_cast<size_t>(l.rope) >= m.ropes.size()) fail("rope index out of range");
    const size_t known = m.ropes[static_cast<size_t>(l.rope)].inverse_frequency.size();
    if (l.attends() && l.turns.empty() && 2 * known > l.head_dim) fail("rotary dimensions exceed head_dim");
    if (!l.turns.empty() && (l.head_dim % 2 != 0 || l.turns.size() != l.kv_heads * (l.head_dim / 2)))
      fail("a frequency is chosen for each pair of every key head");
    for (const uint16_t turn : l.turns)
      if (turn >= known) fail("a pair is turned by frequency " + std::to_string(turn) + " of " + std::to_string(known));
  } else if (!l.turns.empty()) {
    fail("frequencies are chosen of no rotary embedding");
  }
  auto size = [&](const Norm& norm, size_t expected, const char* of) {
    if (norm.weight.size() != expected)
      fail("a norm has " + std::to_string(norm.weight.size()) + " weights; " + of + " is " + std::to_string(expected));
  };
  if (l.attends()) size(l.attention_norm, m.hidden, "hidden");
  if (l.feeds()) size(l.feed_forward_norm, m.hidden, "hidden");
  for (const Norm* norm : {&l.after_attention, &l.after_feed_forward})
    if (norm->kind != Norm::Kind::None) size(*norm, m.hidden, "hidden");
  for (const Norm* norm : {&l.q_norm, &l.k_norm}) {
    if (norm->kind != Norm::Kind::None) size(*norm, l.head_dim, "head_dim");
    if (norm->kind == Norm::Kind::Layer) fail("a norm of heads is an RMSNorm");
  }
  if (l.post_norm && (l.after_attention.kind != Norm::Kind::None || l.after_feed_forward.kind != Norm::Kind::None))
    fail("a part that is normed before it is added is not normed after");
}

template <class T>
T pick(const std::string& what, const std::string& name, std::initializer_list<std::pair<const char*, T>> choices) {
  for (const auto& [key, value] : choices)
    if (name == key) return value;
  throw std::invalid_argument("unknown " + what + " " + name);
}

Gate function_named(const std::string& name) {
  return pick<Gate>("function", name, {{"silu", Gate::Silu}, {"gelu", Gate::Gelu}, {"gelu_tanh", Gate::GeluTanh}, {"relu", Gate::Relu}});
}

Site site_of(const std::string& name) {
  return pick<Site>("site", name, {{"attention", Site::Attention}, {"output", Site::Output}, {"feed_forward", Site::FeedForward}, {"down", Site::Down},
                                   {"source", Site::Source}, {"cross", Site::Cross}, {"cross_output", Site::CrossOutput}});
}

nb::object new_array(std::vector<size_t> shape, float** data) {
  size_t size = 1;
  for (size_t n : shape) size *= n;
  auto* values = new float[size];
  nb::capsule owner(values, [](void* p) noexcept { delete[] static_cast<float*>(p); });
  *data = values;
  return nb::cast(nb::ndarray<nb::numpy, float>(values, shape.size(), shape.data(), owner));
}

}  // namespace

void bind_engine(nb::module_& m) {
  nb::exception<ContextOverflow>(m, "ContextOverflow");

  nb::class_<Linear> factors(m, "Linear");
  factors.def("__init__", [](Linear* self, const PackedMatrix& weight, std::optional<Floats> bias, bool int8) {
    new (self) Linear(make_linear(weight, bias, int8));
  }, "weight"_a, "bias"_a = nb::none(), "int8"_a = true)
      .def("on_grid", [](Linear& linear, const Grid& in, std::optional<Grid> out) {
             linear.integers = integers_of(linear.weight, linear.bias, in, out);
             linear.weight.integers = &linear.integers->rows;
             linear.bias.clear();
           }, "input"_a, "output"_a.none(), "Inputs are rounded to a grid, and outputs where they have one; products are integers")
      .def("choose", [](Linear& linear, nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu> thresholds, const Linear* in, const Linear* out) {
             const PackedMatrix& w = linear.weight;
             if (!w.format.columns || !linear.int8 || linear.integers)
               throw std::invalid_argument("inputs are chosen of a weight in columns, multiplied with inputs in int8");
             if (thresholds.size() != w.cols) throw std::invalid_argument("expected a threshold for each of " + std::to_string(w.cols) + " inputs");
             if ((in == nullptr) != (out == nullptr)) throw std::invalid_argument("a product of low rank has two matrices");
             auto made = std::make_shared<ChosenInputs>(w, thresholds.data());
             if (in != nullptr) {
               if (in->cols() != w.cols || out->rows() != w.rows || in->rows() != out->cols() || in->weight.format.columns || out->weight.format.columns ||
                   !in->bias.empty() || !out->bias.empty() || in->integers || out->integers || in->rows() > w.cols ||
                   in->weight.format.element == Element::BFloat16Pairs || out->weight.format.element == Element::BFloat16Pairs)
                 throw std::invalid_argument("a product of low rank is (rows, rank) times (rank, cols), in panels, without biases");
               made->in = std::make_shared<const Linear>(*in);
               made->out = std::make_shared<const Linear>(*out);
             }
             linear.chosen = std::move(made);
           }, "thresholds"_a, "low_rank_in"_a.none() = nb::none(), "low_rank_out"_a.none() = nb::none(),
           "When a token is decoded, only inputs whose |x| is above a threshold are read; the others go through the low rank");
  factors.def("factored", [](const Linear& left, const Linear& right) {
            if (left.inner || left.plus || right.inner || right.plus || left.integers || right.integers || !right.bias.empty())
              throw std::invalid_argument("two matrices make a linear: each by itself, on no grid, the right one without a bias");
            if (left.weight.cols != right.weight.rows)
              throw std::invalid_argument("left reads " + std::to_string(left.weight.cols) + " values, right gives " +
                                          std::to_string(right.weight.rows));
            Linear made = left;
            made.inner = std::make_shared<const Linear>(right);
            return made;
          }, "right"_a, "left (right x), self being left")
      .def("corrected", [](const Linear& linear, const Linear& term) {
            if (linear.inner || linear.plus || linear.integers || !term.inner || term.plus || !term.bias.empty())
              throw std::invalid_argument("a weight by itself, on no grid, is corrected by two matrices without a bias");
            if (linear.rows() != term.rows() || linear.cols() != term.cols())
              throw std::invalid_argument("a weight and what corrects it are of one shape");
            Linear made = linear;
            made.plus = std::make_shared<const Linear>(term);
            return made;
          }, "term"_a, "self plus another linear of two matrices");
  nb::class_<Grid>(m, "Grid", "code = clamp(rint(x / scale) + zero, 0, 2^bits - 1)").def("__init__", [](Grid* self, float scale, int32_t zero, int bits) {
    if (!(scale > 0) || bits < 2 || bits > 16 || zero < 0 || zero >= 1 << bits) throw std::invalid_argument("a grid has a positive scale, 2 to 16 bits and a zero among its codes");
    new (self) Grid{scale, zero, (1 << bits) - 1};
  }, "scale"_a, "zero"_a, "bits"_a);
  nb::class_<Norm>(m, "Norm").def("__init__", [](Norm* self, const std::string& kind, std::optional<Floats> weight, std::optional<Floats> bias, float eps) {
    new (self) Norm(make_norm(kind, weight, bias, eps));
  }, "kind"_a, "weight"_a.none(), "bias"_a.none(), "eps"_a);

  nb::class_<Experts>(m, "Experts", "A routed feed-forward; see engine/plan.py")
      .def("__init__", [](Experts* self, const Linear& router, const Linear* shared_gate, size_t routed, size_t top_k, bool normalise) {
             new (self) Experts{router, shared_gate ? *shared_gate : Linear{}, {}, routed, top_k, normalise};
           }, "router"_a, "shared_gate"_a.none(), "routed"_a, "top_k"_a, "normalise"_a)
      .def("add", [](Experts& experts, const Linear* gate, const Linear& up, const Linear& down, const std::string& function) {
             experts.experts.push_back({gate ? *gate : Linear{}, up, down, function_named(function)});
           }, "gate"_a.none(), "up"_a, "down"_a, "function"_a, "The next expert; the shared one comes last");

  nb::class_<RelativeBias>(m, "RelativeBias", "Added to scores by distance, (heads, 2 reach + 1)")
      .def("__init__", [](RelativeBias* self, nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu> values) {
             if (values.shape(1) % 2 == 0 || values.shape(1) > size_t{1} << 24)
               throw std::invalid_argument("a relative bias has values for distances -reach .. reach");
             new (self) RelativeBias(values.data(), values.shape(0), values.shape(1) / 2);
           }, "values"_a);
  nb::class_<Cross>(m, "Cross", "Attention over an encoder's states; see engine/plan.py")
      .def("__init__", [](Cross* self, const Linear& q, const Linear& k, const Linear& v, const Linear& o, const Norm& norm, size_t heads,
                          size_t kv_heads, size_t head_dim, float scale) {
             new (self) Cross{q, k, v, o, norm, heads, kv_heads, head_dim, scale};
           }, "q"_a, "k"_a, "v"_a, "o"_a, "norm"_a, "heads"_a, "kv_heads"_a, "head_dim"_a, "scale"_a);

  nb::class_<Model>(m, "Model", "Weights of a Plan; see engine/plan.py")
      .def("__init__", [](Model* self, size_t hidden, size_t vocab, size_t context) {
             new (self) Model();
             self->hidden = hidden;
             self->vocab = vocab;
             self->context = context;
           }, "hidden"_a, "vocab"_a, "context"_a)
      .def("set_embedding", [](Model& model, const Linear& table, float scale) {
             if (table.weight.format.columns) throw std::invalid_argument("an embedding does not lie in columns");
             if (table.rows() != model.vocab || table.cols() != model.hidden) throw std::invalid_argument("embedding is not (vocab, hidden)");
             model.embedding = table;
             model.embedding_scale = scale;
           }, "table"_a, "scale"_a = 1.0f)
      .def("set_head", [](Model& model, const Linear& head, float scale) {
             if (head.weight.format.columns) throw std::invalid_argument("a head does not lie in columns");
             if (head.rows() != model.vocab || head.cols() != model.hidden) throw std::invalid_argument("head is not (vocab, hidden)");
             model.head = head;
             model.logit_scale = scale;
           }, "head"_a, "scale"_a = 1.0f)
      .def("set_final_norm", [](Model& model, const Norm& norm) { model.final_norm = norm; })
      .def("set_embedding_norm", [](Model& model, const Norm& norm) { model.embedding_norm = norm; })
      .def("set_positions", [](Model& model, Floats table, size_t offset) {
             if (table.size() % model.hidden != 0) throw std::invalid_argument("position embedding is not (positions, hidden)");
             model.position_embedding = copy(table);
             model.position_offset = offset;
           }, "table"_a, "offset"_a)
      .def("set_token_types", [](Model& model, Floats table) { model.token_type_embedding = copy(table); }, "table"_a)
      .def("add_rope", [](Model& model, Floats inverse_frequency, float attention_factor) {
             model.ropes.push_back({copy(inverse_frequency), attention_factor});
             return model.ropes.size() - 1;
           }, "inverse_frequency"_a, "attention_factor"_a)
      .def("add_layer", [](Model& model, const Linear* q, const Linear* k, const Linear* v, const Linear* o, const Linear* gate, const Linear* up,
                           const Linear* down, const Norm* attention_norm, const Norm* feed_forward_norm, size_t heads, size_t kv_heads,
                           size_t head_dim, float scale, int rope, const std::string& visible, size_t window, const std::string& function, bool post_norm,
                           const Norm* q_norm, const Norm* k_norm, const Norm* after_attention, const Norm* after_feed_forward,
                           const Experts* experts, std::shared_ptr<const RelativeBias> bias, const Cross* cross, size_t sinks, size_t value_dim,
                           std::optional<nb::ndarray<const uint16_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>> turns) {
             auto or_absent = [](const Linear* linear) { return linear ? *linear : Linear{}; };
             auto or_none = [](const Norm* norm) { return norm ? *norm : Norm{}; };
             Layer layer{or_absent(q), or_absent(k), or_absent(v), or_absent(o), or_absent(gate), or_absent(up), or_absent(down), or_none(attention_norm), or_none(feed_forward_norm), or_none(q_norm), or_none(k_norm),
                         or_none(after_attention), or_none(after_feed_forward), heads, kv_heads, head_dim, value_dim == 0 ? head_dim : value_dim, scale, rope,
                         pick<Visible>("policy", visible, {{"causal", Visible::Causal}, {"sliding", Visible::Sliding}, {"full", Visible::Full}, {"sinks", Visible::Sinks}}),
                         window, sinks,
                         function_named(function), post_norm, experts ? std::make_shared<const Experts>(*experts) : nullptr, std::move(bias),
                         cross ? std::make_shared<const Cross>(*cross) : nullptr};
             if (turns) layer.turns.assign(turns->data(), turns->data() + turns->size());
             check_layer(model, layer, model.layers.size());
             model.layers.push_back(std::move(layer));
           }, "q"_a.none(), "k"_a.none(), "v"_a.none(), "o"_a.none(), "gate"_a.none(), "up"_a.none(), "down"_a.none(), "attention_norm"_a.none(), "feed_forward_norm"_a.none(), "heads"_a, "kv_heads"_a,
           "head_dim"_a, "scale"_a, "rope"_a, "visible"_a, "window"_a, "function"_a, "post_norm"_a,
           "q_norm"_a.none() = nb::none(), "k_norm"_a.none() = nb::none(), "after_attention"_a.none() = nb::none(),
           "after_feed_forward"_a.none() = nb::none(), "experts"_a.none() = nb::none(), "bias"_a.none() = nb::none(),
           "cross"_a.none() = nb::none(), "sinks"_a = 0, "value_dim"_a = 0, "turns"_a.none() = nb::none())
      .def("round_layer", [](Model& model, std::optional<Grid> attention_in, std::optional<Grid> query, std::optional<Grid> key, std::optional<Grid> value,
                             std::optional<Grid> score, std::optional<Grid> probability, std::optional<Grid> attended,
                             std::optional<Grid> feed_forward_in, std::optional<Grid> sigmoid, std::optional<Grid> act) {
             if (model.layers.empty()) throw std::invalid_argument("round_layer: of the layer added last, but there is none");
             Layer& layer = model.layers.back();
             if (score && layer.visible != Visible::Causal) throw std::invalid_argument("attention in integers sees all positions before; it takes no window and no sinks");
             auto rounding = std::make_shared<Rounding>();
             *rounding = {attention_in, query, key, feed_forward_in, sigmoid, act, {}};
             if (score && probability && query && key && value && attended) rounding->attention = integer_attention_of(layer, *query, *key, *value, *score, *probability, *attended);
             if (layer.up.weight.format.columns) throw std::invalid_argument("activations on grids need weights in panels");
             layer.rounding = std::move(rounding);
           }, "attention_in"_a.none(), "query"_a.none(), "key"_a.none(), "value"_a.none(), "score"_a.none(), "probability"_a.none(),
           "attended"_a.none(), "feed_forward_in"_a.none(), "sigmoid"_a.none(), "act"_a.none(),
           "Grids of the layer that was added last; with all of query to attended, its attention is made of integers")
      .def_prop_ro("layers", [](const Model& model) { return model.layers.size(); });

  m.def("integer_matmul", [](const Linear& linear, nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu> x,
                             nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu> y, const std::string& tier) {
          const std::optional<Tier> found = tier_named(tier);
          if (!linear.integers || !found || x.shape(1) != linear.cols() || y.shape(0) != x.shape(0) || y.shape(1) != linear.rows())
            throw std::invalid_argument("integer_matmul: a linear on a grid, x (tokens, cols), y (tokens, rows), a tier");
          const Kernels& table = kernels(*found);
          Activations a;
          a.tokens = x.shape(0), a.cols = linear.cols(), a.slots = a.tokens == 1 ? 1 : kLanes;
          std::vector<uint8_t> buffer(Activations::nbytes_int8(a.tokens, a.cols, a.slots));
          a.place_int8(buffer.data());
          for (size_t t = 0; t < a.tokens; ++t) table.integer.quantise(linear.integers->in, x.data() + t * a.cols, 0, a.cols, a, t);
          const PackedMatrix& w = linear.weight;
          const size_t stride = w.panels() * kLanes;
          std::vector<float> out(a.slots * stride);
          for (size_t tile = 0; tile < a.tiles(); ++tile) {
            const size_t count = std::min(a.slots, a.tokens - tile * a.slots);
            table.integer.matmul(w.format)(w, 0, w.panels(), a, tile, 0, count, {out.data(), stride}, {});
            for (size_t t = 0; t < count; ++t)
              std::copy_n(out.data() + t * stride, w.rows, y.data() + (tile * a.slots + t) * w.rows);
          }
        }, "linear"_a, "x"_a, "y"_a, "tier"_a, "y (tokens, rows): a linear on a grid, by a tier's kernel");

  nb::class_<Choice>(m, "Choice").def_ro("token", &Choice::token).def_ro("logprob", &Choice::logprob).def_ro("alternatives", &Choice::alternatives);

  nb::class_<Sampler>(m, "Sampler")
      .def("__init__", [](Sampler* self, float temperature, int top_k, float top_p, float min_p, float repetition_penalty, size_t penalty_window,
                          uint64_t seed, size_t logprobs) {
             new (self) Sampler({temperature, top_k, top_p, min_p, repetition_penalty, penalty_window, seed, logprobs});
           }, "temperature"_a = 0.0f, "top_k"_a = 0, "top_p"_a = 1.0f, "min_p"_a = 0.0f, "repetition_penalty"_a = 1.0f, "penalty_window"_a = 64,
           "seed"_a = 0, "logprobs"_a = 0)
      .def("observe", [](Sampler& s, Tokens tokens) {
             for (size_t i = 0; i < tokens.size(); ++i) s.observe(tokens.data()[i]);
           }, "tokens"_a)
      .def("sample", [](Sampler& s, nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu> logits) {
             if (logits.size() == 0) throw std::invalid_argument("sample: no logits");
             return s.sample(logits.data(), logits.size());
           }, "logits"_a);

  nb::class_<Tuning>(m, "Tuning", "What changes speed and no answer; see tuning.h")
      .def("__init__", [](Tuning* self, size_t runs_per_thread, size_t ahead_nbytes, size_t farthest_nbytes, int spins_before_yield,
                          int spins_before_sleep) {
             if (runs_per_thread < 1 || spins_before_yield < 0 || spins_before_sleep < 0)
               throw std::invalid_argument("a tuning has at least one run per thread and no negative number of spins");
             new (self) Tuning{runs_per_thread, ahead_nbytes, farthest_nbytes, spins_before_yield, spins_before_sleep};
           }, "runs_per_thread"_a = Tuning{}.runs_per_thread, "ahead_nbytes"_a = Tuning{}.ahead_nbytes,
           "farthest_nbytes"_a = Tuning{}.farthest_nbytes, "spins_before_yield"_a = Tuning{}.spins_before_yield,
           "spins_before_sleep"_a = Tuning{}.spins_before_sleep)
      .def_ro("runs_per_thread", &Tuning::runs_per_thread)
      .def_ro("ahead_nbytes", &Tuning::ahead_nbytes)
      .def_ro("farthest_nbytes", &Tuning::farthest_nbytes)
      .def_ro("spins_before_yield", &Tuning::spins_before_yield)
      .def_ro("spins_before_sleep", &Tuning::spins_before_sleep);

  nb::class_<Session>(m, "Session", "Runs a Model; see session.h")
      .def("__init__", [](Session* self, std::shared_ptr<const Model> model, const std::string& kv, size_t context, size_t slots, size_t threads, size_t batch,
                          size_t source, const Session* beside, const Tuning& tuning) {
             const KvType type = pick<KvType>("KV format", kv, {{"fp32", KvType::Float32}, {"fp16", KvType::Float16}, {"bf16", KvType::BFloat16}, {"int8", KvType::Int8}, {"int4", KvType::Int4}});
             new (self) Session(std::move(model), {type, context, slots, threads, batch, source, tuning}, beside);
           }, "model"_a, "kv"_a, "context"_a, "slots"_a, "threads"_a, "batch"_a, "source"_a = 0, "beside"_a.none() = nb::none(),
           "tuning"_a = Tuning{})
      .def("set_source", [](Session& s, size_t slot, nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu> states) {
             nb::gil_scoped_release release;
             s.set_source(slot, states.data(), states.shape(0), states.shape(1));
           }, "slot"_a, "states"_a, "States of an encoder, (positions, width), that the slot's tokens attend to from now on")
      .def("source_length", &Session::source_length, "slot"_a)
      .def("forward", [](Session& s, Tokens tokens, Tokens slots) {
             if (tokens.size() != slots.size()) throw std::invalid_argument("tokens and slots differ in length");
             nb::gil_scoped_release release;
             s.forward(tokens.data(), slots.data(), tokens.size());
           }, "tokens"_a, "slots"_a)
      .def("begin", [](Session& s, Tokens tokens, Tokens slots) {
             if (tokens.size() != slots.size()) throw std::invalid_argument("tokens and slots differ in length");
             nb::gil_scoped_release release;
             s.begin(tokens.data(), slots.data(), tokens.size());
           }, "tokens"_a, "slots"_a)
      .def("run_layers", &Session::run_layers, "first"_a, "last"_a, nb::call_guard<nb::gil_scoped_release>())
      .def("run_part", [](Session& s, size_t layer, const std::string& part) {
             const Site site = site_of(part);
             nb::gil_scoped_release release;
             s.run_part(layer, site);
           }, "layer"_a, "part"_a)
      .def("inputs", [](Session& s, size_t layer, const std::string& part) {
             const Site site = site_of(part);
             float* out;
             nb::object array = new_array({s.count(), s.input_cols(layer, site)}, &out);
             nb::gil_scoped_release release;
             s.inputs(layer, site, out);
             return array;
           }, "layer"_a, "part"_a, "What the linears of a part read, (tokens, cols)")
      .def("set_inputs", [](Session& s, size_t layer, const std::string& part, nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu> x) {
             const Site site = site_of(part);
             if (x.shape(0) != s.count() || x.shape(1) != s.input_cols(layer, site)) throw std::invalid_argument("inputs are not (tokens, cols) of the part");
             s.set_inputs(layer, site, x.data());
           }, "layer"_a, "part"_a, "x"_a)
      .def("logits", [](Session& s, Tokens rows) {
             float* out;
             nb::object array = new_array({rows.size(), s.model().vocab}, &out);
             nb::gil_scoped_release release;
             s.logits(rows.data(), rows.size(), out);
             return array;
           }, "rows"_a)
      .def("log_probs", [](Session& s, Tokens rows, Tokens targets) {
             if (rows.size() != targets.size()) throw std::invalid_argument("rows and targets differ in length");
             std::vector<double> out(rows.size());
             nb::gil_scoped_release release;
             s.log_probs(rows.data(), targets.data(), rows.size(), out.data());
             return out;
           }, "rows"_a, "targets"_a)
      .def("normed", [](Session& s, Tokens rows) {
             float* out;
             nb::object array = new_array({rows.size(), s.model().hidden}, &out);
             s.normed(rows.data(), rows.size(), out);
             return array;
           }, "rows"_a)
      .def("hidden", [](Session& s) {
             float* out;
             nb::object array = new_array({s.count(), s.model().hidden}, &out);
             for (size_t t = 0; t < s.count(); ++t)
               std::copy_n(s.hidden() + t * s.hidden_stride(), s.model().hidden, out + t * s.model().hidden);
             return array;
           }, "States of the last pass, (tokens, hidden)")
      .def("set_hidden", [](Session& s, nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu> x) {
             if (x.shape(0) != s.count() || x.shape(1) != s.model().hidden) throw std::invalid_argument("hidden states are not (tokens, hidden)");
             for (size_t t = 0; t < s.count(); ++t)
               std::copy_n(x.data() + t * s.model().hidden, s.model().hidden, s.hidden() + t * s.hidden_stride());
           }, "x"_a)
      .def("prefill", [](Session& s, size_t slot, Tokens tokens) {
             nb::gil_scoped_release release;
             s.prefill(slot, tokens.data(), tokens.size());
           }, "slot"_a, "tokens"_a)
      .def("generate", &Session::generate, "slot"_a, "sampler"_a, "n"_a, "stop"_a, nb::call_guard<nb::gil_scoped_release>())
      .def("last_logits", [](Session& s) {
             float* out;
             nb::object array = new_array({s.last_logits().size()}, &out);
             std::copy(s.last_logits().begin(), s.last_logits().end(), out);
             return array;
           })
      .def("length", &Session::length, "slot"_a)
      .def("truncate", &Session::truncate, "slot"_a, "length"_a)
      .def("resumable", &Session::resumable, "slot"_a, "length"_a, "The greatest length, at most this, that truncate() takes")
      .def("set_profile", &Session::set_profile, "on"_a, "Count from zero where the time goes, or stop counting")
      .def("profile", [](const Session& s) {
             static constexpr const char* kNames[] = {"embed", "inputs", "qkv", "attention", "out", "gate_up", "down", "experts", "cross",
                                                      "head", "sampling", "wait", "other"};
             nb::dict seconds;
             for (size_t i = 0; i < s.profile().size(); ++i) seconds[kNames[i]] = s.profile()[i];
             return seconds;
           }, "Seconds by operator, as the calling thread spends them")
      .def("set_capture", &Session::set_capture, "on"_a)
      .def("captured", [](Session& s, const std::string& site) {
             const auto& values = s.captured(site_of(site));
             float* out;
             const size_t rows = std::max<size_t>(s.count(), 1);
             nb::object array = new_array({rows, values.size() / rows}, &out);
             std::copy(values.begin(), values.end(), out);
             return array;
           }, "site"_a)
      .def_prop_rw("decoding", &Session::decoding, &Session::set_decoding, "Passes are of tokens that are decoded, and not of a prompt")
      .def("forget_counts", &Session::forget_counts)
      .def_prop_ro("tokens_decoded", &Session::tokens_decoded)
      .def_prop_ro("inputs_read", [](const Session& s) {
             float* out;
             const std::vector<uint64_t>& read = s.inputs_read();
             nb::object array = new_array({read.size() / Session::kCounted, Session::kCounted}, &out);
             for (size_t i = 0; i < read.size(); ++i) out[i] = static_cast<float>(read[i]) / static_cast<float>(std::max<uint64_t>(s.tokens_decoded(), 1));
             return array;
           }, "Inputs that were above their thresholds, of a token: (layers, q k v o gate up down), since forget_counts()")
      .def_prop_ro("kv_nbytes", &Session::kv_nbytes)
      .def_prop_ro("scratch_nbytes", &Session::scratch_nbytes)
      .def_prop_ro("threads", &Session::threads)
      .def_prop_ro("tier", [](const Session& s) { return std::string(tier_name(s.tier())); })
      .def_prop_ro("slots", [](const Session& s) { return s.config().slots; })
      .def_prop_ro("batch", [](const Session& s) { return s.config().batch; })
      .def_prop_ro("context", [](const Session& s) { return s.config().context; });
}

}  // namespace edgewise
