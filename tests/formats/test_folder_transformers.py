"""Folders and transformers: a plain export loads there with equal logits, one of ours fails there and loads here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgewise.core.checkpoint import Checkpoint
from edgewise.core.numbers import BF16, FP16, FP32, QuantFormat, quantize
from edgewise.core.storage import Dense, QuantizedTensor, Stored
from edgewise.formats.folder import read_folder
from edgewise.formats.folder_writer import write_folder

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The folder and the model of a random two-layer Llama."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False)
    model = transformers.LlamaForCausalLM(config).eval()
    folder = tmp_path_factory.mktemp("llama") / "m"
    model.save_pretrained(folder)
    return folder, model


def logits(model: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.arange(40).reshape(1, 40)).logits.float().numpy()


def load(folder: Path, **options: Any) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def test_what_transformers_saves_is_read_and_written_back(tiny: tuple[Path, Any], tmp_path: Path) -> None:
    folder, model = tiny
    read = read_folder(folder)
    state = model.state_dict()
    assert set(read.tensors) == set(state)
    assert all(np.array_equal(read.tensors[name].dense(), value.numpy()) for name, value in state.items())
    write_folder(read, tmp_path / "m", max_shard_bytes=20_000)
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 1
    assert np.array_equal(logits(load(tmp_path / "m")), logits(model))


@pytest.mark.parametrize("number", [FP32, FP16, BF16], ids=str)
def test_dense_export_loads_with_equal_logits(tiny: tuple[Path, Any], tmp_path: Path, number: Any) -> None:
    import torch

    folder, model = tiny
    dtype = {FP32: torch.float32, FP16: torch.float16, BF16: torch.bfloat16}[number]
    shrunk = quantised(read_folder(folder))
    write_folder(shrunk, tmp_path / "m", dense=number)
    theirs = load(tmp_path / "m", dtype="auto")
    assert theirs.dtype == dtype
    expected = type(model)(model.config).eval()
    # torch rounds the values for the expectation, and both models calculate in float32.
    expected.load_state_dict({name: torch.from_numpy(np.array(shrunk.tensors[name].dense())).to(dtype).float()
                              for name in shrunk.tensors})
    assert np.array_equal(logits(theirs.float()), logits(expected))
    assert not np.array_equal(logits(expected), logits(model))


def quantised(checkpoint: Checkpoint) -> Checkpoint:
    fmt = QuantFormat.parse("int4/g16/fp16/min")

    def shrink(tensor: Stored) -> Stored:
        if len(tensor.shape) != 2:
            return tensor
        codes, scales, minima = quantize(tensor.dense(), fmt)
        return QuantizedTensor(codes, scales, fmt, minima=minima)

    return replace(checkpoint, tensors={name: shrink(checkpoint.tensors[name]) for name in checkpoint.tensors})


def test_a_folder_of_ours_fails_loudly_there(tiny: tuple[Path, Any], tmp_path: Path) -> None:
    import transformers

    write_folder(quantised(read_folder(tiny[0])), tmp_path / "m")
    for loader in (transformers.AutoConfig, transformers.AutoModelForCausalLM, transformers.AutoModel):
        with pytest.raises(ValueError, match="edgewise-llama"):
            loader.from_pretrained(tmp_path / "m")
    back = read_folder(tmp_path / "m")
    assert back.arch == "llama"
    assert back.config["architectures"] == ["LlamaForCausalLM"]
    assert isinstance(back.tensors["model.norm.weight"], Dense)
