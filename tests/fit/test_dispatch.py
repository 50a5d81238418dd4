"""`fit.quantize`: a folder that runs, a run that goes on after a kill, errors that name the layer and the way out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import edgewise.fit.dispatch as dispatch
from edgewise.core.errors import InvalidValueError, SourceError, UnsupportedError, collect_notices
from edgewise.core.storage import Dense, QuantizedTensor
from edgewise.engine import load
from edgewise.fit import quantize
from edgewise.fit.methods import METHODS, method_of, methods_markdown
from edgewise.formats.folder import read_folder
from tiny_checkpoint import tiny_checkpoint, tiny_encoder

TEXT = np.random.default_rng(0).integers(4, 260, 12_000)
LINEAR = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def source():
    return tiny_checkpoint()


def test_a_folder_that_the_engine_runs(source, tmp_path):
    told = []
    report = quantize(source, "gptq", "int4/g32", out=tmp_path / "m", calibrate=TEXT, windows=8, threads=1,
                      progress=lambda *step: told.append(step))
    assert report["tensor_bytes"] < 0.6 * report["tensor_bytes_before"]
    assert 0.5 < report["quality"] < 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]  # the state of the run is gone
    made = read_folder(tmp_path / "m")
    assert str(made.tensors[LINEAR].format) == "int4/g32/fp16"
    assert isinstance(made.tensors["model.embed_tokens.weight"], Dense)
    assert {what.split()[0] for what, _, _ in told} >= {"model.layers.0", "model.layers.1", "done"}
    model = load(tmp_path / "m", threads=1)
    assert len(model.generate([5, 6, 7], max_tokens=4, ignore_eos=True).result().ids) == 4


def test_the_method_decides_what_comes_out(source, tmp_path):
    found = {}
    for name in ("rtn", "gptq"):
        with collect_notices():
            report = quantize(source, name, "int2/g32/fp16/min", out=tmp_path / name, calibrate=TEXT, windows=8,
                              threads=1)
        found[name] = report["mean KL"]
    assert found["gptq"] < found["rtn"]


def test_embedding_and_settings(source, tmp_path):
    report = quantize(source, "gptq", out=tmp_path / "m", calibrate=TEXT, windows=4, threads=1, embedding="int8/g32",
                      settings={"damp": "0.05", "order": "yes"}, check=False)
    assert "damp=0.05" in report["settings"]
    assert "order=True" in report["settings"]
    made = read_folder(tmp_path / "m")
    assert str(made.tensors["model.embed_tokens.weight"].format) == "int8/g32/fp16"
    assert isinstance(made.tensors[LINEAR], QuantizedTensor)
    assert [step.config["method"] for step in made.lineage] == ["gptq", "rtn"]


def test_an_encoder(tmp_path):
    with collect_notices():
        report = quantize(tiny_encoder(), "gptq", "int8/g32", out=tmp_path / "m", calibrate=TEXT, threads=1)
    assert report["mean cosine of states"] > 0.999


class Killed(BaseException):
    pass


def test_a_killed_run_goes_on_and_ends_as_one_that_was_not(source, tmp_path):
    def dying(what, done, total):
        if what.startswith("model.layers.1 output"):
            raise Killed

    settings = {"calibrate": TEXT, "windows": 8, "threads": 1, "check": False}
    with pytest.raises(Killed):
        quantize(source, "gptq", out=tmp_path / "m", progress=dying, **settings)
    assert not (tmp_path / "m").exists()
    assert (tmp_path / ".m.quantize").is_dir()
    told = []
    quantize(source, "gptq", out=tmp_path / "m", resume=True, progress=lambda *step: told.append(step[0]), **settings)
    assert not any(what.startswith("model.layers.0") for what in told if "attention" in what)
    quantize(source, "gptq", out=tmp_path / "n", **settings)
    for name, stored in read_folder(tmp_path / "m").tensors.items():
        np.testing.assert_array_equal(stored.dense(), read_folder(tmp_path / "n").tensors[name].dense())


def test_another_run_does_not_go_on_with_it_and_a_new_one_starts_anew(source, tmp_path):
    def dying(what, done, total):
        if what.startswith("model.layers.1"):
            raise Killed

    settings = {"out": tmp_path / "m", "calibrate": TEXT, "windows": 8, "threads": 1, "check": False}
    with pytest.raises(Killed):
        quantize(source, "gptq", progress=dying, **settings)
    with pytest.raises(InvalidValueError, match="the state of another run"):
        quantize(source, "gptq", "int3/g32", resume=True, **settings)
    with collect_notices() as notices:
        quantize(source, "gptq", "int3/g32", **settings)
    assert any("is discarded" in item.message for item in notices)


def broken(source, name):
    weight = source.tensors[name].dense().copy()
    weight[10, 4] = np.nan
    return replace(source, tensors={**source.tensors, name: Dense(weight)})


@pytest.mark.parametrize(("change", "kind", "words"), [
    ({"method": "gtpq"}, InvalidValueError, "no method 'gtpq'; there are rtn, gptq"),
    ({"format": "int4/g48"}, InvalidValueError,
     r"model\.layers\.0\.self_attn\.q_proj\.weight has rows of 64 values, .* such as int4/g32/fp16"),
    ({"format": "int4/g128"}, InvalidValueError, "such as int4/g64/fp16"),
    ({"method": "llm-int8", "format": "int8/g32/fp16/min"}, InvalidValueError, "exact zero"),
    ({"calibrate": TEXT[:3000]}, InvalidValueError, "has 3000 tokens; .* are needed.*a longer text"),
    ({"calibrate": [300]}, InvalidValueError, "token ids are 0 to 263"),
    ({"calibrate": "no such text"}, SourceError, "no text 'no such text'.*pydoc"),
    ({"settings": {"dump": 1}}, InvalidValueError, "gptq has no setting 'dump'; it has block, damp"),
    ({"settings": {"damp": "much"}}, InvalidValueError, "gptq, damp: 'much' is not a number"),
    ({"embedding": "int4/g48"}, InvalidValueError, "embed_tokens.weight has rows of 64"),
])
def test_bad_input_names_the_layer_and_the_way_out_and_writes_nothing(source, tmp_path, change, kind, words):
    given = {"method": "gptq", "format": "int4/g32", "calibrate": TEXT, "windows": 4, "threads": 1, **change}
    with pytest.raises(kind, match=words), collect_notices():
        quantize(source, given.pop("method"), given.pop("format"), out=tmp_path / "m", **given)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(("name", "words"), [
    ("model.layers.0.mlp.up_proj.weight", r"model\.layers\.0\.mlp\.\w+_proj\.weight.*finite"),
    ("model.embed_tokens.weight", r"inputs of model\.layers\.0\.self_attn\.q_proj.*finite.*damaged"),
    ("model.layers.0.mlp.down_proj.weight", r"model\.layers\.0\.mlp\.down_proj\.weight.*finite"),
])
def test_values_that_are_not_finite_name_their_layer(source, tmp_path, name, words):
    with pytest.raises(InvalidValueError, match=words):
        quantize(broken(source, name), "gptq", "int4/g32", out=tmp_path / "m", calibrate=TEXT, windows=4, threads=1)
    assert not (tmp_path / "m").exists()


def test_an_architecture_that_is_not_known(source, tmp_path):
    strange = replace(source, arch="megalodon", config={**source.config, "model_type": "megalodon"})
    with pytest.raises(UnsupportedError, match="megalodon"):
        quantize(strange, "gptq", "int4/g32", out=tmp_path / "m", calibrate=TEXT)
    assert list(tmp_path.iterdir()) == []


def test_a_format_without_a_kernel_is_said(source, tmp_path):
    with collect_notices() as notices:
        quantize(source, "rtn", "nf4/g32", out=tmp_path / "m", calibrate=TEXT, windows=4, threads=1, check=False)
    assert any("nf4/g32/fp16 has no kernel" in item.message for item in notices) == (
        dispatch.packed_nbytes(dispatch.QuantFormat.parse("nf4/g32"), (64, 64)) is None)


def test_calibration_and_measurement_share_no_window(source):
    sample = dispatch.calibration_of(source, np.arange(12_000) % 264, 16)
    assert sample.windows.shape == (16, 256)
    assert sample.check.shape == (4, 256)
    starts = [int(row[0]) for row in [*sample.windows, *sample.check]]
    assert len(set(starts)) == 20


def test_the_table_is_in_the_documentation(root):
    assert (root / "docs" / "quantization.md").read_text("utf-8") == methods_markdown()
    for method in METHODS:
        assert method_of(method.name.upper().replace("-", "_")) is method
