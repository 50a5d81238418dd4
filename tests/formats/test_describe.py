"""What a Report on a model says, against the model it was written from."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import save_file

from edgewise.core.checkpoint import Step
from edgewise.core.errors import FormatError, SourceError, collect_notices
from edgewise.core.numbers import QuantFormat, quantize
from edgewise.core.storage import Dense, Factored, QuantizedTensor, Sparse
from edgewise.formats.describe import describe, describe_checkpoint, format_of
from edgewise.formats.ggml_blocks import encode
from edgewise.formats.gguf import write_gguf, write_gguf_raw
from tiny_checkpoint import CHAT_TEMPLATE, tiny_checkpoint, tiny_folder


def rows_of(report, title):
    return next(table.rows for table in report.tables if table.title == title)


def test_a_folder(tmp_path):
    checkpoint = tiny_checkpoint(layers=3)
    report = describe(tiny_folder(tmp_path / "tiny", checkpoint))
    parameters = sum(int(np.prod(t.shape)) for t in checkpoint.tensors.values())
    assert report["parameters"] == parameters
    assert report["tensor_bytes"] == 4 * parameters
    assert report["bits_per_weight"] == 32
    assert (report["architecture"], report["layers"], report["context"]) == ("llama", 3, 256)
    assert report["licence"] == "apache-2.0"
    assert rows_of(report, "Chat template") == ((CHAT_TEMPLATE,),)
    assert {row[0] for row in rows_of(report, "Tensors")} == set(checkpoint.tensors)
    groups = {row[0]: row for row in rows_of(report, "Groups")}
    assert groups["model.layers.*.mlp.down_proj.weight"][1:4] == (3, "64x128", "fp32")
    assert dict(rows_of(report, "Configuration"))["rope_theta"] == 10000.0


def test_a_gguf_file_by_its_own_names(tmp_path):
    path = tmp_path / "tiny.gguf"
    step = Step("prune", {"ratio": 0.5}, "1", 7)
    checkpoint = tiny_checkpoint()
    write_gguf(checkpoint.with_tensors(checkpoint.tensors, step), path, "Q8_0")
    report = describe(path)
    formats = {row[0]: row for row in rows_of(report, "Formats")}
    assert set(formats) == {"Q8_0", "F32"}
    assert formats["Q8_0"][4] == pytest.approx(8.5)
    assert report["tensor_bytes"] == sum(row[3] for row in formats.values())
    assert ("blk.*.attn_q.weight", 2, "64x64", "Q8_0", 2 * 64 * 68) in rows_of(report, "Groups")
    assert dict(rows_of(report, "Configuration"))["tokenizer.ggml.tokens"] == "[264 values]"
    assert report.lineage == (step,)
    assert rows_of(report, "Lineage") == (("prune", "ratio=0.5", "1", 7),)


def test_an_unknown_architecture_shows_what_there_is(tmp_path):
    path = tmp_path / "strange.gguf"
    write_gguf_raw(path, {"general.architecture": "strange", "strange.depth": 9, "tokenizer.chat_template": 3},
                   {"some.weight": ("Q4_0", Dense(np.ones((4, 64), np.float32)))})
    with collect_notices() as notices:
        report = describe(path)
    assert (report["architecture"], report["parameters"], report["bits_per_weight"]) == ("strange", 256, 4.5)
    assert dict(rows_of(report, "Configuration"))["strange.depth"] == 9
    assert any("strange" in item.message for item in notices)


def test_a_bare_safetensors_file(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({"a": np.zeros((2, 3), np.float16)}, path)
    with collect_notices() as notices:
        report = describe(path)
    assert (report["parameters"], report["tensor_bytes"]) == (6, 12)
    assert [item.kind for item in notices] == ["info"]


def test_every_storage_form_has_a_name():
    weight = np.random.default_rng(0).normal(size=(8, 64)).astype(np.float32)
    fmt = QuantFormat.parse("int4/g32/fp16/min")
    codes, scales, minima = quantize(weight, fmt)
    half = Dense(weight.astype(np.float16), number=QuantFormat.parse("fp16").element)
    index = np.tile(np.array([0, 1], np.uint8), (8, 16))
    assert format_of(half) == "fp16"
    assert format_of(encode(weight, "Q5_1")) == "Q5_1"
    assert format_of(QuantizedTensor(codes, scales, fmt, minima=minima)) == "int4/g32/fp16/min"
    assert format_of(Factored(half, Dense(weight.T.copy()))) == "rank 64 (fp16 x fp32)"
    assert format_of(Sparse("n_m", index, Dense(weight[:, :32].copy()), (8, 64), (2, 4))) == "2:4 sparse (fp32)"


def test_a_checkpoint_without_tokenizer_or_template():
    checkpoint = tiny_checkpoint(template=False)
    del checkpoint.metadata["tokenizer"]
    report = describe_checkpoint(checkpoint)
    assert (report["tokenizer"], report["chat template"]) == ("none", "none")
    assert "Chat template" not in {table.title for table in report.tables}


def test_what_is_no_model(tmp_path):
    with pytest.raises(SourceError, match="no model"):
        describe(tmp_path / "nothing.gguf")
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + b"\xff" * 40)
    with pytest.raises(FormatError, match=r"damaged\.gguf"):
        describe(damaged)
