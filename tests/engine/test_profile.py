"""The operators of a decode step: all of them, with the bytes they read. No time is asserted."""

from __future__ import annotations

import pytest

from edgewise.core.errors import InvalidValueError, collect_notices
from edgewise.engine.archs import plan_of
from edgewise.engine.loading import model_of
from edgewise.engine.profile import profile
from tiny_checkpoint import tiny_checkpoint, tiny_encoder


def profiled(checkpoint, **options):
    model = model_of(checkpoint, threads=1, cache=False)
    with collect_notices():
        return model, {part.name: part for part in profile(model, plan_of(checkpoint), **options)}


@pytest.mark.parametrize("tied", [True, False])
def test_every_weight_is_read_once_per_step(tied):
    model, parts = profiled(tiny_checkpoint(layers=3, tied=tied), repeats=2)
    assert list(parts) == ["q", "k", "v", "o", "gate", "up", "down", "head", "other"]
    assert all(parts[name].runs == 3 for name in ("q", "down", "other"))
    assert parts["head"].runs == 1
    table = 0 if tied else model.packed.matrices["model.embed_tokens.weight"].nbytes
    assert sum(p.weight_bytes for p in parts.values()) == sum(
        m.nbytes for m in model.packed.matrices.values()) - table
    assert sum(part.seconds for part in parts.values()) > 0
    assert min(part.seconds for part in parts.values()) >= 0


def test_refusals():
    with pytest.raises(InvalidValueError, match="decoder"):
        profiled(tiny_encoder())
    for wrong in ({"repeats": 0}, {"depth": 0}, {"depth": 256}):
        with pytest.raises(InvalidValueError, match="repeat"):
            profiled(tiny_checkpoint(), **wrong)
