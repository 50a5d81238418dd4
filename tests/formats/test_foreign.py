"""Folders of GPTQ, AWQ and compressed-tensors: against slow transcriptions of their packing, and their own library."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from edgewise.core.errors import EdgewiseError, FormatError, UnsupportedError, collect_notices
from edgewise.core.numbers import QuantFormat, quantize
from edgewise.core.storage import Dense, QuantizedTensor, Stored
from edgewise.formats.folder import read_folder
from edgewise.formats.folder_writer import write_folder
from edgewise.formats.foreign import from_words, to_words
from tiny_checkpoint import tiny_checkpoint

Array = NDArray[Any]


def set_bits(words: NDArray[np.uint32], start: int, bits: int, code: int) -> None:
    """Put a code into a stream of 32-bit words, a bit at a time."""
    for bit in range(bits):
        word, place = divmod(start + bit, 32)
        words[word] |= np.uint32(((code >> bit) & 1) << place)


def stream(codes: Array, bits: int) -> Array:
    """(n, m) codes -> (words, m) int32: each column its own stream, as GPTQ packs a weight."""
    words = np.zeros((-(-codes.shape[0] * bits // 32), codes.shape[1]), np.uint32)
    for column in range(codes.shape[1]):
        for place, code in enumerate(codes[:, column]):
            set_bits(words[:, column], place * bits, bits, int(code))
    return words.view(np.int32)


@pytest.mark.parametrize("bits", range(1, 9))
def test_words_hold_a_stream_of_bits(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (3, 45)).astype(np.uint8)
    words = to_words(codes, bits)
    assert np.array_equal(words, stream(codes.T, bits).T)
    assert np.array_equal(from_words(words, 45, bits), codes)


def folder_of(path: Path, quantization: Mapping[str, Any] | None, tensors: Mapping[str, Array]) -> Path:
    path.mkdir()
    config = {"model_type": "llama", "hidden_size": 64, "quantization_config": quantization}
    (path / "config.json").write_text(json.dumps(config))
    save_file(dict(tensors), path / "model.safetensors")
    return path


def grid(seed: int, bits: int, out: int, inputs: int, group: int) -> tuple[Array, Array, Array]:
    """Codes (out, in), zeros (out, groups) and scales (out, groups)."""
    rng = np.random.default_rng(seed)
    groups = -(-inputs // group)
    return (rng.integers(0, 1 << bits, (out, inputs)), rng.integers(0, 1 << bits, (out, groups)),
            rng.uniform(0.01, 0.1, (out, groups)).astype(np.float16))


def values(codes: Array, zeros: Array, scales: Array, order: Array) -> Array:
    return (codes - zeros[:, order]).astype(np.float32) * scales[:, order].astype(np.float32)


def gptq(codes: Array, zeros: Array, scales: Array, bits: int, layout: str, order: Array | None) -> dict[str, Array]:
    stored = zeros if layout == "gptq_v2" else (zeros - 1) % (1 << bits)
    parts = {"l.qweight": stream(codes.T, bits), "l.qzeros": np.ascontiguousarray(stream(stored, bits).T),
             "l.scales": np.ascontiguousarray(scales.T)}
    return parts if order is None else {**parts, "l.g_idx": order.astype(np.int32)}


@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [32, -1])
def test_gptq(tmp_path: Path, bits: int, group: int, layout: str) -> None:
    out, inputs = 32, 96
    size = inputs if group == -1 else group
    codes, zeros, scales = grid(bits, bits, out, inputs, size)
    order = np.arange(inputs) // size
    folder = folder_of(tmp_path / "m", {"quant_method": "gptq", "bits": bits, "group_size": group,
                                        "checkpoint_format": layout}, gptq(codes, zeros, scales, bits, layout, order))
    made = read_folder(folder).tensors["l.weight"]
    assert isinstance(made, QuantizedTensor)
    assert str(made.format) == f"int{bits}/{'axis' if group == -1 else f'g{group}'}/fp16/int"
    assert np.array_equal(made.dense(), values(codes, zeros, scales, order))


def test_gptq_of_symmetric_weights_has_no_zero_points(tmp_path: Path) -> None:
    codes, zeros, scales = grid(0, 4, 16, 64, 32)
    zeros[:] = 8
    folder = folder_of(tmp_path / "m", {"quant_method": "gptq", "bits": 4, "group_size": 32},
                       {**gptq(codes, zeros, scales, 4, "gptq", None), "l.bias": np.zeros(16, np.float16)})
    read = read_folder(folder)
    made = read.tensors["l.weight"]
    assert isinstance(made, QuantizedTensor)
    assert made.format == QuantFormat.parse("int4/g32/fp16")
    assert np.array_equal(made.codes, codes - 8)
    assert list(read.tensors) == ["l.weight"]  # the bias of zeros is the tool's, not the model's


def test_a_bias_that_adds_something_stays(tmp_path: Path) -> None:
    codes, zeros, scales = grid(0, 4, 16, 64, 32)
    folder = folder_of(tmp_path / "m", {"quant_method": "gptq", "bits": 4, "group_size": 32},
                       {**gptq(codes, zeros, scales, 4, "gptq", None), "l.bias": np.ones(16, np.float16)})
    assert set(read_folder(folder).tensors) == {"l.weight", "l.bias"}


def test_gptq_in_order_of_importance_becomes_16_bit_floats(tmp_path: Path) -> None:
    codes, zeros, scales = grid(1, 4, 16, 64, 16)
    order = np.random.default_rng(0).permutation(np.arange(64) // 16)
    folder = folder_of(tmp_path / "m", {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": True},
                       gptq(codes, zeros, scales, 4, "gptq", order))
    with collect_notices() as notices:
        made = read_folder(folder).tensors["l.weight"]
    assert isinstance(made, Dense)
    assert made.data.dtype == np.float16
    assert np.array_equal(made.data, values(codes, zeros, scales, order).astype(np.float16))
    assert any("desc_act" in item.message for item in notices)


def awq_words(codes: Array) -> Array:
    """(rows, out) codes -> (rows, out / 8) int32, eight outputs to a word, the even ones first."""
    words = np.zeros((codes.shape[0], codes.shape[1] // 8), np.uint32)
    for row, column in np.ndindex(codes.shape):
        word, within = divmod(column, 8)
        nibble = within // 2 if within % 2 == 0 else 4 + within // 2
        words[row, word] |= np.uint32(int(codes[row, column]) << (4 * nibble))
    return words.view(np.int32)


def test_awq(tmp_path: Path) -> None:
    codes, zeros, scales = grid(3, 4, 24, 64, 32)
    folder = folder_of(tmp_path / "m", {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, {
        "l.qweight": awq_words(codes.T), "l.qzeros": awq_words(zeros.T), "l.scales": np.ascontiguousarray(scales.T)})
    made = read_folder(folder).tensors["l.weight"]
    assert isinstance(made, QuantizedTensor)
    assert str(made.format) == "int4/g32/fp16/int"
    assert np.array_equal(made.dense(), values(codes, zeros, scales, np.arange(64) // 32))


def group_of(scheme: Mapping[str, Any], layout: str, targets: tuple[str, ...] = ("Linear",)) -> dict[str, Any]:
    return {"quant_method": "compressed-tensors", "format": layout, "quantization_status": "compressed",
            "config_groups": {"group_0": {"targets": list(targets), "weights": dict(scheme)}}}


SCHEMES = [
    (4, True, "group", 32), (4, False, "group", 32), (3, True, "channel", None), (8, True, "channel", None),
    (8, False, "group", 16), (2, False, "channel", None), (8, True, "tensor", None),
]


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "symmetric", "strategy", "group"), SCHEMES)
@pytest.mark.parametrize("layout", ["pack-quantized", "int-quantized"])
def test_what_compressed_tensors_compresses_is_read(tmp_path: Path, bits: int, symmetric: bool, strategy: str,
                                                    group: int | None, layout: str) -> None:
    torch = pytest.importorskip("torch")
    library = pytest.importorskip("compressed_tensors.compressors")
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    args = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy=strategy, group_size=group)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    codes, zeros, scales = grid(bits, bits, 40, 96, group or 96)
    if strategy == "tensor":
        scales = scales[:1]
    middle = 1 << (bits - 1)
    state = {"weight_scale": torch.from_numpy(scales.copy() if strategy != "tensor" else scales[0].copy())}
    zero = np.full_like(zeros, middle) if symmetric else zeros
    if not symmetric:
        state["weight_zero_point"] = torch.from_numpy((zeros - middle).astype(np.int8))
    wide = zero if strategy != "tensor" else zero[:1]
    exact = values(codes, wide, scales, np.arange(96) // (group or 96))
    state["weight"] = torch.from_numpy(exact)
    compressor = library.BaseCompressor.get_value_from_registry(layout)
    made = {f"l.{name}": value.numpy() for name, value in compressor.compress(state, scheme).items()}
    folder = folder_of(tmp_path / "m", group_of(args.model_dump(mode="json"), layout), made)
    read = read_folder(folder).tensors["l.weight"]
    assert isinstance(read, QuantizedTensor)
    assert np.array_equal(read.dense(), exact)
    assert (read.format.zero == "none") == symmetric


def rounded(tensors: Mapping[str, Stored], formats: tuple[str, ...]) -> dict[str, Stored]:
    """Every matrix but the embedding in one of the formats, in turn."""
    made = dict(tensors)
    matrices = [name for name, stored in tensors.items() if len(stored.shape) == 2 and "embed" not in name]
    for place, name in enumerate(matrices):
        fmt = QuantFormat.parse(formats[place % len(formats)])
        codes, scales, zero = quantize(tensors[name].dense(), fmt)
        made[name] = QuantizedTensor(codes, scales, fmt, zeros=zero if fmt.zero == "int" else None,
                                     minima=zero if fmt.zero == "min" else None)
    return made


WRITTEN = ("int4/g32/fp16", "int4/g32/fp16/int", "int8/axis/bf16", "int3/g32/fp32", "e4m3/axis/fp16",
           "int8/tensor/fp16")


def test_export_comes_back_to_the_bit(tmp_path: Path) -> None:
    source = tiny_checkpoint()
    source = replace(source, tensors=rounded(source.tensors, WRITTEN))
    write_folder(source, tmp_path / "m", layout="compressed-tensors")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    back = read_folder(tmp_path / "m")
    assert set(back.tensors) == set(source.tensors)
    for name, stored in source.tensors.items():
        read = back.tensors[name]
        assert type(read) is type(stored)
        assert np.array_equal(read.dense(), stored.dense()), name
        if isinstance(stored, QuantizedTensor):
            assert isinstance(read, QuantizedTensor)
            assert read.format == stored.format


def test_export_says_what_it_widens(tmp_path: Path) -> None:
    source = tiny_checkpoint()
    source = replace(source, tensors=rounded(source.tensors, ("int4/g32/fp16", "int4/g32/fp16/min")))
    with collect_notices() as notices:
        write_folder(source, tmp_path / "m", layout="compressed-tensors")
    assert any("written as fp16" in item.message for item in notices)
    back = read_folder(tmp_path / "m")
    kinds = {type(back.tensors[name]) for name, stored in source.tensors.items() if isinstance(stored, QuantizedTensor)}
    assert kinds == {Dense, QuantizedTensor}


def test_export_of_nothing_quantised_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EdgewiseError, match="no weight is in a format"):
        write_folder(tiny_checkpoint(), tmp_path / "m", layout="compressed-tensors")
    assert not (tmp_path / "m").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:You passed .quantization_config.:UserWarning")
@pytest.mark.parametrize(("formats", "dequantize"), [
    # Unpacked at once, transformers applies one scheme to all weights; left packed, it has no place for zero points.
    (("int4/g32/fp32", "int8/axis/fp32", "int3/g32/fp32"), False), (("int4/g32/fp32/int",), True)])
def test_transformers_loads_the_export_with_our_logits(tmp_path: Path, formats: tuple[str, ...],
                                                       dequantize: bool) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    source = tiny_checkpoint(tied=False)
    source = replace(source, tensors=rounded(source.tensors, formats))
    write_folder(source, tmp_path / "packed", layout="compressed-tensors")
    write_folder(source, tmp_path / "dense", dense=True)
    ids = torch.arange(40).reshape(1, 40)
    logits = []
    route = {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)} if dequantize else {}
    for name, options in (("packed", route), ("dense", {})):
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32, **options)
        with torch.no_grad():
            logits.append(model.eval()(ids).logits.numpy())
    assert np.abs(logits[0]).max() > 0.1
    np.testing.assert_allclose(logits[0], logits[1], rtol=0, atol=1e-5)


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}


@pytest.mark.parametrize(("quantization", "change", "error", "words"), [
    ({**GPTQ, "bits": 5}, {}, FormatError, "bits is '5'"),
    ({**GPTQ, "group_size": 0}, {}, FormatError, "group_size"),
    ({**GPTQ, "checkpoint_format": "marlin"}, {}, UnsupportedError, "marlin"),
    ({**GPTQ, "dynamic": {"x": 1}}, {}, UnsupportedError, "per module"),
    ({**GPTQ, "quant_method": "quip"}, {}, UnsupportedError, "it reads gptq, awq, compressed-tensors"),
    ({**GPTQ, "quant_method": ["gptq"]}, {}, UnsupportedError, "does not read"),
    (GPTQ, {"l.scales": None}, FormatError, "missing"),
    (GPTQ, {"l.qzeros": np.zeros((2, 3), np.int32)}, FormatError, "its shape is"),
    (GPTQ, {"l.qweight": np.zeros((8, 16), np.float32)}, FormatError, "expected I32"),
    (GPTQ, {"l.scales": np.full((2, 16), np.nan, np.float16)}, FormatError, "not finite"),
    (GPTQ, {"l.g_idx": np.full(64, 7, np.int32)}, FormatError, "outside 0..1"),
    ({"quant_method": "awq", "bits": 3}, {}, UnsupportedError, "3 bits"),
    ({"quant_method": "awq", "bits": 4, "version": "gemv"}, {}, UnsupportedError, "gemv"),
    ({"quant_method": "compressed-tensors", "format": "marlin-24"}, {}, UnsupportedError, "marlin-24"),
    ({"quant_method": "compressed-tensors", "config_groups": []}, {}, FormatError, "config_groups"),
    ({**group_of({"num_bits": 4}, "pack-quantized")}, {}, FormatError, "no weight is stored that way"),
    ({**group_of({"num_bits": 4}, "pack-quantized"), "transform_config": {"a": 1}}, {}, UnsupportedError, "rotations"),
    ({**group_of({"num_bits": 99}, "pack-quantized")}, {"l.weight_scale": np.ones((1, 1), np.float32)}, FormatError,
     "1 to 8 bits"),
    ({**group_of({"num_bits": 4}, "pack-quantized", ("re:(",))}, {"l.weight_scale": np.ones((1, 1), np.float32)},
     FormatError, "no group"),
    ({**group_of({"num_bits": 4}, "pack-quantized")}, {"l.weight_scale": np.ones((1, 1), np.float32)}, FormatError,
     "missing"),
])
def test_bad_folders(tmp_path: Path, quantization: Mapping[str, Any], change: Mapping[str, Array | None],
                     error: type[EdgewiseError], words: str) -> None:
    parts: dict[str, Array | None] = {**gptq(*grid(0, 4, 16, 64, 32), 4, "gptq", None), **change}
    folder = folder_of(tmp_path / "m", quantization, {key: part for key, part in parts.items() if part is not None})
    with pytest.raises(error, match=words):
        read_folder(folder).tensors["l.weight"]
