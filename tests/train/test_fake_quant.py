"""The torch twin against the core, bit for bit, and every gradient against its formula."""

from __future__ import annotations

import math

import numpy as np
import pytest

from edgewise.core.activation import StaticActivation
from edgewise.core.elements import E5M2, ELEMENTS, FP4, FP32, INT4, POSIT4, POSIT8, TERNARY, int_format, round_to
from edgewise.core.errors import InvalidValueError
from edgewise.core.numbers import Granularity, QuantFormat, dequantize, quantize

torch = pytest.importorskip("torch")
from edgewise.train.fake_quant import (  # noqa: E402
    EmaRange,
    LearnedClip,
    Lsq,
    LsqPlus,
    StaticAffine,
    fake_quantize,
    per_token,
    round_ste,
    scale_gradient,
    snap,
    static_affine,
)

pytestmark = pytest.mark.slow

SMALL = [name for name, element in ELEMENTS.items() if element.bits <= 16]
PLACES = ["tensor", "axis", "g1", "g8", "g32"]
SCALED = [name for name in SMALL if name not in ("bf16", "fp16")]  # whose range needs no scale
TEXTS = [f"{element}/{place}/{scale}" for element in SCALED for place, scale in zip(
    PLACES, ["fp32", "fp16", "bf16", "e8m0", "fp16"], strict=True)]
TEXTS += [f"int{bits}/{place}/{scale}/{zero}" for bits in range(1, 9) for zero in ("int", "min")
          for place, scale in (("tensor", "fp32"), ("axis", "fp16"), ("g8", "bf16"), ("g32", "fp16"))]
TEXTS += ["posit8_0@4/axis/fp32", "posit4_1@1/g8/fp16", "fp4@4/g32/fp16", "int4/g32/e4m3", "int4/g32/e5m2/min"]


def samples(seed: int) -> list[np.ndarray]:
    """Ordinary values, ties, zeros of both signs, one-sided rows, tiny and huge ones, odd widths."""
    rng = np.random.default_rng(seed)
    ordinary = rng.normal(0, 2, (3, 70)).astype(np.float32)
    ties = rng.integers(-16, 17, (4, 33)).astype(np.float32) / 2
    mixed = (rng.normal(size=(4, 40)) * np.exp(rng.normal(0, 6, (4, 40)))).astype(np.float32)
    mixed[0] = np.abs(mixed[0])
    mixed[1, :20] = -0.0
    mixed[2] = 0
    mixed[3] = 1e-30
    return [ordinary, ties, mixed, np.array([[3.0]], np.float32), np.full((2, 9), -1.5, np.float32)]


def restored(x: np.ndarray, fmt: QuantFormat, bits: int | None = None) -> np.ndarray:
    codes, scales, zeros = quantize(x, fmt)
    return dequantize(codes, scales, fmt, zeros=zeros if fmt.zero == "int" else None,
                      minima=zeros if fmt.zero == "min" else None, bits=bits)


def same_bits(ours, expected: np.ndarray) -> bool:
    return np.array_equal(np.asarray(ours.detach()).view(np.int32), expected.astype(np.float32).view(np.int32))


@pytest.mark.filterwarnings("ignore::edgewise.core.errors.EdgewiseWarning")  # scales beyond a narrow format
@pytest.mark.parametrize("text", TEXTS)
def test_the_twin_equals_the_core_bit_for_bit(text):
    fmt = QuantFormat.parse(text)
    for seed in range(3):
        for x in samples(seed):
            assert same_bits(fake_quantize(torch.from_numpy(x), fmt), restored(x, fmt)), x.shape
            assert same_bits(fake_quantize(torch.from_numpy(x), fmt, through_scale=True), restored(x, fmt)), x.shape


@pytest.mark.filterwarnings("ignore::edgewise.core.errors.EdgewiseWarning")
@pytest.mark.parametrize("text", ["int8/axis/fp32", "int8/g8/fp16/int", "int4/tensor/fp32/min", "int6/g32/fp16"])
def test_prefixes_equal_the_core(text):
    fmt = QuantFormat.parse(text)
    for bits in range(1, fmt.element.bits + 1):
        for x in samples(bits):
            assert same_bits(fake_quantize(torch.from_numpy(x), fmt, bits=bits), restored(x, fmt, bits))


@pytest.mark.parametrize("name", SMALL)
def test_snap_rounds_every_boundary_as_the_core(name):
    element = ELEMENTS[name]
    values = np.unique(element.values()[np.isfinite(element.values())]).astype(np.float32)
    middles = ((values[1:].astype(np.float64) + values[:-1]) / 2).astype(np.float32)
    roots = np.sqrt(np.abs(values[1:].astype(np.float64) * values[:-1])).astype(np.float32)
    with np.errstate(over="ignore"):
        x = np.concatenate([values, middles, roots, -roots, *(np.nextafter(points, np.float32(end)) for end in (
            -np.inf, np.inf) for points in (values, middles, roots)), values * np.float32(1.5)])
    x = x[np.isfinite(x)][-200_000:]
    assert np.array_equal(np.asarray(snap(torch.from_numpy(x), element)), round_to(x, element))


def test_leading_axes_are_rows_and_the_type_is_kept():
    x = np.random.default_rng(0).normal(size=(2, 3, 40)).astype(np.float32)
    fmt = QuantFormat.parse("int4/g8/fp16/min")
    assert same_bits(fake_quantize(torch.from_numpy(x), fmt), restored(x.reshape(6, 40), fmt).reshape(x.shape))
    narrow = torch.from_numpy(x).bfloat16()
    assert fake_quantize(narrow, fmt).dtype == torch.bfloat16
    expected = torch.from_numpy(restored(narrow.float().numpy().reshape(6, 40), fmt)).bfloat16()
    assert torch.equal(fake_quantize(narrow, fmt).reshape(6, 40), expected)
    assert fake_quantize(torch.zeros(0, 4), fmt).shape == (0, 4)


def test_what_it_refuses():
    nested = QuantFormat(INT4, Granularity("group", 32), QuantFormat.parse("int6/g16"))
    with pytest.raises(InvalidValueError, match="themselves quantised"):
        fake_quantize(torch.ones(1, 32), nested)
    with pytest.raises(InvalidValueError, match="single number"):
        fake_quantize(torch.tensor(1.0), QuantFormat.parse("int8"))
    with pytest.raises(InvalidValueError, match="plain integer"):
        fake_quantize(torch.ones(1, 4), QuantFormat.parse("nf4"), bits=2)
    with pytest.raises(InvalidValueError, match="low and high"):
        StaticAffine(1.0, 0.0, 8)


# ---- gradients ----------------------------------------------------------------------------------------------------

def test_rounding_is_straight_through_and_gradients_can_be_scaled():
    x = torch.tensor([0.2, 0.5, 1.5, -2.6], requires_grad=True)
    y = round_ste(x)
    assert y.tolist() == [0, 0, 2, -3]
    scale_gradient(y, 0.25).backward(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert x.grad.tolist() == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("element", [POSIT4, POSIT8, FP4, E5M2, TERNARY, INT4], ids=str)
def test_snap_passes_gradients_inside_the_range_only(element):
    top = element.max_value
    x = torch.tensor([0.0, 0.3 * top, top, 1.8 * top, -3 * top], requires_grad=True)
    snap(x, element).sum().backward()
    assert x.grad.tolist() == [1, 1, 1, 0, 0]


def test_a_dynamic_scale_clips_nothing_and_passes_every_gradient():
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    upstream = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
    for text in ("int4/g8/fp32", "int4/g8/fp16/min", "posit8_0@4/axis/fp16", "fp4/g32/fp16", "nf4/g8/bf16"):
        x.grad = None
        fake_quantize(x, QuantFormat.parse(text)).backward(upstream)
        np.testing.assert_allclose(x.grad, upstream, rtol=1e-6)  # divided by the scale, then multiplied


def test_gradients_through_the_scale_match_the_formula():
    """Symmetric, one group: y_i = q_i s with s = |x_p| / L.  dy_i/dx_p = (q_i - x_i / s) sign(x_p) / L, plus one for
    i = p; where i is p the two terms of x / s cancel to q_p sign / L."""
    x = torch.tensor([[0.31, -2.0, 1.13, 0.77]], requires_grad=True)
    upstream = torch.tensor([[1.0, -0.5, 2.0, 0.25]])
    fake_quantize(x, QuantFormat.parse("int4/axis/fp32"), through_scale=True).backward(upstream)
    scale = 2.0 / 7
    codes = np.rint(np.array([0.31, -2.0, 1.13, 0.77]) / scale)
    slope = (codes - x.detach().numpy()[0] / scale) * -1 / 7
    expected = upstream.numpy()[0].copy()
    expected[1] += (slope * upstream.numpy()[0]).sum()
    np.testing.assert_allclose(x.grad.numpy()[0], expected, rtol=1e-5)


@pytest.mark.parametrize("text", ["int4/g4/fp32", "int4/g4/fp32/int", "int4/axis/fp32/min"])
def test_learned_clip_gradients_match_a_slow_transcription(text):
    """Each value by the chain rule, with every rounding replaced by its argument where it is differentiated."""
    fmt = QuantFormat.parse(text)
    rng = np.random.default_rng(3)
    weight = rng.normal(size=(2, 8))
    weight[:, ::4], weight[:, 1::4] = np.abs(weight[:, ::4]), -np.abs(weight[:, 1::4])  # every group has both signs
    clip = LearnedClip((2, 8), fmt, initial=1.0).double()
    with torch.no_grad():
        clip.upper.copy_(torch.from_numpy(rng.normal(1, 0.5, clip.upper.shape)))
        clip.lower.copy_(torch.from_numpy(rng.normal(1, 0.5, clip.lower.shape)))
    upstream = rng.normal(size=(2, 8))
    clip(torch.from_numpy(weight)).backward(torch.from_numpy(upstream))

    size = 4 if "g4" in text else 8
    for row in range(2):
        for group in range(8 // size):
            place = slice(group * size, (group + 1) * size)
            w, g = weight[row, place], upstream[row, place]
            share_up = 1 / (1 + math.exp(-clip.upper[row, group, 0].item()))
            share_low = 1 / (1 + math.exp(-clip.lower[row, group, 0].item()))
            high, low = share_up * w.max(), share_low * w.min()
            d_high = d_low = 0.0
            for value, up in zip(w, g, strict=True):
                inside = min(max(value, low), high)
                by_value = (float(value > high), float(value < low))  # d inside / d (high, low)
                if fmt.zero == "none":
                    largest = 0 if high >= -low else 1
                    limit = 7.0
                    scale = max(high, -low) / limit
                    d_scale = [(1 / limit if largest == 0 else 0.0), (-1 / limit if largest == 1 else 0.0)]
                    code = np.rint(inside / scale)
                    slopes = [by_value[k] + (code - inside / scale) * d_scale[k] for k in (0, 1)]
                elif fmt.zero == "int":
                    scale = (high - low) / 15
                    d_scale = [1 / 15, -1 / 15]
                    zero = np.rint(-low / scale)
                    d_zero = [low / scale**2 * d_scale[0], -1 / scale + low / scale**2 * d_scale[1]]
                    raw = np.rint(inside / scale) + zero
                    code = min(max(raw, 0), 15)
                    free = float(raw == code)
                    slopes = [(code - zero) * d_scale[k] + scale * (
                        free * (by_value[k] / scale - inside / scale**2 * d_scale[k] + d_zero[k]) - d_zero[k])
                        for k in (0, 1)]
                else:
                    scale = (high - low) / 15
                    d_scale = [1 / 15, -1 / 15]
                    d_low_of = (0.0, 1.0)
                    code = np.rint((inside - low) / scale)
                    slopes = [code * d_scale[k] + scale * ((by_value[k] - d_low_of[k]) / scale
                              - (inside - low) / scale**2 * d_scale[k]) + d_low_of[k] for k in (0, 1)]
                d_high += up * slopes[0]
                d_low += up * slopes[1]
            # fp32 scales are rounded to single precision on the way
            np.testing.assert_allclose(clip.upper.grad[row, group, 0],
                                       d_high * w.max() * share_up * (1 - share_up), rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(clip.lower.grad[row, group, 0],
                                       d_low * w.min() * share_low * (1 - share_low), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("text", ["int4/g32/fp16", "int3/g16/fp16/min", "int2/axis/fp32/int", "int8/tensor/fp32"])
def test_a_learned_clip_is_the_core_on_the_clipped_weight(text):
    fmt = QuantFormat.parse(text)
    weight = np.random.default_rng(5).normal(size=(6, 64)).astype(np.float32)
    clip = LearnedClip((6, 64), fmt, initial=0.5)
    exported = clip.clip(torch.from_numpy(weight)).detach().numpy()
    assert same_bits(clip(torch.from_numpy(weight)), restored(exported, fmt))
    assert np.abs(exported).max() < np.abs(weight).max()


def test_lsq_matches_its_equations():
    """Esser et al., equations 1 to 3: ds = -w/s + round(w/s) inside, Qn or Qp outside, times 1 / sqrt(numel Qp)."""
    weight = torch.tensor([[0.3, -0.9, 2.4, -5.0, 0.05, 1.0]], requires_grad=True)
    lsq = Lsq(3)
    assert not lsq.initialised
    lsq(weight)
    assert lsq.initialised
    assert lsq.step.item() == pytest.approx(2 * weight.abs().mean().item() / math.sqrt(3))
    with torch.no_grad():
        lsq.step.fill_(0.6)
    upstream = torch.tensor([[1.0, 2.0, -1.0, 0.5, 3.0, 1.5]])
    lsq(weight).backward(upstream)
    step, expected, passed = 0.6, 0.0, []
    for value, up in zip(weight.detach().numpy()[0], upstream.numpy()[0], strict=True):
        ratio = value / step
        inside = -4 <= ratio <= 3
        expected += up * (np.rint(ratio) - ratio if inside else (-4 if ratio < -4 else 3))
        passed.append(up if inside else 0)
    assert lsq.step.grad.item() == pytest.approx(expected / math.sqrt(6 * 3), rel=1e-5)
    assert weight.grad[0].tolist() == passed


def test_lsq_state_is_not_initialised_twice():
    first = Lsq(4)
    first(torch.full((3, 3), 2.0))
    second = Lsq(4)
    second.load_state_dict(first.state_dict())
    second(torch.full((3, 3), 100.0))
    assert second.step.item() == first.step.item()


@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_lsq_plus_matches_its_equations(shift):
    x = torch.tensor([[0.3, -0.9, 2.4, -2.5, 0.05, 9.0]]) + shift
    x.requires_grad_()
    lsq = LsqPlus(4)
    lsq(x)
    low, high = (-8, 7) if shift == 0 else (0, 15)
    step = 2 * x.detach().abs().mean().item() / math.sqrt(high)
    assert lsq.element.code_range == (low, high)
    assert lsq.step.item() == pytest.approx(step)
    assert lsq.zero.item() == pytest.approx(0.1 * (x.min().item() - step * low), rel=1e-5)
    lsq(x).sum().backward()
    step, zero = lsq.step.item(), np.rint(lsq.zero.item())
    d_step = d_zero = 0.0
    for value in x.detach().numpy()[0]:
        ratio = value / step + zero
        inside = low <= ratio <= high
        clamped = min(max(ratio, low), high)
        d_step += np.rint(clamped) - zero - (value / step if inside else 0)
        d_zero += 0.0 if inside else -step
    factor = 1 / math.sqrt(6 * high)
    assert lsq.step.grad.item() == pytest.approx(d_step * factor, rel=1e-4)
    assert lsq.zero.grad.item() == pytest.approx(d_zero * factor, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("symmetric", [False, True])
def test_static_ranges_are_those_of_the_core_and_learn(symmetric):
    x = torch.from_numpy(np.random.default_rng(7).normal(0.5, 1, (5, 40)).astype(np.float32)).requires_grad_()
    static = StaticAffine(-1.0, 2.0, 8, symmetric=symmetric)
    y = static(x)
    stored = static.activation()
    assert stored == StaticActivation.from_range(-1.0, 2.0, 8, symmetric=symmetric)
    assert same_bits(y, stored.round(x.detach().numpy()))
    scale, zero = stored.scale, stored.zero
    y.sum().backward()
    raw = np.rint(x.detach().numpy() / np.float32(scale)) + zero
    inside = (raw >= 0) & (raw <= 255)
    assert np.array_equal(x.grad.numpy(), inside.astype(np.float32))
    clipped = np.clip(raw, 0, 255) - zero
    slope = clipped - np.where(inside, x.detach().numpy() / scale, 0)
    assert static.scale.grad.item() == pytest.approx(slope.sum(), rel=1e-3)
    if not symmetric:
        assert static.offset.grad.item() == pytest.approx(-scale * (~inside).sum(), rel=1e-4)


def test_static_affine_broadcasts_per_channel():
    x = torch.linspace(-3, 3, 12).reshape(2, 6)
    scale, zero = torch.tensor([[0.1], [0.2]]), torch.tensor([[3.0], [0.0]])
    y = static_affine(x, scale, zero, 0, 15)
    for row in range(2):
        assert same_bits(y[row], StaticActivation(4, scale[row].item(), int(zero[row])).round(x[row].numpy()))


@pytest.mark.parametrize("shape", [(), (3, 1), (1, 5)])
def test_static_affine_has_the_gradients_of_its_steps(shape):
    generator = torch.Generator().manual_seed(3)
    x = (3 * torch.randn(2, 3, 5, generator=generator)).requires_grad_()
    scale = (0.1 + torch.rand(shape, generator=generator)).requires_grad_()
    zero = (4 * torch.rand(shape, generator=generator)).requires_grad_()
    direction = torch.randn(2, 3, 5, generator=generator)

    offset = round_ste(zero)
    plain = ((round_ste(x / scale) + offset).clamp(0, 7) - offset) * scale
    expected = torch.autograd.grad((plain * direction).sum(), [x, scale, zero])
    made = static_affine(x, scale, zero, 0, 7)
    found = torch.autograd.grad((made * direction).sum(), [x, scale, zero])
    assert torch.equal(made, plain)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_each_token_has_its_own_range():
    x = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 10.0, 100.0])[:, None]
    for symmetric in (False, True):
        whole = per_token(x, 8, symmetric=symmetric)
        for batch in range(2):
            for token in range(3):
                assert torch.equal(whole[batch, token], per_token(x[batch, token][None], 8, symmetric=symmetric)[0])
    peaks = x.abs().amax(dim=-1)
    errors = (per_token(x, 8, symmetric=True) - x).abs().amax(dim=-1)
    assert (errors <= peaks / 127 / 2 * 1.0001).all()


def test_the_running_range_follows_freezes_and_clips():
    observer = EmaRange(POSIT8, decay=0.9, peak=4.0)
    x = torch.tensor([1.0, -8.0, 0.5])
    observer(x)
    assert observer.peak.item() == 8.0
    observer(torch.tensor([4.0]))
    assert observer.peak.item() == pytest.approx(0.9 * 8 + 0.1 * 4)
    observer.frozen = True
    observer(torch.tensor([1e6]))
    observer.frozen = False
    observer.eval()
    observer(torch.tensor([1e6]))
    assert observer.peak.item() == pytest.approx(7.6)
    scale = observer.scale().item()
    values = torch.tensor([0.3, -1.0, 1e6], requires_grad=True)
    y = observer(values)
    y.sum().backward()
    assert values.grad.tolist() == [1, 1, 0]
    assert same_bits(y, round_to(values.detach().numpy() / np.float32(scale), POSIT8) * np.float32(scale))


def test_a_running_range_of_zeros_is_harmless():
    observer = EmaRange(FP4)
    assert observer(torch.zeros(3)).tolist() == [0, 0, 0]


def test_training_against_a_target_only_a_clip_can_reach():
    """A weight with one outlier at 2 bits: learning the clip takes off most of what the outlier costs."""
    weight = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    weight[0, 0] = 12.0
    fmt = QuantFormat(int_format(3, signed=False), Granularity("axis"), FP32, "min")
    clip = LearnedClip((1, 64), fmt, initial=4.0)
    others = weight[:, 1:]

    def loss():
        return ((clip(weight)[:, 1:] - others) ** 2).mean()

    before = loss().item()
    optimiser = torch.optim.Adam(clip.parameters(), lr=0.05)
    for _ in range(200):
        optimiser.zero_grad()
        loss().backward()
        optimiser.step()
    assert loss().item() < 0.3 * before
