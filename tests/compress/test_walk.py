"""The walk: its order, what each group is given, resuming after a kill."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_checkpoints import bert, llama, t5

from edgewise.compress.scales import rescaled, shared
from edgewise.compress.walk import blocks_of, walk
from edgewise.core.checkpoint import Step
from edgewise.core.errors import InvalidValueError, UnsupportedError
from edgewise.core.numbers import QuantFormat, quantize
from edgewise.core.stats import InputStats
from edgewise.core.storage import Dense, QuantizedTensor
from edgewise.engine.archs import plan_of
from edgewise.engine.loading import sites_of

FORMAT = QuantFormat.parse("int4/g32/fp16/min")
STEP = Step("rounded", {"format": str(FORMAT)})


def rounded(stored):
    codes, scales, minima = quantize(stored.dense(), FORMAT)
    return QuantizedTensor(codes, scales, FORMAT, minima=minima)


def change(group, tensors, stats):
    return {name: rounded(tensors[name]) for name in group.names}


class Source:
    """Notes what it is asked, and in which state the block is then."""

    def __init__(self):
        self.seen = []

    def stats(self, block, group, tensors):
        done = [name for name in block.tensors if isinstance(tensors[name], QuantizedTensor)]
        self.seen.append((block.index, group.site, len(done)))
        return InputStats.from_samples(np.ones((1, tensors[group.names[0]].shape[1])))

    def leave(self, block, tensors):
        done = [name for name in block.tensors if isinstance(tensors[name], QuantizedTensor)]
        self.seen.append((block.index, "left", len(done)))


@pytest.mark.parametrize("make", [llama, bert])
def test_blocks_are_the_engines_sites(make):
    checkpoint = make()
    plan = plan_of(checkpoint)
    blocks = blocks_of(checkpoint)
    assert [{group.site: group.names for group in block.groups} for block in blocks] == [
        sites_of(layer) for layer in plan.layers]


def test_order_and_what_is_replaced_by_then():
    source = Source()
    told = []
    made = walk(llama(), change, source, step=STEP, progress=lambda *args: told.append(args))
    one = [("attention", 0), ("output", 3), ("feed_forward", 4), ("down", 6), ("left", 7)]
    assert source.seen == [(block, *item) for block in (0, 1) for item in one]
    assert told[0] == ("model.layers.0 attention", 0, 8)
    assert told[-1] == ("done", 8, 8)
    assert made.lineage[-1] == STEP
    source = llama()
    for name in source.tensors:
        expected = rounded(source.tensors[name]) if "_proj" in name else source.tensors[name]
        assert np.array_equal(made.tensors[name].dense(), expected.dense()), name


def test_some_blocks_only():
    source = Source()
    made = walk(llama(layers=3), change, source, step=STEP, blocks=[1])
    assert [item for item in source.seen if item[1] in ("left", "attention")] == [
        (0, "left", 0), (1, "attention", 0), (1, "left", 7)]
    assert isinstance(made.tensors["model.layers.0.mlp.up_proj.weight"], Dense)
    with pytest.raises(InvalidValueError, match="blocks are 0 to 2"):
        walk(llama(layers=3), change, step=STEP, blocks=[3])


def test_a_killed_walk_goes_on_where_it_was(tmp_path):
    whole = walk(llama(layers=3), change, step=STEP)

    def killed(group, tensors, stats):
        if group.names[0].startswith("model.layers.1.mlp"):
            raise KeyboardInterrupt
        return change(group, tensors, stats)

    with pytest.raises(KeyboardInterrupt):
        walk(llama(layers=3), killed, Source(), step=STEP, state=tmp_path / "state", key="a")
    source = Source()
    made = walk(llama(layers=3), change, source, step=STEP, state=tmp_path / "state", key="a")
    assert source.seen[:2] == [(0, "left", 7), (1, "attention", 0)]
    for name in whole.tensors:
        assert np.array_equal(made.tensors[name].dense(), whole.tensors[name].dense()), name
        assert type(made.tensors[name].nbytes) is int
    source = Source()
    walk(llama(layers=3), change, source, step=STEP, state=tmp_path / "state", key="a")
    assert {item[1] for item in source.seen} == {"left"}
    for other in ({"key": "b"}, {"key": "a", "step": Step("other")}):
        with pytest.raises(InvalidValueError, match="another run"):
            walk(llama(layers=3), change, **{"step": STEP, **other}, state=tmp_path / "state")


def test_what_a_change_returns_is_checked():
    with pytest.raises(InvalidValueError, match="no tensor of its block"):
        walk(llama(), lambda *args: {"lm_head.weight": Dense(np.ones((257, 64), np.float32))}, step=STEP)
    with pytest.raises(InvalidValueError, match="of shape"):
        walk(llama(), lambda group, *args: {group.names[0]: Dense(np.ones((2, 2), np.float32))}, step=STEP)
    with pytest.raises(UnsupportedError, match="2 stacks"):
        blocks_of(t5())


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_scales_leave_results_as_they_are(kv_heads):
    from edgewise.engine.loading import model_of

    rng = np.random.default_rng(0)
    source = llama(kv_heads=kv_heads)

    def scaled(group, tensors, stats):
        return rescaled(group, tensors, shared(rng.uniform(0.3, 3, group.origin.shape), group))

    made = walk(source, scaled, step=Step("scaled"))
    ids = rng.integers(0, 256, 40)
    before, after = (model_of(item, threads=1, kv="fp32").forward(ids) for item in (source, made))
    assert np.abs(after - before).max() < 1e-5 * np.abs(before).max()
    assert not np.array_equal(made.tensors["model.layers.0.mlp.up_proj.weight"].dense(),
                              source.tensors["model.layers.0.mlp.up_proj.weight"].dense())


def test_scales_that_cannot_pass_are_refused():
    block = blocks_of(llama())[0]
    output = block.groups[1]
    assert output.origin[:16].tolist() == output.origin[16:32].tolist() == list(range(16))
    with pytest.raises(InvalidValueError, match="come from one channel"):
        rescaled(output, llama().tensors, np.linspace(1, 2, 64))
    with pytest.raises(InvalidValueError, match="positive"):
        rescaled(output, llama().tensors, np.zeros(64))
    with pytest.raises(UnsupportedError, match="no producer"):
        rescaled(blocks_of(bert())[0].groups[0], bert().tensors, np.ones(32))
