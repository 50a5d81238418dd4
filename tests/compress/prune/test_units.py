"""How many units of each layer go, and which."""

from __future__ import annotations

import numpy as np
import pytest

from edgewise.compress.prune.units import Units, blocks_kept, units_kept
from edgewise.compress.surgery.groups import decoder_of, groups_of
from edgewise.compress.surgery.operations import cut, norms_of
from edgewise.compress.walk import blocks_of
from edgewise.core.checkpoint import Checkpoint
from edgewise.core.errors import InvalidValueError
from tiny_checkpoint import tiny_checkpoint


def weights(checkpoint: Checkpoint) -> int:
    return sum(int(np.prod(checkpoint.tensors[name].shape)) for block in blocks_of(checkpoint)
               for group in block.groups for name in group.names)


def scores(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    return {name: norms_of(checkpoint, group) for name, group in groups_of(checkpoint).items()
            if name.endswith((".heads", ".width"))}


@pytest.mark.parametrize("sparsity", [0.1, 0.25, 0.4])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("multiple", [8, 16])
def test_the_share_asked_for_goes(sparsity: float, kv_heads: int, multiple: int) -> None:
    base = tiny_checkpoint(layers=8, width=384, kv_heads=kv_heads)
    keep = units_kept(decoder_of(base), scores(base), Units(sparsity, multiple=multiple))
    assert 1 - weights(cut(base, keep)) / weights(base) == pytest.approx(sparsity, abs=multiple / 2000)
    touched = {int(name.partition(".")[0]) for name in keep}
    assert touched == {1, 2, 3, 4, 5, 6, 7}  # of eight: one at the start, and half a layer, rounded to none, at the end
    assert all(len(units) % multiple == 0 for name, units in keep.items() if name.endswith(".width"))


def test_the_highest_scores_stay() -> None:
    base = tiny_checkpoint(layers=2)
    rng = np.random.default_rng(0)
    given = {f"{i}.{name}": rng.permutation(units).astype(float) for i in range(2)
             for name, units in (("heads", 2), ("width", 128))}
    keep = units_kept(decoder_of(base), given, Units(0.3, first=0, last=0))
    for name, units in keep.items():
        out = np.setdiff1d(np.arange(len(given[name])), units)
        assert not len(out) or given[name][units].min() > given[name][out].max()


def test_too_much_is_named() -> None:
    base = tiny_checkpoint(layers=4)
    with pytest.raises(InvalidValueError, match="more than layer"):
        units_kept(decoder_of(base), scores(base), Units(0.7, first=0.25, last=0.25))
    for given in ({"sparsity": 1.0}, {"first": 0.6, "last": 0.4}, {"multiple": 0}):
        with pytest.raises(InvalidValueError):
            Units(**given)


def test_layers_of_the_least_influence_go() -> None:
    assert set(blocks_kept(np.array([0.9, 0.1, 0.5, 0.2]), 0.5)) == {"1", "3"}
    assert blocks_kept(np.array([0.9, 0.1]), 0.1) == {}
    with pytest.raises(InvalidValueError, match="at least one layer"):
        blocks_kept(np.array([0.9, 0.1]), 0.9)
