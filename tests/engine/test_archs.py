"""Every family against `transformers` on small random models, and what a wrong checkpoint says.

A mutation is a plan with one mistake; each must miss the tolerance widely, else the agreement would prove little.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
import tiny_models
from reference import MUTATIONS, forward, mutations_of

from edgewise.core.errors import collect_notices
from edgewise.engine.archs import plan_of

pytestmark = pytest.mark.slow

# Largest difference over the largest output. transformers rounds each step to float32; three layers with peaked
# attention carry that on. Encoders renormalise after each part and so lose less.
DECODER_TOLERANCE = 1e-5
ENCODER_TOLERANCE = 2e-6
DETECTED = 20  # times the tolerance

NAMES = [*tiny_models.DECODERS, *tiny_models.ENCODERS]
RUNS_IN_ALL = ["rope base", "head order", "mask", "attention norm epsilon", "feed-forward norm epsilon"]


@lru_cache(maxsize=1)
def _case(name: str):
    """ids, what transformers says, the plan, and the tolerance."""
    torch = pytest.importorskip("torch")
    torch.set_num_threads(2)
    model = tiny_models.build(name)
    ids = tiny_models.ids_of(model)
    with collect_notices() as notices:
        plan = plan_of(tiny_models.checkpoint_of(model))
    tolerance = DECODER_TOLERANCE if plan.kind == "decoder" else ENCODER_TOLERANCE
    return ids, tiny_models.torch_output(model, ids), plan, tolerance, tuple(notices)


def _miss(plan, ids, expected) -> float:
    """Largest difference of the reference executor, in units of the largest expected output."""
    return float(np.abs(forward(plan, ids) - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("name", NAMES)
def test_agrees_with_transformers_and_rejects_mistakes(name):
    ids, expected, plan, tolerance, _ = _case(name)
    assert len(ids) >= 64
    assert _miss(plan, ids, expected) < tolerance
    wrong = mutations_of(plan)
    if plan.kind == "decoder":
        assert set(RUNS_IN_ALL) - {"head order"} <= set(wrong)
    for mutation in wrong:
        assert _miss(MUTATIONS[mutation](plan), ids, expected) > DETECTED * tolerance, mutation


@pytest.mark.parametrize("name", tiny_models.ENCODERS)
def test_token_types_are_added(name):
    import torch

    model = tiny_models.build(name)
    types = model.config.type_vocab_size
    ids = tiny_models.ids_of(model, 16)
    kinds = np.arange(16) % types
    plan = plan_of(tiny_models.checkpoint_of(model))
    expected = tiny_models.torch_output(model, ids, token_type_ids=torch.tensor(kinds)[None])
    got = forward(plan, ids, token_types=kinds)
    assert np.abs(got - expected).max() / np.abs(expected).max() < ENCODER_TOLERANCE


def test_dynamic_scaling_ends_the_context_and_says_so():
    _, _, plan, _, notices = _case("llama rope dynamic")
    assert plan.context == 256
    assert [n.kind for n in notices] == ["ignored"]
    assert "dynamic" in notices[0].message


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_former_configuration_gives_the_same_plan(name):
    """`rope_scaling` and `rope_theta` beside it, as transformers 4 wrote; gamma and beta, as TensorFlow did."""
    from dataclasses import replace

    if name == "llama":
        checkpoint = tiny_models.checkpoint_of(tiny_models.build("llama rope yarn"))
        config = dict(checkpoint.config)
        parameters = dict(config.pop("rope_parameters"))
        config["rope_theta"] = parameters.pop("rope_theta")
        config["rope_scaling"] = {"type": parameters.pop("rope_type"), **parameters}
        older = replace(checkpoint, config=config)
    else:
        checkpoint = tiny_models.checkpoint_of(tiny_models.build("bert"))
        older = replace(checkpoint, tensors={
            "bert." + n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
            for n, t in checkpoint.tensors.items()})
    ids = np.arange(3, 20)
    with collect_notices():
        np.testing.assert_array_equal(forward(plan_of(older), ids), forward(plan_of(checkpoint), ids))


@pytest.mark.parametrize("name", [
    "llama tied", "llama biases", "mistral", "bert", "roberta", "xlm-roberta", "phi3 long", "gemma3", "mixtral",
    "qwen2 moe", "qwen3 moe"])
def test_the_folder_that_transformers_writes_gives_the_same_plan(name, tmp_path):
    from edgewise.formats import read_folder

    model = tiny_models.build(name)
    checkpoint = read_folder(tiny_models.save(model, tmp_path / "model"))
    ids = tiny_models.ids_of(model, 16)
    with collect_notices(strict=True):
        plan = plan_of(checkpoint)
    np.testing.assert_array_equal(forward(plan, ids), forward(plan_of(tiny_models.checkpoint_of(model)), ids))
