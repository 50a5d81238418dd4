"""Linears of two thin matrices, alone and beside a weight: values, bits, memory, and what the work is."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from plans import decoder, encoder, ids_for, logits, stored, weights
from reference import forward

from edgewise.core.errors import collect_notices
from edgewise.core.numbers import BF16
from edgewise.core.storage import Dense, Factored, Sum
from edgewise.engine.build import packed_parts
from edgewise.engine.loading import in_floats, recipes_of, session_of
from edgewise.engine.memory import scratch_bytes
from edgewise.engine.packing import pack_all
from edgewise.engine.plan import Experts, Linear, plan_with
from edgewise.engine.workload import workload_of
from edgewise.native.probe import tiers

N = 90
FORMS = ("F32", "F16", "BF16", "int4/g32/fp16/min", "int8/g32/fp16", "int8/axis", "int3/g32/fp16", "int2/g32/fp16/min",
         "Q4_0", "Q8_0", "MXFP4")


def factored(plan, form, *, rank=lambda linear: 32, term=None, only=None, right=None):
    """The plan with products of random matrices; term: form of the whole weight that they correct."""
    rng = np.random.default_rng(11)

    def change(linear):
        if only is not None and not any(part in linear.name for part in only):
            return linear
        rows, cols = linear.weight.shape
        r = rank(linear)
        pair = Factored(stored(weights(rng, rows, r), form), stored(weights(rng, r, cols), right or form))
        if term is None:
            return replace(linear, weight=pair, activation="int8")
        return replace(linear, weight=Sum((stored(weights(rng, rows, cols), term), pair)), activation="int8")

    return plan_with(plan, change)


def base(**changes):
    return decoder(**{"hidden": 96, "heads": 4, "kv_heads": 2, "head_dim": 32, "ffn": 160, "layers": 2, "context": 320,
                      "biases": True} | changes)


PLANS = {
    "two of each": factored(base(), "int4/g32/fp16/min"),
    "odd ranks": factored(base(), "int8/axis", rank=lambda linear: 5 + 37 * (len(linear.name) % 4)),
    "floats": factored(base(), "F16", rank=lambda linear: 24),
    "mixed": factored(base(), "Q8_0", right="F16", rank=lambda linear: 64),
    "corrected": factored(base(), "F16", term="int4/g32/fp16/min", rank=lambda linear: 8),
    "corrected by codes": factored(base(), "int8/axis", term="int3/g32/fp16/min", rank=lambda linear: 20),
    "some": factored(base(), "int4/g32/fp16/min", only=("v_proj", ".v", "down", "up")),
    "wide": factored(base(hidden=256, ffn=512, layers=1, head_dim=64), "int8/g32/fp16", rank=lambda linear: 224),
}


def plain(plan):
    """Every product multiplied out."""
    return plan_with(plan, lambda linear: replace(linear, weight=Dense(linear.weight.dense())))


def in_float32(plan):
    return plan_with(plan, lambda linear: replace(linear, activation="float32"))


@pytest.mark.parametrize("form", FORMS)
def test_on_float_inputs_it_is_the_product_multiplied_out(form):
    for term in (None, "int4/g32/fp16/min"):
        plan = in_float32(factored(base(), form, term=term))
        ids = ids_for(plan, 40)
        found = logits(session_of(plan, kv="fp32"), ids)
        expected = forward(plain(plan), ids)
        np.testing.assert_allclose(found, expected, atol=3e-5 * np.abs(expected).max(), err_msg=form)


def slow_int8(x):
    """One scale for 32 inputs: code = round(x / (peak / 127))."""
    x = np.asarray(x, np.float64)
    padded = np.pad(x, ((0, 0), (0, -x.shape[1] % 32))).reshape(len(x), -1, 32)
    scale = np.abs(padded).max(axis=2, keepdims=True) / 127
    scale[scale == 0] = 1
    return (np.rint(padded / scale) * scale).reshape(len(x), -1)[:, :x.shape[1]]


class Slow:
    """A weight in the place of a factored one, whose product is made as the engine makes it: y = left Q(right Q(x))."""

    def __init__(self, weight):
        self.weight, self.shape = weight, weight.shape

    def times(self, x, integers):
        weight, total = self.weight, 0.0
        if isinstance(weight, Sum):
            total = self.rounded(x, weight.parts[0], integers) @ weight.parts[0].dense().astype(np.float64).T
            weight = weight.parts[1]
        inner = self.rounded(x, weight.right, integers) @ weight.right.dense().astype(np.float64).T
        return total + self.rounded(inner, weight.left, integers) @ weight.left.dense().astype(np.float64).T

    @staticmethod
    def rounded(x, part, integers):
        return slow_int8(x) if integers and not isinstance(part, Dense) else x


@pytest.mark.parametrize("name", PLANS)
def test_the_transcription_with_rounding_between_the_two(name, monkeypatch):
    """Against a slow product that rounds what the engine rounds: equal but for floats, in texts where no sum falls on
    the other side of a tie. Without the rounding in the middle it is far off."""
    import reference

    plan, whole = PLANS[name], reference._Run.linear

    def linear(self, source, x):
        if isinstance(source.weight, Slow):
            made = source.weight.times(x, True)
            return made if source.bias is None else made + source.bias
        return whole(self, source, x)

    slow = plan_with(plan, lambda each: replace(each, weight=Slow(each.weight)) if isinstance(
        each.weight, Factored | Sum) else each)
    gaps = []
    for seed in (1, 2, 3):
        ids = ids_for(plan, 20, seed)
        found = logits(session_of(plan, kv="fp32"), ids)
        with monkeypatch.context() as patched:
            patched.setattr(reference._Run, "linear", linear)
            gaps.append(np.abs(found - forward(slow, ids, activations="plan")).mean() / np.abs(found).mean())
        without = np.abs(found - forward(plain(plan), ids, activations="plan")).mean() / np.abs(found).mean()
        assert gaps[-1] < 0.6 * without
    assert min(gaps) < 2e-6


@pytest.fixture(params=tiers()[1:] or tiers())
def tier(request, monkeypatch):
    monkeypatch.setenv("EDGEWISE_ISA", request.param)
    return request.param


@pytest.mark.parametrize("name", PLANS)
def test_bits_do_not_depend_on_threads_or_passes(name, tier):
    plan, ids = PLANS[name], ids_for(PLANS[name], 300)
    expected = logits(session_of(plan, kv="fp16", batch=300), ids)
    for threads in (2, 3):
        assert np.array_equal(logits(session_of(plan, kv="fp16", batch=300, threads=threads), ids), expected), threads
    for step in (1, 7, 64):
        found = logits(session_of(plan, kv="fp16", batch=64, threads=2), ids, step=step)
        assert np.array_equal(found, expected), step


@pytest.mark.parametrize("name", PLANS)
def test_tiers_agree(name, monkeypatch):
    plan, ids, found = PLANS[name], ids_for(PLANS[name], 40), []
    for each in tiers():
        monkeypatch.setenv("EDGEWISE_ISA", each)
        found.append(logits(session_of(plan, kv="fp16"), ids, step=17))
    for other in found[1:]:
        assert np.array_equal(other, found[0])


@pytest.mark.parametrize(("form", "term"), [("int8/g32/fp16", None), ("F16", "int4/g32/fp16/min")])
def test_an_encoder_takes_blocks_of_tokens_through_it(form, term):
    """Many tokens go block by block, few all together: the same bits, and the values of the product."""
    plan = factored(encoder(positions=512), form, term=term)
    texts = [ids_for(plan, 400, seed) for seed in (1, 2)]
    alone = []
    for text in texts:
        session = session_of(plan, kv="fp32", context=512, batch=512)
        session.forward(np.int32(text), np.zeros(len(text), np.int32))
        alone.append(np.asarray(session.hidden()))
    for threads in (1, 2):
        session = session_of(plan, kv="fp32", context=512, batch=1024, slots=2, threads=threads)
        session.forward(np.int32(np.concatenate(texts)), np.repeat(np.int32([0, 1]), 400))
        assert np.array_equal(np.asarray(session.hidden()), np.concatenate(alone))
    plan = in_float32(plan)
    session = session_of(plan, kv="fp32", context=512, batch=512)
    session.forward(np.int32(texts[0]), np.zeros(400, np.int32))
    np.testing.assert_allclose(np.asarray(session.hidden()), forward(plain(plan), texts[0]), atol=2e-4)


def test_in_bfloat16_it_is_rounded_between_too():
    plan = base(biases=False)
    rng = np.random.default_rng(2)

    def change(linear):
        rows, cols = linear.weight.shape
        return replace(linear, activation="bfloat16", weight=Factored(stored(weights(rng, rows, 32), "BF16"),
                                                                      stored(weights(rng, 32, cols), "BF16")))

    plan = plan_with(plan, change)
    ids = ids_for(plan, 50)
    found = logits(session_of(plan, kv="fp32"), ids)
    exact = forward(plain(plan), ids)
    assert 1e-5 < np.abs(found - exact).mean() / np.abs(exact).mean() < 3e-2
    for threads, step in ((2, 7), (3, 1)):
        assert np.array_equal(logits(session_of(plan, kv="fp32", threads=threads), ids, step=step), found)


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize(("threads", "batch", "slots"), [(1, 1, 1), (2, 64, 1), (3, 100, 2)])
def test_memory_is_predicted(name, threads, batch, slots):
    session = session_of(PLANS[name], kv="int8", context=77, batch=batch, slots=slots, threads=threads)
    predicted = scratch_bytes(PLANS[name], 77, batch, threads, kv="int8", slots=slots)
    assert session.scratch_nbytes == predicted


def test_weights_are_packed_as_they_are_and_counted():
    plan = PLANS["corrected by codes"]
    with collect_notices() as notices:
        recipes, _ = recipes_of(plan)
    assert not notices
    packed = pack_all(recipes, key=None)
    for layer in plan.layers:
        down = layer.feed_forward.down
        keys = [key for key in packed.matrices if key.startswith(down.key)]
        assert keys == [down.key, f"{down.key}.left", f"{down.key}.right"]
    rows, cols = plan.layers[0].feed_forward.down.weight.shape
    ops = {op.name: op for op in workload_of(plan, packed.matrices).ops}
    assert ops[down.name].macs == rows * cols + 20 * (rows + cols)
    assert ops[down.name].weight_bytes == sum(packed.matrices[key].nbytes for key in keys)


def test_what_runs_as_its_product_says_so():
    plan = base()
    pair = Factored(Dense(np.ones((24, 4), np.float32)), Dense(np.ones((4, plan.hidden), np.float32)))
    router = Linear("router", Dense(np.zeros((2, plan.hidden), np.float32)), None, "float32")
    layer = plan.layers[0]
    expert = replace(layer.feed_forward, up=Linear("u", pair), gate=Linear("g", pair, None), down=Linear(
        "d", Dense(np.ones((plan.hidden, 24), np.float32))))
    other = replace(expert, up=Linear("u2", pair), gate=None)
    plan = replace(plan, layers=(replace(layer, feed_forward=Experts(router, (expert, other), 1, True)),))
    assert not packed_parts(plan)
    with collect_notices() as notices:
        session_of(plan)
    assert any("16-bit floats" in str(notice) for notice in notices)
    assert in_floats(PLANS["two of each"], BF16).layers[0].attention.q.weight.shape == (128, 96)
