"""Each technique of the coverage registry, on and off, and the effect with its sign. Named by papers/coverage.py."""

from __future__ import annotations

import numpy as np
import pytest

from edgewise.compress.lowrank import decompose, ranks
from edgewise.compress.lowrank.r_sparse import RSparse, decomposed, sparse_layer
from edgewise.compress.prune import masks
from edgewise.compress.quantize import awq, gptq, llm_int8, lorc, rtn
from edgewise.compress.surgery import operations as surgery
from edgewise.core.budget import Budget
from edgewise.core.checkpoint import Checkpoint
from edgewise.core.device import Device, Tier, Unit
from edgewise.core.errors import collect_notices
from edgewise.core.numbers import FP32, QuantFormat
from edgewise.core.storage import Dense
from edgewise.engine import load
from edgewise.engine.archs import plan_of
from edgewise.engine.bench import Limits, bench, modelled_joules
from edgewise.engine.loading import model_of
from edgewise.engine.memory import kv_bytes
from edgewise.engine.workload import workload_of
from edgewise.formats import write_gguf
from edgewise.measure.energy import Energy, EnergyMeter
from edgewise.measure.quality import kl_divergence
from tiny_checkpoint import tiny_checkpoint, tiny_folder

IDS = np.random.default_rng(0).integers(0, 256, 96).tolist()


class Constant(EnergyMeter):
    """A meter of a machine that always takes 5 W."""

    def __init__(self):
        super().__init__()
        self.source = "a constant"

    def measure(self, call):
        call()
        return Energy(5.0 * 0.25, 0.25, self.source)


def test_f1_indicators_move_with_the_model(tmp_path):
    def indicators(layers, meter):
        with collect_notices():
            report = bench(tiny_checkpoint(hidden=256, width=1024, layers=layers), prompts=(8,), generated=(4,),
                           threads=(1,), repeats=1, limits=Limits(1e10, 1e11, 1e11), meter=meter)
        decode = dict(zip(report.tables[1].columns, report.tables[1].rows[1], strict=True))
        return {"storage": report.tables[0].rows[0][1], "bytes": decode["GB/s"] / decode["token/s"],
                "joules": decode["J/token"], "memory": report["anonymous memory"]}

    off, on = indicators(1, EnergyMeter(tmp_path)), indicators(8, Constant())
    assert on["storage"] > off["storage"]
    assert on["bytes"] > off["bytes"]
    assert on["memory"] > off["memory"] > 0
    assert on["joules"] == pytest.approx(5.0 * 0.25 / 4)
    assert off["joules"] is None


def divergence(**options):
    """Mean KL from the float model on a fixed sequence, nats."""
    checkpoint = tiny_checkpoint()
    with collect_notices():
        exact = model_of(checkpoint, threads=1, cache=False, kv="fp32").forward(IDS)
        other = model_of(checkpoint, threads=1, cache=False, **{"kv": "fp32", **options}).forward(IDS)
    return float(kl_divergence(exact, other).mean())


def test_f2_more_bits_less_divergence():
    off = divergence()
    on = [divergence(format=f"int{bits}/g32/fp16/min") for bits in (8, 6, 4, 3, 2)]
    assert off == 0
    assert on == sorted(on)
    assert on[0] > off
    assert on[-1] > 10 * on[0]


def test_a1_fewer_key_heads_less_cache():
    on, off = (kv_bytes(plan_of(tiny_checkpoint(hidden=128, heads=4, kv_heads=heads)), "fp16", 256) for heads in (1, 4))
    assert on * 4 == off


def test_a11_a_coarser_cache_is_smaller_and_less_exact():
    def size(kv):
        return model_of(tiny_checkpoint(), threads=1, cache=False, kv=kv).memory.kv_bytes

    off = (divergence(kv="fp32"), size("fp32"))
    on = [(divergence(kv=kv), size(kv)) for kv in ("int8", "int4")]
    assert off[0] == 0 < on[0][0] < on[1][0]
    assert off[1] > on[0][1] > on[1][1]


def test_h1_the_native_path_reads_packed_weights(tmp_path):
    checkpoint = tiny_checkpoint(hidden=128, width=256)
    with collect_notices():
        write_gguf(checkpoint, tmp_path / "packed.gguf", "Q4_0")
        on = load(tmp_path / "packed.gguf", threads=1, cache=False, kv="fp32")
        from edgewise.formats import open_checkpoint

        packed = open_checkpoint(str(tmp_path / "packed.gguf"))
        floats = {name: Dense(np.asarray(stored.dense(), np.float32)) for name, stored in packed.tensors.items()}
        twin = Checkpoint(packed.arch, packed.config, floats, packed.metadata, source="twin")
        off = model_of(twin, threads=1, cache=False, kv="fp32")
    moved = [workload_of(plan_of(source), model.packed.matrices).weight_bytes
             for source, model in ((packed, on), (twin, off))]
    assert on.packed.nbytes < off.packed.nbytes
    assert moved[0] < moved[1] / 3
    assert float(kl_divergence(off.forward(IDS), on.forward(IDS)).mean()) < 0.02


def test_h3_a_device_table_prices_a_step():
    checkpoint = tiny_checkpoint()
    step = workload_of(plan_of(checkpoint), model_of(checkpoint, threads=1, cache=False).packed.matrices)

    def board(j_per_byte):
        return Device("board", (Tier("ram", j_per_byte=j_per_byte),), (Unit("cpu", j_per_op={"fp32": 1e-12}),),
                      idle_w=0.0)

    on, off = modelled_joules(step, 1.0, board(2e-10))[0], modelled_joules(step, 1.0, board(None))[0]
    assert off is None
    assert on == pytest.approx(2e-10 * step.moved_bytes + 2e-12 * step.macs)
    assert on > modelled_joules(step, 1.0, board(1e-10))[0]


@pytest.mark.slow
def test_u7_a_budget_and_its_cost_in_one_report(tmp_path):
    from edgewise.fit import fit

    source = tiny_folder(tmp_path / "source", hidden=128, width=256, layers=2)
    with collect_notices():
        whole = model_of(tiny_checkpoint(hidden=128, width=256, layers=2), threads=1, cache=False, context=256).memory
        off = fit(str(source), Budget(memory_bytes=2 * whole.total_bytes), context=256, threads=1, out=tmp_path / "off")
        on = fit(str(source), Budget(memory_bytes=whole.total_bytes * 6 // 10), context=256, threads=1,
                 out=tmp_path / "on")
    assert on.report["memory_bytes"] < off.report["memory_bytes"]
    assert on.report["quality"] < off.report["quality"] <= 1


def torch_net(linear, seed):
    import torch
    from torch import nn

    torch.manual_seed(seed)
    return nn.Sequential(linear(16, 48), nn.ReLU(), linear(48, 48), nn.ReLU(), linear(48, 4))


def torch_task(count=512):
    """Which of four directions a noisy vector points to."""
    import torch

    made = torch.Generator().manual_seed(1)
    labels = torch.randint(4, (count,), generator=made)
    centres = torch.randn(4, 16, generator=made)
    return centres[labels] + 0.7 * torch.randn(count, 16, generator=made), labels


def torch_loss(model, batch):
    import torch

    return torch.nn.functional.cross_entropy(model(*batch[0]), batch[1])


@pytest.mark.slow
def test_q5_training_in_ternary_beats_rounding_to_it():
    import torch
    from torch import nn

    from edgewise.train.bitnet import BitLinear
    from edgewise.train.qat import Phase, train_phases

    x, y = torch_task()

    def batches(rng):
        order = torch.from_numpy(rng.permutation(len(y)))
        return [((x[part],), y[part]) for part in order.split(64)]

    def trained(linear):
        model = torch_net(linear, 0)
        train_phases(model, batches, torch_loss, [Phase("all", 15, 5e-3)])
        return model

    on = torch_loss(trained(BitLinear), ((x,), y)).item()
    rounded = torch_net(BitLinear, 0)
    rounded.load_state_dict(trained(nn.Linear).state_dict())
    off = torch_loss(rounded, ((x,), y)).item()
    assert on < 0.5 * off


@pytest.mark.slow
def test_q6_training_smoothing_and_normal_floats_each_help():
    import torch
    from torch import nn

    from edgewise.compress.quantize.smoothquant import scales_of
    from edgewise.core.numbers import FP4, QuantFormat, dequantize, quantize
    from edgewise.train.qat import Phase, calibrate, prepare, quantisable, train_phases

    x, y = torch_task()

    def batches(rng):
        order = torch.from_numpy(rng.permutation(len(y)))
        return [((x[part],), y[part]) for part in order.split(64)]

    net = torch_net(nn.Linear, 0)
    train_phases(net, batches, torch_loss, [Phase("float", 10, 5e-3)])
    model = prepare(net, dict.fromkeys(quantisable(net), FP4))
    calibrate(model, [(x,)])
    off = {"training": torch_loss(model, ((x,), y)).item()}
    train_phases(model, batches, torch_loss, [Phase("both", 10, 2e-3, weights=True, inputs=True)])
    on = {"training": torch_loss(model, ((x,), y)).item()}

    rng = np.random.default_rng(0)
    weight = rng.normal(size=(64, 128)).astype(np.float32)

    def rounded(values, text):
        fmt = QuantFormat.parse(text)
        codes, scales, _ = quantize(values, fmt)
        return dequantize(codes, scales, fmt)

    inputs = rng.normal(size=(200, 128)).astype(np.float32)
    inputs[:, ::32] *= 60
    scale = scales_of([weight], np.abs(inputs).max(axis=0)).astype(np.float32)
    exact = inputs @ weight.T

    def error(a, b):
        return float(np.square(rounded(a, "int8/tensor/fp32") @ rounded(b, "int8/axis/fp32").T - exact).mean())

    off["smoothing"], on["smoothing"] = error(inputs, weight), error(inputs / scale, weight * scale)
    off["normal float"], on["normal float"] = (float(np.square(rounded(weight, text) - weight).mean())
                                               for text in ("int4/g64/fp16", "nf4/g64/fp16"))
    assert on["training"] < off["training"]
    assert on["smoothing"] < 0.5 * off["smoothing"]
    assert on["normal float"] < off["normal float"]


FORMAT3 = QuantFormat.parse("int3/g32/fp16/min")


def products(*, spread=0.0, seed=0):
    """Correlated inputs, the sizes of whose channels differ by e^spread, and a weight."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((512, 64)) @ (np.eye(64) + 0.3 * rng.standard_normal((64, 64)))
    x *= np.exp(spread * rng.standard_normal(64))
    return x, rng.standard_normal((48, 64)).astype(np.float32)


def product_error(x, weight, stored):
    return float(np.square(x @ (stored.dense().astype(np.float64) - weight).T).sum())


def plain(weight, fmt):
    return rtn.quantize_layer(weight, fmt, rtn.Rtn(search=False))


def test_q1_errors_are_made_up_for():
    x, weight = products()
    gram, config = x.T @ x, gptq.Gptq(search=False)
    on = gptq.quantize_layer(weight, gram, FORMAT3, config)
    off = gptq.quantize_layer(weight, np.diag(np.diag(gram)), FORMAT3, config)
    np.testing.assert_array_equal(off.dense(), plain(weight, FORMAT3).dense())
    assert product_error(x, weight, on) < 0.7 * product_error(x, weight, off)


def test_q2_weights_of_large_inputs_are_scaled_up():
    x, weight = products(spread=1.2)
    sizes, gram = np.sqrt(np.square(x).mean(axis=0)), x.T @ x

    def scaled(steps):
        s = awq.scales_of([weight], sizes, gram, FORMAT3, awq.Awq(steps=steps))[0].astype(np.float32)
        return Dense(awq.clipped_layer(weight * s, gram / np.outer(s, s), FORMAT3, awq.Awq(clip=False)).dense() / s)

    on, off = scaled(20), scaled(1)
    np.testing.assert_array_equal(off.dense(), plain(weight, FORMAT3).dense())
    assert product_error(x, weight, on) < 0.8 * product_error(x, weight, off)


def test_q3_outliers_apart():
    x, weight = products()
    x[:, [3, 40]] *= 30
    weight[:, [3, 40]] *= 6
    fmt, peaks = QuantFormat.parse("int8/axis"), np.abs(x).max(axis=0)
    threshold = float(np.sort(peaks)[-3] * 1.5)
    on = llm_int8.quantize_layer(weight, peaks, fmt, llm_int8.LlmInt8(threshold=threshold))
    off = llm_int8.quantize_layer(weight, peaks, fmt, llm_int8.LlmInt8(threshold=np.inf))
    np.testing.assert_array_equal(off.dense(), plain(weight, fmt).dense())
    assert product_error(x, weight, on) < 0.2 * product_error(x, weight, off)


def test_q4_the_residual_to_a_low_rank():
    _, weight = products()
    fmt = QuantFormat.parse("int2/g32/fp16/min")
    made = [lorc.compensated(weight, fmt, lorc.Lorc(rank=rank)) for rank in (2, 8, 32)]
    off = made[0].parts[0]
    np.testing.assert_array_equal(off.dense(), plain(weight, fmt).dense())
    on = [float(np.square(each.dense() - weight).sum()) for each in made]
    assert on == sorted(on, reverse=True)
    assert on[0] < float(np.square(off.dense() - weight).sum())


def test_p1_masks_that_know_the_inputs():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((400, 64)) @ (np.eye(64) + 0.3 * rng.standard_normal((64, 64)))
    x *= np.exp(rng.standard_normal(64))
    weight, gram = rng.standard_normal((48, 64)).astype(np.float32), x.T @ x

    def error(made):
        return float(np.square((made - weight) @ x.T).sum())

    off = error(masks.by_magnitude(weight, masks.Prune(0.5))[0])
    wanda = error(masks.by_wanda(weight, np.sqrt(np.diag(gram)), masks.Prune(0.5))[0])
    on = error(masks.by_sparsegpt(weight, gram, masks.SparseGpt(0.5))[0])
    assert off > wanda > on
    np.testing.assert_array_equal(masks.by_sparsegpt(weight, gram, masks.SparseGpt(0.0))[0], weight)


def test_p2_cut_units_are_fewer_bytes_and_operations():
    whole = tiny_checkpoint()
    gone = {"0.width": range(40), "1.heads": [0]}
    keep = {"0.width": range(40, 128), "1.heads": [1]}

    def work(checkpoint):
        plan = plan_of(checkpoint)
        session = model_of(checkpoint, cache=False)
        ops = workload_of(plan, session.packed.matrices, depth=32).ops
        return sum(op.weight_bytes + op.in_bytes for op in ops), sum(op.macs for op in ops)

    def logits(checkpoint):
        return model_of(checkpoint, kv="fp32", cache=False).forward(np.array(IDS, np.int32))

    smaller = surgery.cut(whole, keep)
    assert all(on < off for on, off in zip(work(smaller), work(whole), strict=True))
    zeroed = surgery.zero(whole, gone)
    np.testing.assert_allclose(logits(surgery.cut(zeroed, keep)), logits(zeroed), rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(logits(surgery.cut(whole, {"0.width": range(128)})), logits(whole))


def test_p3_inputs_chosen_for_each_token():
    """Half of the inputs read: those that matter to a token, or one half for all tokens."""
    rng = np.random.default_rng(0)
    weight = (rng.standard_normal((48, 64)) * np.exp(0.5 * rng.standard_normal(64))).astype(np.float32)
    calibration, x = (np.asarray(rng.standard_t(3, (tokens, 64)), np.float32) for tokens in (2000, 400))

    def error(read):
        return float(np.square((x * ~read) @ weight.T).sum())

    layer = sparse_layer(Dense(weight, FP32), decomposed(weight, 0), calibration, RSparse(0.5, alpha=1.0))
    seen = np.abs(x) > layer.threshold
    assert seen.mean() == pytest.approx(0.5, abs=0.03)
    static = np.square(calibration).mean(0) * np.square(weight).sum(0)
    on, off = error(seen), error(np.broadcast_to(static >= np.median(static), x.shape))
    assert on < 0.5 * off
    whole = sparse_layer(Dense(weight, FP32), decomposed(weight, 0), calibration, RSparse(0.0, alpha=1.0))
    assert not whole.threshold.any()
    assert whole.weight.data is weight


def test_r1_two_thin_factors_that_know_the_inputs():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((400, 64)) @ (np.eye(64) + 0.3 * rng.standard_normal((64, 64)))
    x *= np.exp(rng.standard_normal(64))
    weight = rng.standard_normal((96, 64)) * np.exp(-np.arange(64) / 16) @ rng.standard_normal((64, 64)) / 8
    gram = x.T @ x

    def error(made):
        return float(np.square((made - weight) @ x.T).sum())

    off = [error(decompose.svd(weight, rank).dense()) for rank in (8, 16, 32)]
    on = [error(decompose.whitened(weight, gram, rank).dense()) for rank in (8, 16, 32)]
    assert all(on < off for on, off in zip(on, off, strict=True))
    assert on == sorted(on, reverse=True)
    np.testing.assert_allclose(decompose.whitened(weight, gram, 64).dense(), weight, rtol=0, atol=1e-10)
    # By a few random vectors, and the factors rounded to 8 bits: hardly worse than the best of the rank.
    chance = decompose.randomised(weight, 16)
    coarse = [rtn.quantize_layer(part.astype(np.float32), QuantFormat.parse("int8")).dense()
              for part in (chance.left, chance.right)]
    least = np.square(decompose.svd(weight, 16).dense() - weight).sum()
    assert least <= np.square(coarse[0] @ coarse[1] - weight).sum() < 1.1 * least
    # A weight whose energy falls fast gives ranks to one whose does not.
    spectra = [np.exp(-np.arange(32) / fall) for fall in (2.0, 20.0)]
    shared = ranks.ranks_within(spectra, [(32, 32)] * 2, 2 * 8 * 64)
    equal = sum(float(np.square(each[8:]).sum() / np.square(each).sum()) for each in spectra)
    assert shared.ranks[0] < shared.ranks[1]
    assert shared.dropped < equal


@pytest.mark.slow
def test_d1_a_student_comes_nearer_to_its_teacher():
    from edgewise.train.distill import Distill, distill

    teacher = tiny_checkpoint()
    student = surgery.cut(teacher, {"0.width": range(24, 128), "1.values.0": range(14), "1.values.1": range(14)})
    text = np.random.default_rng(3).integers(4, 260, 4000)

    def apart(checkpoint):
        logits = [model_of(each, cache=False).forward(np.array(IDS, np.int32)) for each in (teacher, checkpoint)]
        return kl_divergence(*logits).mean(), kl_divergence(*logits[::-1]).mean()

    settings = {"steps": 60, "batch": 8, "length": 24, "prompt": 8, "rate": 2e-3}
    before = apart(student)
    for which, direction, policy in ((0, "forward", 0.0), (1, "reverse", 0.0), (1, "reverse", 1.0)):
        made = distill(student, teacher, text, Distill(direction=direction, on_policy=policy, **settings))
        on = apart(made)[which]
        assert on < before[which]
    off = apart(distill(student, teacher, text, Distill(**{**settings, "rate": 1e-12})))[0]
    assert off == pytest.approx(before[0], rel=1e-3)
