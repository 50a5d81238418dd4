"""Conversions: what is written holds what the format says, and the report's errors are those of a slow loop."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from cut_checkpoint import cut_checkpoint
from edgewise import load
from edgewise.core.errors import InvalidValueError, SourceError, UnsupportedError, collect_notices
from edgewise.core.numbers import QuantFormat, dequantize, quantize
from edgewise.core.storage import Blocks, Dense, Factored
from edgewise.fit.convert import convert, tensor_class
from edgewise.formats import open_checkpoint
from edgewise.formats.describe import format_of
from edgewise.formats.folder import read_folder
from edgewise.formats.folder_writer import write_folder
from edgewise.formats.ggml_blocks import encode
from edgewise.formats.gguf import read_gguf
from tiny_checkpoint import tiny_checkpoint, tiny_encoder, tiny_folder

DOWN = "model.layers.1.mlp.down_proj.weight"


def rows_of(report, title):
    return {row[0]: row for table in report.tables if table.title == title for row in table.rows}


@pytest.fixture(scope="module")
def checkpoint():
    return tiny_checkpoint(tied=False)


@pytest.mark.parametrize("out", ["made.gguf", "folder"])
@pytest.mark.parametrize("name", ["Q4_0", "Q5_1", "Q8_0", "MXFP4", "BF16"])
def test_block_types(checkpoint, tmp_path, out, name):
    report = convert(checkpoint, tmp_path / out, name)
    made = open_checkpoint(tmp_path / out)
    assert set(made.tensors) == set(checkpoint.tensors)
    source = checkpoint.tensors[DOWN].dense()
    expected = encode(source, name).dense()
    np.testing.assert_array_equal(made.tensors[DOWN].dense(), expected)
    norm = "model.norm.weight"
    np.testing.assert_array_equal(made.tensors[norm].dense(), checkpoint.tensors[norm].dense())

    row = rows_of(report, "Tensors")[DOWN]
    difference = expected.astype(np.float64) - source
    assert row[6] == pytest.approx(math.sqrt((difference**2).sum() / (source.astype(np.float64)**2).sum()))
    assert row[7] == pytest.approx(np.abs(difference).max())
    assert report["tensor_bytes"] == made.nbytes
    assert report["storage_bytes"] >= made.nbytes
    assert [step.name for step in made.lineage] == ["convert"]


def test_the_layout_of_compressed_tensors(checkpoint, tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    convert(checkpoint, ours, "int4/g32", embedding="F16")
    convert(ours, theirs, layout="compressed-tensors")
    expected, made = open_checkpoint(ours), open_checkpoint(theirs)
    for name in expected.tensors:
        np.testing.assert_array_equal(made.tensors[name].dense(), expected.tensors[name].dense())
    ids = np.arange(40, dtype=np.int32)
    np.testing.assert_array_equal(load(theirs).forward(ids), load(ours).forward(ids))


def test_a_number_format_in_a_folder(checkpoint, tmp_path):
    fmt = QuantFormat.parse("int4/g32/fp16/min")
    report = convert(checkpoint, tmp_path / "folder", str(fmt), embedding="q8_0")
    made = open_checkpoint(tmp_path / "folder")
    codes, scales, minima = quantize(checkpoint.tensors[DOWN].dense(), fmt)
    np.testing.assert_array_equal(made.tensors[DOWN].dense(), dequantize(codes, scales, fmt, minima=minima))
    assert isinstance(made.tensors["model.embed_tokens.weight"], Blocks)
    assert isinstance(made.tensors["lm_head.weight"], Blocks)
    classes = rows_of(report, "Classes")
    assert classes["attention"][1] == "fp32 > int4/g32/fp16/min"
    assert classes["head"][1] == classes["embedding"][1] == "fp32 > Q8_0"
    assert classes["norm"][1] == "fp32"
    assert classes["norm"][5:] == (0, 0)
    assert list(rows_of(report, "Layers")) == ["0", "1"]


def test_a_number_format_that_a_gguf_file_holds_is_packed_without_rounding_again(checkpoint, tmp_path):
    fmt = QuantFormat.parse("int4/g32/fp16/min")
    convert(checkpoint, tmp_path / "made.gguf", str(fmt))
    made = open_checkpoint(tmp_path / "made.gguf").tensors[DOWN]
    codes, scales, minima = quantize(checkpoint.tensors[DOWN].dense(), fmt)
    assert made.codec.name == "Q4_1"
    np.testing.assert_array_equal(made.dense(), dequantize(codes, scales, fmt, minima=minima))


def test_what_is_already_in_the_format_is_kept_to_the_bit(checkpoint, tmp_path):
    convert(checkpoint, tmp_path / "a.gguf", "Q4_0")
    report = convert(str(tmp_path / "a.gguf"), tmp_path / "b.gguf", "Q4_0")
    assert report["relative_rms_error"] == report["max_error"] == 0
    a, b = (open_checkpoint(tmp_path / name) for name in ("a.gguf", "b.gguf"))
    for name in a.tensors:
        np.testing.assert_array_equal(a.tensors[name].dense(), b.tensors[name].dense())
    assert [step.name for step in b.lineage] == ["convert", "convert"]


def test_dense_is_a_plain_folder_for_others(checkpoint, tmp_path):
    report = convert(checkpoint, tmp_path / "plain", "Q4_0", dense="fp16")
    made = open_checkpoint(tmp_path / "plain")
    assert all(isinstance(made.tensors[name], Dense) for name in made.tensors)
    assert "quantization_config" not in (tmp_path / "plain" / "config.json").read_text()
    expected = encode(checkpoint.tensors[DOWN].dense(), "Q4_0").dense().astype(np.float16)
    np.testing.assert_array_equal(made.tensors[DOWN].dense(), expected)
    assert report["bits_per_weight"] == 16
    error = expected.astype(np.float64) - checkpoint.tensors[DOWN].dense()
    assert rows_of(report, "Tensors")[DOWN][7] == pytest.approx(np.abs(error).max())


@pytest.mark.parametrize("out", ["made.gguf", "folder"])
def test_what_is_written_runs(checkpoint, tmp_path, monkeypatch, out):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    convert(checkpoint, tmp_path / "plain", dense="fp32")
    convert(checkpoint, tmp_path / out, "Q8_0")
    ids = list(range(4, 40))
    exact, made = load(tmp_path / "plain").forward(ids), load(tmp_path / out).forward(ids)
    assert np.abs(made - exact).max() < 0.1 * np.abs(exact).max()
    assert not np.array_equal(made, exact)


def test_an_encoder_keeps_its_tables(tmp_path):
    report = convert(tiny_encoder(), tmp_path / "encoder", "Q8_0")
    classes = rows_of(report, "Classes")
    assert classes["table"][1] == "fp32"
    assert classes["attention"][1] == "fp32, fp32 > Q8_0"  # biases stay
    assert classes["feed-forward"][2] == 8


def test_rows_that_are_no_whole_blocks_fall_back_aloud(tmp_path):
    odd = tiny_checkpoint(width=100)
    with collect_notices() as notices:
        report = convert(odd, tmp_path / "odd", "Q4_0")
    row = rows_of(report, "Tensors")[DOWN]
    assert row[3] == "fp16"
    assert 0 < row[6] < 1e-3
    assert {item.kind for item in notices} == {"fallback"}
    assert len([item for item in notices if "not whole blocks" in item.message]) == 2


def test_values_beyond_half_precision_fall_back_to_bf16(checkpoint, tmp_path):
    large = {**checkpoint.tensors, DOWN: Dense(checkpoint.tensors[DOWN].dense() * np.float32(1e6))}
    with collect_notices() as notices:
        report = convert(replace(checkpoint, tensors=large), tmp_path / "f", "F16")
    assert rows_of(report, "Tensors")[DOWN][3] == "bf16"
    assert [item.kind for item in notices] == ["fallback"]


def test_a_form_without_a_block_type_falls_back_aloud(checkpoint, tmp_path):
    weight = checkpoint.tensors[DOWN].dense()
    factored = Factored(Dense(np.ascontiguousarray(weight[:, :8])), Dense(np.eye(8, weight.shape[1], dtype=np.float32)))
    with collect_notices() as notices:
        report = convert(replace(checkpoint, tensors={**checkpoint.tensors, DOWN: factored}), tmp_path / "f.gguf")
    assert rows_of(report, "Tensors")[DOWN][2:4] == ("rank 8 (fp32 x fp32)", "fp16")
    assert "no block type holds" in notices[0].message


def test_progress_ends_at_its_total(checkpoint, tmp_path):
    seen = []
    convert(checkpoint, tmp_path / "made.gguf", "Q4_0", progress=lambda what, done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] > 0


@pytest.mark.parametrize(("out", "options", "error", "words"), [
    ("x.gguf", {"format": "int4/g64"}, InvalidValueError, "GGUF file cannot hold"),
    ("x.gguf", {"format": "Q4_K"}, UnsupportedError, "read but not written"),
    ("x", {"format": "Q9"}, InvalidValueError, "Q4_0"),
    ("x", {"dense": "int8"}, InvalidValueError, "fp16, bf16 or fp32"),
    ("x.gguf", {"dense": "fp16"}, InvalidValueError, "model folder"),
])
def test_formats_are_checked_before_anything_is_read(tmp_path, out, options, error, words):
    with pytest.raises(error, match=words):
        convert("no-such-model", tmp_path / out, **options)
    with pytest.raises(SourceError):
        convert("no-such-model", tmp_path / out)


def test_nothing_is_replaced_unasked(checkpoint, tmp_path):
    out = tmp_path / "made.gguf"
    out.write_bytes(b"precious")
    with pytest.raises(InvalidValueError, match="exists"):
        convert(checkpoint, out)
    assert out.read_bytes() == b"precious"
    convert(checkpoint, out, overwrite=True)
    folder = tiny_folder(tmp_path / "source")
    with pytest.raises(InvalidValueError, match="being read"):
        convert(str(folder), folder, "Q4_0", overwrite=True)
    with pytest.raises(InvalidValueError, match="being read"):
        convert(str(out), out, "Q4_0", overwrite=True)


def test_a_failed_conversion_leaves_nothing(checkpoint, tmp_path):
    bad = {**checkpoint.tensors, DOWN: Dense(np.full((64, 128), np.nan, np.float32))}
    for out in ("made.gguf", "folder"):
        with pytest.raises(InvalidValueError, match="NaN"):
            convert(replace(checkpoint, tensors=bad), tmp_path / out, "Q4_0")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "expected"), [
    ("model.embed_tokens.weight", "embedding"), ("lm_head.weight", "head"),
    ("model.layers.3.self_attn.q_proj.weight", "attention"), ("model.layers.3.mlp.up_proj.weight", "feed-forward"),
    ("model.layers.3.input_layernorm.weight", "norm"), ("encoder.layer.0.attention.output.dense.weight", "attention"),
    ("encoder.layer.0.output.dense.weight", "feed-forward"),
    ("encoder.layer.0.attention.output.LayerNorm.weight", "norm"),
    ("embeddings.position_embeddings.weight", "table"), ("pooler.dense.weight", "other")])
def test_classes(name, expected):
    assert tensor_class(name) == expected


def test_layers_that_are_padded_are_rounded_like_the_rest(tmp_path):
    source = write_folder(cut_checkpoint(), tmp_path / "cut")
    with collect_notices():
        convert(str(source), str(tmp_path / "m.gguf"), "Q8_0")
        convert(str(source), str(tmp_path / "plain"), dense="fp16")
    made = read_gguf(tmp_path / "m.gguf")
    for name in made.tensors:
        if name.endswith("_proj.weight"):
            assert format_of(made.tensors[name]) == "Q8_0", name
    plain = read_folder(tmp_path / "plain")
    ups = [name for name in plain.tensors if name.endswith("up_proj.weight")]
    assert {tuple(plain.tensors[name].shape) for name in ups} == {(128, 64)}
