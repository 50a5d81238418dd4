"""Codecs of ggml's block types: decoding through them, rounding to them, packing codes without rounding."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import quantize as ggml_quantize

from edgewise.core.errors import InvalidValueError, UnsupportedError
from edgewise.core.numbers import BF16, FP16, MXFP4, QuantFormat, quantize
from edgewise.core.storage import Blocks, Dense, QuantizedTensor
from edgewise.formats.ggml_blocks import PLAIN, READ, WRITTEN, codec, encode, ggml_bytes, stored_of, type_of


def nibbles(bits: np.ndarray) -> np.ndarray:
    """16 bytes -> 32 codes: low halves first."""
    return np.concatenate([bits & 15, bits >> 4])


def q4_1_by_hand(block: np.ndarray) -> np.ndarray:
    d, m = block[:4].view(np.float16).astype(np.float32)
    return d * nibbles(block[4:]).astype(np.float32) + m


def q6_k_by_hand(block: np.ndarray) -> np.ndarray:
    """One value at a time, from the layout's description."""
    low, high, scales, d = block[:128], block[128:192], block[192:208].view(np.int8), block[208:].view(np.float16)
    values = np.zeros(256, np.float32)
    for i in range(256):
        half, place = divmod(i, 128)
        run, column = divmod(place, 32)
        low_bits = low[half * 64 + run % 2 * 32 + column] >> (4 if run >= 2 else 0) & 15
        high_bits = high[half * 32 + column] >> (2 * run) & 3
        code = int(low_bits) + 16 * int(high_bits) - 32
        values[i] = (np.float32(d[0]) * np.float32(scales[i // 16])) * np.float32(code)
    return values


def q4_k_by_hand(block: np.ndarray) -> np.ndarray:
    d, dmin = block[:4].view(np.float16).astype(np.float32)
    packed = [int(byte) for byte in block[4:16]]
    values = np.zeros(256, np.float32)
    for group in range(8):
        if group < 4:
            scale, minimum = packed[group] % 64, packed[group + 4] % 64
        else:
            scale = packed[group + 4] % 16 + packed[group - 4] // 64 * 16
            minimum = packed[group + 4] // 16 + packed[group] // 64 * 16
        for i in range(32):
            byte = block[16 + group // 2 * 32 + i]
            code = np.float32(byte >> 4 if group % 2 else byte & 15)
            values[group * 32 + i] = (d * np.float32(scale)) * code - dmin * np.float32(minimum)
    return values


@pytest.mark.parametrize(("name", "by_hand"), [("Q4_1", q4_1_by_hand), ("Q6_K", q6_k_by_hand), ("Q4_K", q4_k_by_hand)])
def test_decoding_agrees_with_a_slow_transcription(name: str, by_hand) -> None:
    form = codec(name)
    raw = np.random.default_rng(0).integers(0, 0x78, (3, 2 * form.block_nbytes), dtype=np.uint8)
    expected = [np.concatenate([by_hand(block) for block in row.reshape(2, -1)]) for row in raw]
    assert np.array_equal(form.decode(raw), np.array(expected))


@pytest.mark.parametrize("name", WRITTEN)
def test_encode_rounds_as_ggml_and_keeps_the_shape(name: str) -> None:
    values = np.random.default_rng(1).standard_normal((2, 3, 64)).astype(np.float32)
    made = encode(values, name)
    assert made.shape == (2, 3, 64)
    assert type_of(made) == name
    assert made.nbytes == 6 * codec(name).row_nbytes(64)
    theirs = np.asarray(ggml_quantize(values, GGMLQuantizationType[name])).view(np.uint8).reshape(6, -1)
    assert np.array_equal(ggml_bytes(made, name), theirs)


@pytest.mark.parametrize("name", WRITTEN)
def test_bytes_of_the_type_it_is_stored_in_are_not_copied(name: str) -> None:
    made = encode(np.random.default_rng(2).standard_normal((4, 32)), name)
    raw = ggml_bytes(made, name)
    assert np.shares_memory(raw, made.raw if isinstance(made, Blocks) else made.data)
    assert np.array_equal(stored_of(name, raw, made.shape).dense(), made.dense())


@pytest.mark.parametrize(("text", "name"), [
    ("int4/g32/fp16", "Q4_0"), ("int4/g32/fp16/min", "Q4_1"), ("int5/g32/fp16", "Q5_0"),
    ("int5/g32/fp16/min", "Q5_1"), ("int8/g32/fp16", "Q8_0")])
def test_codes_are_packed_without_rounding(text: str, name: str) -> None:
    fmt = QuantFormat.parse(text)
    x = np.random.default_rng(3).standard_normal((5, 96)).astype(np.float32)
    codes, scales, minima = quantize(x, fmt)
    tensor = QuantizedTensor(codes, scales, fmt, minima=minima)
    assert type_of(tensor) == name
    packed = stored_of(name, ggml_bytes(tensor, name), tensor.shape)
    assert np.array_equal(packed.dense(), tensor.dense())
    assert packed.nbytes == tensor.nbytes


def test_microscaling_codes_are_packed_without_rounding() -> None:
    x = np.random.default_rng(4).standard_normal((5, 96)).astype(np.float32) * 10.0
    codes, scales, _ = quantize(x, MXFP4)
    tensor = QuantizedTensor(codes, scales, MXFP4)
    assert type_of(tensor) == "MXFP4"
    assert np.array_equal(stored_of("MXFP4", ggml_bytes(tensor, "MXFP4"), (5, 96)).dense(), tensor.dense())


@pytest.mark.parametrize("text", ["int4/g64/fp16", "int4/g32/fp32", "int3/g32/fp16", "int4/axis/fp16", "nf4/g32/fp16",
                                  "int8/g32/fp16/min", "int4/g32/fp16/int"])
def test_other_formats_have_no_block_type(text: str) -> None:
    fmt = QuantFormat.parse(text)
    codes, scales, zero = quantize(np.ones((2, 64), np.float32), fmt)
    kept = {"zeros": zero} if fmt.zero == "int" else {"minima": zero}
    assert type_of(QuantizedTensor(codes, scales, fmt, **kept)) is None


def test_plain_types_are_dense() -> None:
    assert [type_of(Dense(np.zeros(4, dtype), number)) for dtype, number in PLAIN.values()] == ["F32", "F16", "BF16"]
    assert encode(np.ones((1, 3)), "F16").number == FP16
    assert encode(np.ones((1, 3)), "BF16").number == BF16


def test_what_cannot_be_rounded_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"Q4_K is read but not written; written are F32, F16"):
        encode(np.zeros((1, 256)), "Q4_K")
    with pytest.raises(UnsupportedError, match="block type 'Q9_9' is not one"):
        encode(np.zeros((1, 256)), "Q9_9")
    with pytest.raises(InvalidValueError, match="multiple of 32 values; given 33"):
        encode(np.zeros((1, 33)), "Q8_0")
    with pytest.raises(InvalidValueError, match="1 values are NaN or infinite"):
        encode(np.array([[1.0, np.nan]]), "F16")
    with pytest.raises(InvalidValueError, match=r"largest value is 1e\+06; choose F32 or BF16"):
        encode(np.array([[1e6]]), "F16")
    with pytest.raises(InvalidValueError, match=r"Q4_0 decodes \(rows, blocks \* 18\) uint8"):
        codec("Q4_0").decode(np.zeros((1, 19), np.uint8))


def test_every_type_that_is_read_has_a_codec() -> None:
    assert len(READ) == 15
    assert set(WRITTEN) < set(READ)
    assert {name: codec(name).ggml_id for name in READ} == {name: GGMLQuantizationType[name].value for name in READ}
