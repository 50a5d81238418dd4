"""The plan of real weights against torch, and torch against the numbers that everything else is compared with."""

from __future__ import annotations

import numpy as np
import pytest
from real_models import mean_pooled, perplexity
from reference import MUTATIONS, forward

from edgewise.core.errors import collect_notices
from edgewise.engine.archs import plan_of

pytestmark = pytest.mark.slow

TOLERANCE = 1e-5  # largest difference over the largest output; thirty layers of float32 rounding in torch
PROMPT = ("The capital of France is Paris, and the river that runs through it is the Seine. Its bridges, thirty-seven "
          "of them within the city, are older than most of what stands on either bank; the oldest is called new.")


def _miss(plan, ids, expected) -> float:
    return float(np.abs(forward(plan, ids, dtype=np.float32) - expected).max() / np.abs(expected).max())


def test_smollm2_plan_agrees_with_torch(smollm2):
    ids = smollm2.tokenizer.encode(PROMPT * 2, add_special=False)
    assert len(ids) >= 64
    expected = smollm2.output(ids)
    plan = plan_of(smollm2.checkpoint)
    assert _miss(plan, ids, expected) < TOLERANCE
    for mutation in ("rope base", "rope layout", "head order", "mask", "attention norm epsilon"):
        assert _miss(MUTATIONS[mutation](plan), ids, expected) > 100 * TOLERANCE, mutation


def test_smollm2_weights_stay_quantised(smollm2):
    plan = plan_of(smollm2.checkpoint)
    assert plan.layers[7].feed_forward.down.activation == "int8"
    assert plan.layers[7].feed_forward.down.weight.nbytes < 576 * 1536
    assert plan.head.weight is plan.embedding.weight
    assert (plan.hidden, plan.vocab, len(plan.layers), plan.context) == (576, 49152, 30, 8192)


def test_smollm2_reference_perplexity(lee_ids, lee_losses):
    """design.md's rule: the first eight windows of 512, positions 1 to 511 of each, natural mean."""
    assert len(lee_ids) == 75_678
    assert lee_losses.shape == (8, 511)
    assert perplexity(lee_losses) == pytest.approx(33.060, abs=5e-4)


def test_minilm_plan_agrees_with_torch(minilm):
    ids = minilm.tokenizer.encode(PROMPT * 2)
    assert len(ids) >= 64
    expected = minilm.output(ids)
    with collect_notices() as notices:
        plan = plan_of(minilm.checkpoint)
    assert [(n.kind, "pooler" in n.message) for n in notices if "pooler" in n.message] == [("info", True)]
    assert _miss(plan, ids, expected) < TOLERANCE
    for mutation in ("head order", "mask", "position offset"):
        assert _miss(MUTATIONS[mutation](plan), ids, expected) > 100 * TOLERANCE, mutation


def test_minilm_finds_the_nearer_sentence(minilm):
    near, same, far = mean_pooled(minilm, ["A dog runs across the field.", "A puppy is running over the grass.",
                                           "Interest rates rose by half a point."])
    assert near @ same > 0.5 > near @ far + 0.2
