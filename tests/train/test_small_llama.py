"""The small Llama learns, is kept, and is the same model in torch and in the engine."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from edgewise.core.errors import InvalidValueError
from edgewise.engine.loading import model_of
from edgewise.train.small_llama import SmallLlama, batches, llama_of, small_llama, token_ids

pytestmark = pytest.mark.slow
TINY = SmallLlama(hidden=32, layers=2, heads=4, kv_heads=2, width=64, vocab=512, context=32, steps=60, batch=8,
                  learning_rate=1e-2, text="pydoc")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def trained(home):
    return small_llama(TINY)


def loss_of(checkpoint):
    part = torch.from_numpy(token_ids(checkpoint, "pydoc")[:16 * 32].reshape(16, 32))
    with torch.no_grad():
        return float(llama_of(checkpoint)(part, labels=part).loss)


def test_training_lowers_the_loss(trained):
    assert loss_of(small_llama(replace(TINY, steps=1))) > np.log(512) - 0.2
    assert loss_of(trained) < np.log(512) - 1


def test_it_is_trained_once(trained):
    seen = []
    again = small_llama(TINY, progress=lambda *told: seen.append(told))
    assert again.source == trained.source
    assert seen == []
    assert small_llama(replace(TINY, seed=1), progress=lambda *told: seen.append(told)).source != trained.source
    assert seen


def test_torch_and_the_engine_agree(trained):
    ids = token_ids(trained, "pydoc")[:32]
    ours = model_of(trained, threads=1, cache=False, kv="fp32").forward(ids.astype(np.int32))
    with torch.no_grad():
        theirs = llama_of(trained)(torch.from_numpy(ids)[None]).logits[0].numpy()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5)


def test_batches_are_excerpts_and_seeded():
    ids = np.arange(100)
    first = next(batches(ids, 3, 10, 5))
    assert first.shape == (3, 10)
    assert bool((first.diff(dim=1) == 1).all())
    assert torch.equal(first, next(batches(ids, 3, 10, 5)))
    assert not torch.equal(first, next(batches(ids, 3, 10, 6)))


def test_what_cannot_be_is_said():
    with pytest.raises(InvalidValueError, match="longer text"):
        next(batches(np.arange(10), 1, 10, 0))
    with pytest.raises(InvalidValueError, match="divide"):
        SmallLlama(hidden=30)
    with pytest.raises(InvalidValueError, match="258"):
        SmallLlama(vocab=100)
