"""The native block codecs against the `gguf` package, bit for bit, and their own edges."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from edgewise.native import _core

LAYOUTS: dict[str, tuple[int, int, int, bool]] = _core.block_layouts()
QUANTISED = [name for name in LAYOUTS if LAYOUTS[name][1] > 1]
WRITTEN = [name for name in LAYOUTS if LAYOUTS[name][3]]


def judge(name: str, raw: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return np.asarray(dequantize(raw, GGMLQuantizationType[name]), np.float32)


def assert_same_bits(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.shape == theirs.shape
    both_nan = np.isnan(ours) & np.isnan(theirs)
    assert np.array_equal(np.where(both_nan, 0, ours.view(np.uint32)), np.where(both_nan, 0, theirs.view(np.uint32)))


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_is_the_packages(name: str) -> None:
    from gguf.constants import GGML_QUANT_SIZES

    kind = GGMLQuantizationType[name]
    assert (kind.value, *GGML_QUANT_SIZES[kind]) == LAYOUTS[name][:3]


@pytest.mark.parametrize("name", LAYOUTS)
def test_random_bytes_decode_to_the_same_bits(name: str) -> None:
    raw = np.random.default_rng(1).integers(0, 256, (40, 7 * LAYOUTS[name][2]), dtype=np.uint8)
    assert_same_bits(_core.decode_blocks(name, raw), judge(name, raw))


def test_every_half_decodes_as_numpy_does() -> None:
    raw = np.arange(65536, dtype=np.uint16).view(np.uint8).reshape(256, 512)
    assert_same_bits(_core.decode_blocks("F16", raw), raw.view(np.float16).astype(np.float32))


def test_floats_round_to_half_and_bfloat16_ties_to_even() -> None:
    rng = np.random.default_rng(2)
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    ties = (halves[:-1] + halves[1:]) / 2
    random = rng.integers(0, 2**32, 100_000, dtype=np.uint32).view(np.float32)
    extremes = np.float32([0, -0.0, 65504, 65519.99, 65520, 1e-8, 2**-25, 2**-25 * 1.0001, np.inf, -np.inf, np.nan])
    values = np.concatenate([halves, ties, -ties, np.nextafter(ties, np.float32(9e9)), random, extremes])[None, :]
    with np.errstate(all="ignore"):
        halved = values.astype(np.float16).astype(np.float32)
    assert_same_bits(_core.decode_blocks("F16", _core.encode_blocks("F16", values)), halved)
    brains = quantize(values, GGMLQuantizationType.BF16).view(np.uint8)
    assert np.array_equal(_core.encode_blocks("BF16", values), brains)


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_encoding_is_the_packages(name: str, scale: float) -> None:
    rng = np.random.default_rng(3)
    values = (rng.standard_normal((50, 128)) * scale).astype(np.float32)
    values[0] = 0.0
    values[1] = scale
    values[2, :32] = -scale
    values[3] = np.round(values[3] / scale * 4) * scale  # many ties
    values[4, ::2] = 0.0
    theirs = np.asarray(quantize(values, GGMLQuantizationType[name])).view(np.uint8).reshape(50, -1)
    assert np.array_equal(_core.encode_blocks(name, values), theirs)


@pytest.mark.parametrize("name", [name for name in QUANTISED if name != "MXFP4"])
def test_non_finite_scales_are_found(name: str) -> None:
    nbytes = LAYOUTS[name][2]
    raw = np.zeros((3, 5 * nbytes), np.uint8)
    assert _core.first_nonfinite_block(name, raw) == -1
    found = 0
    for byte in range(1, nbytes):
        for bits in (0x7C, 0xFE):
            broken = raw.copy()
            broken[1, 2 * nbytes + byte] = bits
            bad = not np.isfinite(judge(name, broken)).all()
            assert (_core.first_nonfinite_block(name, broken) == 7) == bad, byte
            found += bad
    assert found >= 2


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_non_finite_values_are_found(name: str) -> None:
    values = np.zeros((2, 9), np.float32)
    values[1, 3] = np.nan
    assert _core.first_nonfinite_block(name, _core.encode_blocks(name, values)) == 12


def test_mxfp4_exponents_that_overflow_are_found() -> None:
    raw = np.full((256, 17), 0x77, np.uint8)
    raw[:, 0] = np.arange(256)
    first = int(np.argmin(np.isfinite(judge("MXFP4", raw)).all(1)))
    assert first > 0
    assert _core.first_nonfinite_block("MXFP4", raw) == first


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown block type 'Q9'; expected one of F32, F16"):
        _core.decode_blocks("Q9", np.zeros((1, 18), np.uint8))
    with pytest.raises(ValueError, match="Q4_0 expects rows of a multiple of 18 bytes; given 17"):
        _core.decode_blocks("Q4_0", np.zeros((1, 17), np.uint8))
    with pytest.raises(ValueError, match="cannot write Q4_K"):
        _core.encode_blocks("Q4_K", np.zeros((1, 256), np.float32))
    with pytest.raises(TypeError):
        _core.decode_blocks("Q4_0", np.zeros((1, 18), np.int8))
    with pytest.raises(TypeError):
        _core.decode_blocks("Q4_0", np.zeros((2, 36), np.uint8)[:, ::2])
    assert _core.decode_blocks("Q4_0", np.zeros((0, 18), np.uint8)).shape == (0, 32)
