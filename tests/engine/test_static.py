"""Static activations in integers: products to the bit by Python's own integers, a model by its fake-quantised twin."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tiny_checkpoints import llama

from edgewise.core.activation import StaticActivation, activations_to_config
from edgewise.core.errors import UnsupportedError, collect_notices
from edgewise.core.numbers import QuantFormat, quantize
from edgewise.core.storage import QuantizedTensor
from edgewise.engine.archs import plan_of
from edgewise.engine.loading import load, model_of
from edgewise.engine.memory import kv_bytes, scratch_bytes
from edgewise.engine.packing import pack_one, recipe_of
from edgewise.engine.static import with_static
from edgewise.formats.folder_writer import write_folder
from edgewise.native import _core
from edgewise.native.probe import tiers

TIERS = tiers()
IDS = np.random.default_rng(3).integers(4, 250, 37).astype(np.int32)


def rounded(values: np.ndarray, form: str) -> QuantizedTensor:
    fmt = QuantFormat.parse(form)
    codes, scales, zero = quantize(values.astype(np.float32), fmt)
    return QuantizedTensor(codes, scales, fmt, zeros=zero)


def native(grid: StaticActivation | None):
    return None if grid is None else _core.Grid(grid.scale, grid.zero, grid.bits)


@pytest.mark.parametrize("form", ["int8/tensor/fp32", "int8/tensor/fp32/int", "int8/axis", "int8/axis/fp16/int",
                                  "int4/axis", "int4/axis/fp32/int", "int3/axis", "int2/axis/fp16/int"])
@pytest.mark.parametrize(("cols", "bits"), [(64, 8), (100, 16), (576, 16), (33, None)])
def test_a_linear_is_its_transcription_in_whole_numbers(form, cols, bits):
    """sum in 64 bits, one multiplier and shift: equal on every tier. And one code at most from float arithmetic."""
    rng = np.random.default_rng(cols)
    weight = rounded(rng.standard_normal((35, cols)) / cols**0.5, form)
    bias = rng.standard_normal(35).astype(np.float32)
    x = (3 * rng.standard_normal((19, cols)) + 0.5).astype(np.float32)
    given = StaticActivation.from_range(-6.0, 7.5, 8)
    exact = given.round(x).astype(np.float64) @ weight.dense().astype(np.float64).T + bias
    result = None if bits is None else StaticActivation.from_range(float(exact.min()) * 0.8, float(exact.max()), bits)
    linear = _core.Linear(pack_one(recipe_of("w", weight)), bias)
    linear.on_grid(native(given), native(result))
    found = []
    for tier in TIERS:
        y = np.empty((19, 35), np.float32)
        _core.integer_matmul(linear, x, y, tier)
        one = np.empty((1, 35), np.float32)
        _core.integer_matmul(linear, x[7:8], one, tier)
        assert np.array_equal(one[0], y[7])
        found.append(y)
    for y in found:
        assert np.array_equal(y, found[0])

    zeros = np.zeros((1, 1)) if weight.zeros is None else weight.zeros
    scales = np.broadcast_to(weight.scales, (35, 1))[:, 0]
    unit = (scales * np.float32(given.scale)).astype(np.float32)
    codes = weight.codes.astype(np.int64) - zeros.astype(np.int64)
    wide = unit.astype(np.float64)
    offsets = np.rint(bias / wide).astype(np.int64)
    left = bias.astype(np.float64) - offsets * wide  # of the bias, less than a unit of the sums
    sums = (given.codes(x).astype(np.int64) - given.zero) @ codes.T + offsets
    if result is None:
        assert np.allclose(found[0], sums * wide + left, rtol=2.0**-22, atol=1e-6)
        return
    factors = wide / np.float32(result.scale)
    shift = int(np.clip(30 - np.frexp(np.abs(factors).max())[1], 1, 62))
    multipliers = np.rint(factors * 2.0**shift).astype(np.int64)
    rest = np.rint(left / np.float32(result.scale)).astype(np.int64)
    made = ((sums * multipliers + (1 << (shift - 1))) >> shift) + rest
    expected = result.values(np.clip(made + result.zero, 0, 2**result.bits - 1))
    assert np.array_equal(found[0], expected)
    assert np.abs(result.codes(exact.astype(np.float32)) - result.codes(found[0])).max() <= 1
    assert len(np.unique(found[0])) > 100


class Twin:
    """A Llama in float64 that rounds every site to its grid, or records the range of each: one token at a time, whole
    matrices, no cache."""

    def __init__(self, checkpoint, grids=None):
        self.tensors = {name: np.asarray(stored.dense(), np.float64) for name, stored in checkpoint.tensors.items()}
        self.config, self.grids, self.ranges, self.seen = checkpoint.config, grids, {}, {}

    def site(self, name: str, x: np.ndarray) -> np.ndarray:
        kept = x[np.isfinite(x)]
        low, high = self.ranges.get(name, (0.0, 0.0))
        self.ranges[name] = (min(low, float(kept.min())), max(high, float(kept.max())))
        if self.grids is not None and name in self.grids:
            x = np.where(np.isfinite(x), self.grids[name].round(np.where(np.isfinite(x), x, 0)), x).astype(np.float64)
        self.seen[name] = x
        return x

    def norm(self, x, name):
        x = self.site(f"{name}.input", x)
        root = np.sqrt((x * x).mean(-1, keepdims=True) + self.config["rms_norm_eps"])
        return x / root * self.tensors[f"{name}.weight"]

    def linear(self, x, *names):
        x = self.site(f"{names[0]}.input", x)
        return [self.site(f"{name}.output", x @ self.tensors[f"{name}.weight"].T) for name in names]

    def logits(self, ids):
        config = self.config
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        dim = config.get("head_dim") or config["hidden_size"] // heads
        n, h = len(ids), self.tensors["model.embed_tokens.weight"][ids]
        angles = np.arange(n)[:, None] * config.get("rope_theta", 10_000.0) ** (-np.arange(0, dim, 2) / dim)

        def turn(x):
            a, b = x[..., :dim // 2], x[..., dim // 2:]
            c, s = np.cos(angles)[:, None], np.sin(angles)[:, None]
            return np.concatenate([a * c - b * s, b * c + a * s], axis=-1)

        for i in range(config["num_hidden_layers"]):
            at = f"model.layers.{i}"
            x = self.norm(h, f"{at}.input_layernorm")
            q, k, v = self.linear(x, *(f"{at}.self_attn.{part}_proj" for part in "qkv"))
            q = self.site(f"{at}.self_attn.query", turn(q.reshape(n, heads, dim)))
            k = self.site(f"{at}.self_attn.key", turn(k.reshape(n, kv_heads, dim)))
            k, v = (np.repeat(part, heads // kv_heads, axis=1) for part in (k, v.reshape(n, kv_heads, dim)))
            scores = np.where(np.tri(n, dtype=bool), np.einsum("ihd,jhd->hij", q, k) / dim**0.5, -np.inf)
            scores = self.site(f"{at}.self_attn.softmax_in", scores)
            p = np.exp(scores - scores.max(-1, keepdims=True))
            p = self.site(f"{at}.self_attn.softmax_out", p / p.sum(-1, keepdims=True))
            attended = np.einsum("hij,jhd->ihd", p, v).reshape(n, -1)
            h = h + self.linear(attended, f"{at}.self_attn.o_proj")[0]
            x = self.norm(h, f"{at}.post_attention_layernorm")
            gate, up = self.linear(x, f"{at}.mlp.gate_proj", f"{at}.mlp.up_proj")
            act = self.site(f"{at}.mlp.act", gate * self.site(f"{at}.mlp.sigmoid", 1 / (1 + np.exp(-gate))))
            h = h + self.linear(act * up, f"{at}.mlp.down_proj")[0]
        x = h / np.sqrt((h * h).mean(-1, keepdims=True) + config["rms_norm_eps"]) * self.tensors["model.norm.weight"]
        head = "lm_head.weight" if "lm_head.weight" in self.tensors else "model.embed_tokens.weight"
        return x @ self.tensors[head].T


def widths(site: str) -> int:
    """As the method has them: 16 bits for norms' inputs, scores, probabilities and what goes to the residual stream."""
    wide = ("layernorm.input", "softmax_in", "softmax_out", "o_proj.output", "down_proj.output")
    return 16 if site.endswith(wide) else 8


def made(form: str, *, layers: int = 2, symmetric: bool = False, **changes):
    """A small model in integers: checkpoint, its float twin and the fake-quantised one."""
    source = llama(layers=layers, **changes)
    tensors = {name: rounded(stored.dense(), "int8/axis" if "down_proj" in name and form.startswith("int8") else form)
               if "_proj" in name else stored for name, stored in source.tensors.items()}
    checkpoint = replace(source, tensors=tensors)
    floats = Twin(checkpoint)
    floats.logits(IDS)
    shared = {"k_proj.input": "q_proj.input", "v_proj.input": "q_proj.input", "up_proj.input": "gate_proj.input"}
    grids = {}
    for site, (low, high) in floats.ranges.items():
        bits = widths(site)
        if site.endswith((".mlp.sigmoid", "softmax_out")):
            low, high = 0.0, 1.0
        grids[site] = StaticActivation.from_range(low, high, bits, symmetric=symmetric and bits == 8)
    for i in range(layers):
        at = f"model.layers.{i}."
        for other, first in shared.items():
            part = "mlp." if "up" in other else "self_attn."
            grids[f"{at}{part}{other}"] = grids[f"{at}{part}{first}"]
    config = {**checkpoint.config, "quantization_config": activations_to_config(checkpoint.config, grids)}
    return replace(checkpoint, config=config), Twin(checkpoint), Twin(checkpoint, grids)


@pytest.mark.parametrize(("form", "symmetric"), [("int8/tensor/fp32/int", False), ("int4/axis/fp32/int", False),
                                                 ("int4/axis", True)])
def test_a_model_is_its_fake_quantised_twin(form, symmetric):
    """Inputs of the linears of the first layer within one code; logits a small part of what rounding moves them by."""
    checkpoint, floats, twin = made(form, layers=1, symmetric=symmetric)
    model = model_of(checkpoint, threads=2, context=64)
    session = model.session
    session.set_capture(True)
    logits = model.forward(IDS)
    expected, plain = twin.logits(IDS), floats.logits(IDS)
    at = "model.layers.0."
    model.reset()
    session.forward(IDS, np.zeros(len(IDS), np.int32))
    for name, site in (("attention", "self_attn.q_proj.input"), ("output", "self_attn.o_proj.input"),
                       ("feed_forward", "mlp.gate_proj.input"), ("down", "mlp.down_proj.input")):
        grid = twin.grids[at + site]
        ours, theirs = grid.codes(session.captured(name)), grid.codes(twin.seen[at + site].reshape(len(IDS), -1))
        apart = np.abs(ours - theirs)
        assert apart.max() <= 1, site
        assert (apart > 0).mean() < 0.02, site
    assert np.abs(logits - expected).mean() < 0.15 * np.abs(expected - plain).mean()
    assert np.abs(expected - plain).max() > 1e-3


@pytest.mark.parametrize("form", ["int8/tensor/fp32", "int4/axis/fp16/int"])
def test_bits_do_not_depend_on_threads_passes_or_batches(form):
    checkpoint, _, _ = made(form, heads=4, kv_heads=2)
    expected = None
    for threads, batch in ((1, 64), (2, 16), (3, 1), (2, 5)):
        model = model_of(checkpoint, threads=threads, context=64, batch=batch, cache=False)
        logits = model.forward(IDS)
        expected = logits if expected is None else expected
        assert np.array_equal(logits, expected), (threads, batch)
    model = model_of(checkpoint, threads=2, context=64, slots=2, cache=False)
    tokens, slots = np.repeat(IDS[:20], 2), np.tile(np.array([0, 1], np.int32), 20)
    model.session.forward(tokens, slots)
    out = np.asarray(model.session.logits(np.arange(40, dtype=np.int32)))
    assert np.array_equal(out[0::2], expected[:20])
    assert np.array_equal(out[1::2], expected[:20])


def test_inputs_alone_may_be_on_grids():
    """As SmoothQuant leaves a model: the linears multiply integers, all else is floats."""
    checkpoint, floats, twin = made("int8/axis")
    sites = {name: grid for name, grid in twin.grids.items() if name.endswith("_proj.input")}
    config = {**checkpoint.config, "quantization_config": activations_to_config({}, sites)}
    some = Twin(checkpoint, sites)
    expected, plain = some.logits(IDS), floats.logits(IDS)
    logits = model_of(replace(checkpoint, config=config), threads=1, kv="fp32").forward(IDS)
    assert np.abs(logits - expected).mean() < 0.15 * np.abs(expected - plain).mean()


def test_a_folder_brings_its_grids(tmp_path):
    checkpoint, _, _ = made("int4/axis")
    write_folder(checkpoint, tmp_path / "m")
    with collect_notices() as notices:
        model = load(str(tmp_path / "m"), threads=1, cache=False)
    assert any("static activations" in item.message for item in notices)
    assert np.array_equal(model.forward(IDS), model_of(checkpoint, threads=1).forward(IDS))
    with collect_notices() as notices:
        load(str(tmp_path / "m"), threads=1, cache=False, activations="float32")
    assert [item.kind for item in notices if "static activations" in item.message] == ["ignored"]


def test_memory_is_what_was_said():
    checkpoint, _, _ = made("int8/axis")
    plan = with_static(plan_of(checkpoint), Twin(checkpoint, made("int8/axis")[2].grids).grids)
    model = model_of(checkpoint, threads=2, context=100, batch=16, slots=2)
    assert model.session.kv_nbytes == kv_bytes(plan, "int8", 100, 2)
    assert model.session.scratch_nbytes == scratch_bytes(plan, 100, 16, 2, kv="int8", slots=2)


@pytest.mark.parametrize(("change", "message"), [
    (lambda sites: sites.pop("model.layers.0.self_attn.softmax_in"), "softmax_in is not named"),
    (lambda sites: sites.pop("model.layers.1.mlp.down_proj.input"), "none for its input"),
    (lambda sites: sites.update({"model.layers.7.mlp.act": StaticActivation(8, 0.1, 0)}), "does not have"),
    (lambda sites: sites.update({"model.layers.0.mlp.up_proj.input": StaticActivation(8, 0.1, 0)}), "have one grid"),
    (lambda sites: sites.update({"model.layers.0.mlp.down_proj.input": StaticActivation(16, 0.1, 0)}), "at most 8"),
    (lambda sites: sites.update({"model.layers.0.mlp.down_proj.output": StaticActivation(16, 1e-9, 0)}), "too small"),
])
def test_what_integers_cannot_run_is_said(change, message):
    checkpoint, _, twin = made("int8/axis")
    sites = dict(twin.grids)
    change(sites)
    config = {**checkpoint.config, "quantization_config": activations_to_config({}, sites)}
    with pytest.raises(UnsupportedError, match=message):
        model_of(replace(checkpoint, config=config), threads=1)


def test_weights_in_groups_are_refused():
    checkpoint, _, _ = made("int8/axis")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = {**checkpoint.tensors, name: rounded(checkpoint.tensors[name].dense(), "int4/g32")}
    with pytest.raises(UnsupportedError, match=r"mlp.up_proj has static activations, but its weight"):
        model_of(replace(checkpoint, tensors=tensors), threads=1)
