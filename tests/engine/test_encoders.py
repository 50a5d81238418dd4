"""Encoders: embeddings, poolings, and sequences seen whole."""

from __future__ import annotations

import numpy as np
import pytest
from reference import forward
from tiny_checkpoints import bert

from edgewise.core.errors import ContextOverflowError, InvalidValueError, collect_notices
from edgewise.engine.archs import plan_of
from edgewise.engine.loading import model_of

TEXT = "A text of more than thirty-two tokens."


@pytest.fixture(scope="module")
def model():
    return model_of(bert(), threads=2)


def test_states_and_forward_are_the_executors(model):
    ids = model.encode(TEXT)
    expected = forward(plan_of(bert()), ids)
    assert model.states(ids) == pytest.approx(expected, abs=1e-4)
    assert np.array_equal(model.forward(ids), model.states(ids))


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_poolings(model, pooling):
    states = model.states(model.encode(TEXT))
    expected = {"mean": states.mean(0), "cls": states[0], "last": states[-1]}[pooling]
    found = model.embed([TEXT, "x"], pooling=pooling)
    assert found.shape == (2, 32)
    assert found[0] == pytest.approx(expected / np.linalg.norm(expected), abs=1e-6)
    assert model.embed(TEXT, pooling=pooling, normalise=False)[0] == pytest.approx(expected, abs=1e-6)
    assert np.array_equal(model_of(bert(pooling=pooling), threads=1).embed([TEXT, "x"]), found)


def test_no_texts_and_a_wrong_pooling(model):
    assert model.embed([]).shape == (0, 32)
    with pytest.raises(InvalidValueError, match="mean, cls or last; given 'max'"):
        model.embed(TEXT, pooling="max")


def test_a_shorter_context_is_seen_whole_or_refused():
    """Never in two passes: the first would not see the second."""
    model = model_of(bert(), threads=1, context=37)
    assert model.context == 37
    ids = list(range(37))
    assert model.forward(ids) == pytest.approx(forward(plan_of(bert()), ids), abs=1e-4)
    with pytest.raises(ContextOverflowError, match="38 tokens do not fit the context of 37"):
        model.forward([*ids, 1])
    with pytest.raises(ContextOverflowError):
        model.embed("x" * 38)


def test_a_longer_context_than_positions_is_clamped():
    with collect_notices() as notices:
        model = model_of(bert(), threads=1, context=100)
    assert model.context == 48
    assert [(n.kind, n.where) for n in notices] == [("clamp", "context")]


def test_a_batch_is_not_for_encoders():
    with collect_notices() as notices:
        model = model_of(bert(), threads=1, batch=5)
    assert [n.kind for n in notices] == ["ignored"]
    ids = list(range(20))
    assert model.forward(ids) == pytest.approx(forward(plan_of(bert()), ids), abs=1e-4)


@pytest.mark.parametrize("form", [None, "bf16", "int8/g32"])
def test_sequences_read_at_once_have_the_bits_they_have_alone(form):
    """Lengths around tiles, more sequences than slots, and so many tokens that products are split by tokens too."""
    with collect_notices():
        alone, many = (model_of(bert(), threads=2, slots=slots, format=form) for slots in (1, 13))
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, 257, n) for n in (1, 48, 15, 16, 17, 48, 48, 40, 48, 2, 48, 48, 48, 33, 5)]
    found = many.states_of(sequences)
    assert [len(states) for states in found] == [len(ids) for ids in sequences]
    for ids, states in zip(sequences, found, strict=True):
        assert np.array_equal(states, alone.states(ids))
    assert many.states_of([]) == []
    with pytest.raises(ContextOverflowError, match="49 tokens do not fit"):
        many.states_of([[1], list(range(49))])
    assert np.array_equal(many.embed([TEXT, "x"]), alone.embed([TEXT, "x"]))
