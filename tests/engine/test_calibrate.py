"""Statistics gathered by the engine against NumPy's over what the executor feeds each linear."""

from __future__ import annotations

import numpy as np
import pytest
import reference
from tiny_checkpoints import bert, llama

from edgewise.core.errors import InvalidValueError
from edgewise.core.stats import Stats
from edgewise.engine.archs import plan_of
from edgewise.engine.build import linears_of
from edgewise.engine.loading import model_of

CLOSE = 1e-4
"""Relative to a linear's largest input: float32 arithmetic of two layers."""

TEXTS = [np.random.default_rng(seed).integers(0, 256, n) for seed, n in enumerate((70, 3, 128))]


def inputs_by_name(checkpoint, texts, monkeypatch) -> dict[str, np.ndarray]:
    """What the executor multiplies, by the name of the linear."""
    seen: dict[str, list[np.ndarray]] = {}
    original = reference._Run.linear

    def linear(self, linear, x):
        seen.setdefault(linear.name, []).append(np.array(x, np.float64))
        return original(self, linear, x)

    monkeypatch.setattr(reference._Run, "linear", linear)
    plan = plan_of(checkpoint)
    for ids in texts:
        reference.forward(plan, ids)
    layers = {item.name for item in linears_of(plan)} - {plan.embedding.name, getattr(plan.head, "name", "")}
    return {name: np.concatenate(parts) for name, parts in seen.items() if name in layers}


@pytest.mark.parametrize("make", [llama, lambda: bert(positions=128)], ids=["llama", "bert"])
def test_stats_are_numpys(make, monkeypatch):
    checkpoint = make()
    expected = Stats.from_samples(inputs_by_name(checkpoint, TEXTS, monkeypatch), gram=True)
    model = model_of(checkpoint, threads=2, kv="fp32", batch=None)
    found = model.calibrate(TEXTS, gram=True)
    assert set(found) == set(expected)
    assert len(found) == 7 * 2 if checkpoint.arch == "llama" else 6
    for name, item in found.items():
        theirs = expected[name]
        size = theirs.absmax.max()
        assert item.count == theirs.count == 201
        for field, scale in (("min", 1), ("max", 1), ("mean", 1), ("mean_square", size)):
            assert np.abs(getattr(item, field) - getattr(theirs, field)).max() < CLOSE * size * scale, (name, field)
        assert np.abs(item.gram - theirs.gram).max() < CLOSE * np.abs(theirs.gram).max()


def test_parts_merge_and_passes_do_not_matter():
    whole = model_of(llama(), threads=1).calibrate(TEXTS)
    model = model_of(llama(), threads=2, batch=7)
    parts = model.calibrate(TEXTS[:1]) + model.calibrate(TEXTS[1:])
    for name, item in whole.items():
        assert np.array_equal(parts[name].min, item.min)
        assert parts[name].total_square == pytest.approx(item.total_square, rel=1e-9)
        assert parts[name].count == item.count


def test_linears_of_one_input_share_it():
    stats = model_of(llama(), threads=1).calibrate(["some text"])
    assert stats["model.layers.0.self_attn.q_proj.weight"] is stats["model.layers.0.self_attn.v_proj.weight"]
    assert stats["model.layers.0.mlp.gate_proj.weight"] is stats["model.layers.0.mlp.up_proj.weight"]
    assert stats["model.layers.0.mlp.gate_proj.weight"].gram is None


def test_long_texts_are_read_in_parts_and_progress_is_told():
    model = model_of(llama(), threads=1, context=50)
    told = []
    stats = model.calibrate([TEXTS[2], TEXTS[1]], progress=lambda *args: told.append(args))
    assert next(iter(stats.values())).count == 131
    assert told == [("calibrating", n, 4) for n in (1, 2, 3, 4)]


def test_refusals_leave_the_model_usable():
    model = model_of(llama(), threads=1)
    for texts in ([], [""], [[]]):
        with pytest.raises(InvalidValueError, match="at least one text"):
            model.calibrate(texts)
    with pytest.raises(InvalidValueError, match="outside the vocabulary"):
        model.calibrate([[1, 999]])
    assert model.session.length(0) == 0
    assert model.generate([1, 2], max_tokens=3, ignore_eos=True).result().finish_reason == "length"
