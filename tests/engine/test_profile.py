"""The operators of a decode step and of a prompt: all of them, with the bytes they read. No time is asserted."""

from __future__ import annotations

import pytest

from edgewise.core.errors import InvalidValueError
from edgewise.engine.archs import plan_of
from edgewise.engine.loading import model_of
from edgewise.engine.profile import OperatorTime, Profile, profile, profile_table
from edgewise.engine.workload import arithmetic, workload_of
from tiny_checkpoint import tiny_checkpoint, tiny_encoder


def profiled(checkpoint, **options):
    model = model_of(checkpoint, threads=1, cache=False)
    plan = plan_of(checkpoint)
    return model, plan, profile(model, plan, **options)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("threads", [1, 2])
def test_every_weight_is_read_once_per_step(tied, threads):
    model, _, found = profiled(tiny_checkpoint(layers=3, tied=tied), repeats=2, threads=threads, tokens=4)
    parts = {part.name: part for part in found.operators}
    assert {name: part.runs for name, part in parts.items() if part.moved_bytes} == {
        "embed": 1, "qkv": 9, "attention": 3, "out": 3, "gate_up": 6, "down": 3, "head": 1}
    assert set(parts) - {"wait", "other"} == {"embed", "inputs", "qkv", "attention", "out", "gate_up", "down", "head",
                                              "sampling"}
    assert [part.name for part in found.linears] == ["qkv", "out", "gate_up", "down", "head"]
    table = 0 if tied else model.packed.matrices["model.embed_tokens.weight"].nbytes
    assert sum(p.moved_bytes for p in found.linears) == sum(m.nbytes for m in model.packed.matrices.values()) - table


def test_the_parts_are_the_whole():
    _, _, found = profiled(tiny_checkpoint(layers=2), repeats=3)
    assert found.step_s == sum(part.seconds for part in found.operators) > 0
    assert found.linear_share == sum(part.seconds for part in found.linears) / found.step_s
    assert 0 < found.linear_share < 1
    table = profile_table(found, "x", read_bytes_per_s=1e9, int8_ops_per_s=1e9, fp32_ops_per_s=1e9)
    assert sum(row[3] for row in table.rows[:-1]) == pytest.approx(1.0, abs=1e-12)
    assert table.rows[-1][:4] == ("whole", None, found.step_s * 1e3, 1.0)


def test_a_prompt_does_what_its_workload_says():
    model, plan, found = profiled(tiny_checkpoint(layers=2), phase="prefill", tokens=40, depth=7, repeats=1)
    load = workload_of(plan, model.packed.matrices, tokens=40, depth=7, kv=model.kv)
    assert sum(part.operations for part in found.operators) == sum(arithmetic(load).values())
    assert sum(part.moved_bytes for part in found.operators) == load.moved_bytes
    assert "sampling" not in {part.name for part in found.operators}


def test_the_model_is_as_before():
    checkpoint = tiny_checkpoint()
    model, plan = model_of(checkpoint, threads=2, cache=False), plan_of(checkpoint)
    before = model.generate([5, 6, 7], max_tokens=8, ignore_eos=True).result().ids
    profile(model, plan, session=model.session, repeats=1, tokens=4)
    assert sum(model.session.profile().values()) == 0
    model.reset()
    assert model.generate([5, 6, 7], max_tokens=8, ignore_eos=True).result().ids == before


def test_a_share_of_the_roof_is_of_the_nearer_one():
    found = Profile((OperatorTime("head", 1, 0.5, 100, 1000, "int8"),
                     OperatorTime("attention", 2, 0.25, 200, 50, "fp32"), OperatorTime("wait", 0, 0.25)), 1.0)
    table = profile_table(found, "x", read_bytes_per_s=1000.0, int8_ops_per_s=4000.0, fp32_ops_per_s=1000.0)
    assert table.rows == (
        ("head", 1, 500.0, 0.5, 2e-7, 2e-6, 0.5), ("attention", 2, 250.0, 0.25, 8e-7, 2e-7, 0.8),
        ("wait", None, 250.0, 0.25, None, None, None), ("whole", None, 1000.0, 1.0, 3e-7, 1.05e-6, None))
    assert [row[-1] for row in profile_table(found, "x").rows] == [None] * 4


def test_refusals():
    with pytest.raises(InvalidValueError, match="decoder"):
        profiled(tiny_encoder())
    for wrong in ({"repeats": 0}, {"depth": -1}, {"depth": 256}, {"tokens": 0}):
        with pytest.raises(InvalidValueError, match="repeat"):
            profiled(tiny_checkpoint(), **wrong)
