"""The operators of a decode step: all of them, with the bytes they read. No time is asserted."""

from __future__ import annotations

import pytest

from edgewise.core.errors import InvalidValueError
from edgewise.engine.archs import plan_of
from edgewise.engine.loading import model_of
from edgewise.engine.profile import profile
from tiny_checkpoint import tiny_checkpoint, tiny_encoder


def profiled(checkpoint, **options):
    model = model_of(checkpoint, threads=1, cache=False)
    return model, profile(model, plan_of(checkpoint), **options)


@pytest.mark.parametrize("tied", [True, False])
def test_every_weight_is_read_once_per_step(tied):
    model, found = profiled(tiny_checkpoint(layers=3, tied=tied), repeats=2)
    parts = {part.name: part for part in found.linears}
    assert list(parts) == ["q", "k", "v", "o", "gate", "up", "down", "head"]
    assert {part.runs for name, part in parts.items() if name != "head"} == {3}
    assert parts["head"].runs == 1
    table = 0 if tied else model.packed.matrices["model.embed_tokens.weight"].nbytes
    assert sum(p.weight_bytes for p in parts.values()) == sum(
        m.nbytes for m in model.packed.matrices.values()) - table
    assert found.step_s > 0
    assert found.linear_share == sum(part.seconds for part in found.linears) / found.step_s >= 0


def test_refusals():
    with pytest.raises(InvalidValueError, match="decoder"):
        profiled(tiny_encoder())
    for wrong in ({"repeats": 0}, {"depth": 0}, {"depth": 256}):
        with pytest.raises(InvalidValueError, match="repeat"):
            profiled(tiny_checkpoint(), **wrong)
