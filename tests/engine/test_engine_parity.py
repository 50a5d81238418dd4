"""The native engine against transformers: small random models, each shown to miss when altered, and real weights."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from plans import logits
from reference import MUTATIONS, forward, mutations_of
from tiny_models import DECODERS, ENCODERS, POSITIONS, build, checkpoint_of, ids_of, torch_output

from edgewise.core.errors import InvalidValueError, collect_notices
from edgewise.core.numbers import QuantFormat
from edgewise.engine.archs import plan_of
from edgewise.engine.build import linears_of
from edgewise.engine.loading import model_of, requantised, session_of
from edgewise.engine.plan import layer_with

pytestmark = pytest.mark.slow

FLOAT32 = 2e-5
"""Largest difference over the largest output, for float32 weights and a float32 cache."""

COST = 1.25
"""A rounded format costs what the executor pays for the same rounding, within this factor either way. The cost is the
root mean square of the differences over that of the outputs: 0.04 for an int8 cache on these models, whose attention
is peaked; a code on an edge falls here or there, and the layers after it spread that."""

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


def typical(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.sqrt(((found - expected) ** 2).mean() / (expected**2).mean()))


def on_floats(plan):
    """The plan with float32 inputs of every linear, whatever its weights."""
    def change(linear):
        return replace(linear, activation="float32")

    return replace(plan, layers=tuple(layer_with(layer, change) for layer in plan.layers), head=change(plan.head))


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
        model = model_of(checkpoint, kv="fp32", threads=2, context=len(ids))
        assert miss(model.forward(ids), expected) < FLOAT32
        plan = plan_of(checkpoint)
    for mutation in mutations_of(plan):
        try:
            found = native(MUTATIONS[mutation](plan), ids)
        except InvalidValueError:
            assert mutation == "norm order"  # a layer that norms on both sides has no other order: it is refused
            continue
        assert miss(found, expected) > MISS * FLOAT32, mutation


@pytest.mark.parametrize("kv", ["fp16", "bf16", "int8", "int4"])
@pytest.mark.parametrize("name", ["llama", "llama head size", "llama one key head", "mistral"])
def test_rounded_caches(name, kv):
    checkpoint, ids, expected = case(name)
    found = model_of(checkpoint, kv=kv, context=len(ids)).forward(ids)
    cost = typical(forward(plan_of(checkpoint), ids, kv=kv), expected)
    assert cost / COST < typical(found, expected) < cost * COST


@pytest.mark.parametrize("form", ["int8/g32", "int6/g32", "int4/g32/fp16/min", "int3/axis", "int2/g16/fp16/min"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_quantised_weights(name, form):
    """Against transformers with the same weights dequantised: on float inputs exactly, on int8 inputs nearly."""
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
    expected = torch_output(torch_model, ids)
    assert miss(native(on_floats(plan), ids), expected) < FLOAT32
    cost = typical(forward(plan, ids, activations="plan"), expected)
    assert cost / COST < typical(native(plan, ids), expected) < cost * COST


PROMPTS = ("The capital of France is", "Once upon a time, in a small village,", "To bake bread, first",
           "Photosynthesis is the process by which", "The three laws of motion state that",
           "def fibonacci(n):\n    ", "In 1969, the first people", "My favourite animal is the", "Dear Sir or Madam,\n",
           "Rain falls because")


@pytest.fixture(scope="module")
def smollm2_native(smollm2):
    with collect_notices():
        return model_of(smollm2.checkpoint, context=1024, threads=2, cache=False)


def greedy_by_torch(smollm2, model, ids: list[int], n: int) -> list[int]:
    """ids and torch's greedy continuation.

    The engine drafts it and torch reads the draft at once; what torch would have chosen otherwise is put right, and
    drafted on from there.
    """
    text = list(ids)
    while len(text) < len(ids) + n:
        model.reset()
        draft = text + model.generate(text, max_tokens=len(ids) + n - len(text), ignore_eos=True).result().ids
        choices = smollm2.output(draft[:-1]).argmax(1)[len(text) - 1:].tolist()
        agreed = next((i for i, c in enumerate(choices) if c != draft[len(text) + i]), None)
        text = draft if agreed is None else [*draft[:len(text) + agreed], choices[agreed]]
    return text


def test_smollm2_makes_the_same_choices(smollm2, smollm2_native):
    """Teacher-forced greedy choices over 64-token continuations of ten prompts: at least 95 % equal torch's."""
    same = total = 0
    for prompt in PROMPTS:
        ids = smollm2.tokenizer.encode(prompt, add_special=False)
        text = greedy_by_torch(smollm2, smollm2_native, ids, 64)
        found = smollm2_native.forward(text[:-1])[len(ids) - 1:].argmax(1)
        same += int((found == np.array(text[len(ids):])).sum())
        total += len(found)
    assert total == 640
    assert same >= 0.95 * total, same


def test_smollm2_perplexity(smollm2_native, lee_text):
    assert smollm2_native.perplexity(lee_text, windows=8) == pytest.approx(33.060, rel=0.01)


def test_smollm2_on_float_inputs_is_torchs_model(smollm2):
    """Q4_1 weights as they are, activations and cache in float32: float arithmetic is all that differs."""
    ids = np.asarray(smollm2.tokenizer.encode("The river that runs through Paris is the Seine. " * 6), np.int32)[:64]
    expected = smollm2.output(ids)
    plan = on_floats(plan_of(smollm2.checkpoint))
    assert miss(native(plan, ids, threads=2), expected) < FLOAT32
    for mutation in ("rope base", "head order", "mask"):
        assert miss(native(MUTATIONS[mutation](plan), ids, threads=2), expected) > 100 * FLOAT32, mutation


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


@pytest.mark.parametrize(("form", "least"), [("fp16", 0.999999), ("bf16", 0.9999), ("int8/g32/fp16", 0.999)])
def test_minilm_in_fewer_bits(minilm, form, least):
    """Embeddings keep their direction within the bound of the format; the format is in use, for they are not exact."""
    from real_models import mean_pooled

    texts = ["A dog runs across the field.", "Interest rates rose by half a point.", "x", "Straße, naïve café: 北京 😀",
             "It was the best of times, it was the worst of times, it was the age of wisdom. " * 8,
             "def mean(values): return sum(values) / len(values)"]
    with collect_notices():
        model, exact = (model_of(minilm.checkpoint, threads=2, format=name, cache=False) for name in (form, None))
    found, expected = model.embed(texts).astype(np.float64), mean_pooled(minilm, texts).astype(np.float64)
    cosine = (found * expected).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)
    assert cosine.min() >= least, cosine
    assert np.abs(found - exact.embed(texts)).max() > 1e-5
