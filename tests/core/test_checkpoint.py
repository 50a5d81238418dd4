"""A checkpoint is immutable and remembers what was done to it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from edgewise.core.checkpoint import Checkpoint, Step
from edgewise.core.storage import Dense, LazyTensors

WEIGHT = Dense(np.ones((4, 2), np.float32))


def test_a_step_adds_to_the_lineage_and_leaves_the_original_alone():
    first = Checkpoint("llama", {"hidden_size": 2}, {"w": WEIGHT}, source="m.gguf")
    second = first.with_tensors({"w": WEIGHT, "b": WEIGHT}, Step("split", {"parts": 2}, seed=1), parts=2)
    assert (len(first.tensors), first.lineage, dict(first.config)) == (1, (), {"hidden_size": 2})
    assert [s.name for s in second.lineage] == ["split"]
    assert second.config == {"hidden_size": 2, "parts": 2}
    assert (first.nbytes, second.nbytes) == (32, 64)
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.arch = "bert"


def test_repr_does_not_load_tensors():
    def fail():
        raise AssertionError("loaded")

    text = repr(Checkpoint("llama", {}, LazyTensors({"w": fail}), source="m.gguf"))
    assert text == "Checkpoint(llama, 1 tensors, m.gguf)"


def test_step_json():
    step = Step("gptq", {"damp": 0.01}, "0.1.0", 7)
    assert Step.from_json(step.to_json()) == step
    assert Step.from_json({"name": "x"}) == Step("x")
