"""The Workload of a Plan against what is counted by hand."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from edgewise.core.errors import InvalidValueError
from edgewise.core.storage import Dense
from edgewise.engine.archs import plan_of
from edgewise.engine.build import linears_of
from edgewise.engine.loading import model_of
from edgewise.engine.plan import Attention, Experts, FeedForward, Layer, Linear, Norm, Plan
from edgewise.engine.workload import arithmetic, workload_of
from tiny_checkpoint import VOCAB, tiny_checkpoint, tiny_encoder

HIDDEN, LAYERS, WIDTH, KV = 64, 2, 128, 32
WEIGHTS = LAYERS * (2 * HIDDEN * HIDDEN + 2 * KV * HIDDEN + 3 * WIDTH * HIDDEN)
"""Values in the linears of the layers."""


def loaded(**options):
    checkpoint = tiny_checkpoint(hidden=HIDDEN, layers=LAYERS, width=WIDTH, **options)
    return plan_of(checkpoint), model_of(checkpoint, threads=1, cache=False).packed.matrices


def linear_macs(workload):
    return sum(op.macs for op in workload.ops if op.kind == "linear")


def test_a_decode_step_reads_every_weight_once_and_one_row_of_the_table():
    plan, matrices = loaded(tied=False)
    step = workload_of(plan, matrices)
    assert step.phase == "decode"
    assert linear_macs(step) == WEIGHTS + VOCAB * HIDDEN
    table = matrices["model.embed_tokens.weight"].nbytes
    assert step.weight_bytes == sum(m.nbytes for m in matrices.values()) - table + round(table / VOCAB)


def test_a_tied_head_is_read_from_the_table():
    plan, matrices = loaded(tied=True)
    step = workload_of(plan, matrices)
    table = matrices["model.embed_tokens.weight"].nbytes
    assert step.weight_bytes == sum(m.nbytes for m in matrices.values()) + round(table / VOCAB)
    assert linear_macs(step) == WEIGHTS + VOCAB * HIDDEN


def test_attention_grows_with_depth():
    plan, matrices = loaded()
    shallow, deep = (workload_of(plan, matrices, depth=depth) for depth in (0, 63))
    heads, head_dim = 4, 16
    assert deep.macs - shallow.macs == LAYERS * 2 * heads * head_dim * 63
    kv_16 = deep.moved_bytes - deep.weight_bytes
    assert kv_16 == LAYERS * 64 * 2 * (16 + 32) * 2  # two kv heads; keys of 16, values padded to 32, fp16
    assert workload_of(plan, matrices, depth=63, kv="fp32").moved_bytes - deep.weight_bytes == 2 * kv_16


def test_a_prefill_reads_weights_once_per_pass():
    plan, matrices = loaded()
    once, twice = (workload_of(plan, matrices, tokens=64, batch=batch) for batch in (64, 32))
    head = sum(op.weight_bytes for op in once.ops[-1:])
    layers = sum(m.nbytes for name, m in matrices.items() if "layers" in name)
    assert twice.weight_bytes - once.weight_bytes == layers
    assert once.phase == "prefill"
    assert linear_macs(once) == 64 * WEIGHTS + VOCAB * HIDDEN
    assert head == matrices["model.embed_tokens.weight"].nbytes


def test_attention_of_a_prefill_is_the_triangle_of_its_positions():
    plan, matrices = loaded()
    got = sum(op.macs for op in workload_of(plan, matrices, tokens=10, depth=5).ops if op.kind == "attention")
    assert got == LAYERS * 2 * 4 * 16 * sum(range(6, 16))


def test_an_encoder_sees_everything():
    checkpoint = tiny_encoder()
    plan = plan_of(checkpoint)
    matrices = model_of(checkpoint, threads=1, cache=False).packed.matrices
    load = workload_of(plan, matrices, tokens=8, kv="fp32")
    assert sum(op.macs for op in load.ops if op.kind == "attention") == 2 * 2 * 4 * 16 * 8 * 8
    assert set(arithmetic(load)) == {"fp32"}


def test_integers_where_the_weights_are():
    plan, matrices = loaded()
    assert arithmetic(workload_of(plan, matrices)).keys() == {"fp32"}
    quantised = arithmetic(workload_of(plan, matrices, int8=True))
    assert quantised["int8"] == 2 * WEIGHTS
    assert quantised["fp32"] == 2 * (VOCAB * HIDDEN + LAYERS * 2 * 4 * 16)  # the head stays as stored; attention


def test_refusals():
    plan, matrices = loaded()
    for wrong in ({"tokens": 0}, {"depth": -1}, {"batch": 0}):
        with pytest.raises(InvalidValueError):
            workload_of(plan, matrices, **wrong)


def routed(top_k=2, experts=8):
    """One layer of `experts` experts, and the sizes of its weights."""
    def linear(name, rows, cols):
        return Linear(name, Dense(np.zeros((rows, cols), np.float32)))

    def expert(name):
        return FeedForward(linear(f"{name}.up", 24, 16), linear(f"{name}.down", 16, 24), linear(f"{name}.gate", 24, 16))

    norm = Norm("rms", np.ones(16, np.float32), 1e-5)
    attention = Attention(*(linear(part, 16, 16) for part in "qkvo"), heads=2, kv_heads=2, head_dim=8, scale=1.0)
    layer = Layer(attention, Experts(linear("router", experts, 16), tuple(expert(f"e{i}") for i in range(experts)),
                                     top_k, True), norm, norm)
    table = linear("table", 32, 16)
    plan = Plan("routed", "decoder", 16, 32, 64, table, (layer,), norm, replace(table, name="head"))
    matrices = {one.key: SimpleNamespace(rows=one.weight.shape[0], cols=one.weight.shape[1], nbytes=one.weight.nbytes)
                for one in linears_of(plan)}
    return plan, matrices


def test_decode_reads_the_chosen_experts_and_a_long_prefill_all_of_them():
    plan, matrices = routed()
    whole = sum(m.nbytes for name, m in matrices.items() if name.startswith("e"))

    def read(**options):
        return sum(op.weight_bytes for op in workload_of(plan, matrices, **options).ops if op.name.startswith("e"))

    assert read() == whole * 2 // 8
    assert read(tokens=1000, batch=1000) == whole
    assert read() < read(tokens=2) < whole
    macs = sum(op.macs for op in workload_of(plan, matrices, tokens=10).ops if op.name.startswith("e"))
    assert macs == 10 * 2 * 3 * 16 * 24
