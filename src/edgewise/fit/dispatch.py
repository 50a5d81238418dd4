"""One method, one format: a model in, a folder out that the engine runs and torch loads.

    from edgewise.fit import quantize
    quantize("smollm2", "gptq", "int4/g32", out="smollm2-gptq")

The linears of the layers are quantised by the method; embedding and head stay as they are, or are rounded to nearest
in a format of their own. Blocks that are done lie in a folder beside `out`, from which a killed run goes on.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgewise.compress.quantize.changes import KEPT
from edgewise.compress.quantize.rtn import quantize_layer as rounded_layer
from edgewise.compress.walk import Block, blocks_of, walk
from edgewise.core.checkpoint import Checkpoint, Step
from edgewise.core.errors import InvalidValueError, SourceError, UnsupportedError, notice
from edgewise.core.numbers import QuantFormat
from edgewise.core.report import Quantity, Report, Table
from edgewise.core.storage import LazyTensors, Stored
from edgewise.data.texts import Text, text
from edgewise.data.tokenizer import tokenizer_of
from edgewise.engine.archs import plan_of
from edgewise.engine.calibrate import EngineStats
from edgewise.engine.loading import model_of
from edgewise.engine.packing import packed_nbytes
from edgewise.fit.methods import Method, check_format, method_of
from edgewise.fit.sensitivity import kl_rows
from edgewise.formats.describe import format_of
from edgewise.formats.folder_writer import check_target, write_folder
from edgewise.formats.sources import open_checkpoint
from edgewise.measure.cores import usable_cores

__all__ = ["Calibration", "calibration_of", "quality_of", "quantize", "quantized"]

Progress = Callable[[str, int, int], None]
Ids = NDArray[np.int32]
WINDOW = 512
"""Tokens of a calibration window."""
WINDOWS = {"nothing": 0, "inputs": 16, "gram": 32, "tokens": 512}
"""Windows that a method calibrates on where nobody says how many, by what it needs."""
_LEAST_TOKENS = 2048
"""Fewer say too little about the inputs of a linear."""
_CHECKED = 4
"""Windows that the result is measured on."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """Excerpts of a text, spread over it. windows: (n, tokens) to calibrate on; check: (n, tokens) to measure on,
    apart from these. name, sha256: of the text."""

    windows: Ids
    check: Ids
    name: str
    sha256: str


def quantize(source: str | os.PathLike[str] | Checkpoint, method: str = "gptq", format: str | QuantFormat | None = None,
             *, out: str | os.PathLike[str], calibrate: str | Sequence[int] = "wikipedia_pages/calibration",
             windows: int | None = None, embedding: str | None = None, settings: Mapping[str, Any] | None = None,
             threads: int | None = None, resume: bool = False, overwrite: bool = False, check: bool = True,
             offline: bool | None = None, progress: Progress | None = None) -> Report:
    """Quantise a model by a method of the table into a model folder, and say what it cost.

    format: of the linears, such as int4/g32; by default the method's own. embedding: of embedding and head, by rounding
    to nearest; by default they stay as they are. calibrate: a text as `data.texts.text` names it, or token ids.
    windows: of 512 tokens, to calibrate on. settings: of the method, by name. resume: go on where a killed run was.
    check: measure the result against the source on windows of the same text that calibration did not see.
    Raises InvalidValueError, UnsupportedError and SourceError before anything is written.
    """
    row = method_of(method)
    fmt = format if isinstance(format, QuantFormat) else QuantFormat.parse(format or row.format)
    check_format(row, fmt)
    config = row.settings(settings)
    target = Path(out)
    check_target(target, overwrite=overwrite)
    threads = threads or usable_cores().usable
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(
        os.fspath(source), offline=offline, progress=progress)
    blocks = _check_model(checkpoint, fmt, row)
    embedding_fmt = None if embedding is None else QuantFormat.parse(embedding)
    usual = WINDOWS[row.needs] if row.windows is None else row.windows
    sample = calibration_of(checkpoint, calibrate, usual if windows is None else windows,
                            asked=windows is not None, offline=offline, progress=progress)
    state = target.absolute().with_name(f".{target.name}.quantize")
    if state.exists() and not resume:
        notice("info", "the state of an unfinished run is discarded; --resume would have gone on with it",
               where=str(state))
        shutil.rmtree(state)
    if resume and not state.exists():
        notice("info", "there is no unfinished run to resume; it starts anew", where=str(state))

    started = time.perf_counter()
    made = quantized(checkpoint, row, fmt, config, sample, blocks=blocks, threads=threads, state=state,
                     progress=progress)
    if embedding_fmt is not None:
        made = _with_tables(made, embedding_fmt)
    seconds = time.perf_counter() - started
    folder = write_folder(made, target, overwrite=overwrite, progress=progress)
    shutil.rmtree(state, ignore_errors=True)
    return _report(checkpoint, folder, row, fmt, config, sample, seconds, threads, check)


def quantized(checkpoint: Checkpoint, method: Method, fmt: QuantFormat, config: Any, sample: Calibration, *,
              blocks: Sequence[Block] | None = None, threads: int = 1, state: Path | None = None,
              progress: Progress | None = None) -> Checkpoint:
    """The checkpoint as a method makes it. state: a folder for what is done, which the result may read from."""
    function = method.call()
    if method.kind == "trained":
        ids = sample.windows.reshape(-1).astype(np.int64)  # one text: where a window ends is no matter to training
        made: Checkpoint = function(checkpoint, ids, fmt, config, progress=progress, state=state)
        return made
    step = Step("quantize", {"method": method.name, "format": str(fmt), "settings": _plain(config),
                             "text_sha256": sample.sha256, "tokens": int(sample.windows.size)}, _version())
    stats = None
    if method.needs != "nothing":
        stats = EngineStats(checkpoint, list(sample.windows), gram=method.needs == "gram",
                            sequential=method.sequential, threads=threads)
    run = {"edgewise_run": dict(method.run)} if method.run else {}
    return walk(checkpoint, function(fmt, config), stats, step=step, state=state,
                key=f"{sample.sha256} {sample.windows.shape}", progress=progress, **run)


def calibration_of(checkpoint: Checkpoint, source: str | Sequence[int] | Ids, windows: int, *, asked: bool = True,
                   offline: bool | None = None, progress: Progress | None = None) -> Calibration:
    """Windows to calibrate and to measure on, evenly over a text. Raises InvalidValueError where it is too short.

    asked: so many were asked for, so that fewer are a truncation.
    """
    length = min(WINDOW, _positions(checkpoint))
    if isinstance(source, str):
        if "tokenizer" not in checkpoint.metadata:
            raise InvalidValueError(f"{checkpoint.source}: the model carries no tokenizer; give token ids to calibrate "
                                    "on")
        try:
            known = text(source, offline=offline, progress=progress)
        except SourceError as error:
            raise SourceError(f"{error}; to calibrate without a download, give a text file, or pydoc") from error
        ids = np.asarray(tokenizer_of(checkpoint).encode(known.content, add_special=False), np.int32)
        name, digest = known.name, known.sha256
    else:
        ids = np.asarray(source, np.int32).reshape(-1)
        name, digest = "token ids", Text.of("", ",".join(map(str, ids.tolist()))).sha256
        highest = int(checkpoint.config.get("vocab_size") or 1 << 30)
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < highest:
            raise InvalidValueError(f"token ids are 0 to {highest - 1}; given {ids.min()} to {ids.max()}")
    wanted = (windows + _CHECKED) * length
    least = _LEAST_TOKENS + _CHECKED * length if windows else _CHECKED * length
    if len(ids) < least:
        raise InvalidValueError(f"the calibration text {name} has {len(ids)} tokens; {least} are needed, of which "
                                f"{_CHECKED * length} to measure the result on; give a longer text (--calibrate)")
    count = min(windows, len(ids) // length - _CHECKED)
    if len(ids) < wanted:
        notice("truncation" if asked else "info", f"{name} has {len(ids)} tokens: {count} windows of {length} are "
               f"calibrated on, not {windows}", where="quantize")
    total = count + _CHECKED
    starts = np.linspace(0, len(ids) - length, total).astype(np.int64)
    cut = np.stack([ids[start:start + length] for start in starts])
    checked = np.zeros(total, bool)
    checked[np.linspace(0, total - 1, _CHECKED + 2).astype(np.int64)[1:-1]] = True
    if checked.sum() < _CHECKED:
        checked[:] = np.arange(total) < _CHECKED
    return Calibration(cut[~checked], cut[checked], name, digest)


def _positions(checkpoint: Checkpoint) -> int:
    from edgewise.fit.choose import context_limit

    return context_limit(plan_of(checkpoint))


def _check_model(checkpoint: Checkpoint, fmt: QuantFormat, method: Method) -> tuple[Block, ...]:
    """The blocks. Raises where the model is of an unknown architecture, or a linear of it cannot take the format."""
    plan = plan_of(checkpoint)
    if plan.kind == "encoder-decoder":
        raise UnsupportedError(f"{checkpoint.source}: {checkpoint.arch} is an encoder-decoder, whose two stacks no "
                               "method walks yet; round it to nearest with: edgewise convert --format int8/g32")
    blocks = blocks_of(checkpoint)
    without_kernel = 0
    for block in blocks:
        for name in (name for group in block.groups for name in group.names if not KEPT.search(name)):
            rows, inputs = checkpoint.tensors[name].shape
            group = fmt.granularity.group
            if fmt.granularity.kind == "group" and inputs % group:
                fitting = next((size for size in (128, 64, 32, 16) if inputs % size == 0 and size < group), None)
                instead = str(replace(fmt, granularity=replace(fmt.granularity, group=fitting))) if fitting else \
                    str(fmt).replace(f"/g{group}", "/axis")
                raise InvalidValueError(f"{name} has rows of {inputs} values, which are no whole groups of {group}; "
                                        f"take another format, such as {instead}")
            if fmt.n_m is not None and inputs % fmt.n_m[1]:
                raise InvalidValueError(f"{name} has rows of {inputs} values, which {fmt.n_m[0]}:{fmt.n_m[1]} sparsity "
                                        "does not divide; take another format")
            without_kernel += packed_nbytes(fmt, (rows, inputs)) is None
    if without_kernel:
        notice("fallback", f"{fmt} has no kernel: the folder is as small as it should be, and {without_kernel} linears "
               f"run as 16-bit floats; {method.format} has one", where="quantize")
    return blocks


def _with_tables(checkpoint: Checkpoint, fmt: QuantFormat) -> Checkpoint:
    """Embedding and head rounded to nearest, each once."""
    plan = plan_of(checkpoint)
    names = {plan.embedding.name} | ({plan.head.name} if plan.head is not None else set())
    for name in names & set(checkpoint.tensors):
        inputs = checkpoint.tensors[name].shape[1]
        if fmt.granularity.kind == "group" and inputs % fmt.granularity.group:
            raise InvalidValueError(f"{name} has rows of {inputs} values, which are no whole groups of "
                                    f"{fmt.granularity.group}; give another --embedding")
    made: dict[str, Stored] = {name: rounded_layer(checkpoint.tensors[name].dense(), fmt) for name in names
                               if name in checkpoint.tensors}
    source = checkpoint.tensors
    makers: dict[str, Callable[[], Stored]] = {
        name: (lambda name=name: made[name] if name in made else source[name])  # type: ignore[misc]
        for name in source}
    return checkpoint.with_tensors(LazyTensors(makers), Step("quantize", {"method": "rtn", "embedding": str(fmt)},
                                                             _version()))


def _plain(config: Any) -> dict[str, Any]:
    from edgewise.core.plain import to_plain

    found: dict[str, Any] = to_plain(config)
    return found


def _version() -> str:
    from edgewise import __version__

    return __version__


# ---- the report ---------------------------------------------------------------------------------------------------

def _report(source: Checkpoint, folder: Path, method: Method, fmt: QuantFormat, config: Any, sample: Calibration,
            seconds: float, threads: int, check: bool) -> Report:
    from edgewise.formats.folder import read_folder

    made = read_folder(folder)
    files = [path for path in folder.rglob("*") if path.is_file()]
    weights = sum(math.prod(made.tensors[name].shape) for name in made.tensors)
    quantities = [
        Quantity("method", f"{method.name} ({method.citation})"), Quantity("format", str(fmt)),
        Quantity("settings", ", ".join(f"{key}={value}" for key, value in _plain(config).items())),
        Quantity("text", f"{sample.name}, SHA-256 {sample.sha256[:16]}, {sample.windows.size} tokens"),
        Quantity("time", seconds, "s"),
        Quantity("tensor_bytes_before", source.nbytes, "B"), Quantity("tensor_bytes", made.nbytes, "B"),
        Quantity("bits_per_weight", 8 * made.nbytes / weights),
        Quantity("storage_bytes", sum(path.stat().st_size for path in files), "B"),
        Quantity("written to", str(folder))]
    if check:
        quantities += quality_of(source, made, sample, threads)
    return Report(f"{source.metadata.get('name') or source.source}: {method.title}, {fmt}", tuple(quantities),
                  (_formats_table(source, made),), lineage=made.lineage)


def _formats_table(source: Checkpoint, made: Checkpoint) -> Table:
    groups: dict[tuple[str, str], list[str]] = {}
    for name in made.tensors:
        before = source.tensors[name] if name in source.tensors else made.tensors[name]
        groups.setdefault((format_of(before), format_of(made.tensors[name])), []).append(name)
    return Table("Tensors", ("from", "to", "tensors", "bytes before", "bytes"), tuple(
        (before, after, len(names), sum(source.tensors[n].nbytes for n in names if n in source.tensors),
         sum(made.tensors[n].nbytes for n in names)) for (before, after), names in sorted(groups.items())),
        ("", "", "", "B", "B"))


def quality_of(source: Checkpoint, made: Checkpoint, sample: Calibration, threads: int) -> list[Quantity]:
    """Both models on the windows that calibration did not see."""
    length = sample.check.shape[1]
    before, after = (model_of(each, threads=threads, context=length, cache=False) for each in (source, made))
    if before.kind == "encoder":
        cosines = []
        for ids in sample.check:
            rows = [each.states(ids).astype(np.float64) for each in (before, after)]
            norms = np.linalg.norm(rows[0], axis=1) * np.linalg.norm(rows[1], axis=1)
            cosines.append((rows[0] * rows[1]).sum(axis=1) / np.maximum(norms, 1e-30))
        return [Quantity("mean cosine of states", float(np.concatenate(cosines).mean())),
                Quantity("least cosine of states", float(np.concatenate(cosines).min()))]
    kls, losses = [], ([], [])  # type: ignore[var-annotated]
    after.session.decoding = after.input_sparse  # every token, as if it had been sampled
    for ids in sample.check:
        logits = [each.forward(ids) for each in (before, after)]
        kls.append(kl_rows(logits[0], logits[1]))
        for loss, rows in zip(losses, logits, strict=True):
            top = rows.max(axis=-1)
            total = top + np.log(np.exp(rows - top[:, None]).sum(axis=-1, dtype=np.float64))
            loss.append((total[:-1] - rows[np.arange(len(ids) - 1), ids[1:]]).astype(np.float64))
    kl = np.concatenate(kls)
    mean, error = float(kl.mean()), float(kl.std() / math.sqrt(len(kl)))
    low, high = mean - 1.96 * error, mean + 1.96 * error
    perplexities = [math.exp(float(np.concatenate(loss).mean())) for loss in losses]
    read = after.inputs_read()
    return [*([] if read is None else [Quantity("inputs read", read, "share")]),
            Quantity("quality", math.exp(-mean), "", (math.exp(-high), math.exp(-max(low, 0.0)))),
            Quantity("mean KL", mean, "nats"),
            Quantity("perplexity before", perplexities[0]), Quantity("perplexity", perplexities[1])]
