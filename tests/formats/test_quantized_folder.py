"""Storage forms inside a folder: equal to the bit after a round trip, of the promised size, refused when malformed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from edgewise.core.checkpoint import Checkpoint
from edgewise.core.errors import EdgewiseError, FormatError, InvalidValueError, UnsupportedError, collect_notices
from edgewise.core.numbers import (
    E8M0,
    FP16,
    FP32,
    INT4,
    INT8,
    MXFP4,
    NF4,
    Granularity,
    NumberFormat,
    QuantFormat,
    int_format,
    posit_format,
    quantize,
)
from edgewise.core.storage import Dense, Factored, InputSparse, QuantizedTensor, Sparse, Stored, Sum
from edgewise.formats.folder import read_folder
from edgewise.formats.folder_writer import write_folder
from edgewise.formats.quantized_folder import encode, format_from_json, format_to_json, pack_bits, unpack_bits
from edgewise.formats.safetensors import SafetensorsFile, nbytes_of

RNG = np.random.default_rng(0)


def quantized(fmt: QuantFormat | str, shape: tuple[int, int] = (6, 70)) -> QuantizedTensor:
    fmt = QuantFormat.parse(fmt) if isinstance(fmt, str) else fmt
    codes, scales, zero = quantize(np.random.default_rng(1).standard_normal(shape).astype(np.float32), fmt)
    return QuantizedTensor(codes, scales, fmt, **{"int": {"zeros": zero}, "min": {"minima": zero}}.get(fmt.zero, {}))


def n_m(values: Stored, group: int = 4, kept: int = 2, out: int = 6, inputs: int = 32) -> Sparse:
    places = np.sort(np.argsort(RNG.random((out, inputs // group, group)), axis=2)[:, :, :kept], axis=2)
    return Sparse("n_m", places.reshape(out, -1).astype(np.uint8), values, (out, inputs), n_m=(kept, group))


def csr() -> Sparse:
    values = Dense(RNG.standard_normal((1, 5)).astype(np.float16), FP16)
    return Sparse("csr", np.array([0, 3, 1, 2, 9], np.uint16), values, (4, 10),
                  row_starts=np.array([0, 2, 2, 4, 5], np.int32))


def n_m_format() -> QuantizedTensor:
    fmt = QuantFormat(INT4, Granularity("group", 16), FP16, n_m=(2, 4))
    codes = RNG.integers(-8, 8, (6, 32)).astype(np.int8)
    codes.reshape(6, 8, 4)[:, :, [0, 3]] = 0
    codes[0] = 0  # rows with fewer codes than may be kept
    return QuantizedTensor(codes, np.ones((6, 2), np.float32), fmt)


TEXT_FORMATS = ["int4/g32/fp16/min", "int4/g32/fp16", "int8/axis/fp32", "int8/tensor/fp16", "int2/g16/bf16/int",
                "int3/g10/fp16/min", "int5/g64/fp16/int", "int6/g7/bf16", "int7/axis/fp16/int", "int1/g32/fp16",
                "ternary/tensor/fp32", "nf4/g64/fp16", "fp4/g32/e8m0", "e4m3/axis/fp16", "e5m2/tensor/bf16",
                "posit8_0/g32/fp16", "int8/g32/e4m3", "int4/tensor/fp32/int"]
STORED: dict[str, Callable[[], Stored]] = {
    **{text: (lambda text=text: quantized(text)) for text in TEXT_FORMATS},  # type: ignore[misc]
    "mxfp4": lambda: quantized(MXFP4),
    "restricted": lambda: quantized(QuantFormat(int_format(4, restricted=True), Granularity("axis"))),
    "int12": lambda: quantized(QuantFormat(int_format(12), Granularity("axis"), FP32)),
    "int16": lambda: quantized(QuantFormat(int_format(16), Granularity("axis"), FP32)),
    "posit6": lambda: quantized(QuantFormat(NumberFormat("posit", 6, es=1), Granularity("group", 16), FP32)),
    "codebook": lambda: quantized(QuantFormat(
        NumberFormat("codebook", 2, codebook=(-1.0, -0.25, 0.25, 1.0)), Granularity("group", 32), FP16)),
    "prefixes": lambda: quantized(QuantFormat(INT8, Granularity("group", 32), FP16, prefixes=(4, 2))),
    "one value": lambda: quantized("int4/g32/fp16/min", (1, 1)),
    "one column": lambda: quantized("int3/g32/fp16", (9, 1)),
    "2:4 format": n_m_format,
    "factored": lambda: Factored(quantized("int4/g4/fp16", (6, 8)), Dense(RNG.standard_normal((8, 70), np.float32))),
    "nested": lambda: Factored(quantized("int8/axis/fp16", (6, 4)),
                               Factored(quantized("int4/g4/fp16", (4, 4)), quantized("int3/g16/bf16/min", (4, 70)))),
    "2:4 dense": lambda: n_m(Dense(RNG.standard_normal((6, 16), np.float32))),
    "2:4 quantised": lambda: n_m(quantized("int4/g16/fp16", (6, 16))),
    "1:16": lambda: n_m(Dense(RNG.standard_normal((6, 2), np.float32)), group=16, kept=1),
    "1:1": lambda: n_m(Dense(RNG.standard_normal((6, 32), np.float32)), group=1, kept=1),
    "csr": csr,
    "sum": lambda: Sum((quantized("int4/g32/fp16/min", (6, 10)), Factored(
        Dense(RNG.standard_normal((6, 3), np.float32)), Dense(RNG.standard_normal((3, 10), np.float32))))),
    "sparse in factored in sum": lambda: Sum((quantized("int8/axis", (3, 10)), Factored(
        Dense(RNG.standard_normal((3, 4), np.float32)), csr()))),
    "input sparse": lambda: InputSparse(quantized("int4/g10/fp16/min"), np.linspace(0, 1, 70, dtype=np.float32)),
    "input sparse and low rank": lambda: InputSparse(
        quantized("int8/axis"), np.full(70, np.inf, np.float32), Factored(
            Dense(RNG.standard_normal((6, 3), np.float32)), quantized("int8/g10", (3, 70)))),
    "csr in factored": lambda: Factored(Dense(RNG.standard_normal((3, 4), np.float32)), csr()),
}


def checkpoint(tensors: Mapping[str, Stored]) -> Checkpoint:
    return Checkpoint("llama", {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, tensors)


def same(left: Any, right: Any) -> None:
    """Equal to the bit, field by field, whatever nests in what."""
    assert type(left) is type(right) or (isinstance(left, QuantizedTensor) and isinstance(right, QuantizedTensor))
    if isinstance(left, np.ndarray):
        assert left.dtype == right.dtype
        assert left.shape == right.shape
        assert left.tobytes() == right.tobytes()
    elif isinstance(left, tuple) and any(isinstance(part, Stored) for part in left):
        for first, second in zip(left, right, strict=True):
            same(first, second)
    elif hasattr(left, "__dataclass_fields__") and not isinstance(left, (QuantFormat, NumberFormat)):
        for field in left.__dataclass_fields__:
            same(getattr(left, field), getattr(right, field))
    else:
        assert left == right


@pytest.mark.parametrize("name", STORED)
def test_round_trip_is_exact_and_of_the_promised_size(tmp_path: Path, name: str) -> None:
    tensor = STORED[name]()
    write_folder(checkpoint({"w": tensor, "plain": Dense(np.ones(3, np.float32))}), tmp_path / "m")
    back = read_folder(tmp_path / "m")
    same(back.tensors["w"], tensor)
    assert back.tensors["w"].nbytes == tensor.nbytes
    assert np.array_equal(back.tensors["w"].dense(), tensor.dense())
    if isinstance(tensor, QuantizedTensor):
        same(back.tensors["w"].rows(1, 3), tensor.rows(1, 3))
        assert np.array_equal(tensor.rows(1, 3).dense(), tensor.dense()[1:3])
    file = SafetensorsFile(tmp_path / "m" / "model.safetensors")
    stored = sum(entry.nbytes for key, entry in file.items() if key != "plain")
    assert stored == tensor.nbytes
    assert back.arch == "llama"
    assert back.config["architectures"] == ["LlamaForCausalLM"]
    assert "quantization_config" not in back.config


def test_what_config_json_says(tmp_path: Path) -> None:
    write_folder(checkpoint({"w": quantized("int4/g32/fp16/min")}), tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["architectures"] == ["EdgewiseLlamaForCausalLM"]
    assert config["model_type"] == "edgewise-llama"
    assert config["edgewise"]["arch"] == "llama"
    assert config["quantization_config"] == {
        "quant_method": "edgewise", "version": 1,
        "formats": {"w": {"storage": "quantized", "format": "int4/g32/fp16/min", "shape": [6, 70]}}}
    file = SafetensorsFile(tmp_path / "m" / "model.safetensors")
    assert {key: (entry.dtype, entry.shape) for key, entry in file.items()} == {
        "w.codes": ("U8", (6, 35)), "w.scales": ("F16", (6, 3)), "w.minima": ("F16", (6, 3))}


def test_layout_is_the_documented_one() -> None:
    codes = np.array([[1, 2, 3, 4, 5]], np.uint8)
    assert pack_bits(codes, 4).tolist() == [[0x21, 0x43, 0x05]]
    assert pack_bits(codes, 3).tolist() == [[0b11_010_001, 0b0_101_100_0]]
    assert pack_bits(np.array([[-1, 1, -2, 0]], np.int8), 2).tolist() == [[0b00_10_01_11]]
    assert pack_bits(np.array([[0x123, 0xABC]], np.uint16), 12).tolist() == [[0x23, 0xC1, 0xAB]]


def slow_pack(codes: np.ndarray, bits: int) -> list[list[int]]:
    """A row as one long integer, its lowest code in its lowest bits."""
    rows = []
    for row in codes.tolist():
        whole = sum((code & ((1 << bits) - 1)) << (bits * place) for place, code in enumerate(row))
        rows.append(list(whole.to_bytes(math.ceil(len(row) * bits / 8), "little")))
    return rows


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 16), st.booleans(), st.data())
def test_packing_agrees_with_its_transcription(bits: int, signed: bool, data: st.DataObject) -> None:
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
    kind = ("int" if signed else "uint") + ("8" if bits <= 8 else "16")
    codes = data.draw(arrays.arrays(kind, st.tuples(st.integers(1, 3), st.integers(0, 40)),
                                    elements=st.integers(low, high)))
    packed = pack_bits(codes, bits)
    assert packed.tolist() == slow_pack(codes, bits)
    same(unpack_bits(packed, codes.shape[1], bits, signed=signed), codes)


@pytest.mark.parametrize("fmt", [QuantFormat.parse(text) for text in TEXT_FORMATS] + [
    MXFP4, QuantFormat(int_format(9), Granularity("axis")), QuantFormat(NF4, Granularity("group", 8), E8M0),
    QuantFormat(int_format(4, restricted=True), Granularity("tensor"), FP32, prefixes=(2,), n_m=(1, 4)),
    QuantFormat(posit_format(6, 1, "standard"), Granularity("axis"), FP32, peak=1 / 3),
    QuantFormat.parse("posit8_0@4/axis/fp32")], ids=str)
def test_formats_have_a_json_form(fmt: QuantFormat) -> None:
    assert format_from_json(json.loads(json.dumps(format_to_json(fmt)))) == fmt


def test_what_cannot_be_stored_is_refused() -> None:
    good = quantized("int4/g32/fp16/min")
    assert good.minima is not None
    bad: list[tuple[QuantizedTensor, str]] = [
        (QuantizedTensor(good.codes + 16, good.scales, good.format, minima=good.minima), "codes run from"),
        (QuantizedTensor(good.codes, good.scales * np.float32(1.001), good.format, minima=good.minima), "not values"),
        (QuantizedTensor(good.codes, good.scales[:, :1], good.format, minima=good.minima), "have shape"),
        (QuantizedTensor(good.codes, good.scales, good.format), "minima"),
        (QuantizedTensor(good.codes, np.full_like(good.scales, np.nan), good.format, minima=good.minima), "not values"),
        (QuantizedTensor(good.codes[0], good.scales, good.format, minima=good.minima), r"codes are \(out, in\)"),
    ]
    for tensor, message in bad:
        with pytest.raises(InvalidValueError, match=message):
            encode(tensor, "w")
    fmt = QuantFormat(INT4, Granularity("group", 32), good.format)
    with pytest.raises(UnsupportedError, match="themselves quantised"):
        encode(QuantizedTensor(good.codes // 2, good.scales, fmt), "w")
    tensor = n_m_format()
    with pytest.raises(InvalidValueError, match="more than 2 codes"):
        encode(QuantizedTensor(np.ones_like(tensor.codes), tensor.scales, tensor.format), "w")
    zeros = quantized("int4/g32/fp16/int")
    with pytest.raises(InvalidValueError, match="zeros must be integers"):
        encode(QuantizedTensor(zeros.codes, zeros.scales, zeros.format, zeros=np.full((6, 3), 0.5, np.float32)), "w")


Q = {"storage": "quantized", "format": "int4/g32/fp16/min", "shape": [6, 70]}
HOSTILE: dict[str, tuple[Any, str]] = {
    "not an object": (7, "expected a description"),
    "no storage": ({}, "storage dense, quantized"),
    "unknown storage": ({"storage": "zip"}, "storage dense, quantized"),
    "unknown format": ({**Q, "format": "int99/g32"}, "int99"),
    "format of another type": ({**Q, "format": 5}, "expected the fields"),
    "group of zero": ({**Q, "format": "int4/g0/fp16"}, "granularity 'g0'"),
    "missing part": ({**Q, "format": "int4/g32/fp16/int"}, r"'w\.zeros' is missing"),
    "another shape": ({**Q, "shape": [6, 72]}, "expected"),
    "huge shape": ({**Q, "shape": [2**60, 70]}, "expected a shape"),
    "negative shape": ({**Q, "shape": [-6, 70]}, "expected a shape"),
    "no shape": ({key: Q[key] for key in ("storage", "format")}, "expected a shape"),
    "three sizes": ({**Q, "shape": [1, 6, 70]}, "two sizes"),
    "other group": ({**Q, "format": "int4/g16/fp16/min"}, "expected F16 of shape"),
    "other bits": ({**Q, "format": "int5/g32/fp16/min"}, "expected U8 of shape"),
    "other scale": ({**Q, "format": "int4/g32/bf16/min"}, "expected BF16"),
    "too many bits": ({**Q, "format": {"element": {"kind": "int", "bits": 40}, "granularity": "g32", "scale": "fp16",
                                       "zero": "none", "prefixes": [], "n_m": None}}, "kind, bits"),
    "short codebook": ({**Q, "format": {
        "element": {"kind": "codebook", "bits": 4, "codebook": [0.0]}, "granularity": "g32", "scale": "fp16",
        "zero": "none", "prefixes": [], "n_m": None}}, "codebook of 2"),
    "n:m that does not divide": ({**Q, "format": {
        "element": "int4", "granularity": "g32", "scale": "fp16", "zero": "none", "prefixes": [], "n_m": [2, 4]}},
        "multiple of 4"),
    "block type": ({"storage": "blocks", "codec": "Q9_9", "shape": [6, 32]}, r"'w\.blocks' is missing"),
    "endless nesting": (json.loads('{"storage": "factored", "left": ' * 30 + "{}" + "}" * 30), "not nested deeply"),
    "input sparse without a weight": ({"storage": "input_sparse"}, "description"),
    "input sparse with something else": ({"storage": "input_sparse", "weight": {"storage": "dense"}, "low_rank": {
        "storage": "dense"}}, "a factored low_rank"),
    "factored without sides": ({"storage": "factored"}, "description"),
}


def edited(folder: Path, description: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["formats"]["w"] = description
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_description(tmp_path: Path, case: str) -> None:
    description, message = HOSTILE[case]
    write_folder(checkpoint({"w": quantized("int4/g32/fp16/min")}), tmp_path / "m")
    with pytest.raises(FormatError, match=message) as caught:
        _ = read_folder(edited(tmp_path / "m", description)).tensors["w"]
    assert caught.value.tensor is not None
    assert caught.value.tensor.startswith("w")


@pytest.mark.parametrize(("name", "part", "value", "message"), [
    ("int4/g32/fp16/min", "scales", np.float16(np.nan), r"scales\[0, 0\] is nan"),
    ("int4/g32/fp16/min", "minima", np.float16(-np.inf), r"minima\[0, 0\] is -inf"),
    ("fp4/g32/e8m0", "scales", np.uint8(255), r"scales\[0, 0\] is nan"),
    ("csr", "index", np.uint16(10), "columns"),
    ("csr", "row_starts", np.int32(1), "row starts"),
    ("2:4 format", "codes", np.uint8(255), None),
])
def test_hostile_bytes(tmp_path: Path, name: str, part: str, value: Any, message: str | None) -> None:
    write_folder(checkpoint({"w": STORED[name]()}), tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    begin = SafetensorsFile(path)[f"w.{part}"].begin
    content = bytearray(path.read_bytes())
    content[begin:begin + value.nbytes] = value.tobytes()
    path.write_bytes(content)
    if message is None:
        read_folder(tmp_path / "m").tensors["w"].dense()
        return
    with pytest.raises(FormatError, match=message) as caught:
        _ = read_folder(tmp_path / "m").tensors["w"]
    assert caught.value.tensor in ("w", f"w.{part}")


def test_places_beyond_their_group_are_refused(tmp_path: Path) -> None:
    write_folder(checkpoint({"w": n_m(Dense(RNG.standard_normal((2, 10), np.float32)), 3, 1, 2, 30)}), tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    begin = SafetensorsFile(path)["w.index"].begin
    content = bytearray(path.read_bytes())
    content[begin] = 255
    path.write_bytes(content)
    with pytest.raises(FormatError, match="places below 3"):
        _ = read_folder(tmp_path / "m").tensors["w"]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_description_reads_or_says_why(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.getbasetemp() / "described"
    if not folder.exists():
        write_folder(checkpoint({"w": quantized("int4/g32/fp16/min")}), folder)
    leaf = st.one_of(st.none(), st.booleans(), st.integers(-2, 300), st.floats(allow_nan=False), st.text(max_size=4),
                     st.sampled_from(["int4/g32/fp16/min", "quantized", "sparse", "n_m", "csr", "g32", "int", "posit"]))
    keys = st.sampled_from(["storage", "format", "shape", "values", "left", "right", "encoding", "n_m", "element",
                            "granularity", "scale", "zero", "prefixes", "kind", "bits", "codebook"])
    tree = st.recursive(leaf, lambda inner: st.one_of(st.lists(inner, max_size=3),
                                                      st.dictionaries(keys, inner, max_size=6)), max_leaves=12)
    description = {**Q, **data.draw(st.dictionaries(keys, tree, max_size=5))}
    try:
        tensor = read_folder(edited(folder, description)).tensors["w"]
    except EdgewiseError:
        return
    assert math.prod(tensor.shape) < 10**6


def test_blocks_of_gguf(tmp_path: Path) -> None:
    blocks = pytest.importorskip("edgewise.formats.ggml_blocks")
    tensor = blocks.encode(RNG.standard_normal((4, 64)).astype(np.float32), "Q4_1")
    stacked = blocks.encode(RNG.standard_normal((2, 3, 32)).astype(np.float32), "Q8_0")
    write_folder(checkpoint({"w": tensor, "s": stacked}), tmp_path / "m")
    back = read_folder(tmp_path / "m")
    same(back.tensors["w"], tensor)
    same(back.tensors["s"], stacked)
    assert back.tensors["w"].nbytes == 4 * 2 * 20
    edited(tmp_path / "m", {"storage": "blocks", "codec": "Q9_9", "shape": [4, 64]})
    with pytest.raises(UnsupportedError, match="Q9_9"):
        _ = read_folder(tmp_path / "m").tensors["w"]
    edited(tmp_path / "m", {"storage": "blocks", "codec": "Q4_1", "shape": [4, 33]})
    with pytest.raises(FormatError, match="whole blocks"):
        _ = read_folder(tmp_path / "m").tensors["w"]


def test_shards_split_a_tensor_and_its_scales(tmp_path: Path) -> None:
    tensors = {name: quantized(name) for name in TEXT_FORMATS[:5]}
    write_folder(checkpoint(tensors), tmp_path / "m", max_shard_bytes=100)
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 5
    back = read_folder(tmp_path / "m")
    for name, tensor in tensors.items():
        same(back.tensors[name], tensor)


def test_dense_export_holds_the_values(tmp_path: Path) -> None:
    tensor = quantized("int4/g32/fp16/min")
    write_folder(checkpoint({"w": tensor}), tmp_path / "m", dense=True)
    back = read_folder(tmp_path / "m")
    assert isinstance(back.tensors["w"], Dense)
    assert np.array_equal(back.tensors["w"].dense(), tensor.dense())
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["torch_dtype"] == "float32"
    assert nbytes_of("F32", (6, 70)) == 6 * 70 * 4


def test_how_a_model_runs_stays_in_the_configuration(tmp_path: Path) -> None:
    run = {"activations": {"a.input": {"bits": 8, "scale": 0.1, "zero": 3}}, "kv": "int8"}
    source = Checkpoint("llama", {"model_type": "llama", "quantization_config": run},
                        {"a.weight": Dense(np.ones((2, 3), np.float32))})
    back = read_folder(write_folder(source, tmp_path / "m"))
    assert back.config["quantization_config"] == run
    assert json.loads((tmp_path / "m" / "config.json").read_text())["model_type"] == "edgewise-llama"
    with collect_notices() as notices:
        plain = read_folder(write_folder(source, tmp_path / "plain", dense=True))
    assert "quantization_config" not in plain.config
    assert any("activations, kv" in item.message for item in notices)
