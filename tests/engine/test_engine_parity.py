"""The native engine against transformers: small random models, each shown to miss when altered, and real weights."""

from __future__ import annotations

import numpy as np
import pytest
from plans import logits
from reference import MUTATIONS, mutations_of
from tiny_models import DECODERS, ENCODERS, POSITIONS, build, checkpoint_of, ids_of, torch_output

from edgewise.core.errors import collect_notices
from edgewise.core.numbers import QuantFormat
from edgewise.engine.archs import plan_of
from edgewise.engine.build import linears_of
from edgewise.engine.loading import model_of, requantised, session_of

pytestmark = pytest.mark.slow

FLOAT32 = 2e-5
"""Largest difference over the largest output, for float32 weights and a float32 cache."""

KV = {"fp16": 5e-3, "int8": 6e-2}
"""The same with keys and values rounded: what the format costs on these models, whose attention is peaked."""

MISS = 5
"""A mistake has to miss by this many times the bound."""

_built = {}


def case(name: str):
    """(checkpoint, ids, transformers' output) of a tiny model, made once."""
    if name not in _built:
        model = build(name)
        ids = ids_of(model)
        _built[name] = checkpoint_of(model), np.asarray(ids, np.int32), torch_output(model, ids)
    return _built[name]


def miss(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def native(plan, ids: np.ndarray, **options) -> np.ndarray:
    session = session_of(plan, context=len(ids), batch=len(ids), **options)
    if plan.head is not None:
        return logits(session, ids)
    session.forward(ids, np.zeros(len(ids), np.int32))
    return session.normed(np.arange(len(ids), dtype=np.int32))


@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
def test_float32(name):
    checkpoint, ids, expected = case(name)
    assert len(ids) == POSITIONS >= 64
    with collect_notices():
        model = model_of(checkpoint, kv="fp32", threads=2)
        assert miss(model.forward(ids), expected) < FLOAT32
        plan = plan_of(checkpoint)
    for mutation in mutations_of(plan):
        assert miss(native(MUTATIONS[mutation](plan), ids), expected) > MISS * FLOAT32, mutation


@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("name", ["llama", "llama head size", "llama one key head", "mistral"])
def test_rounded_caches(name, kv):
    checkpoint, ids, expected = case(name)
    found = model_of(checkpoint, kv=kv).forward(ids)
    assert 1e-6 < miss(found, expected) < KV[kv]


ACTIVATIONS = 5e-2
"""What rounding activations to int8 costs at most on these models, once the weights are the same."""


@pytest.mark.parametrize("form", ["int8/g32/fp16", "int6/g32/fp16", "int4/g32/fp16/min", "int2/g16/fp16/min"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_quantised_weights(name, form):
    """Against transformers with the same weights dequantised."""
    import torch

    torch_model = build(name)
    with collect_notices():
        plan = requantised(plan_of(checkpoint_of(torch_model)), QuantFormat.parse(form))
    parameters = dict(torch_model.named_parameters())
    with torch.no_grad():
        for linear in linears_of(plan):
            if "layers" in linear.name:
                parameters[linear.name].copy_(torch.from_numpy(np.array(linear.weight.dense())))
    ids = np.asarray(ids_of(torch_model), np.int32)
    assert miss(native(plan, ids), torch_output(torch_model, ids)) < ACTIVATIONS


PROMPTS = ("The capital of France is", "Once upon a time, in a small village,", "To bake bread, first",
           "Photosynthesis is the process by which", "The three laws of motion state that",
           "def fibonacci(n):\n    ", "In 1969, the first people", "My favourite animal is the", "Dear Sir or Madam,\n",
           "Rain falls because")


@pytest.fixture(scope="module")
def smollm2_native(smollm2):
    with collect_notices():
        return model_of(smollm2.checkpoint, context=1024, threads=2, cache=False)


def test_smollm2_makes_the_same_choices(smollm2, smollm2_native):
    """Teacher-forced greedy choices over 64-token continuations of ten prompts: at least 95 % equal torch's."""
    same = total = 0
    for prompt in PROMPTS:
        ids = smollm2.tokenizer.encode(prompt, add_special=False)
        text = ids + smollm2.greedy(ids, 64)
        found = smollm2_native.forward(text[:-1])[len(ids) - 1:].argmax(1)
        same += int((found == np.array(text[len(ids):])).sum())
        total += 64
    assert total == 640
    assert same >= 0.95 * total, same


def test_smollm2_perplexity(smollm2_native, lee_text):
    assert smollm2_native.perplexity(lee_text, windows=8) == pytest.approx(33.060, rel=0.01)


def test_smollm2_altered_is_another_model(smollm2):
    ids = np.asarray(smollm2.tokenizer.encode("The river that runs through Paris is the Seine. " * 6), np.int32)[:64]
    expected = smollm2.output(ids)
    plan = plan_of(smollm2.checkpoint)
    right = miss(native(plan, ids, threads=2, kv="fp16"), expected)
    assert right < 0.05
    for mutation in ("rope base", "head order", "mask"):
        assert miss(native(MUTATIONS[mutation](plan), ids, threads=2, kv="fp16"), expected) > 3 * right, mutation


def test_minilm_embeddings(minilm):
    from real_models import mean_pooled

    texts = ["A dog runs across the field.", "Interest rates rose by half a point.", "x", "Straße, naïve café: 北京 😀",
             "It was the best of times, it was the worst of times, it was the age of wisdom. " * 8]
    with collect_notices():
        model = model_of(minilm.checkpoint, threads=2, cache=False)
    found, expected = model.embed(texts), mean_pooled(minilm, texts)
    cosine = (found * expected).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)
    assert cosine.min() > 0.99999
    ids = np.asarray(minilm.tokenizer.encode(texts[4]), np.int32)[:100]
    right = miss(model.states(ids), minilm.output(ids))
    assert right < 1e-4
    plan = plan_of(minilm.checkpoint)
    for mutation in ("head order", "mask", "position offset"):
        assert miss(native(MUTATIONS[mutation](plan), ids), minilm.output(ids)) > 100 * right, mutation
