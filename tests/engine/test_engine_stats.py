"""Statistics of a checkpoint block by block, as a walk asks for them, against the executor in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import reference
from tiny_checkpoints import bert, llama, t5

from edgewise.compress.walk import blocks_of, walk
from edgewise.core.checkpoint import Step
from edgewise.core.errors import ContextOverflowError, InvalidValueError, UnsupportedError
from edgewise.core.numbers import QuantFormat, quantize
from edgewise.core.stats import Stats
from edgewise.core.storage import Dense, QuantizedTensor
from edgewise.engine.archs import plan_of
from edgewise.engine.calibrate import EngineStats, gather
from edgewise.engine.loading import model_of

CLOSE = 2e-5
"""Relative to a linear's largest input: float32 arithmetic of a few layers."""

TEXTS = [np.random.default_rng(seed).integers(0, 256, n) for seed, n in enumerate((70, 3, 128, 1))]
FORMAT = QuantFormat.parse("int3/g32/fp16/min")


def rounded(stored):
    codes, scales, minima = quantize(stored.dense(), FORMAT)
    return QuantizedTensor(codes, scales, FORMAT, minima=minima)


def change(group, tensors, stats):
    return {name: rounded(tensors[name]) for name in group.names}


def executed(checkpoint, monkeypatch):
    """Stats of what the executor multiplies, by the name of the linear."""
    seen = {}
    original = reference._Run.linear

    def linear(self, linear, x):
        seen.setdefault(linear.name, []).append(np.array(x, np.float64))
        return original(self, linear, x)

    with monkeypatch.context() as patch:
        patch.setattr(reference._Run, "linear", linear)
        for ids in TEXTS:
            reference.forward(plan_of(checkpoint), ids, context=128)
    return Stats.from_samples({name: np.concatenate(parts) for name, parts in seen.items()}, gram=True)


def agree(found, expected, name):
    size = expected.absmax.max()
    assert found.count == expected.count == 202
    for field, scale in (("min", size), ("max", size), ("mean", size), ("mean_square", size**2), ("gram", None)):
        theirs = getattr(expected, field)
        bound = CLOSE * (np.abs(theirs).max() if scale is None else scale)
        assert np.abs(getattr(found, field) - theirs).max() < bound, (name, field)


MODELS = {"llama": llama, "grouped to one": lambda: llama(kv_heads=1),
          "bert": lambda: bert(positions=130)}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("sequential", [False, True])
def test_each_group_sees_what_the_executor_does(make, sequential, monkeypatch):
    checkpoint = make()
    source = EngineStats(checkpoint, TEXTS, gram=True, sequential=sequential, threads=2)
    before = executed(checkpoint, monkeypatch)
    walked = {}

    def judged(group, tensors, stats):
        # The checkpoint with all that is replaced by now: the groups of this block, and those of the blocks before.
        state = {**dict(checkpoint.tensors), **walked, **dict(tensors)}
        expected = executed(checkpoint.with_tensors(state, Step("so far")), monkeypatch) if sequential else before
        agree(stats, expected[group.names[0]], group)
        made = change(group, tensors, stats)
        walked.update(made)
        return made

    walk(checkpoint, judged, source, step=Step("rounded"))
    assert len(walked) == sum(len(group.names) for block in blocks_of(checkpoint) for group in block.groups)
    end = executed(checkpoint.with_tensors({**checkpoint.tensors, **walked}, Step("all")), monkeypatch)
    if checkpoint.arch == "llama":  # the two kinds of statistics differ, or the test above tells them not apart
        name = "model.layers.1.mlp.down_proj.weight"
        assert np.abs(end[name].mean - before[name].mean).max() > 100 * CLOSE * before[name].absmax.max()


def test_a_changed_norm_is_seen():
    checkpoint = llama()

    def change(group, tensors, stats):
        if group.site == "attention":
            norm = tensors[group.producer].dense()
            return {group.producer: Dense(norm * 2)}
        assert group.site != "feed_forward" or stats.count == 202
        return {}

    source = EngineStats(checkpoint, TEXTS, sequential=True, threads=1)
    made = walk(checkpoint, change, source, step=Step("norms"))
    model = model_of(made, threads=1, kv="fp32", context=128, batch=128)
    states = []
    for ids in TEXTS:
        model.session.begin(ids.astype(np.int32), np.zeros(len(ids), np.int32))
        model.session.run_layers(0, model.layers)
        states.append(np.asarray(model.session.hidden()))
        model.reset()
    assert np.array_equal(source.hidden, np.concatenate(states))


def test_passes_and_threads_do_not_matter(monkeypatch):
    from edgewise.engine import calibrate

    def states(threads, tokens):
        monkeypatch.setattr(calibrate, "_PASS_TOKENS", tokens)
        source = EngineStats(llama(), TEXTS, threads=threads)
        walk(llama(), change, source, step=Step("x"))
        return np.array(source.hidden)

    first = states(1, 2048)
    assert np.array_equal(states(2, 128), first)
    assert np.array_equal(states(2, 64), first)


@pytest.mark.parametrize(("lengths", "most"), [([1, 1, 1], 1), ([5, 1], 5), ([4, 4, 1], 4), ([1, 4, 1, 4, 1], 4),
                                               ([2, 2, 2, 2], 4), ([3], 4)])
def test_no_pass_is_of_one_token(lengths, most):
    from edgewise.engine.calibrate import _passes_of

    sequences = [np.zeros(n, np.int32) for n in lengths]
    passes = _passes_of(sequences, most)
    assert [i for one in passes for i in one] == list(range(len(lengths)))
    for one in passes:
        assert 2 <= sum(lengths[i] for i in one) <= most + 2


def test_gathered_into_a_folder_and_again_after_a_kill(tmp_path):
    checkpoint = llama()
    told = []
    whole = gather(checkpoint, TEXTS, tmp_path / "whole", gram=True, threads=1)
    loose = model_of(checkpoint, threads=1, kv="fp32", context=128).calibrate(TEXTS, gram=True)
    assert set(whole) == set(loose)
    for name in whole:
        assert np.abs(whole[name].gram - loose[name].gram).max() < CLOSE * np.abs(loose[name].gram).max()

    def killed(what, done, total):
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gather(checkpoint, TEXTS, tmp_path / "part", gram=True, threads=1, progress=killed)
    again = gather(checkpoint, TEXTS, tmp_path / "part", gram=True, threads=1, progress=lambda *a: told.append(a))
    assert told[-1] == ("calibrating", 2, 2)
    for name in whole:
        assert np.array_equal(again[name].gram, whole[name].gram), name
    with pytest.raises(InvalidValueError, match="another run"):
        gather(checkpoint, TEXTS, tmp_path / "part", threads=1)


def test_refusals_name_what_is_wrong():
    with pytest.raises(InvalidValueError, match="at least two tokens"):
        EngineStats(llama(), [[1]])
    with pytest.raises(ContextOverflowError, match="129 tokens"):
        EngineStats(llama(), [np.zeros(129, np.int32)])
    with pytest.raises(UnsupportedError, match="is both"):
        EngineStats(t5(), TEXTS)
    with pytest.raises(InvalidValueError, match="outside the vocabulary"):
        EngineStats(llama(), [[1, 999]])
    checkpoint = llama()
    source = EngineStats(checkpoint, TEXTS)
    blocks = blocks_of(checkpoint)
    with pytest.raises(InvalidValueError, match="order of the walk"):
        source.stats(blocks[1], blocks[1].groups[0], checkpoint.tensors)
    bad = np.array(checkpoint.tensors["model.layers.0.mlp.up_proj.weight"].dense())
    bad[3, 5] = np.inf
    broken = checkpoint.with_tensors({**checkpoint.tensors, "model.layers.0.mlp.up_proj.weight": Dense(bad)}, Step("x"))
    with pytest.raises(InvalidValueError, match=r"inputs of model\.layers\.0\.mlp\.down_proj\.weight.*input 3 is"):
        walk(broken, lambda *args: {}, EngineStats(broken, TEXTS), step=Step("x"))
