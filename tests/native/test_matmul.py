"""Every matmul kernel of every tier against NumPy, and against every other tier to the bit."""

from __future__ import annotations

import zlib

import numpy as np
import pytest

from edgewise.core.numbers import bf16_to_float32, float32_to_bf16
from edgewise.native import kernels
from edgewise.native.io import block_layouts, decode_blocks
from edgewise.native.kernels import KernelLine, Packed
from edgewise.native.probe import tiers

TIERS = tiers()
LINES = kernels.quantised_kernels()
OWN = [line for line in LINES if not line.nested]  # packed from codes; the nested ones come as GGUF blocks only
LAYOUTS = block_layouts()
BLOCKS = [name for name, layout in LAYOUTS.items() if layout.values > 1]
IQ4_NL = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]

ROUNDING = 2.0**-23
"""The bound of every format, quantised and float alike: a kernel differs from the exact sum over the same (rounded)
inputs by no more than one float32 rounding for each of its additions and scales, of the sum of magnitudes."""


def bound(steps: int, magnitude: np.ndarray) -> np.ndarray:
    return (steps + 4) * ROUNDING * magnitude + 1e-37


def rounded(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Inputs as the kernels see them: int8 codes and one float32 scale max|x| / 127 per 32 inputs, ties to even."""
    tokens, cols = x.shape
    padded = np.zeros((tokens, -(-cols // 32), 32), np.float32)
    padded.reshape(tokens, -1)[:, :cols] = x
    scale = np.abs(padded).max(axis=2) / np.float32(127)
    scale = np.where(scale > 0, scale, np.float32(1))
    codes = np.rint(padded / scale[..., None])
    assert np.abs(codes).max() <= 127
    return codes.reshape(tokens, -1)[:, :cols], np.repeat(scale, 32, axis=1)[:, :cols]


def check(weight: Packed, dense: np.ndarray, x: np.ndarray, spread: np.ndarray, *, quantised: bool,
          round_inputs=lambda x: x) -> np.ndarray:
    """dense: the weight in float64. spread: (rows, cols), |scale * code| + |minimum|, what a kernel adds up."""
    codes, scale = rounded(x) if quantised else (round_inputs(x), np.float32(1))
    exact_inputs = codes.astype(np.float64) * scale
    expected = exact_inputs @ dense.T
    results = [kernels.matmul(weight, x, tier) for tier in TIERS]
    for tier, result in zip(TIERS, results, strict=True):
        assert np.array_equal(result.view(np.uint32), results[0].view(np.uint32)), tier
    steps = 4 * (x.shape[1] // 16 + 1) if quantised else x.shape[1]
    miss = np.abs(results[0] - expected)
    assert (miss <= bound(steps, np.abs(exact_inputs) @ spread.T)).all(), float(miss.max())
    return results[0]


def inputs(tokens: int, cols: int, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((tokens, cols), np.float32)
    x *= np.exp(np.random.default_rng(seed + 1).uniform(-3, 3, (tokens, 1))).astype(np.float32)
    return x


def name_of(line: KernelLine) -> str:
    return f"{line.bits}-{line.kind}{'-nested' if line.nested else ''}{'-halves' if line.halves else ''}"


class Made:
    """A random weight for a line of kernels.inc, of every scale type it takes, and its value in float64."""

    def __init__(self, line: KernelLine, rows: int, cols: int, *, group: int | None = None, scale: str = "fp16",
                 codes: np.ndarray | None = None, zero_groups: bool = True) -> None:
        rng = np.random.default_rng(zlib.crc32(f"{line}{rows}{cols}".encode()))
        group = group or (16 if line.halves else 32)
        groups = -(-cols // group)
        self.codes = rng.integers(0, 2**line.bits, (rows, cols), dtype=np.uint8) if codes is None else codes
        if scale == "e8m0":
            scales = np.exp2(rng.integers(-6, 3, (rows, groups))).astype(np.float32)
        else:
            scales = rng.uniform(1e-3, 0.1, (rows, groups)).astype(np.float16).astype(np.float32)
            scales *= np.where(rng.random((rows, groups)) < 0.2, np.float32(-1), np.float32(1))
            if zero_groups:
                scales[rng.random((rows, groups)) < 0.1] = 0
            if scale == "fp32":
                scales = (scales * np.float32(1.0001)).astype(np.float32)
        minima = rng.uniform(-0.2, 0.2, (rows, groups)).astype(np.float16).astype(np.float32)
        table = IQ4_NL if line.kind == "Table" else []
        self.packed = kernels.pack_codes(self.codes, scales, minima if line.kind == "Minimum" else None,
                                         bits=line.bits, scale=scale, group=group, table=table)
        wide = np.repeat(scales.astype(np.float64), group, axis=1)[:, :cols]
        if line.kind == "Table":
            values = np.array(IQ4_NL)[self.codes]
        else:
            values = self.codes - (0.0 if line.kind == "Minimum" else 2.0 ** (line.bits - 1))
        low = np.repeat(minima.astype(np.float64), group, axis=1)[:, :cols] if line.kind == "Minimum" else 0.0
        self.dense = wide * values + low
        centre = 128 if (line.bits, line.kind) == (8, "Minimum") else 0  # bytes are multiplied about their middle
        self.spread = np.abs(wide * (values - centre)) + np.abs(low + centre * wide)
        # unpack_row multiplies and adds in float32, as dense() of a stored tensor does
        self.row = (wide.astype(np.float32) * values.astype(np.float32)) + np.float32(low)


def test_the_lines_cover_what_the_engine_is_asked_for():
    assert {(line.bits, line.kind) for line in LINES} >= {
        *((bits, "Symmetric") for bits in (2, 3, 4, 5, 6, 8)), *((bits, "Minimum") for bits in (1, 2, 3, 4, 5, 6, 8))}
    assert TIERS[0] == "reference"


@pytest.mark.parametrize("line", OWN, ids=name_of)
def test_codes(line):
    """Rows around the sixteen of a panel, columns around the thirty-two of a block, tokens around both tiles."""
    for rows, cols, tokens in [(16, 32, 1), (1, 64, 2), (15, 96, 3), (17, 160, 4), (33, 32, 5), (16, 288, 15),
                               (48, 64, 16), (33, 96, 17), (17, 64, 33), (16, 33, 1), (5, 40, 6), (17, 100, 17)]:
        made = Made(line, rows, cols)
        check(made.packed, made.dense, inputs(tokens, cols), made.spread, quantised=True)


@pytest.mark.parametrize("line", OWN, ids=name_of)
def test_rows_come_back(line):
    for rows, cols in [(1, 32), (17, 64), (33, 100)]:
        made = Made(line, rows, cols)
        assert np.array_equal(made.packed.dense(), made.row)


@pytest.mark.parametrize("line", [line for line in OWN if not line.halves], ids=name_of)
@pytest.mark.parametrize(("group", "cols"), [(64, 192), (64, 160), (128, 288), (288, 288), (1024, 1000)])
def test_groups_longer_than_a_block(line, group, cols):
    """A scale per 64 or more inputs, or per row; the last group may be short."""
    made = Made(line, 19, cols, group=group)
    check(made.packed, made.dense, inputs(6, cols), made.spread, quantised=True)
    assert np.array_equal(made.packed.dense(), made.row)


@pytest.mark.parametrize("scale", ["fp16", "fp32"])
@pytest.mark.parametrize(("bits", "group", "cols"), [(2, 64, 160), (3, 32, 96), (4, 16, 100), (4, 128, 288),
                                                     (8, 32, 96), (8, 288, 288)])
def test_zero_points(bits, group, cols, scale):
    """value = scale * (code - zero), exactly what it says where the scale is half precision."""
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 2**bits, (35, cols), dtype=np.uint8)
    zeros = rng.integers(0, 2**bits, (35, -(-cols // group))).astype(np.float32)
    scales = rng.uniform(1e-3, 0.1, zeros.shape).astype(np.float16).astype(np.float32)
    if scale == "fp32":
        scales *= np.float32(1.0001)
    packed = kernels.pack_codes(codes, scales, zeros, bits=bits, group=group, scale=scale, zero_points=True)
    wide, points = (np.repeat(v.astype(np.float64), group, axis=1)[:, :cols] for v in (scales, zeros))
    dense = wide * (codes - points)
    if scale == "fp16":
        assert np.array_equal(packed.dense(), dense)
    spread = wide * (np.abs(codes - 128.0 * (bits == 8)) + np.abs(points - 128.0 * (bits == 8)))
    many = check(packed, dense, inputs(19, cols), spread, quantised=True)
    for tier in TIERS:
        assert np.array_equal(kernels.matmul(packed, inputs(19, cols)[:1], tier)[0], many[0])
        floats = kernels.matmul(packed, inputs(3, cols), tier, int8=False)
        exact = inputs(3, cols).astype(np.float64) @ dense.T
        assert (np.abs(floats - exact) <= bound(3 * cols, np.abs(inputs(3, cols)) @ (wide * (codes + points)).T)).all()


class Halved:
    """A random weight of which two of every four inputs are kept, and its value in float64, put together one by one."""

    def __init__(self, bits: int, centre: str, rows: int, cols: int, group: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed + bits + cols)
        kept = cols // 2
        self.codes = rng.integers(0, 2**bits, (rows, kept), dtype=np.uint8)
        order = rng.permuted(np.tile(np.arange(4, dtype=np.uint8), (rows, cols // 4, 1)), axis=2)
        self.places = np.ascontiguousarray(order[:, :, :2].reshape(rows, kept))  # in any order
        groups = -(-kept // group)
        scales = rng.uniform(-0.1, 0.1, (rows, groups)).astype(np.float16).astype(np.float32)
        if centre == "None":
            minima = rng.uniform(-0.2, 0.2, (rows, groups)).astype(np.float16).astype(np.float32)
        else:
            minima = rng.integers(0, 2**bits, (rows, groups)).astype(np.float32)
        self.packed = kernels.pack_sparse(self.codes, self.places, scales, None if centre == "Half" else minima,
                                          bits=bits, group=group, zero_points=centre == "Zero")
        self.dense, self.spread = np.zeros((rows, cols)), np.zeros((rows, cols))
        for row in range(rows):
            for i in range(kept):
                scale, low = float(scales[row, i // group]), float(minima[row, i // group])
                code = float(self.codes[row, i])
                column = i // 2 * 4 + int(self.places[row, i])
                parts = {"Half": (scale * (code - 2 ** (bits - 1)), 0.0), "Zero": (scale * (code - low), 0.0),
                         "None": (scale * code, low)}[centre]
                self.dense[row, column] = sum(parts)
                self.spread[row, column] = sum(map(abs, parts))


@pytest.mark.parametrize(("bits", "centre"), kernels.sparse_kernels())
@pytest.mark.parametrize(("group", "cols"), [(16, 128), (32, 192), (64, 256), (128, 512), (16, 36), (64, 576),
                                               (192, 384)])
def test_two_of_four(bits, centre, group, cols):
    """Against NumPy, and to the bit between tiers; one token has the bits it has among many."""
    made = Halved(bits, centre, 19, cols, group)
    assert np.array_equal(made.packed.dense(), made.dense.astype(np.float32))
    x = inputs(21, cols)
    many = check(made.packed, made.dense, x, made.spread, quantised=True)
    for tier in TIERS:
        for token in (0, 20):
            assert np.array_equal(kernels.matmul(made.packed, x[token:token + 1], tier)[0], many[token])
    plain = [kernels.matmul(made.packed, x[:5], tier, int8=False) for tier in TIERS]
    for result in plain:
        assert np.array_equal(result, plain[0])
    miss = np.abs(plain[0] - x[:5].astype(np.float64) @ made.dense.T)
    assert (miss <= bound(2 * cols, np.abs(x[:5]) @ made.spread.T)).all()


def test_every_pair_of_places_is_told_apart():
    pairs = [(a, b) for a in range(4) for b in range(4) if a != b]
    places = np.tile(np.array(pairs, np.uint8).reshape(1, -1), (16, 1))  # twelve groups of four: 48 inputs
    codes = np.tile(np.array([[0, 3]], np.uint8), (16, len(pairs)))      # -2 and 1
    packed = kernels.pack_sparse(codes, places, np.ones((16, 1), np.float32), bits=2, group=64)
    row = packed.dense()[0].reshape(-1, 4)
    for (a, b), group in zip(pairs, row, strict=True):
        assert group[a] == -2
        assert group[b] == 1
        assert np.count_nonzero(group) == 2


@pytest.mark.parametrize("places", [[0, 0], [1, 4], [255, 2]])
def test_places_that_are_none_are_refused(places):
    with pytest.raises(ValueError, match="two different places"):
        kernels.pack_sparse(np.zeros((1, 2), np.uint8), np.array([places], np.uint8), np.ones((1, 1), np.float32),
                            bits=4)


# A power of two has no sign and no zero: minima are never stored so.
@pytest.mark.parametrize(("scale", "line"), [(scale, line) for scale in ("fp32", "e8m0") for line in OWN
                                             if scale == "fp32" or line.kind != "Minimum"],
                         ids=lambda part: part if isinstance(part, str) else name_of(part))
def test_scale_types(line, scale):
    made = Made(line, 18, 96, scale=scale)
    check(made.packed, made.dense, inputs(18, 96), made.spread, quantised=True)
    assert np.array_equal(made.packed.dense(), made.row)


@pytest.mark.parametrize("line", OWN, ids=name_of)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("code", ["largest", "smallest"])
def test_extremes_do_not_saturate(line, sign, code):
    """All codes at one end and all inputs at another: the largest sums of products, in 8 and 16-bit steps too."""
    value = 2**line.bits - 1 if code == "largest" else 0
    made = Made(line, 17, 128, codes=np.full((17, 128), value, np.uint8), zero_groups=False)
    x = np.full((17, 128), sign * 127, np.float32)
    result = check(made.packed, made.dense, x, made.spread, quantised=True)
    assert np.abs(result).max() > 1 or (line.kind == "Minimum" and code == "smallest")


@pytest.mark.parametrize("line", OWN, ids=name_of)
def test_inputs_at_the_edges(line):
    """A token of zeros, of one value, with a peak that makes all others round to nothing, of ties."""
    made = Made(line, 20, 96)
    x = np.zeros((6, 96), np.float32)
    x[1] = -2.5
    x[2] = 1e-4
    x[2, 40] = -1e4
    x[3, 95] = 1.0
    x[4] = np.tile(np.float32([127, -127, 0.5, -0.5, 1.5, 2.5, -1.5, 63.5]), 12)  # ties
    x[5] = 1e-30
    result = check(made.packed, made.dense, x, made.spread, quantised=True)
    assert not result[0].any()


def test_inputs_are_divided_by_their_scale():
    """To the bit, though no division is made: a code is the quotient rounded twice, to float32 and to ties to even."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((4096, 32)) * np.exp(rng.uniform(-60, 60, (4096, 1)))).astype(np.float32)
    halves = np.arange(-127, 128).astype(np.float32) / 2  # products of a scale with halves, and their neighbours
    x[:2048, :31] = halves[rng.integers(0, len(halves), (2048, 31))] * np.abs(x[:2048, 31:])
    x[:2048, 31] *= 127
    x[:1024, :31] = np.nextafter(x[:1024, :31], rng.choice([-np.inf, np.inf], (1024, 31)).astype(np.float32))
    codes, scale = rounded(x)
    identity = kernels.pack_codes((np.eye(32, dtype=np.uint8) + 128), np.ones((32, 1), np.float32), bits=8)
    for tier in TIERS:
        assert np.array_equal(kernels.matmul(identity, x, tier), (codes * scale).astype(np.float32))


@pytest.mark.parametrize("steps", [1, 50, 190, 40_000])
def test_inputs_too_small_for_a_scale_are_zero(steps):
    """max|x| / 127 would be zero or have a bit or two left, and codes would not fit a byte."""
    codes, scales = np.full((16, 64), 7, np.uint8), np.full((16, 2), 1e30, np.float32)
    packed = kernels.pack_codes(codes, scales, bits=4, scale="fp32")
    x = np.full((2, 64), steps * 2.0**-149, np.float32)
    for tier in TIERS:
        assert not kernels.matmul(packed, x, tier).any()


@pytest.mark.parametrize("line", OWN, ids=name_of)
def test_one_token_has_the_bits_it_has_among_many(line):
    made = Made(line, 33, 96)
    x = inputs(37, 96)
    for tier in TIERS:
        many = kernels.matmul(made.packed, x, tier)
        for token in range(len(x)):
            assert np.array_equal(kernels.matmul(made.packed, x[token:token + 1], tier)[0], many[token])
        for count in (2, 3, 5, 16, 31):
            assert np.array_equal(kernels.matmul(made.packed, x[3:3 + count], tier), many[3:3 + count])


def random_blocks(name: str, rows: int, cols: int, seed: int = 0) -> np.ndarray:
    """Random bytes with finite scales, (rows, bytes per row)."""
    layout = LAYOUTS[name]
    rng = np.random.default_rng(seed + zlib.crc32(name.encode()))
    raw = rng.integers(0, 256, (rows, cols // layout.values, layout.nbytes), dtype=np.uint8)
    half = rng.uniform(-0.05, 0.05, (*raw.shape[:2], 2)).astype(np.float16).view(np.uint8)
    at = {"Q2_K": 80, "Q3_K": 108, "Q6_K": 208}.get(name, 0)
    if name == "MXFP4":
        raw[..., 0] = rng.integers(110, 135, raw.shape[:2])
    else:
        both = name in ("Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K")
        raw[..., at:at + (4 if both else 2)] = half[..., :4 if both else 2]
    return raw.reshape(rows, -1)


def spread_of(name: str, dense: np.ndarray) -> np.ndarray:
    """An upper bound of |scale * code| + |minimum| from the values of a block: where minima cancel, both ends count."""
    block = LAYOUTS[name].values
    parts = np.abs(dense).reshape(len(dense), -1, block).max(axis=2)
    return np.repeat(4 * parts, block, axis=1)


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name):
    for rows, blocks, tokens in [(16, 1, 1), (17, 2, 5), (1, 3, 17), (33, 1, 16), (15, 2, 33), (2, 5, 4)]:
        cols = blocks * LAYOUTS[name].values
        raw = random_blocks(name, rows, cols)
        packed = kernels.pack_blocks(name, raw, cols)
        dense = decode_blocks(name, raw)
        assert np.array_equal(packed.dense(), dense)  # but for the sign of a zero
        wide = dense.astype(np.float64)
        x = inputs(tokens, cols)
        many = check(packed, wide, x, spread_of(name, wide), quantised=True)
        for tier in TIERS:
            assert np.array_equal(kernels.matmul(packed, x[-1:], tier)[0], many[-1])


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("byte", [0x00, 0xFF, 0x80, 0x7F])
def test_blocks_of_one_byte(name, byte):
    """Every code and sub-scale at an end, inputs at an end."""
    cols = 2 * LAYOUTS[name].values
    layout = LAYOUTS[name]
    scales = random_blocks(name, 17, cols).reshape(17, -1, layout.nbytes)
    raw = np.full_like(scales, byte)
    at = {"Q2_K": 80, "Q3_K": 108, "Q6_K": 208}.get(name, 0)
    width = 1 if name == "MXFP4" else 4 if name in ("Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K") else 2
    raw[..., at:at + width] = scales[..., at:at + width]
    raw = raw.reshape(17, -1)
    dense = decode_blocks(name, raw)
    packed = kernels.pack_blocks(name, raw, cols)
    assert np.array_equal(packed.dense(), dense)
    for sign in (1, -1):
        x = np.full((18, cols), sign * 127, np.float32)
        check(packed, dense.astype(np.float64), x, spread_of(name, dense.astype(np.float64)) + 1, quantised=True)


def test_mxfp4_exponents_to_the_smallest():
    raw = random_blocks("MXFP4", 16, 32)
    raw[:, 0] = np.arange(16)
    packed = kernels.pack_blocks("MXFP4", raw, 32)
    dense = decode_blocks("MXFP4", raw)
    assert np.array_equal(packed.dense(), dense)
    x = np.full((1, 32), 1e30, np.float32)
    check(packed, dense.astype(np.float64), x, np.abs(dense.astype(np.float64)), quantised=True)


def floats(element: str, rows: int, cols: int) -> tuple[np.ndarray, np.ndarray]:
    """A random weight as stored, and in float32."""
    values = np.random.default_rng(rows + cols).standard_normal((rows, cols), np.float32)
    if element == "float32":
        return values, values
    if element == "float16":
        return values.astype(np.float16), values.astype(np.float16).astype(np.float32)
    values[values == 0] = 1
    stored = (values.view(np.uint32) >> 16).astype(np.uint16)
    return stored, bf16_to_float32(stored)


@pytest.mark.parametrize("element", ["float32", "float16", "bfloat16"])
def test_floats(element):
    for rows, cols, tokens in [(16, 32, 1), (1, 1, 2), (15, 7, 3), (17, 31, 4), (33, 33, 5), (16, 100, 15), (2, 64, 16),
                               (33, 40, 17), (17, 65, 33)]:
        stored, dense = floats(element, rows, cols)
        packed = kernels.pack_floats(stored, element)
        assert np.array_equal(packed.dense(), dense)
        x = inputs(tokens, cols)
        wide = dense.astype(np.float64)
        many = check(packed, wide, x, np.abs(wide), quantised=False)
        for tier in TIERS:
            assert np.array_equal(kernels.matmul(packed, x[-1:], tier)[0], many[-1])


@pytest.mark.parametrize("tokens", [1, 2, 4, 9, 16, 17, 33])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (16, 32), (17, 31), (33, 100), (48, 65)])
def test_bfloat16_pairs(rows, cols, tokens):
    """Weights and inputs in bfloat16, in sums of float32: the exact sum, within float32 rounding."""
    stored, dense = floats("bfloat16", rows, cols)
    packed = kernels.pack_floats(stored, "bfloat16 pairs")
    assert np.array_equal(packed.dense(), dense)
    x, wide = inputs(tokens, cols), dense.astype(np.float64)
    many = check(packed, wide, x, np.abs(wide), quantised=False, round_inputs=to_bfloat)
    for tier in TIERS:
        assert np.array_equal(kernels.matmul(packed, x[-1:], tier)[0], many[-1])


def to_bfloat(x: np.ndarray) -> np.ndarray:
    """Inputs of bfloat16 products: nearest, ties to even, nothing below 2^-56."""
    near = bf16_to_float32(float32_to_bf16(x))
    return np.where(np.abs(x) < 2.0**-56, np.float32(0), near)


def test_bfloat16_pairs_add_the_odd_input_first_and_round_each_time():
    """In the order of VDPBF16PS, on every tier: what float32 sums in another order, or in one step, would not give."""
    rng = np.random.default_rng(0)
    stored, dense = floats("bfloat16", 16, 64)
    x = to_bfloat((rng.standard_normal((40, 64)) * 2.0 ** rng.integers(-9, 9, (40, 64))).astype(np.float32))

    def in_order(columns):  # float64 holds a product of bfloat16, and its sum with a float32 of like size, exactly
        total = np.zeros((40, 16), np.float32)
        for k in columns:
            total = (total + x[:, k, None].astype(np.float64) * dense[None, :, k]).astype(np.float32)
        return total

    expected, other = in_order(k ^ 1 for k in range(64)), in_order(range(64))
    packed = kernels.pack_floats(stored, "bfloat16 pairs")
    for tier in TIERS:
        assert np.array_equal(kernels.matmul(packed, x, tier), expected)
    assert not np.array_equal(expected, other)


def test_bfloat16_pairs_know_nothing_below_2_to_the_minus_56():
    """Smaller weights and inputs are zero, and the smallest that are left make sums that no tier takes for zero."""
    edge = np.float32([2.0**-56, -(2.0**-56), 2.0**-57, -(2.0**-60), 2.0**-126, 1e-40, 0, 2.0**-56 * 1.0078125])
    stored = np.tile(float32_to_bf16(edge), (16, 4))
    packed = kernels.pack_floats(stored, "bfloat16 pairs")
    kept = to_bfloat(np.tile(edge, (16, 4)))
    assert np.array_equal(packed.dense(), kept)
    x = np.zeros((3, 32), np.float32)
    x[0], x[1, 7], x[1, 0], x[2] = 2.0**-57, 2.0**-56 * 1.0078125, -(2.0**-56) * 1.0078125, 1.0
    found = [kernels.matmul(packed, x, tier) for tier in TIERS]
    for result in found:
        assert np.array_equal(result, found[0])
    assert not found[0][0].any()
    assert found[0][1, 0] == np.float32(2.0**-112 * (1.0078125**2 - 1.0078125))  # 2^-119 and a bit: products cancel
    assert found[0][2, 0] == np.float32(4 * 2.0**-56 * 1.0078125)


def test_float_extremes():
    """Subnormal halves, the largest ones, and bfloat16 beyond the halves' range."""
    stored = np.tile(np.float16([6e-8, -6e-8, 65504, -65504, 2**-14, 0, -0.0, 1]), (16, 4))
    packed = kernels.pack_floats(stored, "float16")
    wide = stored.astype(np.float64)
    check(packed, wide, np.ones((3, 32), np.float32), np.abs(wide), quantised=False)
    big = np.full((16, 32), 0x7E00, np.uint16)  # 2^125
    wide = bf16_to_float32(big).astype(np.float64)
    check(kernels.pack_floats(big, "bfloat16"), wide, np.full((2, 32), 1e-5, np.float32), wide, quantised=False)


def test_wrong_arguments_are_refused():
    codes, scales = np.zeros((2, 64), np.uint8), np.ones((2, 2), np.float32)
    packed = kernels.pack_codes(codes, scales, bits=4)
    with pytest.raises(ValueError, match="no kernel for 7-bit"):
        kernels.pack_codes(codes, scales, bits=7)
    with pytest.raises(ValueError, match="16 inputs or a multiple of 32; given 8"):
        kernels.pack_codes(codes, scales, bits=4, group=8)
    with pytest.raises(ValueError, match=r"expected scales and minima of \(2, 2\)"):
        kernels.pack_codes(codes, scales[:, :1].copy(), bits=4)
    with pytest.raises(ValueError, match="16 entries"):
        kernels.pack_codes(codes, scales, bits=4, table=[1, 2])
    with pytest.raises(ValueError, match="are not 32 values of Q4_0"):
        kernels.pack_blocks("Q4_0", np.zeros((1, 17), np.uint8), 32)
    with pytest.raises(ValueError, match="shapes do not agree"):
        kernels.matmul(packed, np.zeros((1, 32), np.float32), "reference")
    with pytest.raises(ValueError, match="tier sse: expected reference"):
        kernels.matmul(packed, np.zeros((1, 64), np.float32), "sse")
    with pytest.raises(ValueError, match="packed data has 7 bytes"):
        Packed(packed_format(), 2, 64, np.zeros(7, np.uint8))
    with pytest.raises(ValueError, match="out of range"):
        packed.row(2)


def packed_format():
    from edgewise.native import _core

    return _core.PackedFormat("int", 4)
