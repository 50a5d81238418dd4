"""Statistics by hooks: the engine's, over families, groups of queries and tied embeddings."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tiny_models import build, checkpoint_of, ids_of  # noqa: E402

from edgewise import models  # noqa: E402
from edgewise.compress.walk import blocks_of, walk  # noqa: E402
from edgewise.core.checkpoint import Step  # noqa: E402
from edgewise.core.errors import InvalidValueError, UnsupportedError  # noqa: E402
from edgewise.core.numbers import QuantFormat, quantize  # noqa: E402
from edgewise.core.storage import QuantizedTensor  # noqa: E402
from edgewise.engine.calibrate import EngineStats  # noqa: E402
from edgewise.engine.loading import model_of  # noqa: E402
from edgewise.train.hooks import TorchStats, gather  # noqa: E402

pytestmark = pytest.mark.slow

CLOSE = 5e-5
"""Relative to a linear's largest input: float32 arithmetic of a few layers in another order."""
FORMAT = QuantFormat.parse("int3/g32/fp16/min")
FAMILIES = ["llama", "llama tied", "llama one key head", "llama biases", "mistral", "qwen2", "qwen3", "phi3", "gemma3",
            "bert", "roberta"]


def agree(found, expected, name):
    assert found.count == expected.count
    size = expected.absmax.max()
    for field, bound in (("min", size), ("max", size), ("mean", size), ("mean_square", size**2)):
        assert np.abs(getattr(found, field) - getattr(expected, field)).max() < CLOSE * bound, (name, field)
    if expected.gram is not None:
        assert np.abs(found.gram - expected.gram).max() < CLOSE * np.abs(expected.gram).max(), name


def change(group, tensors, stats):
    made = {}
    for name in group.names:
        codes, scales, minima = quantize(tensors[name].dense(), FORMAT)
        made[name] = QuantizedTensor(codes, scales, FORMAT, minima=minima)
    return made


@pytest.mark.parametrize("name", FAMILIES)
def test_whole_sequences_give_what_the_engine_gives(name):
    model = build(name)
    texts = [ids_of(model, n, seed=n) for n in (70, 3, 41)]
    found = gather(model, texts, gram=True)
    run = model_of(checkpoint_of(model), threads=1, kv="fp32", context=100)
    expected = run.calibrate(texts, gram=True)
    names = {name for name in expected if not name.endswith("lm_head.weight")}
    assert set(found) == names
    assert found.keys() >= {name for block in blocks_of(checkpoint_of(model)) for g in block.groups for name in g.names}
    for linear in names:
        agree(found[linear], expected[linear], linear)


def test_linears_of_one_input_share_it_and_the_output_layer_is_left_out():
    stats = gather(build("llama tied"), [[5, 6, 7]])
    first = "model.layers.0.self_attn"
    assert stats[f"{first}.q_proj.weight"] is stats[f"{first}.v_proj.weight"]
    assert stats[f"{first}.q_proj.weight"] is not stats[f"{first}.o_proj.weight"]
    assert not any("lm_head" in name or "embed" in name for name in stats)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("sequential", [False, True])
def test_block_by_block_they_are_the_engines(name, sequential):
    model = build(name)
    checkpoint = checkpoint_of(model)
    texts = [ids_of(model, n, seed=n) for n in (70, 3, 41)]
    engine = EngineStats(checkpoint, texts, gram=True, sequential=sequential, threads=1)
    hooks = TorchStats(models.load(checkpoint), texts, gram=True, sequential=sequential)

    class Both:
        groups = 0

        def stats(self, block, group, tensors):
            expected = engine.stats(block, group, tensors)
            agree(hooks.stats(block, group, tensors), expected, group)
            self.groups += 1
            return expected

        def leave(self, block, tensors):
            engine.leave(block, tensors)
            hooks.leave(block, tensors)

    both = Both()
    walk(checkpoint, change, both, step=Step("rounded"))
    assert both.groups == 4 * len(blocks_of(checkpoint))


def test_squared_gradients_are_those_of_each_sequence():
    model = build("llama")
    texts = [ids_of(model, n, seed=n) for n in (12, 7)]
    stats = gather(model, texts, gradients=True)
    assert not any(parameter.grad is not None for parameter in model.parameters())
    name = "model.layers.1.mlp.up_proj.weight"
    weight = dict(model.named_parameters())[name]
    expected = np.zeros(weight.shape)
    for ids in texts:
        logits = model(torch.tensor(ids)[None]).logits[0]
        picked = torch.log_softmax(logits[:-1], -1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
        expected += torch.autograd.grad(-picked.sum(), weight)[0].double().numpy() ** 2
    assert np.abs(stats[name].gradient_square - expected).max() < 1e-5 * expected.max()
    with pytest.raises(UnsupportedError, match="at least two tokens"):
        gather(model, [[3]], gradients=True)


def test_smollm2_agrees():
    """Grouped queries and a tied output layer, float32, three sequences."""
    from edgewise.formats.sources import open_checkpoint

    checkpoint = open_checkpoint("smollm2")
    texts = [np.random.default_rng(n).integers(0, 40000, n) for n in (64, 9, 130)]
    hooks = TorchStats(models.load(checkpoint), texts)
    engine = EngineStats(checkpoint, texts, threads=1)
    for block in blocks_of(checkpoint):
        for group in block.groups:
            found, expected = (source.stats(block, group, {}) for source in (hooks, engine))
            size = expected.absmax.max()
            for field, bound in (("min", size), ("max", size), ("mean", size), ("mean_square", size**2)):
                # Thirty layers, some of whose states are a thousand times the others.
                assert np.abs(getattr(found, field) - getattr(expected, field)).max() < 1e-3 * bound, (group, field)
        for source in (hooks, engine):
            source.leave(block, {})


def test_refusals():
    model = build("llama")
    with pytest.raises(InvalidValueError, match="at least one sequence"):
        gather(model, [])
    with pytest.raises(InvalidValueError, match="at least one token"):
        TorchStats(model, [[]])
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 2] = float("nan")
    with pytest.raises(InvalidValueError, match=r"layers\.0\.mlp\.down_proj\.weight.*input 3 is nan"):
        gather(model, [[4, 5, 6]])
