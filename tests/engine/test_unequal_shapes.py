"""Layers of unequal shapes in the engine, against a transcription in NumPy and against the same layers padded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from cut_checkpoint import SHAPES, cut_checkpoint
from edgewise.compress.walk import blocks_of
from edgewise.core.checkpoint import Checkpoint
from edgewise.core.errors import FormatError, UnsupportedError
from edgewise.core.shapes import shapes_of
from edgewise.core.storage import Dense
from edgewise.engine.archs import plan_of
from edgewise.engine.calibrate import EngineStats
from edgewise.engine.loading import load, model_of, session_of
from edgewise.engine.memory import kv_bytes, scratch_bytes
from edgewise.formats.equal_shapes import equal_shapes
from edgewise.formats.folder import read_folder
from edgewise.formats.folder_writer import write_folder

TOKENS = np.random.default_rng(5).integers(4, 260, 150).astype(np.int32)


def transcription(checkpoint: Checkpoint, ids: NDArray[np.int32]) -> NDArray[np.float64]:
    """Logits of every position, one position, head and pair at a time."""
    shapes = shapes_of(checkpoint.config)
    assert shapes is not None
    size, eps = checkpoint.config["head_dim"], checkpoint.config["rms_norm_eps"]
    theta = checkpoint.config["rope_theta"] ** (-np.arange(0, size, 2) / size)

    def get(name: str) -> NDArray[np.float64]:
        return checkpoint.tensors[f"{name}.weight"].dense().astype(np.float64)

    def normed(x: NDArray[np.float64], name: str) -> NDArray[np.float64]:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * get(name)

    h = get("model.embed_tokens")[ids]
    for i, shape in enumerate(shapes):
        layer = f"model.layers.{i}."
        if shape.heads:
            x = normed(h, f"{layer}input_layernorm")
            q, k, v = (x @ get(f"{layer}self_attn.{part}_proj").T for part in "qkv")
            q, k = q.reshape(len(ids), shape.heads, -1), k.reshape(len(ids), shape.kv_heads, -1)
            v, half = v.reshape(len(ids), shape.kv_heads, -1), shape.key_dim // 2
            group = shape.heads // shape.kv_heads

            def turned(x: NDArray[np.float64], position: int, own: tuple[int, ...],
                       half: int = half) -> NDArray[np.float64]:
                y = x.copy()
                for j, pair in enumerate(own):
                    angle = position * theta[pair]
                    y[j] = x[j] * np.cos(angle) - x[j + half] * np.sin(angle)
                    y[j + half] = x[j + half] * np.cos(angle) + x[j] * np.sin(angle)
                return y

            out = np.zeros((len(ids), shape.heads, shape.value_dim))
            for head in range(shape.heads):
                kv = head // group
                own = tuple(range(half)) if shape.pairs is None else shape.pairs[kv]
                keys = np.stack([turned(k[p, kv], p, own) for p in range(len(ids))])
                for p in range(len(ids)):
                    scores = keys[:p + 1] @ turned(q[p, head], p, own) * size**-0.5
                    weights = np.exp(scores - scores.max())
                    out[p, head] = weights / weights.sum() @ v[:p + 1, kv]
            h = h + out.reshape(len(ids), -1) @ get(f"{layer}self_attn.o_proj").T
        if shape.width:
            x = normed(h, f"{layer}post_attention_layernorm")
            gate = x @ get(f"{layer}mlp.gate_proj").T
            h = h + (gate / (1 + np.exp(-gate)) * (x @ get(f"{layer}mlp.up_proj").T)) @ get(f"{layer}mlp.down_proj").T
    return np.asarray(normed(h, "model.norm") @ get("model.embed_tokens").T)


def logits_of(checkpoint: Checkpoint, ids: NDArray[np.int32] = TOKENS, step: int = 0, **options: object
              ) -> NDArray[np.float32]:
    """step: tokens in a pass; 0: all."""
    session = session_of(plan_of(checkpoint), **options)  # type: ignore[arg-type]
    made = []
    for start in range(0, len(ids), step or len(ids)):
        part = ids[start:start + (step or len(ids))]
        session.forward(part, np.zeros(len(part), np.int32))
        made.append(np.asarray(session.logits(np.arange(len(part), dtype=np.int32))).copy())
    return np.concatenate(made)


def test_logits_are_those_of_the_transcription() -> None:
    checkpoint = cut_checkpoint()
    np.testing.assert_allclose(logits_of(checkpoint, TOKENS[:40]), transcription(checkpoint, TOKENS[:40]),
                               rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("kv", ["fp32", "fp16", "bf16", "int8", "int4"])
def test_bits_do_not_depend_on_how_a_text_is_cut_or_on_threads(kv: str) -> None:
    checkpoint = cut_checkpoint()
    whole = logits_of(checkpoint, kv=kv)
    for step, threads in ((1, 2), (7, 1), (64, 2)):
        np.testing.assert_array_equal(logits_of(checkpoint, step=step, kv=kv, threads=threads), whole)


@pytest.mark.parametrize(("kv", "bound"), [("fp32", 1e-4), ("fp16", 1e-2), ("bf16", 5e-2), ("int8", 5e-2)])
def test_layers_padded_with_zeros_give_the_same(kv: str, bound: float) -> None:
    checkpoint = cut_checkpoint()
    padded = equal_shapes(checkpoint)
    assert shapes_of(padded.config) is None
    given, expected = logits_of(checkpoint, kv=kv), logits_of(padded, kv=kv)
    assert np.abs(given - expected).max() < bound * np.abs(expected).max()


@pytest.mark.parametrize("kv", ["fp32", "fp16", "bf16", "int8", "int4"])
def test_memory_is_predicted(kv: str) -> None:
    plan = plan_of(cut_checkpoint())
    session = session_of(plan, kv=kv, context=200, batch=48, slots=2, threads=2)
    assert kv_bytes(plan, kv, 200, 2, 48) == session.kv_nbytes
    assert scratch_bytes(plan, 200, 48, 2, kv=kv, slots=2) == session.scratch_nbytes


def test_a_cut_layer_keeps_less() -> None:
    plan = plan_of(cut_checkpoint())
    assert kv_bytes(plan, "fp16", 256) < 0.7 * kv_bytes(plan_of(equal_shapes(cut_checkpoint())), "fp16", 256)


def test_a_folder_keeps_the_shapes_and_a_plain_one_is_padded(tmp_path: Path) -> None:
    checkpoint = cut_checkpoint()
    ours = read_folder(write_folder(checkpoint, tmp_path / "ours"))
    assert shapes_of(ours.config) == SHAPES
    assert '"edgewise-llama"' in (tmp_path / "ours" / "config.json").read_text("utf-8")
    np.testing.assert_array_equal(logits_of(ours), logits_of(checkpoint))
    plain = read_folder(write_folder(checkpoint, tmp_path / "plain", dense=True))
    assert shapes_of(plain.config) is None
    assert '"model_type": "llama"' in (tmp_path / "plain" / "config.json").read_text("utf-8")
    np.testing.assert_allclose(logits_of(plain), logits_of(checkpoint), rtol=1e-3, atol=1e-3)


def test_a_model_generates_and_a_window_slides_over_it(tmp_path: Path) -> None:
    write_folder(cut_checkpoint(), tmp_path / "ours")
    model = load(tmp_path / "ours", format="int8/g32/fp16", cache=False)
    assert len(list(model.generate("abc", max_tokens=4))) > 0
    endless = model_of(cut_checkpoint(), attention="sink=4,window=16", cache=False)
    assert endless.endless


def test_statistics_are_gathered_of_the_parts_that_are_there() -> None:
    checkpoint = cut_checkpoint()
    source = EngineStats(checkpoint, [TOKENS[:32], TOKENS[32:60]], gram=True)
    widths = {}
    for block in blocks_of(checkpoint):
        for group in block.groups:
            found = source.stats(block, group, checkpoint.tensors)
            assert found is not None
            widths[block.index, group.site] = len(found.min)
        source.leave(block, checkpoint.tensors)
    assert widths[1, "output"] == 40
    assert widths[1, "down"] == 72
    assert (2, "attention") not in widths
    assert (3, "down") not in widths
    assert widths[4, "output"] == 48


@pytest.mark.parametrize(("change", "message"), [
    ({"heads": 3}, "multiple of kv_heads"), ({"key_dim": 10}, "pairs"), ({"width": -1}, "width is -1"),
    ({"extra": 1}, "'extra' unknown"), ({"pairs": [[0, 1], [9, 2]]}, "ascending"), ({"heads": True}, "heads is True")])
def test_a_wrong_entry_is_named(change: dict[str, object], message: str) -> None:
    checkpoint = cut_checkpoint()
    entries = [shape.to_json() for shape in SHAPES]
    entries[1] |= change
    with pytest.raises(FormatError, match=r"layer_shapes\[1\]") as error:
        plan_of(replace(checkpoint, config={**checkpoint.config, "layer_shapes": entries}))
    assert message in str(error.value)


def test_wrong_lists_are_named() -> None:
    checkpoint = cut_checkpoint()
    for given in ([], "x", [1] * 5):
        with pytest.raises(FormatError, match="layer_shapes"):
            plan_of(replace(checkpoint, config={**checkpoint.config, "layer_shapes": given}))
    entries = [shape.to_json() for shape in SHAPES]
    entries[1].pop("pairs")
    with pytest.raises(FormatError, match="pairs says which"):
        plan_of(replace(checkpoint, config={**checkpoint.config, "layer_shapes": entries}))


def test_a_family_that_norms_whole_heads_refuses_fewer_pairs() -> None:
    checkpoint = cut_checkpoint(SHAPES[1:2])
    norms = {f"model.layers.0.self_attn.{part}_norm.weight": Dense(np.ones(16, np.float32)) for part in "qk"}
    with pytest.raises(UnsupportedError, match="normed as a whole"):
        plan_of(replace(checkpoint, arch="qwen3", tensors={**checkpoint.tensors, **norms}))
