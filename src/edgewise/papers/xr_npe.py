"""XR-NPE: mixed formats of 4, 8 and 16 bits for perception: classification, gaze and visual-inertial odometry.

Kumari, Lokhande et al., "XR-NPE: High-Throughput Mixed-precision SIMD Neural Processing Engine for Extended Reality
Perception Workloads", 2025, arXiv:2508.13049, and the repository mukullokhande99/XR-NPE. FP4 (E2M1), Posit(4,1),
Posit(8,0) and Posit(16,1); a score per layer decides which are wide; quantisation-aware training regains the rest.

Here the networks are small and trained from nothing (papers/xr_npe_workloads.py): digits of 8x8 pixels, drawn eyes, and
a simulated vehicle. "Rounded" is without training after it, with ranges of one batch. Weights and inputs of every layer
are rounded, the first and the last too, which the paper keeps wide. "Mixed" is the paper's rule, 18 % of the layers in
Posit(8,0) and the rest in FP4; "under a budget" is the exact choice among the four formats at as many bits per weight,
by Fisher information times rounding error: our generalisation.
The engine's arithmetic is the quire; its hardware is not modelled here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgewise.core.elements import FP4, POSIT4, POSIT8, POSIT16, NumberFormat, posit_format, rounding_table
from edgewise.core.errors import MissingExtraError, notice, require
from edgewise.core.quire import quire_matmul
from edgewise.core.recipe import Claim, Recipe
from edgewise.core.report import Quantity, Report, Table
from edgewise.papers.xr_npe_workloads import WORKLOADS, Task

__all__ = ["RECIPE"]

Metrics = dict[str, float | None]
FORMATS = {"P16": POSIT16, "P8": POSIT8, "FP4": FP4, "P4": POSIT4}
MEAN_BITS = 0.18 * 8 + 0.82 * 4
"""Of the paper's mix, by layers."""


def run(settings: Mapping[str, Any], seed: int, ablate: bool) -> Report:
    """One seed: the formats, then every workload."""
    torch = require("torch", extra="torch", purpose="the networks of xr-npe")
    metrics: Metrics = {}
    _formats(seed, settings["products"], ablate, metrics)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in one order, whatever the machine
    try:
        rows = [row for name in WORKLOADS for row in _Workload(name, settings, seed, ablate, metrics).run()]
    finally:
        torch.set_num_threads(threads)
    table = Table("Error by format", ("workload", "formats", "bits per weight", "error", "unit", "loss"), tuple(rows))
    return Report("xr-npe", tuple(Quantity(name, value) for name, value in metrics.items()), (table,),
                  environment={"torch": torch.__version__})


# ---- the formats --------------------------------------------------------------------------------------------------

def _formats(seed: int, products: int, ablate: bool, metrics: Metrics) -> None:
    """Round trips, the published table, and dot products against rational arithmetic."""
    lost = 0
    for fmt in FORMATS.values():
        table = rounding_table(fmt)
        lost += int((fmt.encode(table.values) != table.codes).sum())
    metrics["codes lost between decoding and encoding"] = lost
    said = np.array([0, 1 / 16, 1 / 4, 1 / 2, 1, 2, 4, 16])
    metrics["largest distance of Posit(4,1) from its table"] = float(np.abs(POSIT4.values()[:8] - said).max())
    rng, wrong = np.random.default_rng(seed), 0
    for fmt in FORMATS.values():
        codes = rounding_table(fmt).codes
        for _ in range(products):
            left, right = (rng.choice(codes, 32).astype(np.uint16) for _ in range(2))
            found = fmt.values()[quire_matmul(left[None], right[:, None], fmt)[0, 0]]
            wrong += found != _nearest(_exact(left, right, fmt), fmt)
    metrics["dot products that differ from exact ones rounded once"] = wrong
    if ablate:
        once = each = 0.0
        for fmt in (FP4, POSIT4):
            for _ in range(20 * products):
                left, right = (fmt.encode(rng.normal(0, 0.5, 16)) for _ in range(2))
                exact = float(_exact(left, right, fmt))
                rounded = fmt.decode(fmt.encode(fmt.decode(left) * fmt.decode(right))).sum(dtype=np.float64)
                once += (float(fmt.values()[quire_matmul(left[None], right[:, None], fmt)[0, 0]]) - exact) ** 2
                each += (float(fmt.decode(fmt.encode(rounded))) - exact) ** 2
        metrics["squared error of 4-bit dot products with rounded products over rounded once"] = each / once


def _exact(left: NDArray[Any], right: NDArray[Any], fmt: NumberFormat) -> Fraction:
    values = fmt.values()
    return sum((Fraction(values[a]) * Fraction(values[b]) for a, b in zip(left, right, strict=True)), Fraction(0))


def _nearest(exact: Fraction, fmt: NumberFormat) -> float:
    """By the definition: the value with the least distance, ties to the even code."""
    table = rounding_table(fmt)
    place = int(np.searchsorted(table.values, float(exact)))
    near = [(abs(Fraction(float(table.values[k])) - exact), int(table.codes[k]) % 2, k)
            for k in range(max(0, place - 2), min(len(table.values), place + 2))]
    return float(table.values[min(near)[2]])


# ---- a workload ---------------------------------------------------------------------------------------------------

class _Workload:
    """Trains a network in float, rounds it in every way, and trains on in the formats."""

    def __init__(self, name: str, settings: Mapping[str, Any], seed: int, ablate: bool, metrics: Metrics) -> None:
        import torch

        own = settings[name]
        self.name, self.own, self.seed, self.ablate, self.metrics = name, own, seed, ablate, metrics
        self.shuffles = settings["shuffles"]
        self.task: Task = WORKLOADS[name](seed, **own["data"])
        self.inputs = [torch.from_numpy(part) for part in self.task.inputs]
        self.targets = torch.from_numpy(self.task.targets)
        self.tests = [tuple(map(torch.from_numpy, part)) for part in self.task.test_inputs]
        self.rows: list[tuple[Any, ...]] = []
        self.errors: dict[str, float] = {}
        self.losses: dict[str, float] = {}

    def batches(self, size: int) -> Any:
        import torch

        def made(rng: np.random.Generator) -> Any:
            order = torch.from_numpy(rng.permutation(len(self.targets)))
            for start in range(0, len(order) - size + 1, size):
                part = order[start:start + size]
                yield tuple(values[part] for values in self.inputs), self.targets[part]

        return made

    def loss(self, model: Any, batch: Any) -> Any:
        return self.task.loss(model(*batch[0]), batch[1])

    def judge(self, model: Any) -> tuple[float, float]:
        """(error, loss) on what was held out."""
        import torch

        model.eval()
        with torch.no_grad():
            outputs = [model(*inputs).numpy() for inputs in self.tests]
        loss = self.task.loss(torch.from_numpy(np.concatenate(outputs)), torch.from_numpy(self.task.test_targets))
        return self.task.error(outputs), float(loss)

    def note(self, label: str, model: Any) -> Any:
        from edgewise.train.qat import stored_bits

        self.errors[label], self.losses[label] = self.judge(model)
        self.rows.append((self.name, label, stored_bits(model), self.errors[label], self.task.unit,
                          self.losses[label]))
        return model

    def rounded(self, net: Any, elements: Mapping[str, NumberFormat]) -> Any:
        from edgewise.train.qat import calibrate, prepare

        model = prepare(net, elements)
        calibrate(model, [tuple(part[:256] for part in self.inputs)])
        return model

    def trained(self, net: Any, elements: Mapping[str, NumberFormat], *, broken: bool = False) -> Any:
        """Rounded, then trained: weights, then weights and inputs."""
        from edgewise.train.qat import Phase, QuantizedLayer, train_phases

        model = self.rounded(net, elements)
        for layer in model.modules():
            if isinstance(layer, QuantizedLayer):
                layer.broken_gradient = broken
        first, second = self.own["epochs"][1:]
        train_phases(model, self.batches(self.own["batch"]), self.loss,
                     (Phase("weights", first, 2e-3, weights=True),
                      Phase("weights and inputs", second, 2e-3, weights=True, inputs=True)), seed=self.seed)
        return model

    def run(self) -> list[tuple[Any, ...]]:
        import torch

        from edgewise.train.qat import Phase, quantisable, train_phases
        from edgewise.train.sensitivity import layer_fisher, layer_scores, under_budget, widest_first

        torch.manual_seed(self.seed)
        net = self.task.build()
        train_phases(net, self.batches(self.own["batch"]), self.loss, (Phase("float", self.own["epochs"][0], 2e-3),),
                     seed=self.seed)
        self.note("float", net)
        names = list(quantisable(net))
        for label, element in FORMATS.items():
            self.note(label, self.rounded(net, dict.fromkeys(names, element)))
        sample = [batch for batch, _ in zip(self.batches(4)(np.random.default_rng(self.seed)), range(5), strict=False)]
        scores = layer_scores(net, sample, self.loss, FP4)
        mixed = widest_first(scores, POSIT8, FP4)
        self.note("mixed", self.rounded(net, mixed))
        self._rankings(net, "mixed", lambda ranks: widest_first(ranks, POSIT8, FP4), scores)
        fisher = layer_fisher(net, sample, self.loss)
        self.note("under a budget", self.rounded(net, under_budget(net, fisher, FORMATS.values(), MEAN_BITS)))
        self._rankings(net, "under a budget", lambda ranks: under_budget(net, ranks, FORMATS.values(), MEAN_BITS),
                       fisher)
        self.note("FP4, trained", self.trained(net, dict.fromkeys(names, FP4)))
        self.note("P4, trained", self.trained(net, dict.fromkeys(names, POSIT4)))
        model = self.note("mixed, trained", self.trained(net, mixed))
        self._compare()
        if self.name == "digits":
            self._runtime(model)
        if self.name == "odometry":
            self._size(net, mixed)
        if self.ablate:
            self._ablate(net, names)
        return self.rows

    def _rankings(self, net: Any, rule: str, chosen: Any, scores: Mapping[str, float]) -> None:
        """The rule with the scores dealt out at random, several times, and the other way round."""
        rng = np.random.default_rng(self.seed)
        dealt = [dict(zip(scores, rng.permutation(list(scores.values())).tolist(), strict=True))
                 for _ in range(self.shuffles)]
        turned = max(scores.values()) + min(scores.values())
        losses = [self.judge(self.rounded(net, chosen(ranks)))[1] for ranks in dealt]
        backwards = self.judge(self.rounded(net, chosen({name: turned - score for name, score in scores.items()})))[1]
        self.metrics[f"{self.name}: loss of random ranks over the ranked, {rule}, less 1"] = (
            float(np.mean(losses)) / self.losses[rule] - 1)
        self.metrics[f"{self.name}: loss of reversed ranks over the ranked, {rule}, less 1"] = (
            backwards / self.losses[rule] - 1)

    def _compare(self) -> None:
        error, name = self.errors, self.name
        for label in ("P16", "P8"):
            self.metrics[f"{name}: error added by {label}"] = error[label] - error["float"]
        self.metrics[f"{name}: least error added by 4 bits"] = min(error["FP4"], error["P4"]) - error["float"]
        for label in ("FP4", "P4"):
            lost = error[label] - error["float"]
            self.metrics[f"{name}: share of the loss of {label} regained by training"] = (
                (error[label] - error[f"{label}, trained"]) / lost if lost > 0 else None)
        span = error["FP4"] - error["P8"]
        for rule in ("mixed", "under a budget"):
            self.metrics[f"{name}: way from FP4 to P8, {rule}"] = (
                (error["FP4"] - error[rule]) / span if span > 0 else None)
        if name == "odometry":
            ladder = [error[label] for label in ("float", "P16", "P8", "mixed, trained", "FP4, trained")]
            self.metrics["odometry: least step of drift from float down the ladder"] = float(np.diff(ladder).min())

    def _runtime(self, model: Any) -> None:
        """The mixed network in ONNX Runtime: its answers, and the bytes of its file."""
        names = ("digits: answers of ONNX Runtime that agree", "digits: ONNX file in float over mixed, bytes")
        try:
            runtime = require("onnxruntime", extra="onnx", purpose="running the exported network")
            require("onnx", extra="onnx", purpose="exporting the network")
        except MissingExtraError as error:
            notice("ignored", str(error), where="xr-npe")
            self.metrics.update(dict.fromkeys(names))
            return
        import torch

        from edgewise.formats.onnx_writer import write_onnx
        from edgewise.train.export import graph_of

        plain = self.task.build()
        shape = self.inputs[0].shape[1:]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "mixed.onnx"
            small = write_onnx(graph_of(model, shape), path)
            large = write_onnx(graph_of(plain.eval(), shape), Path(folder) / "float.onnx")
            session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
            tests: NDArray[np.float32] = self.tests[0][0].numpy()
            found = np.concatenate([session.run(None, {"input": tests[start:start + 64]})[0]
                                    for start in range(0, len(tests), 64)])
        with torch.no_grad():
            expected = model(self.tests[0][0]).numpy()
        self.metrics[names[0]] = float((found.argmax(axis=1) == expected.argmax(axis=1)).mean())
        self.metrics[names[1]] = large / small

    def _size(self, net: Any, mixed: Mapping[str, NumberFormat]) -> None:
        """Weights with their scales, in float32 and as chosen."""
        from edgewise.core.numbers import Granularity, QuantFormat
        from edgewise.train.qat import quantisable

        shapes = {name: (len(layer.weight), layer.weight[0].numel()) for name, layer in quantisable(net).items()}
        stored = sum(QuantFormat(mixed[name], Granularity("axis")).nbytes(shape) for name, shape in shapes.items())
        self.metrics["odometry: weights in float over mixed, bytes"] = (
            4 * sum(rows * columns for rows, columns in shapes.values()) / stored)

    def _ablate(self, net: Any, names: Sequence[str]) -> None:
        formats = dict.fromkeys(names, POSIT4)
        self.note("P4, gradient broken", self.trained(net, formats, broken=True))
        lost = self.errors["P4"] - self.errors["float"]
        gained = self.errors["P4, gradient broken"] - self.errors["P4, trained"]
        self.metrics[f"{self.name}: share regained with the gradient less without"] = (
            gained / lost if lost > 0 else None)
        never = dict.fromkeys(names, posit_format(4, 1, "nonzero"))
        self.note("P4, never to zero", self.rounded(net, never))
        self.metrics[f"{self.name}: loss of P4 never to zero over P4, less 1"] = (
            self.losses["P4, never to zero"] / self.losses["P4"] - 1)


# ---- claims -------------------------------------------------------------------------------------------------------

_SEEDS = "The networks are small and the seeds decide: the sign is that of the claim for one or two of three."
_RULE = ("The paper's rule widens the 18 % of layers that rank highest, whatever they weigh: it spends 5.9 bits a "
         "weight on odometry, and the same sensitivities chosen exactly under a budget of 4.7 leave less than half of "
         "the loss.")


def _claims() -> tuple[Claim, ...]:
    card = "card: small-scale check"
    claims = [
        Claim("Every code survives decoding and encoding", card, "codes lost between decoding and encoding", 0),
        Claim("Posit(4,1) is the table of powers of two", "section 3",
              "largest distance of Posit(4,1) from its table", 0),
        Claim("Dot products are exact and rounded once", card,
              "dot products that differ from exact ones rounded once", 0),
        Claim("Posit(16,1) is as good as float: within 0.3 points", card, "digits: error added by P16", 0,
              "equal", 0.3),
        Claim("Posit(8,0) loses less than 1 point", card, "digits: error added by P8", 1, "at-most"),
        Claim("4 bits without training lose several points", card, "digits: least error added by 4 bits", 2,
              "at-least"),
        Claim("Drift is ordered: float, P16, P8, mixed, FP4 (within 0.1 % of the way)", "repository, UL-VIO table",
              "odometry: least step of drift from float down the ladder", 0, "at-least", 0.1, why_not=_RULE),
        Claim("The mixed model is 5.6 times as small as float", "repository, UL-VIO: 13.5 MB to 2.42 MB",
              "odometry: weights in float over mixed, bytes", 13.5 / 2.42, "at-least",
              why_not="Which layers are widened depends on the seed; a network of ten layers has few to choose from."),
        Claim("The mixed network runs in ONNX Runtime from its codes with the same answers", "runs where it must",
              "digits: answers of ONNX Runtime that agree", 0.99, "at-least"),
        Claim("Its file is a third of the float one", "runs where it must",
              "digits: ONNX file in float over mixed, bytes", 3, "at-least"),
        Claim("Rounding each product doubles the squared error of 4-bit dot products", "ablation",
              "squared error of 4-bit dot products with rounded products over rounded once", 2, "at-least",
              ablation=True),
    ]
    for name in WORKLOADS:
        for label in ("FP4", "P4"):
            claims.append(Claim(f"{name}: training regains 60 % of what {label} lost", card,
                                f"{name}: share of the loss of {label} regained by training", 0.6, "at-least",
                                why_not="Twenty epochs; FP4 loses little to begin with, so that the share is of a "
                                        "small number and differs by a third between seeds."))
        for rule in ("mixed", "under a budget"):
            claims.append(Claim(f"{name}: {rule}, at least half-way from FP4 to P8", card,
                                f"{name}: way from FP4 to P8, {rule}", 0.5, "at-least",
                                why_not=_RULE if rule == "mixed" else _SEEDS))
            for ranks in ("random", "reversed"):
                claims.append(Claim(f"{name}: ranked layers beat {ranks} ranks, {rule}", card,
                                    f"{name}: loss of {ranks} ranks over the ranked, {rule}, less 1", 0, "order",
                                    why_not=_RULE if rule == "mixed" else _SEEDS))
        claims.append(Claim(f"{name}: with a broken gradient training regains less", "ablation",
                            f"{name}: share regained with the gradient less without", 0, "order", ablation=True,
                            why_not=_SEEDS))
        claims.append(Claim(f"{name}: never rounding to zero costs Posit(4,1) accuracy", "ablation",
                            f"{name}: loss of P4 never to zero over P4, less 1", 0, "order", ablation=True,
                            why_not="Weights are spread so that few fall below half of the least step: both losses "
                                    "differ by 2 % at most."))
    return tuple(claims)


RECIPE = Recipe(
    title="XR-NPE",
    paper="arXiv:2508.13049",
    claims=_claims(),
    scales={
        "smoke": {"products": 5, "shuffles": 1,
                  "digits": {"data": {"train": 400}, "batch": 50, "epochs": (10, 1, 3)},
                  "gaze": {"data": {"train": 300, "test": 100}, "batch": 50, "epochs": (6, 1, 2)},
                  "odometry": {"data": {"drives": 2, "frames": 200, "tests": 1}, "batch": 50, "epochs": (10, 1, 3)}},
        "small": {"products": 100, "shuffles": 5, "seeds": 3,
                  "digits": {"data": {"train": 600}, "batch": 64, "epochs": (30, 5, 20)},
                  "gaze": {"data": {"train": 1500, "test": 600}, "batch": 64, "epochs": (30, 5, 20)},
                  "odometry": {"data": {"drives": 10, "frames": 600, "tests": 5}, "batch": 128,
                               "epochs": (30, 5, 20)}},
    },
    sources={"products": "inferred", "shuffles": "inferred", "digits": "inferred", "gaze": "inferred",
             "odometry": "inferred"},
    run=run,
)
