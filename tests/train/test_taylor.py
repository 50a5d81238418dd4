"""First-order importance, against the loss itself and against a transcription."""

from __future__ import annotations

import numpy as np
import pytest

from edgewise.compress.surgery.operations import zero
from tiny_checkpoint import tiny_checkpoint

pytestmark = pytest.mark.slow
IDS = np.random.default_rng(0).integers(4, 260, (3, 40))


def test_importance_is_the_sum_of_what_each_weight_would_change() -> None:
    import torch

    from edgewise.models.loader import load
    from edgewise.train.taylor import importance_of

    checkpoint = tiny_checkpoint()
    found = importance_of(checkpoint, IDS)
    model = load(checkpoint).requires_grad_(True)
    sum(model(torch.from_numpy(row[None]), labels=torch.from_numpy(row[None])).loss for row in IDS).backward()
    mlp, attention = model.model.layers[1].mlp, model.model.layers[1].self_attn
    terms = {name: (p * p.grad).abs().detach().double().numpy() for name, p in [
        *mlp.named_parameters(), *attention.named_parameters()]}
    for n in (0, 5, 127):
        expected = (terms["gate_proj.weight"][n].sum() + terms["up_proj.weight"][n].sum()
                    + terms["down_proj.weight"][:, n].sum())
        assert found["1.width"][n] == pytest.approx(expected, rel=1e-4)
    expected = (terms["q_proj.weight"][32:].sum() + terms["k_proj.weight"][16:].sum()
                + terms["v_proj.weight"][16:].sum() + terms["o_proj.weight"][:, 32:].sum())
    assert found["1.heads"][1] == pytest.approx(expected, rel=1e-4)


def test_a_unit_that_is_zero_matters_nothing() -> None:
    from edgewise.train.taylor import importance_of

    found = importance_of(zero(tiny_checkpoint(), {"0.width": [3], "1.heads": [0]}), IDS)
    assert found["0.width"][3] == 0
    assert found["1.heads"][0] == 0
    assert (np.delete(found["0.width"], 3) > 0).all()
