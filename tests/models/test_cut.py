"""Decoders of transformers with layers of unequal shapes: the same logits as the engine's, cached or not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cut_checkpoint import SHAPES, cut_checkpoint
from edgewise.core.errors import UnsupportedError
from edgewise.core.shapes import LayerShape
from edgewise.core.storage import Dense
from edgewise.engine.archs import plan_of
from edgewise.engine.loading import session_of
from edgewise.formats.equal_shapes import equal_shapes
from edgewise.formats.folder_writer import write_folder

pytestmark = pytest.mark.slow
TOKENS = np.random.default_rng(5).integers(4, 260, 60).astype(np.int32)


def _engine(checkpoint):  # type: ignore[no-untyped-def]
    session = session_of(plan_of(checkpoint))
    session.forward(TOKENS, np.zeros(len(TOKENS), np.int32))
    return np.asarray(session.logits(np.arange(len(TOKENS), dtype=np.int32)))


def test_torch_agrees_with_the_engine_and_with_padding(tmp_path: Path) -> None:
    import torch

    from edgewise.models.loader import load

    checkpoint = cut_checkpoint()
    model = load(str(write_folder(checkpoint, tmp_path / "cut")))
    ids = torch.from_numpy(TOKENS[None].astype(np.int64))
    with torch.no_grad():
        logits = model(ids).logits[0].numpy()
        padded = load(equal_shapes(checkpoint))(ids).logits[0].numpy()
    np.testing.assert_allclose(logits, _engine(checkpoint), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(logits, padded, rtol=1e-3, atol=1e-3)


def test_a_first_layer_without_attention_counts_positions_all_the_same() -> None:
    import torch

    from edgewise.models.decoding import continued
    from edgewise.models.loader import load

    checkpoint = cut_checkpoint((SHAPES[2], SHAPES[1], SHAPES[0]))
    model, ids = load(checkpoint), torch.from_numpy(TOKENS[None].astype(np.int64))
    with torch.no_grad():
        whole = model(ids).logits[0]
        _, state = continued(model, ids[:, :50])
        then = continued(model, ids[:, 50:], state)[0][0]
    np.testing.assert_allclose(whole.numpy(), _engine(checkpoint), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(then.numpy(), whole[50:].numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch", ["mistral", "qwen2", "qwen3"])
def test_other_families_are_cut_too(arch: str) -> None:
    import torch

    from edgewise.models.loader import load

    shapes = (LayerShape(2, 1, 16, 8, 50), LayerShape(0, 0, 0, 0, 30), LayerShape(4, 2, 16, 16, 0))
    checkpoint = replace(cut_checkpoint(shapes), arch=arch)
    tensors, rng = dict(checkpoint.tensors), np.random.default_rng(3)
    for i, shape in enumerate(shapes):
        if arch == "qwen3" and shape.heads:
            tensors |= {f"model.layers.{i}.self_attn.{part}_norm.weight": Dense(
                rng.uniform(0.5, 1.5, 16).astype(np.float32)) for part in "qk"}
        if arch == "qwen2" and shape.heads:
            for part, rows in (("q", shape.heads * 16), ("k", shape.kv_heads * 16),
                               ("v", shape.kv_heads * shape.value_dim)):
                tensors[f"model.layers.{i}.self_attn.{part}_proj.bias"] = Dense(
                    rng.normal(0, 0.3, rows).astype(np.float32))
    checkpoint = replace(checkpoint, tensors=tensors)
    with torch.no_grad():
        ids = torch.from_numpy(TOKENS[None].astype(np.int64))
        logits = load(checkpoint)(ids).logits[0].numpy()
        padded = load(equal_shapes(checkpoint))(ids).logits[0].numpy()
    np.testing.assert_allclose(logits, _engine(checkpoint), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(logits, padded, rtol=1e-3, atol=1e-3)


def test_a_cut_layer_learns() -> None:
    import torch

    from edgewise.models.loader import load

    model = load(cut_checkpoint()).requires_grad_(True)
    ids = torch.from_numpy(TOKENS[None].astype(np.int64))
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in model.parameters())


def test_encoders_are_refused() -> None:
    from edgewise.models.loader import load
    from tiny_checkpoint import tiny_encoder

    encoder = tiny_encoder()
    with pytest.raises(UnsupportedError, match="layer_shapes"):
        load(replace(encoder, config={**encoder.config, "layer_shapes": [s.to_json() for s in SHAPES[:2]]}))
