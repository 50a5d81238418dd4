"""Greenformers: thin pairs for short sequences, Linformer for long ones, and where they cross.

Cahyawijaya, arXiv:2108.10808. The thesis measures encoders on a GPU and counts what BERT would save; here an encoder of
two layers is timed on one core over lengths, in torch and, at both ends, in ONNX Runtime with its memory. Whether
quality holds is measured on handwritten digits read row by row: made of thin pairs and trained, or cut to thin pairs by
SVD after training, with and without training on.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from edgewise.core.errors import collect_notices, require
from edgewise.core.recipe import Claim, Recipe
from edgewise.core.report import Quantity, Report, Table

__all__ = ["RECIPE"]

Metrics = dict[str, float | None]
KINDS = ("dense", "thin pairs", "Linformer")


def run(settings: Mapping[str, Any], seed: int, ablate: bool) -> Report:
    """One seed: seconds over lengths, memory at the longest, accuracy by design and after the fact."""
    speeds, metrics = _speeds(settings["speed"], seed, ablate)
    quality, found = _quality(settings["quality"], seed, ablate)
    metrics |= found | _bert(settings["bert"])
    return Report("greenformers", tuple(Quantity(name, value) for name, value in metrics.items()), (speeds, quality))


def _speeds(chosen: Mapping[str, Any], seed: int, ablate: bool) -> tuple[Table, Metrics]:
    import torch

    from edgewise.measure.onnx_runtime import onnx_peak_bytes, onnx_seconds
    from edgewise.measure.repeat import rounds
    from edgewise.models.short_encoder import ShortEncoder
    from edgewise.train.greenformers import crossover
    from edgewise.train.surgery import parameters, write_onnx_net

    lengths, dim = chosen["lengths"], chosen["dim"]
    base = ShortEncoder(dim, dim, chosen["depth"], chosen["heads"], 4 * dim, 10, max(lengths))
    shapes = {"dense": base, "thin pairs": replace(base, rank=chosen["rank"]),
              "Linformer": replace(base, projected=chosen["projected"])}
    seconds: dict[str, list[float]] = {name: [] for name in shapes}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        models = {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for name, shape in shapes.items():
                models[name] = shape.build().eval()
            with torch.no_grad():
                for length in lengths:
                    x = torch.randn(chosen["batch"], length, dim)
                    timed = rounds({name: lambda model=model, x=x: model(x) for name, model in models.items()},
                                   repeats=chosen["repeats"], seed=seed)
                    for name, sample in timed.items():
                        # A neighbour's slice of time is longer than a short sequence: the fastest run had none.
                        seconds[name].append(min(sample.values))
    finally:
        torch.set_num_threads(threads)
    gain = {name: [a / b for a, b in zip(seconds["dense"], seconds[name], strict=True)] for name in KINDS[1:]}
    metrics: Metrics = {
        "speed of thin pairs over dense, shortest": gain["thin pairs"][0],
        "speed of thin pairs over dense, longest": gain["thin pairs"][-1],
        "speed of Linformer over dense, shortest": gain["Linformer"][0],
        "speed of Linformer over dense, longest": gain["Linformer"][-1],
        "length at which Linformer overtakes thin pairs": _crossing(
            lengths, [a / b for a, b in zip(gain["Linformer"], gain["thin pairs"], strict=True)]),
        "the same over that of counted multiplications": None,
    }
    at = metrics["length at which Linformer overtakes thin pairs"]
    if at is not None:
        metrics["the same over that of counted multiplications"] = at / crossover(dim, chosen["rank"],
                                                                                 chosen["projected"])
    with tempfile.TemporaryDirectory() as folder:
        ends = {"shortest": min(lengths), "longest": max(lengths)}
        for where in chosen["onnx"]:
            length = ends[where]
            files = {}
            example = torch.randn(1, length, dim)
            for name, model in models.items():
                files[name] = Path(folder) / f"{name}-{length}.onnx"
                write_onnx_net(model, example, files[name])
            timed = onnx_seconds(files, example.numpy(), repeats=chosen["repeats"])
            peak = {name: onnx_peak_bytes(path, tuple(example.shape)) for name, path in files.items()}
            for name in KINDS[1:]:
                metrics[f"speed of {name} over dense, {where}, ONNX Runtime"] = (
                    min(timed["dense"].values) / min(timed[name].values))
                metrics[f"memory of {name} over dense, {where}, ONNX Runtime"] = peak[name] / peak["dense"]
    for name in KINDS[1:]:
        metrics[f"parameters of layers, {name} over dense"] = (
            parameters(models[name].layers) / parameters(models["dense"].layers))
    if ablate:
        metrics["speed of thin pairs over Linformer, longest"] = gain["thin pairs"][-1] / gain["Linformer"][-1]
        metrics["speed of Linformer over thin pairs, shortest"] = gain["Linformer"][0] / gain["thin pairs"][0]
    rows = tuple((length, *(seconds[name][place] for name in KINDS)) for place, length in enumerate(lengths))
    return Table("Seconds over lengths, torch on one core", ("length", *KINDS), rows, ("", "s", "s", "s")), metrics


def _crossing(lengths: list[int], ratio: list[float]) -> float | None:
    """The length at which a rising ratio passes 1, between measured ones by logarithms; None if it does not, once."""
    signs = [value > 1 for value in ratio]
    if signs[0] or not signs[-1] or sum(a != b for a, b in pairwise(signs)) != 1:
        return None
    place = signs.index(True)
    low, high = math.log(ratio[place - 1]), math.log(ratio[place])
    share = -low / (high - low)
    return math.exp((1 - share) * math.log(lengths[place - 1]) + share * math.log(lengths[place]))


def _quality(chosen: Mapping[str, Any], seed: int, ablate: bool) -> tuple[Table, Metrics]:
    import torch

    from edgewise.models.short_encoder import ShortEncoder
    from edgewise.train.greenformers import Greenformers, factorised
    from edgewise.train.pictures import Epochs, learn, predictions, scores
    from edgewise.train.surgery import parameters

    digits = require("sklearn.datasets", extra="eval", purpose="the digits").load_digits()
    order = np.random.default_rng(seed).permutation(len(digits.target))[:chosen["digits"]]
    held = len(order) // 4
    x = torch.from_numpy(digits.images[order].astype(np.float32) / 8 - 1)  # rows as tokens, (n, 8, 8)
    y, truth = torch.from_numpy(digits.target[order].astype(np.int64)), digits.target[order][:held].astype(np.int64)
    base = ShortEncoder(8, chosen["dim"], 2, 4, 4 * chosen["dim"], 10, 8)
    epochs = Epochs(chosen["epochs"], 32, chosen["learning_rate"], seed=seed)
    inside = ("layers",)

    def accuracy(model: Any) -> float:
        return scores(predictions(model, x[:held]), truth, 10)["accuracy"]

    def trained(shape: Any) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = shape.build()
        learn(model, x[held:], y[held:], epochs)
        return model

    dense = trained(base)
    designed = trained(replace(base, rank=chosen["rank"]))
    rows: dict[str, tuple[float, int]] = {"dense": (accuracy(dense), parameters(dense)),
                                          "thin pairs from the start": (accuracy(designed), parameters(designed))}
    with collect_notices():
        for share in chosen["fractions"]:
            model = factorised(dense, Greenformers(share, inside=inside, seed=seed))
            rows[f"SVD, {share:g}"] = accuracy(model), parameters(model)
        lowest = min(chosen["fractions"])
        model = factorised(dense, Greenformers(lowest, inside=inside, seed=seed))
        again = replace(epochs, epochs=chosen["after"], learning_rate=epochs.learning_rate / 4)
        learn(model, x[held:], y[held:], again)
        rows[f"SVD, {lowest:g}, trained on"] = accuracy(model), parameters(model)
        drawn = factorised(dense, Greenformers(max(chosen["fractions"]), "random", inside=inside, seed=seed))
        rows[f"random pairs, {max(chosen['fractions']):g}"] = accuracy(drawn), parameters(drawn)
    reached = {name: row[0] for name, row in rows.items()}
    lost = reached["dense"] - reached[f"SVD, {lowest:g}"]
    metrics: Metrics = {
        "points lost by design": 100 * (reached["dense"] - reached["thin pairs from the start"]),
        "parameters by design over dense": rows["thin pairs from the start"][1] / rows["dense"][1],
        "points lost by SVD at the largest fraction":
            100 * (reached["dense"] - reached[f"SVD, {max(chosen['fractions']):g}"]),
        "points lost by SVD at the smallest fraction": 100 * lost,
        "points left after training on": 100 * (reached["dense"] - reached[f"SVD, {lowest:g}, trained on"]),
    }
    if ablate:
        metrics["points lost by random pairs, not trained"] = 100 * (
            reached["dense"] - reached[f"random pairs, {max(chosen['fractions']):g}"])
    return Table("Digits row by row", ("encoder", "accuracy", "parameters"), tuple(
        (name, *row) for name, row in rows.items())), metrics


def _bert(chosen: Mapping[str, Any]) -> Metrics:
    """What a Low-Rank BERT-base would save of training's multiplications, by the count of a layer."""
    from edgewise.train.greenformers import TrainingCost, layer_macs

    def total(rank: int) -> int:
        return 12 * layer_macs(chosen["length"], 768, 3072, rank=rank).total

    share = total(chosen["rank"]) / total(0)
    whole, less = (TrainingCost(hours, chosen["power_w"]) for hours in (chosen["hours"], chosen["hours"] * share))
    return {"share of BERT-base's training that thin pairs save, counted": 1 - share,
            "kilograms of CO2 saved, counted": whole.co2_kg - less.co2_kg}


def _claims() -> tuple[Claim, ...]:
    card, abstract = "card: small-scale check", "abstract"
    return (
        Claim("Short sequences: thin pairs are faster than dense", abstract, "speed of thin pairs over dense, shortest",
              1.2, "at-least"),
        Claim("and Linformer is not", card, "speed of Linformer over dense, shortest", 1.1, "at-most"),
        Claim("Long sequences: Linformer is twice as fast as dense", card, "speed of Linformer over dense, longest",
              2.0, "at-least"),
        Claim("and thin pairs gain little", card, "speed of thin pairs over dense, longest", 1.5, "at-most"),
        Claim("They cross once, near 512", abstract, "length at which Linformer overtakes thin pairs", 512, "equal",
              256),
        Claim("below where counted multiplications cross", card, "the same over that of counted multiplications", 1.0,
              "at-most"),
        Claim("ONNX Runtime, short: thin pairs are faster", abstract,
              "speed of thin pairs over dense, shortest, ONNX Runtime", 1.0, "at-least"),
        Claim("ONNX Runtime, long: Linformer is faster", abstract,
              "speed of Linformer over dense, longest, ONNX Runtime", 1.5, "at-least"),
        Claim("ONNX Runtime, long: Linformer takes less memory", abstract,
              "memory of Linformer over dense, longest, ONNX Runtime", 0.7, "at-most"),
        Claim("Thin pairs make the model smaller", abstract, "parameters of layers, thin pairs over dense", 0.6,
              "at-most"),
        Claim("Linformer does not", card, "parameters of layers, Linformer over dense", 1.0, "at-least"),
        Claim("Trained as thin pairs, two points at most are lost", card, "points lost by design", 2.0, "at-most"),
        Claim("with little more than half of the parameters", card, "parameters by design over dense", 0.6, "at-most"),
        Claim("SVD of nine tenths costs little", card, "points lost by SVD at the largest fraction", 2.0, "at-most"),
        Claim("SVD of a small fraction costs much", card, "points lost by SVD at the smallest fraction", 5.0,
              "at-least"),
        Claim("which training on brings back", card, "points left after training on", 3.0, "at-most"),
        Claim("BERT's training would cost 30 % less", abstract,
              "share of BERT-base's training that thin pairs save, counted", 0.3, "at-least"),
        Claim("Thin pairs where Linformer belongs lose to it", "ablation",
              "speed of thin pairs over Linformer, longest", 1.0, "at-most", ablation=True),
        Claim("Linformer where thin pairs belong loses to them", "ablation",
              "speed of Linformer over thin pairs, shortest", 1.0, "at-most", ablation=True),
        Claim("Random pairs, not trained, know nothing", "ablation", "points lost by random pairs, not trained", 50.0,
              "at-least", ablation=True),
    )


_BERT = {"length": 128, "rank": 256, "hours": 79.0, "power_w": 12_041.0}
RECIPE = Recipe(
    title="Greenformers",
    paper="arXiv:2108.10808",
    claims=_claims(),
    scales={
        "smoke": {"speed": {"lengths": [16, 1024], "dim": 64, "depth": 1, "heads": 2, "rank": 16, "projected": 32,
                            "batch": 1, "repeats": 3, "onnx": ["longest"]},
                  "quality": {"digits": 400, "dim": 32, "rank": 8, "epochs": 6, "after": 2, "learning_rate": 0.05,
                              "fractions": [0.9, 0.3]}, "bert": _BERT},
        "small": {"speed": {"lengths": [16, 32, 64, 128, 256, 512, 1024, 2048], "dim": 128, "depth": 2, "heads": 4,
                            "rank": 32, "projected": 64, "batch": 4, "repeats": 7,
                            "onnx": ["shortest", "longest"]},
                  "quality": {"digits": 1797, "dim": 64, "rank": 16, "epochs": 15, "after": 5, "learning_rate": 0.05,
                              "fractions": [0.9, 0.7, 0.5, 0.2]}, "bert": _BERT, "seeds": 3},
        "paper": {"speed": {"lengths": [16, 32, 64, 128, 256, 512, 1024, 2048, 4096], "dim": 768, "depth": 12,
                            "heads": 12, "rank": 256, "projected": 256, "batch": 16, "repeats": 7,
                            "onnx": ["shortest", "longest"]},
                  "quality": {"digits": 1797, "dim": 256, "rank": 64, "epochs": 100, "after": 20,
                              "learning_rate": 0.05, "fractions": [0.9, 0.7, 0.5, 0.2]}, "bert": _BERT, "seeds": 3},
    },
    sources={"speed": "inferred", "quality": "inferred", "bert": "code"},
    run=run,
)
