"""The table of pruning methods: what `edgewise prune --method` may name.

kind mask: a function of its settings -> Change of compress.walk; zeros in weights of their old shape.
kind cut: (checkpoint, sample, settings, *, threads, state, progress) -> Checkpoint of smaller shapes, whatever it
needs. state: a folder for what is done; modegpt, which takes minutes, goes on from it, the others begin anew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from edgewise.compress.lowrank.modegpt import ModeGpt, influence_of
from edgewise.compress.lowrank.modegpt_walk import shrink
from edgewise.compress.prune.units import Units, blocks_kept, units_kept
from edgewise.compress.surgery.groups import decoder_of, groups_of
from edgewise.compress.surgery.operations import cut, norms_of
from edgewise.compress.walk import blocks_of
from edgewise.core.checkpoint import Checkpoint, Step
from edgewise.core.errors import InvalidValueError, notice
from edgewise.core.report import Report, Table
from edgewise.core.values import dataclass
from edgewise.engine.calibrate import EngineStats
from edgewise.fit.dispatch import Calibration
from edgewise.fit.methods import Method
from edgewise.report import render
from edgewise.report.text import cell

__all__ = ["PRUNERS", "Blocks", "block_influence", "pruner_of", "pruners_markdown"]

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Blocks:
    """sparsity: share of the layers that go."""

    sparsity: float = 0.25

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise InvalidValueError(f"sparsity is the share of layers that go, from 0 to below 1; given "
                                    f"{self.sparsity}")


def units_by_norm(checkpoint: Checkpoint, sample: Calibration, config: Units, *, threads: int,
                  state: Path | None = None, progress: Progress | None = None) -> Checkpoint:
    """Heads and neurons of the least 2-norm go."""
    decoder = decoder_of(checkpoint)
    scores = {name: norms_of(checkpoint, group) for name, group in groups_of(checkpoint, decoder).items()
              if name.endswith((".heads", ".width"))}
    return cut(checkpoint, units_kept(decoder, scores, config), step=_step("units", config, sample))


def units_by_taylor(checkpoint: Checkpoint, sample: Calibration, config: Units, *, threads: int,
                    state: Path | None = None, progress: Progress | None = None) -> Checkpoint:
    """LLM-Pruner: heads and neurons of the least first-order importance go."""
    from edgewise.train.taylor import importance_of

    decoder = decoder_of(checkpoint)
    scores = importance_of(checkpoint, sample.windows, threads=threads, progress=progress)
    return cut(checkpoint, units_kept(decoder, scores, config), step=_step("llm-pruner", config, sample))


def blocks_by_influence(checkpoint: Checkpoint, sample: Calibration, config: Blocks, *, threads: int,
                        state: Path | None = None, progress: Progress | None = None) -> Checkpoint:
    """ShortGPT: the layers that turn the states least go."""
    influence = block_influence(checkpoint, sample, threads=threads, progress=progress)
    return cut(checkpoint, blocks_kept(influence, config.sparsity), step=_step("shortgpt", config, sample))


def decomposed(checkpoint: Checkpoint, sample: Calibration, config: ModeGpt, *, threads: int,
               state: Path | None = None, progress: Progress | None = None) -> Checkpoint:
    """MoDeGPT: neurons, and dimensions of heads, with the least error of what a pair of matrices gives."""
    made, cuts = shrink(checkpoint, config, lambda gram: EngineStats(
        checkpoint, list(sample.windows), gram=gram, threads=threads), step=_step("modegpt", config, sample),
        state=state, key=f"{sample.sha256} {sample.windows.shape}", progress=progress)
    worst = max(range(len(cuts)), key=lambda index: cuts[index].feed_forward_error)
    notice("info", f"on the calibration text a feed-forward gives what it gave but for "
           f"{100 * np.mean([cut.feed_forward_error for cut in cuts]):.0f} %, at most "
           f"{100 * cuts[worst].feed_forward_error:.0f} % (layer {worst}), values of heads but for "
           f"{100 * np.mean([cut.value_error for cut in cuts]):.0f} %", where="modegpt")
    return made


def block_influence(checkpoint: Checkpoint, sample: Calibration, *, threads: int = 1,
                    progress: Progress | None = None) -> np.ndarray[Any, np.dtype[np.float64]]:
    """(layers,): 1 - mean cos of the states before and after each layer, on the windows to calibrate on."""
    source = EngineStats(checkpoint, list(sample.windows), threads=threads)
    found, blocks = [], blocks_of(checkpoint)
    for block in blocks:
        before = np.array(source.hidden)
        source.leave(block, {name: checkpoint.tensors[name] for name in block.tensors})
        found.append(influence_of(before, source.hidden))
        if progress is not None:
            progress("influence", block.index + 1, len(blocks))
    return np.array(found)


def _step(name: str, config: Any, sample: Calibration) -> Step:
    from edgewise import __version__
    from edgewise.core.plain import to_plain

    return Step("prune", {"method": name, "settings": to_plain(config), "text_sha256": sample.sha256,
                          "tokens": int(sample.windows.size)}, __version__)


_MASKS = "edgewise.compress.prune.masks:"
_HERE = "edgewise.fit.pruners:"
PRUNERS: tuple[Method, ...] = (
    Method("magnitude", "Magnitude", "Han et al., NeurIPS 2015, arXiv:1506.02626", "closed", "nothing", "mask",
           _MASKS + "magnitude_change", _MASKS + "Prune", "the smallest weights of each matrix become zero"),
    Method("wanda", "Wanda", "Sun et al., ICLR 2024, arXiv:2306.11695", "closed", "inputs", "mask",
           _MASKS + "wanda_change", _MASKS + "Prune",
           "of each row the weights become zero that are smallest times the norm of their input", sequential=True),
    Method("sparsegpt", "SparseGPT", "Frantar and Alistarh, ICML 2023, arXiv:2301.00774", "closed", "gram", "mask",
           _MASKS + "sparsegpt_change", _MASKS + "SparseGpt",
           "column by column, what a zeroed weight leaves behind made up for by those after it", sequential=True),
    Method("units", "Units by norm", "Li et al., ICLR 2017, arXiv:1608.08710", "closed", "nothing", "cut",
           _HERE + "units_by_norm", "edgewise.compress.prune.units:Units",
           "key heads with their query heads, and neurons, of the least norm are cut out"),
    Method("llm-pruner", "LLM-Pruner", "Ma et al., NeurIPS 2023, arXiv:2305.11627", "trained", "tokens", "cut",
           _HERE + "units_by_taylor", "edgewise.compress.prune.units:Units",
           "the same units by what the loss would lose with them, to first order; needs torch"),
    Method("shortgpt", "ShortGPT", "Men et al., 2024, arXiv:2403.03853", "closed", "inputs", "cut",
           _HERE + "blocks_by_influence", _HERE + "Blocks", "whole layers that turn the states least are left out"),
    Method("modegpt", "MoDeGPT", "Lin et al., ICLR 2025, arXiv:2408.09632", "closed", "gram", "cut",
           _HERE + "decomposed", "edgewise.compress.lowrank.modegpt:ModeGpt",
           "neurons and dimensions of heads go, and what they said is read out of those that stay",
           windows=64),  # a layer's 1,536 neurons are read out better from 32,768 tokens than from half of them
)
"""`format` says what comes out: a mask (zeros) or a cut (smaller shapes). `needs` as for quantisation."""


def pruner_of(name: str) -> Method:
    """The row of that name. Raises InvalidValueError with the names there are."""
    known = name.strip().lower().replace("_", "-")
    for row in PRUNERS:
        if row.name == known:
            return row
    raise InvalidValueError(f"no method {name!r}; there are {', '.join(row.name for row in PRUNERS)}")


def pruners_markdown() -> str:
    """The table as Markdown, which docs/pruning.md is."""
    rows = []
    for row in PRUNERS:
        module, name = row.config.split(":")
        kind = getattr(import_module(module), name)
        settings = "; ".join(f"{field.name} = {cell(field.default)}" for field in fields(kind))
        rows.append((row.name, f"{row.title}: {row.citation}", "zeros" if row.format == "mask" else "smaller shapes",
                     row.needs, row.says, settings))
    table = Table("Methods of `edgewise prune`", ("method", "paper", "makes", "needs", "what it does", "settings"),
                  tuple(rows))
    return render(Report("Pruning", tables=(table,)), "markdown")
