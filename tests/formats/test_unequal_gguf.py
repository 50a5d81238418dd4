"""Layers of unequal shapes in GGUF files: said in arrays, or padded; hostile arrays are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from cut_checkpoint import SHAPES, cut_checkpoint
from edgewise.core.checkpoint import Checkpoint
from edgewise.core.errors import EdgewiseError, collect_notices
from edgewise.core.shapes import LayerShape, shapes_of
from edgewise.engine.archs import plan_of
from edgewise.engine.loading import session_of
from edgewise.formats.ggml_blocks import type_of
from edgewise.formats.gguf import read_gguf, read_gguf_raw, write_gguf, write_gguf_raw

SAID = (LayerShape(4, 2, 16, 16, 96), LayerShape(0, 0, 0, 0, 64), LayerShape(2, 2, 16, 16, 32),
        LayerShape(3, 1, 16, 16, 160))
TOKENS = np.random.default_rng(5).integers(4, 260, 40).astype(np.int32)


def _logits(checkpoint: Checkpoint) -> NDArray[np.float32]:
    session = session_of(plan_of(checkpoint))
    session.forward(TOKENS, np.zeros(len(TOKENS), np.int32))
    return np.asarray(session.logits(np.arange(len(TOKENS), dtype=np.int32)))


def test_arrays_come_back_with_the_same_bits(tmp_path: Path) -> None:
    checkpoint = cut_checkpoint(SAID)
    write_gguf(checkpoint, tmp_path / "m.gguf")
    read = read_gguf(tmp_path / "m.gguf")
    keys, _ = read_gguf_raw(tmp_path / "m.gguf")
    assert keys["general.architecture"] == "deci"
    assert keys["deci.attention.head_count"].tolist() == [4, 0, 2, 3]
    assert shapes_of(read.config) == SAID
    np.testing.assert_array_equal(_logits(read), _logits(checkpoint))


def test_what_arrays_cannot_say_is_padded(tmp_path: Path) -> None:
    checkpoint = cut_checkpoint(SHAPES)
    with collect_notices() as notices:
        write_gguf(checkpoint, tmp_path / "m.gguf")
    assert any("padded with zeros" in str(notice) for notice in notices)
    read = read_gguf(tmp_path / "m.gguf")
    assert shapes_of(read.config) is None
    np.testing.assert_allclose(_logits(read), _logits(checkpoint), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("damage", [
    {"deci.attention.head_count": np.array([4, 0, 2], np.int32)},
    {"deci.attention.head_count": np.array([4, 0, 2, -3], np.int32)},
    {"deci.attention.head_count_kv": np.array([2, 0, 0, 1], np.int32)},
    {"deci.attention.head_count_kv": np.array([3, 0, 2, 1], np.int32)},
    {"deci.feed_forward_length": np.array([96, 0, 32, 160], np.int32)},
    {"deci.feed_forward_length": np.array([96, 64, 32, 161], np.int32)},
    {"deci.attention.head_count": np.array([4.0, 0, 2, 3], np.float32)},
    {"deci.attention.head_count": np.array([], np.int32)},
])
def test_damaged_arrays_are_refused(tmp_path: Path, damage: dict[str, object]) -> None:
    write_gguf(cut_checkpoint(SAID), tmp_path / "m.gguf")
    keys, tensors = read_gguf_raw(tmp_path / "m.gguf")
    write_gguf_raw(tmp_path / "n.gguf", {**keys, **damage}, {
        name: (type_of(stored) or "F32", stored) for name, stored in tensors.items()})
    with pytest.raises(EdgewiseError):
        plan_of(read_gguf(tmp_path / "n.gguf"))

