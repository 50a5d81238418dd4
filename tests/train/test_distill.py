"""Distillation: both directions against a transcription, on text and on policy, killed and gone on with."""

from __future__ import annotations

import numpy as np
import pytest

from edgewise.compress.prune.masks import Prune, by_magnitude
from edgewise.compress.surgery.groups import groups_of
from edgewise.compress.surgery.operations import cut, norms_of
from edgewise.core.checkpoint import Step
from edgewise.core.errors import InvalidValueError
from edgewise.core.shapes import shapes_of
from edgewise.core.storage import Dense
from edgewise.engine.archs import plan_of
from edgewise.engine.loading import session_of
from tiny_checkpoint import tiny_checkpoint

pytestmark = pytest.mark.slow
IDS = np.random.default_rng(0).integers(4, 260, 4000)
TEACHER = tiny_checkpoint(layers=2)
SHORT = {"steps": 60, "batch": 8, "length": 32, "prompt": 8, "rate": 3e-3}


def student():
    """The teacher without an eighth of its neurons and values, and with the gains of its norms spoilt."""
    rng = np.random.default_rng(1)
    norms = norms_of(TEACHER, groups_of(TEACHER)["0.width"])
    smaller = cut(TEACHER, {"0.width": np.argsort(-norms)[:112], "1.values.0": range(14), "1.values.1": range(14)})
    tensors = {name: smaller.tensors[name] for name in smaller.tensors}
    for name in [name for name in tensors if "layernorm" in name]:
        tensors[name] = Dense((tensors[name].dense() * np.exp(0.5 * rng.standard_normal(64))).astype(np.float32))
    return smaller.with_tensors(tensors, Step("spoil"))


def kl_of(checkpoint):
    """(forward, reverse) KL to the teacher on tokens that were not trained on."""
    ids = np.random.default_rng(9).integers(4, 260, 128).astype(np.int32)
    logs = []
    for each in (TEACHER, checkpoint):
        session = session_of(plan_of(each))
        session.forward(ids, np.zeros(len(ids), np.int32))
        logits = np.asarray(session.logits(np.arange(len(ids), dtype=np.int32))).astype(np.float64)
        logs.append(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))
    p, q = logs
    return float((np.exp(p) * (p - q)).sum(axis=1).mean()), float((np.exp(q) * (q - p)).sum(axis=1).mean())


def test_divergences_are_their_transcriptions() -> None:
    import torch

    from edgewise.train.distill import forward_kl, reverse_kl

    rng = np.random.default_rng(0)
    teacher, own = rng.standard_normal((2, 5, 11))
    for temperature in (1.0, 2.5):
        for row in range(5):
            p = [np.exp(v / temperature) / sum(np.exp(teacher[row] / temperature)) for v in teacher[row]]
            q = [np.exp(v / temperature) / sum(np.exp(own[row] / temperature)) for v in own[row]]
            expected = [sum(a * np.log(a / b) for a, b in zip(one, other, strict=True)) * temperature**2
                        for one, other in ((p, q), (q, p))]
            given = [kl(torch.tensor(teacher[row]), torch.tensor(own[row]), temperature).item()
                     for kl in (forward_kl, reverse_kl)]
            np.testing.assert_allclose(given, expected, rtol=1e-5)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_a_cut_model_heals_and_keeps_its_shapes(direction: str) -> None:
    from edgewise.train.distill import Distill, distill

    before = student()
    after = distill(before, TEACHER, IDS, Distill(direction=direction, **SHORT))
    which = 0 if direction == "forward" else 1
    assert kl_of(after)[which] < 0.5 * kl_of(before)[which]
    assert shapes_of(after.config) == shapes_of(before.config)
    assert after.lineage[-1].config["direction"] == direction


def test_a_student_learns_from_what_it_says_itself() -> None:
    from edgewise.train.distill import Distill, distill

    before = student()
    after = distill(before, TEACHER, IDS, Distill(
        direction="reverse", on_policy=1.0, **{**SHORT, "length": 16, "prompt": 4}))
    assert kl_of(after)[1] < 0.6 * kl_of(before)[1]


def test_what_is_said_follows_the_models_own_chances() -> None:
    import torch

    from edgewise.models.loader import load
    from edgewise.train.distill import sampled

    model = load(TEACHER)
    prompt = torch.from_numpy(IDS[None, :6])
    with torch.no_grad():
        chances = torch.softmax(model(prompt).logits[0, -1] / 0.5, dim=-1).numpy()
    said = sampled(model, prompt.repeat(3000, 1), 1, 0.5, 7)[:, -1].numpy()
    counts = np.bincount(said, minlength=len(chances)) / len(said)
    likely = np.argsort(-chances)[:5]
    np.testing.assert_allclose(counts[likely], chances[likely], atol=5 * np.sqrt(0.25 / 3000))
    again = sampled(model, prompt, 9, 1.0, 7)
    assert torch.equal(again, sampled(model, prompt, 9, 1.0, 7))
    assert again.shape == (1, 15)


def test_a_killed_run_ends_where_it_would_have(tmp_path, monkeypatch) -> None:
    from edgewise.train import distill as module
    from edgewise.train.kept import Kept

    config = module.Distill(on_policy=0.5, **{**SHORT, "steps": 6, "batch": 2})
    whole = module.distill(student(), TEACHER, IDS, config)

    class Killed(Exception):
        pass

    def until(title, done, total):
        if done == 3:
            raise Killed

    class Always(Kept):
        def save(self, done, *, last=False):
            super().save(done, last=True)

    monkeypatch.setattr(module, "Kept", Always)
    with pytest.raises(Killed):
        module.distill(student(), TEACHER, IDS, config, state=tmp_path, progress=until)
    steps = []
    resumed = module.distill(student(), TEACHER, IDS, config, state=tmp_path,
                             progress=lambda title, done, total: steps.append(done))
    assert steps == [4, 5, 6]
    for name in whole.tensors:
        np.testing.assert_array_equal(resumed.tensors[name].dense(), whole.tensors[name].dense())


def test_zeros_stay_zero_unless_they_need_not() -> None:
    from edgewise.train.distill import Distill, distill

    name = "model.layers.0.mlp.up_proj.weight"
    made, mask = by_magnitude(TEACHER.tensors[name].dense(), Prune(0.5))
    pruned = TEACHER.with_tensors({**TEACHER.tensors, name: Dense(made)}, Step("prune"))
    config = {**SHORT, "steps": 3}
    healed = distill(pruned, TEACHER, IDS, Distill(**config)).tensors[name].dense()
    assert (healed[mask] == 0).all()
    assert (healed[~mask] != made[~mask]).any()
    free = distill(pruned, TEACHER, IDS, Distill(keep_zeros=False, **config)).tensors[name].dense()
    assert (free[mask] != 0).any()


def test_wrong_settings_are_named() -> None:
    from edgewise.train.distill import Distill, distill

    for given in ({"direction": "sideways"}, {"temperature": 0.0}, {"on_policy": 2.0}, {"prompt": 256}, {"steps": 0}):
        with pytest.raises(InvalidValueError):
            Distill(**given)
    with pytest.raises(InvalidValueError, match="longer one"):
        distill(TEACHER, TEACHER, IDS[:20], Distill(**SHORT))
    with pytest.raises(InvalidValueError, match="one vocabulary"):
        distill(TEACHER.with_tensors(TEACHER.tensors, Step("test"), vocab_size=100), TEACHER, IDS, Distill(**SHORT))
