"""Hugging Face folders: what is read, what is written, and what is never touched."""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy as reference

from edgewise.core.checkpoint import Checkpoint, Step
from edgewise.core.errors import (
    BudgetError,
    EdgewiseWarning,
    FormatError,
    InvalidValueError,
    SourceError,
    UnsupportedError,
    collect_notices,
)
from edgewise.core.numbers import BF16, FP16, FP32, float32_to_bf16
from edgewise.core.storage import Dense
from edgewise.formats import folder_writer as module
from edgewise.formats.folder import is_model_folder, read_folder
from edgewise.formats.folder_writer import write_folder

CONFIG = {"model_type": "llama", "hidden_size": 4, "architectures": ["LlamaForCausalLM"], "eos_token_id": 2}


def make(folder: Path, config: Any = CONFIG, **files: Any) -> Path:
    """A folder with one float32 tensor, config.json and the given files (`__` in a name stands for a dot)."""
    folder.mkdir(exist_ok=True)
    reference.save_file({"model.embed_tokens.weight": np.ones((3, 4), np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return folder


def checkpoint(seed: int = 0, **metadata: Any) -> Checkpoint:
    rng = np.random.default_rng(seed)
    tensors = {"model.embed_tokens.weight": Dense(rng.standard_normal((5, 4)).astype(np.float32)),
               "a": Dense(rng.standard_normal((2, 3)).astype(np.float16), FP16),
               "b": Dense(float32_to_bf16(rng.standard_normal(7).astype(np.float32)), BF16)}
    return Checkpoint("llama", dict(CONFIG), tensors, metadata, (Step("rescale", {"s": 0.1}, "1.2", 7),))


def test_reads_everything_a_folder_says(tmp_path: Path) -> None:
    folder = make(tmp_path / "m", tokenizer__json={"model": {"é": 1}}, generation_config__json={"eos_token_id": [1, 2]},
                  tokenizer_config__json={"chat_template": "{{ x }}", "model_max_length": 9},
                  README__md="---\nlicense: apache-2.0\ntags: []\n---\n# A model")
    read = read_folder(folder)
    assert read.arch == "llama"
    assert read.config == {**CONFIG, "tie_word_embeddings": True}
    assert json.loads(read.metadata["tokenizer"]) == {"model": {"é": 1}}
    assert read.metadata["chat_template"] == "{{ x }}"
    assert read.metadata["tokenizer_config"]["model_max_length"] == 9
    assert read.metadata["generation"] == {"eos_token_id": [1, 2]}
    assert read.metadata["licence"] == "apache-2.0"
    assert read.metadata["name"] == "m"
    assert read.files == (str(folder / "model.safetensors"),)
    assert np.array_equal(read.tensors["model.embed_tokens.weight"].dense(), np.ones((3, 4)))
    assert is_model_folder(folder)
    assert not is_model_folder(tmp_path)


def test_generation_falls_back_to_the_configuration(tmp_path: Path) -> None:
    assert read_folder(make(tmp_path / "m")).metadata["generation"] == {"eos_token_id": 2}


def test_which_chat_template_wins(tmp_path: Path) -> None:
    folder = make(tmp_path / "m", tokenizer_config__json={"chat_template": [
        {"name": "tool", "template": "T"}, {"name": "default", "template": "D"}]})
    with pytest.warns(EdgewiseWarning, match="only 'default' is used"):
        assert read_folder(folder).metadata["chat_template"] == "D"
    (folder / "chat_template.json").write_text('{"chat_template": "J"}')
    assert read_folder(folder).metadata["chat_template"] == "J"
    (folder / "chat_template.jinja").write_text("P")
    assert read_folder(folder).metadata["chat_template"] == "P"


def test_pooling_of_a_sentence_encoder(tmp_path: Path) -> None:
    module_types = ["Transformer", "Pooling", "Normalize", "Dense"]
    folder = make(tmp_path / "m", {"model_type": "bert"}, sentence_bert_config__json={"max_seq_length": 256},
                  modules__json=[{"path": f"{i}_{kind}", "type": f"sentence_transformers.models.{kind}"}
                                 for i, kind in enumerate(module_types)])
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text(
        '{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false, "pooling_mode_max_tokens": true}')
    with pytest.warns(EdgewiseWarning, match="'Dense'"):
        pooling = read_folder(folder).metadata["pooling"]
    assert pooling == {"mode": "cls+max", "normalize": True, "max_tokens": 256}
    (folder / "modules.json").write_text('[{"type": "Pooling", "path": "../../etc"}]')
    with pytest.raises(FormatError, match="not a plain folder name"):
        read_folder(folder)


@pytest.mark.parametrize(("given", "mode"), [
    ({"pooling_mode_lasttoken": True}, "last"), ({"pooling_mode": "weightedmean"}, "weighted_mean"),
    ({"pooling_mode": "cls"}, "cls"), ({"pooling_mode_mean_tokens": False}, None), ({"pooling_mode": "odd"}, None)])
def test_names_of_poolings(tmp_path: Path, given: Any, mode: str | None) -> None:
    folder = make(tmp_path / "m", {"model_type": "bert"}, modules__json=[{"path": "1_Pooling", "type": "x.Pooling"}])
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text(json.dumps(given))
    with collect_notices() as notices:
        read = read_folder(folder)
    assert read.metadata["pooling"]["mode"] == (mode or "mean")
    assert [item.kind for item in notices] == ([] if mode else ["fallback"])
    write_folder(read, tmp_path / "again")
    assert read_folder(tmp_path / "again").metadata["pooling"] == read.metadata["pooling"]
    with pytest.raises(InvalidValueError, match="'odd'"):
        write_folder(checkpoint(pooling={"mode": "odd", "normalize": False}), tmp_path / "odd")
    assert not (tmp_path / "odd").exists()


def test_buffers_are_left_out_and_unknown_integers_are_said(tmp_path: Path) -> None:
    folder = make(tmp_path / "m")
    reference.save_file({"embeddings.position_ids": np.zeros((1, 4), np.int64), "odd": np.zeros(2, np.int32),
                         "w": np.zeros(2, np.float32)}, folder / "model.safetensors")
    with collect_notices() as notices:
        assert set(read_folder(folder).tensors) == {"w"}
    assert [item.kind for item in notices] == ["info", "ignored"]
    assert "odd (I32)" in notices[1].message


@pytest.mark.parametrize(("config", "message"), [
    ("[]", "expected a JSON object"), ("{", "not valid JSON"), ("{}", "no 'model_type'"),
    ('{"model_type": 3}', "no 'model_type'"), ('{"a":' * 5000, "nested too deeply"),
    ('{"model_type": "llama", "model_type": "bert"}', "twice"),
    ('{"model_type": "llama", "edgewise": 1}', "must be an object"),
    ('{"model_type": "llama", "edgewise": {"lineage": [1]}}', "lineage"),
    ('{"model_type": "llama", "edgewise": {"lineage": 1}}', "lineage"),
    ('{"model_type": "llama", "quantization_config": {"quant_method": "edgewise", "version": 1}}', "formats"),
])
def test_hostile_configuration(tmp_path: Path, config: str, message: str) -> None:
    folder = make(tmp_path / "m", config)
    with pytest.raises(FormatError, match=message) as caught:
        read_folder(folder)
    assert caught.value.path == str(folder / "config.json")


def test_other_quantisation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="'quip'"):
        read_folder(make(tmp_path / "m", {**CONFIG, "quantization_config": {"quant_method": "quip"}}))
    with pytest.raises(UnsupportedError, match="newer edgewise"):
        read_folder(make(tmp_path / "m", {**CONFIG, "quantization_config": {"quant_method": "edgewise", "version": 2}}))


def test_missing_folder_and_configuration(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="is not a folder"):
        read_folder(tmp_path / "absent")
    with pytest.raises(SourceError, match=r"no config\.json"):
        read_folder(tmp_path)


def equal(left: Checkpoint, right: Checkpoint) -> None:
    assert sorted(left.tensors) == sorted(right.tensors)
    for name in left.tensors:
        one, two = left.tensors[name], right.tensors[name]
        assert isinstance(one, Dense)
        assert isinstance(two, Dense)
        assert one.number == two.number
        assert np.array_equal(one.data, two.data)


def test_round_trip(tmp_path: Path) -> None:
    metadata = {"tokenizer": b'{"version": "1.0"}', "chat_template": "{{ é }}", "generation": {"eos_token_id": 2},
                "tokenizer_config": {"a": 1}, "licence": "mit", "name": "tiny",
                "pooling": {"mode": "mean", "normalize": True, "max_tokens": 12}}
    original = checkpoint(**metadata)
    assert write_folder(original, tmp_path / "m") == tmp_path / "m"
    back = read_folder(tmp_path / "m")
    equal(original, back)
    assert back.metadata == metadata
    assert back.lineage == original.lineage
    assert back.arch == "llama"
    assert back.config == {**CONFIG, "tie_word_embeddings": True, "torch_dtype": "float32"}
    assert not [path for path in tmp_path.iterdir() if path.name != "m"]
    write_folder(back, tmp_path / "again")
    for path in sorted((tmp_path / "m").rglob("*")):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "again" / path.relative_to(tmp_path / "m")).read_bytes()


def test_a_tokenizer_out_of_a_gguf_file_survives(tmp_path: Path) -> None:
    keys = {"tokenizer.ggml.tokens": ["a", "b"], "tokenizer.ggml.scores": np.array([0.5, 1], np.float32)}
    with collect_notices() as notices:
        write_folder(checkpoint(tokenizer=keys), tmp_path / "m")
    assert [item.kind for item in notices] == ["info"]
    assert read_folder(tmp_path / "m").metadata["tokenizer"] == {
        "tokenizer.ggml.tokens": ["a", "b"], "tokenizer.ggml.scores": [0.5, 1.0]}


def test_shards_round_trip_and_report_progress(tmp_path: Path) -> None:
    original = checkpoint()
    seen: list[tuple[str, int, int]] = []
    write_folder(original, tmp_path / "m", max_shard_bytes=90, progress=lambda *step: seen.append(step))
    assert sorted(path.name for path in (tmp_path / "m").glob("*.safetensors")) == [
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    equal(original, read_folder(tmp_path / "m"))
    assert seen[-1][1:] == (80 + 12 + 14, 80 + 12 + 14)
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


@pytest.mark.parametrize("number", [FP32, FP16, BF16])
def test_dense_export(tmp_path: Path, number: Any) -> None:
    write_folder(checkpoint(), tmp_path / "m", dense=number)
    back = read_folder(tmp_path / "m")
    assert {tensor.number for tensor in back.tensors.values()} == {number}  # type: ignore[attr-defined]
    values = checkpoint().tensors["a"].dense()
    assert np.allclose(back.tensors["a"].dense(), values, rtol=0 if number != BF16 else 2**-8, atol=0)


def test_fp16_export_says_what_it_clamps(tmp_path: Path) -> None:
    large = replace(checkpoint(), tensors={"w": Dense(np.array([1e5, -1e6, 1], np.float32))})
    with collect_notices() as notices:
        write_folder(large, tmp_path / "m", dense=FP16)
    assert [(item.kind, item.message[:8]) for item in notices] == [("clamp", "2 values")]
    assert np.array_equal(read_folder(tmp_path / "m").tensors["w"].dense(), [65504, -65504, 1])


def test_metadata_without_a_place_is_said(tmp_path: Path) -> None:
    with pytest.warns(EdgewiseWarning, match="no place for the metadata oddity"):
        write_folder(checkpoint(oddity=1), tmp_path / "m")


def test_our_folder_is_replaced_and_others_are_not(tmp_path: Path) -> None:
    write_folder(checkpoint(0), tmp_path / "m")
    first = read_folder(tmp_path / "m")
    write_folder(checkpoint(1), tmp_path / "m")
    equal(checkpoint(1), read_folder(tmp_path / "m"))
    equal(checkpoint(0), first)  # a folder in use stays readable
    theirs = make(tmp_path / "theirs")
    before = (theirs / "config.json").read_bytes()
    with pytest.raises(InvalidValueError, match="did not write"):
        write_folder(checkpoint(), theirs)
    assert (theirs / "config.json").read_bytes() == before
    write_folder(checkpoint(), theirs, overwrite=True)
    equal(checkpoint(), read_folder(theirs))
    (theirs / "notes.txt").write_text("mine")
    with pytest.raises(InvalidValueError, match=r"notes\.txt"):
        write_folder(checkpoint(), theirs, overwrite=True)
    assert (theirs / "notes.txt").read_text() == "mine"
    (tmp_path / "file").write_text("x")
    with pytest.raises(InvalidValueError, match="not a folder"):
        write_folder(checkpoint(), tmp_path / "file", overwrite=True)
    (tmp_path / "empty").mkdir()
    write_folder(checkpoint(), tmp_path / "empty")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "m", "theirs"]


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt(), ValueError("x")])
def test_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException) -> None:
    def fail(*_: Any) -> None:
        raise failure

    write_folder(checkpoint(0), tmp_path / "m")
    monkeypatch.setattr(module, "_write_metadata", fail)
    expected = BudgetError if isinstance(failure, OSError) else type(failure)
    for name in ("m", "new"):
        with pytest.raises(expected):
            write_folder(checkpoint(1), tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    equal(checkpoint(0), read_folder(tmp_path / "m"))


def test_too_little_space_is_said_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(BudgetError, match="takes 106 bytes"):
        write_folder(checkpoint(), tmp_path / "m")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(InvalidValueError, match="cannot write"):
        write_folder(checkpoint(), tmp_path / "m")


@pytest.mark.parametrize("name", ["file/m", "file/deeper/m", "x" * 300])
def test_a_place_that_cannot_be(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InvalidValueError, match="cannot write the folder"):
        write_folder(checkpoint(), tmp_path / name)
    assert (tmp_path / "file").read_text() == "x"


def test_two_tensors_of_one_stored_name(tmp_path: Path) -> None:
    from edgewise.core.numbers import QuantFormat, quantize
    from edgewise.core.storage import QuantizedTensor

    fmt = QuantFormat.parse("int4/g4/fp16")
    codes, scales, _ = quantize(np.ones((2, 4), np.float32), fmt)
    clash = replace(checkpoint(), tensors={
        "w": QuantizedTensor(codes, scales, fmt), "w.scales": Dense(np.ones(2, np.float32))})
    with pytest.raises(InvalidValueError, match=r"stored as 'w\.scales'"):
        write_folder(clash, tmp_path / "m")
