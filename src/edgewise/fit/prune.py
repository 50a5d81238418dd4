"""`edgewise prune`: one method, one share, a folder that the engine runs and torch loads, and what it cost.

    prune("smollm2", "wanda", 0.5, out="smollm2-wanda")
    prune("smollm2", "llm-pruner", 0.2, out="smollm2-80")
    prune("smollm2", "sparsegpt", pattern="2:4", out="smollm2-2of4")
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from edgewise.compress.walk import blocks_of, walk
from edgewise.core.checkpoint import Checkpoint, Step
from edgewise.core.errors import InvalidValueError, notice
from edgewise.core.plain import to_plain
from edgewise.core.report import Quantity, Report, Table
from edgewise.core.shapes import LayerShape, shapes_of
from edgewise.core.storage import Sparse
from edgewise.engine.calibrate import EngineStats
from edgewise.fit.dispatch import Calibration, calibration_of, quality_of
from edgewise.fit.methods import Method
from edgewise.fit.pruners import pruner_of
from edgewise.formats.folder import read_folder
from edgewise.formats.folder_writer import check_target, write_folder
from edgewise.formats.sources import open_checkpoint
from edgewise.measure.cores import usable_cores

__all__ = ["prune", "pruned"]

Progress = Callable[[str, int, int], None]
WINDOWS = {"nothing": 0, "inputs": 16, "gram": 32, "tokens": 10}
"""Windows that a method calibrates on where nobody says how many; LLM-Pruner takes ten (its section 4.1)."""


def prune(source: str | os.PathLike[str] | Checkpoint, method: str = "wanda", sparsity: float | None = None, *,
          out: str | os.PathLike[str], pattern: str = "",
          calibrate: str | Sequence[int] = "wikipedia_pages/calibration", windows: int | None = None,
          settings: Mapping[str, Any] | None = None, threads: int | None = None, resume: bool = False,
          overwrite: bool = False, check: bool = True, offline: bool | None = None,
          progress: Progress | None = None) -> Report:
    """Prune a model by a method of the table into a model folder, and say what it cost.

    sparsity: share of the weights of the layers that go, of shortgpt of the layers; by default the method's own.
    pattern: N:M in place of a share, for methods that set zeros. The other arguments are those of `dispatch.quantize`.
    Raises InvalidValueError, UnsupportedError and SourceError before anything is written.
    """
    row = pruner_of(method)
    config = _settings(row, sparsity, pattern, settings or {})
    target = Path(out)
    check_target(target, overwrite=overwrite)
    threads = threads or usable_cores().usable
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(
        os.fspath(source), offline=offline, progress=progress)
    blocks_of(checkpoint)
    usual = WINDOWS[row.needs] if row.windows is None else row.windows
    sample = calibration_of(checkpoint, calibrate, usual if windows is None else windows,
                            asked=windows is not None, offline=offline, progress=progress)
    state = target.absolute().with_name(f".{target.name}.prune")
    if state.exists() and not resume:
        notice("info", "the state of an unfinished run is discarded; --resume would have gone on with it",
               where=str(state))
        shutil.rmtree(state)
    started = time.perf_counter()
    made = pruned(checkpoint, row, config, sample, threads=threads, state=state, progress=progress)
    seconds = time.perf_counter() - started
    folder = write_folder(made, target, overwrite=overwrite, progress=progress)
    shutil.rmtree(state, ignore_errors=True)
    return _report(checkpoint, folder, row, config, sample, seconds, threads, check)


def pruned(checkpoint: Checkpoint, row: Method, config: Any, sample: Calibration, *, threads: int = 1,
           state: Path | None = None, progress: Progress | None = None) -> Checkpoint:
    """The checkpoint as a method makes it. state: a folder for what is done, which the result may read from."""
    function = row.call()
    if row.format == "cut":
        made: Checkpoint = function(checkpoint, sample, config, threads=threads, state=state, progress=progress)
        return made
    from edgewise import __version__

    step = Step("prune", {"method": row.name, "settings": to_plain(config), "text_sha256": sample.sha256,
                          "tokens": int(sample.windows.size)}, __version__)
    stats = None
    if row.needs != "nothing":
        stats = EngineStats(checkpoint, list(sample.windows), gram=row.needs == "gram", sequential=row.sequential,
                            threads=threads)
    return walk(checkpoint, function(config), stats, step=step, state=state,
                key=f"{sample.sha256} {sample.windows.shape}", progress=progress)


def _settings(row: Method, sparsity: float | None, pattern: str, given: Mapping[str, Any]) -> Any:
    values = dict(given)
    for name, value in (("sparsity", sparsity), ("pattern", pattern or None)):
        if value is None:
            continue
        if name in values:
            raise InvalidValueError(f"{name} is given twice: {value} and {values[name]}")
        values[name] = value
    if pattern and row.format == "cut":
        raise InvalidValueError(f"{row.name} cuts whole units, which have no N:M pattern; take magnitude, wanda or "
                                "sparsegpt for it")
    if pattern and sparsity is not None:
        raise InvalidValueError(f"a pattern says how much goes by itself; given {pattern} and sparsity {sparsity}")
    return row.settings(values)


# ---- the report -----------------------------------------------------------------------------------------------------

def _report(source: Checkpoint, folder: Path, row: Method, config: Any, sample: Calibration, seconds: float,
            threads: int, check: bool) -> Report:
    made = read_folder(folder)
    before, after = (_linears(each) for each in (source, made))
    files = [path for path in folder.rglob("*") if path.is_file()]
    quantities = [
        Quantity("method", f"{row.name} ({row.citation})"),
        Quantity("settings", ", ".join(f"{field.name}={getattr(config, field.name)}" for field in fields(config))),
        Quantity("text", f"{sample.name}, SHA-256 {sample.sha256[:16]}, {sample.windows.size} tokens"),
        Quantity("time", seconds, "s"),
        Quantity("layer weights before", before[0]), Quantity("layer weights", after[0]),
        Quantity("sparsity", 1 - after[1] / before[0]),
        Quantity("parameters before", _parameters(source)), Quantity("parameters", _parameters(made)),
        Quantity("tensor_bytes_before", source.nbytes, "B"), Quantity("tensor_bytes", made.nbytes, "B"),
        Quantity("storage_bytes", sum(path.stat().st_size for path in files), "B"),
        Quantity("written to", str(folder))]
    if check:
        quantities += quality_of(source, made, sample, threads)
    tables = (_shapes_table(made),) if shapes_of(made.config) is not None else ()
    if row.format == "mask" and after[1] < before[0]:
        notice("info", "zeros among dense weights make no model faster in the engine; cut units do, and 2:4 with "
               "quantised values", where=row.name)
    return Report(f"{source.metadata.get('name') or source.source}: {row.title}", tuple(quantities), tables,
                  lineage=made.lineage)


def _linears(checkpoint: Checkpoint) -> tuple[int, int]:
    """Weights of the linears of all layers, and how many of them are not zero."""
    every, kept = 0, 0
    for block in blocks_of(checkpoint):
        for name in (name for group in block.groups for name in group.names):
            stored = checkpoint.tensors[name]
            every += math.prod(stored.shape)
            kept += int(np.count_nonzero(stored.values.dense() if isinstance(stored, Sparse) else stored.dense()))
    return every, kept


def _parameters(checkpoint: Checkpoint) -> int:
    return sum(math.prod(checkpoint.tensors[name].shape) for name in checkpoint.tensors)


def _shapes_table(checkpoint: Checkpoint) -> Table:
    """Layers of one shape in one row."""
    shapes = shapes_of(checkpoint.config) or ()
    rows: list[tuple[str, LayerShape]] = []
    first = 0
    for index, shape in enumerate(shapes):
        if index + 1 == len(shapes) or shapes[index + 1] != shape:
            rows.append((f"{first}" if first == index else f"{first} to {index}", shape))
            first = index + 1
    return Table("Layers", ("layers", "heads", "key heads", "key width", "value width", "neurons"), tuple(
        (name, shape.heads, shape.kv_heads, shape.key_dim, shape.value_dim, shape.width) for name, shape in rows))
