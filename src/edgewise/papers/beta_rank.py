"""Beta-Rank on few pictures of unequal kinds: both published directions against L1, HRank and chance.

Hosseini et al., arXiv:2304.07461. The paper prunes ResNet-56 and -110 on dermatoscopic and fundus pictures (ISIC,
IDRiD) of three kinds, one of them rare; here a smaller residual network learns drawn marks on skin in the shares 70, 25
and 5 (data/lesions.py), and is judged on as many of each. The same dense network, the same rate, the same training
after; only the rank differs. A seed is several dense networks, whose scores are averaged: one alone is noise.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgewise.compress.prune.filter_ranks import BetaRank, beta_scores, l1_scores, stability
from edgewise.core.recipe import Claim, Recipe
from edgewise.core.report import Quantity, Report, Table
from edgewise.data.lesions import lesions

__all__ = ["RECIPE"]

Metrics = dict[str, float | None]
IN_OVER_OUT = BetaRank("in over out")


def run(settings: Mapping[str, Any], seed: int, ablate: bool) -> Report:
    """One seed: the score by itself, unequal kinds, equal kinds, the pruned network in ONNX Runtime."""
    metrics = _score(seed)
    unequal, found = _compared(settings, seed, settings["shares"], ablate)
    metrics |= found
    equal, found = _compared(settings, seed, [1, 1, 1], False)
    metrics["points of accuracy between beta and the better of L1 and HRank, equal kinds"] = found[
        "points of accuracy between beta and the better of L1 and HRank"]
    return Report("beta-rank", tuple(Quantity(name, value) for name, value in metrics.items()), (
        Table("Unequal kinds", unequal[0], unequal[1]), Table("Equal kinds", equal[0], equal[1])),
        environment={"shares": str(settings["shares"])})


def _score(seed: int) -> Metrics:
    """What the score does to a filter that is scaled, and to one that reads what never changes."""
    rng = np.random.default_rng(seed)
    weight, x = rng.normal(size=(8, 3, 1, 1)), rng.normal(size=(16, 3, 6, 6))
    x[:, 2] = 0.5
    weight[5] = [[[0.0]], [[0.0]], [[10.0]]]

    def scores(weight: Any, config: BetaRank) -> Any:
        return beta_scores(weight, x, np.einsum("kc,nchw->nkhw", weight[:, :, 0, 0], x), config)

    larger = weight * np.where(np.arange(8) == 0, 3.0, 1.0)[:, None, None, None]
    grown, kept = (scores(larger, config)[0] / scores(weight, config)[0] for config in (BetaRank(), IN_OVER_OUT))
    return {"score of a filter times three, out over in": float(grown),
            "score of a filter times three, in over out": float(kept),
            "place of the indifferent filter by L1": float((l1_scores(weight) > l1_scores(weight)[5]).sum()),
            "filters below the indifferent one by beta":
                float((scores(weight, BetaRank()) < scores(weight, BetaRank())[5]).sum())}


def _compared(settings: Mapping[str, Any], seed: int, shares: Any, ablate: bool) -> tuple[Any, Metrics]:
    import torch

    from edgewise.models.convnets import ResNet
    from edgewise.train.filter_pruning import FilterPruning, prune_filters, rank_filters
    from edgewise.train.pictures import Epochs, learn, predictions, scores
    from edgewise.train.surgery import macs, parameters, units_of

    size, rate, batch = settings["size"], settings["rate"], settings["ranking_batch"]
    plans = {"L1": FilterPruning("l1"), "HRank": FilterPruning("hrank"), "beta": FilterPruning("beta"),
             "beta, in over out": FilterPruning("beta", beta=IN_OVER_OUT), "random": FilterPruning("random")}
    if ablate:
        plans |= {"beta, output alone": FilterPruning("beta", beta=BetaRank(input_term=False)),
                  "L1, weights scaled": FilterPruning("l1", scaled=True, raw=True),
                  "HRank, weights scaled": FilterPruning("hrank", scaled=True, raw=True),
                  "beta, weights scaled": FilterPruning("beta", scaled=True)}
    rows: dict[str, list[tuple[float, ...]]] = {name: [] for name in ("dense", *plans)}
    stable: dict[str, list[float]] = {"beta": [], "HRank": []}
    shape, metrics = ResNet(settings["depth"], tuple(settings["widths"]), 3, 3, size), {}
    for repeat in range(settings["repeats"]):
        own = 100 * seed + repeat
        pictures, kinds = (torch.from_numpy(part) for part in lesions(settings["pictures"], 2 * own, size=size,
                                                                      shares=shares))
        held_out, truth = lesions(settings["held_out"], 2 * own + 1, size=size)
        tests = torch.from_numpy(held_out)

        def judged(model: Any, tests: Any = tests, truth: Any = truth) -> tuple[float, float]:
            found = scores(predictions(model, tests), truth, 3)
            return found["accuracy"], found["f1"]

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(own)
            dense = shape.build()
        learn(dense, pictures, kinds, Epochs(settings["epochs"], settings["batch"], 0.05, seed=own))
        rows["dense"].append((*judged(dense), *judged(dense)))
        units = units_of(dense, tests[:1])
        for name, plan in plans.items():
            smaller = prune_filters(dense, units, pictures[:batch],
                                    FilterPruning(**{**vars(plan), "rate": rate, "seed": own}))
            before = judged(smaller)
            learn(smaller, pictures, kinds, Epochs(settings["after"], settings["batch"], 0.01, schedule="steps",
                                                   seed=own + 1))
            rows[name].append((*before, *judged(smaller)))
            if name == "beta":
                last = dense, smaller, units
        order = np.random.default_rng(own)
        for name, totals in stable.items():
            each: dict[str, list[Any]] = {unit.name: [] for unit in units}
            for _ in range(settings["rankings"]):
                some = torch.from_numpy(order.choice(len(pictures), settings["small_batch"], replace=False))
                for unit, values in rank_filters(dense, units, pictures[some], plans[name]).items():
                    each[unit].append(values)
            totals.append(float(np.mean([stability(runs, 0.25) for runs in each.values()])))
    mean = {name: np.mean(values, axis=0) for name, values in rows.items()}
    metrics = {"points of accuracy between beta and the better of L1 and HRank":
               100 * float(mean["beta"][2] - max(mean["L1"][2], mean["HRank"][2]))}
    for other in ("L1", "HRank", "random"):
        metrics[f"points of F1 over {other}, right after pruning"] = 100 * float(mean["beta"][1] - mean[other][1])
        metrics[f"points of F1 over {other}, trained on"] = 100 * float(mean["beta"][3] - mean[other][3])
    metrics["points of F1 of out over in over in over out, trained on"] = 100 * float(
        mean["beta"][3] - mean["beta, in over out"][3])
    metrics["points of F1 lost to the dense net"] = 100 * float(mean["dense"][1] - mean["beta"][3])
    metrics["share of filters ever chosen, beta less HRank"] = float(np.mean(stable["beta"]) - np.mean(stable["HRank"]))
    dense, smaller, units = last
    metrics["multiplications left"] = macs(smaller, tests) / macs(dense, tests)
    metrics["parameters beside what the widths give"] = parameters(smaller) / _analytic(
        settings, [max(1, int(unit.size * (1 - rate))) for unit in units], units)
    if shares == settings["shares"]:
        metrics |= _measured(dense, smaller, held_out, settings)
    if ablate:
        metrics["points of F1 that the input's spread gives, trained on"] = 100 * float(
            mean["beta"][3] - mean["beta, output alone"][3])
        metrics["points of F1 over HRank with weights scaled, trained on"] = 100 * float(
            mean["beta, weights scaled"][3] - mean["HRank, weights scaled"][3])
    columns = ("rank", "accuracy after pruning", "F1 after pruning", "accuracy trained on", "F1 trained on")
    return (columns, tuple((name, *map(float, values)) for name, values in mean.items())), metrics


def _analytic(settings: Mapping[str, Any], widths: list[int], units: Any) -> int:
    """Parameters of the residual network whose units have these widths, by the formula."""
    by = dict(zip([unit.name for unit in units], widths, strict=True))
    outs, total, before = [], 0, by["stem"]
    total += 3 * 9 * before + 2 * before
    for place in range(len(settings["widths"]) * settings["depth"]):
        stage, inside = divmod(place, settings["depth"])
        if not inside:
            first = f"blocks.{place}.conv2"
            out = before if not stage else by[first]
        middle = by[f"blocks.{place}.conv1"]
        total += before * middle * 9 + 2 * middle + middle * out * 9 + 2 * out
        if stage and not inside:
            total += before * out + 2 * out
        before = out
        outs.append(out)
    return total + before * 3 + 3


def _measured(dense: Any, smaller: Any, held_out: Any, settings: Mapping[str, Any]) -> Metrics:
    import torch

    from edgewise.measure.onnx_runtime import onnx_peak_bytes, onnx_seconds
    from edgewise.train.surgery import write_onnx_net

    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{name}.onnx" for name in ("dense", "pruned")}
        for name, model in (("dense", dense), ("pruned", smaller)):
            write_onnx_net(model, torch.from_numpy(held_out[:1]), files[name])
        shape = (settings["held_out_batch"], *held_out.shape[1:])
        seconds = onnx_seconds(files, np.resize(held_out, shape), repeats=11)
        peak = {name: min(onnx_peak_bytes(path, shape) for _ in range(3)) for name, path in files.items()}
    return {"memory of the pruned net over the dense, ONNX Runtime": peak["pruned"] / peak["dense"],
            "seconds of the pruned net over the dense, ONNX Runtime":
                seconds["pruned"].median / seconds["dense"].median}


def _claims() -> tuple[Claim, ...]:
    card, paper = "card: small-scale check", "tables 2 and 3"
    return (
        Claim("Out over in grows with the square of a filter", card, "score of a filter times three, out over in", 9.0,
              "equal", 1e-6),
        Claim("In over out does not see a filter's size", card, "score of a filter times three, in over out", 1.0,
              "equal", 1e-6),
        Claim("L1 puts a filter that reads what never changes first", card, "place of the indifferent filter by L1",
              0.0),
        Claim("Beta puts it last", card, "filters below the indifferent one by beta", 0.0),
        Claim("Unequal kinds: better than L1 right after pruning", card, "points of F1 over L1, right after pruning",
              0.0, "order"),
        Claim("better than HRank right after pruning", card, "points of F1 over HRank, right after pruning", 0.0,
              "order"),
        Claim("better than L1 after training on", paper, "points of F1 over L1, trained on", 0.0, "order"),
        Claim("a point better than HRank after training on", card, "points of F1 over HRank, trained on", 1.0,
              "at-least"),
        Claim("better than chance right after pruning", "ours", "points of F1 over random, right after pruning", 0.0,
              "order"),
        Claim("The direction of the code is no worse than that of the equation", "ours",
              "points of F1 of out over in over in over out, trained on", 0.0, "at-least", 1.0),
        Claim("Trained on, near the dense net", "abstract", "points of F1 lost to the dense net", 3.0, "at-most"),
        Claim("Equal kinds: all within a point", card,
              "points of accuracy between beta and the better of L1 and HRank, equal kinds", 0.0, "equal", 1.0),
        Claim("Its choice depends less on the batch than HRank's", card,
              "share of filters ever chosen, beta less HRank", 0.0, "at-most"),
        Claim("58 % of the multiplications go", "abstract", "multiplications left", 0.42, "at-most"),
        Claim("What is left is what the widths give", card, "parameters beside what the widths give", 1.0, "equal",
              1e-9),
        Claim("Less memory in ONNX Runtime", "abstract", "memory of the pruned net over the dense, ONNX Runtime", 0.7,
              "at-most"),
        Claim("Less time in ONNX Runtime", "abstract", "seconds of the pruned net over the dense, ONNX Runtime", 0.7,
              "at-most"),
        Claim("The input's spread helps", "ablation", "points of F1 that the input's spread gives, trained on", 0.0,
              "at-least", 1.0, ablation=True),
        Claim("With the program's scaling of the weights, further ahead of HRank", "ablation",
              "points of F1 over HRank with weights scaled, trained on", 1.0, "at-least", ablation=True),
    )


RECIPE = Recipe(
    title="Beta-Rank",
    paper="arXiv:2304.07461",
    claims=_claims(),
    scales={
        "smoke": {"size": 16, "depth": 1, "widths": [6, 8], "pictures": 90, "held_out": 90, "shares": [70, 25, 5],
                  "epochs": 3, "after": 1, "batch": 16, "rate": 0.5, "ranking_batch": 32, "small_batch": 8,
                  "rankings": 3, "repeats": 1, "held_out_batch": 16},
        "small": {"size": 32, "depth": 2, "widths": [16, 32, 64], "pictures": 600, "held_out": 900,
                  "shares": [70, 25, 5], "epochs": 30, "after": 10, "batch": 32, "rate": 0.4, "ranking_batch": 256,
                  "small_batch": 16, "rankings": 10, "repeats": 2, "held_out_batch": 64, "seeds": 3},
        "paper": {"size": 256, "depth": 9, "widths": [16, 32, 64], "pictures": 600, "held_out": 900,
                  "shares": [70, 25, 5], "epochs": 150, "after": 150, "batch": 16, "rate": 0.4, "ranking_batch": 16,
                  "small_batch": 16, "rankings": 10, "repeats": 3, "held_out_batch": 16, "seeds": 3},
    },
    sources={"size": "code", "depth": "paper", "widths": "code", "pictures": "inferred", "held_out": "inferred",
             "shares": "inferred", "epochs": "code", "after": "code", "batch": "code", "rate": "inferred",
             "ranking_batch": "code", "small_batch": "code", "rankings": "inferred", "repeats": "paper",
             "held_out_batch": "inferred"},
    run=run,
)
