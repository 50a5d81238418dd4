"""Rewrite a model in another number format or file format, and say what each tensor lost by it.

    convert("smollm2", "smollm2-q4_0.gguf", "Q4_0", embedding="Q8_0")
    convert("smollm2", "smollm2-int4", "int4/g64/fp16/min")
    convert("smollm2", "smollm2-fp16", dense="fp16")

Weights are rounded to nearest, one tensor at a time. The error of a tensor is |W' - W| against its source as stored.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from edgewise.core.checkpoint import Checkpoint, Step
from edgewise.core.errors import InvalidValueError, UnsupportedError, notice
from edgewise.core.numbers import BF16, FP16, FP32, NumberFormat, QuantFormat, quantize, round_to
from edgewise.core.report import Quantity, Report, Table
from edgewise.core.storage import LazyTensors, QuantizedTensor, Stored
from edgewise.formats.cache import Progress
from edgewise.formats.describe import format_of
from edgewise.formats.equal_shapes import equal_shapes
from edgewise.formats.folder_writer import Layout, write_folder
from edgewise.formats.ggml_blocks import READ, WRITTEN, codec, encode, type_of
from edgewise.formats.gguf import write_gguf
from edgewise.formats.gguf_writer import as_layers_of_gguf
from edgewise.formats.sources import open_checkpoint

__all__ = ["TensorError", "convert", "tensor_class"]

Float32 = NDArray[np.float32]
_PLAIN: dict[str, NumberFormat] = {"fp32": FP32, "fp16": FP16, "bf16": BF16}
_BLOCK_NAMES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
_KEPT_BYTES = 400_000_000
"""A folder's writer asks twice for each tensor. Up to this many bytes, what was rounded is kept for the second time."""
_ROWS = 4096
"""Rows whose error is summed at a time, in float64."""

_CLASSES = (
    ("table", r"(position_embeddings|token_type_embeddings|relative_attention_bias)\."),
    ("embedding", r"((embed_tokens|word_embeddings|wte)\.|^shared\.)"),
    ("head", r"(^|\.)lm_head\."),
    ("norm", r"norm"),
    ("attention", r"(self_attn|attention|attn)\."),
    ("feed-forward", r"(mlp|feed_forward|intermediate|output\.dense|densereludense)\b"),
)


@dataclass(frozen=True)
class TensorError:
    """What became of one tensor. squares: sum of squared errors; reference: sum of squared source values."""

    name: str
    shape: tuple[int, ...]
    before: str
    after: str
    bytes_before: int
    bytes_after: int
    squares: float
    reference: float
    largest: float

    @property
    def relative_rms(self) -> float:
        """Root mean square of the error over that of the source."""
        return relative_rms([self])


def relative_rms(errors: Sequence[TensorError]) -> float:
    """Of several tensors together. 0 where nothing changed, infinite where all that was there is zero."""
    squares, reference = sum(e.squares for e in errors), sum(e.reference for e in errors)
    if squares == 0:
        return 0.0
    return math.sqrt(squares / reference) if reference else math.inf


def tensor_class(name: str) -> str:
    """embedding, head, attention, feed-forward, norm, table (of positions or token types) or other."""
    return next((label for label, pattern in _CLASSES if re.search(pattern, name.lower())), "other")


def convert(source: str | os.PathLike[str] | Checkpoint, out: str | os.PathLike[str], format: str = "keep", *,
            embedding: str | None = None, dense: str | None = None, layout: Layout = "edgewise",
            overwrite: bool = False, offline: bool | None = None, progress: Progress | None = None) -> Report:
    """Write a model to `out`: a GGUF file when the name ends in .gguf, else a model folder.

    format: of every matrix; "keep", a block type of GGUF ("Q4_0", "F16"), or a QuantFormat ("int4/g32/fp16/min").
    embedding: of embedding and head, by default as the others. Norms, biases and tables of positions stay as they are.
    dense: "fp16", "bf16" or "fp32": a folder of plain tensors that hold the rounded values, for other software.
    layout: "compressed-tensors" writes a folder whose quantised weights transformers and vLLM read.
    A matrix that a format cannot hold is written as F16 (BF16 where F16 ends too early), with a notice.
    Raises InvalidValueError for a format that the file cannot hold, and what reading and writing raise.
    """
    target = Path(out)
    gguf = target.suffix.lower() == ".gguf"
    if dense is not None and (gguf or dense not in _PLAIN):
        raise InvalidValueError("dense writes a model folder in fp16, bf16 or fp32; "
                                f"given {f'the GGUF file {target}' if gguf else repr(dense)}")
    if layout not in get_args(Layout) or (layout != "edgewise" and (gguf or dense is not None)):
        raise InvalidValueError(f"the layout {layout!r} is not one of {', '.join(get_args(Layout))}" if layout not in
                                get_args(Layout) else f"the layout {layout} is of a model folder with quantised "
                                "weights; leave .gguf off the name, and dense away")
    wanted = _target(format, gguf)
    wanted_embedding = wanted if embedding is None else _target(embedding, gguf)
    if gguf and target.exists() and not overwrite:
        raise InvalidValueError(f"{target} exists; choose another name, or say overwrite (--overwrite)")
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(
        os.fspath(source), offline=offline, progress=progress)
    _refuse_own_source(checkpoint, target)

    number = None if dense is None else _PLAIN[dense]
    if gguf:  # padded first: what is padded is rounded like the rest
        checkpoint = as_layers_of_gguf(checkpoint)
    elif number is not None or layout != "edgewise":
        checkpoint = equal_shapes(checkpoint)
    work = _Conversion(checkpoint, wanted, wanted_embedding, gguf, number)
    config = {"format": format, **({"embedding": embedding} if embedding else {}),
              **({"dense": dense} if dense else {}), **({"layout": layout} if layout != "edgewise" else {})}
    changed = checkpoint.with_tensors(work.tensors(), Step("convert", config, _version()))
    started = time.perf_counter()
    if gguf:
        write_gguf(changed, target, "keep", overwrite=overwrite, progress=progress)
    else:
        write_folder(changed, target, dense=number or False, layout=layout, overwrite=overwrite, progress=progress)
    seconds = time.perf_counter() - started
    return _report(checkpoint, target, list(work.errors.values()), seconds, changed.lineage)


def _version() -> str:
    from edgewise import __version__

    return __version__


def _refuse_own_source(checkpoint: Checkpoint, out: Path) -> None:
    for file in checkpoint.files:
        if out.exists() and (os.path.samefile(file, out) or os.path.samefile(Path(file).parent, out)):
            raise InvalidValueError(f"{out} is the model that is being read; a source is never rewritten; choose "
                                    "another name")


# ---- formats ------------------------------------------------------------------------------------------------------

def _target(text: str, gguf: bool) -> str | QuantFormat:
    """"keep", a block type's name, or a QuantFormat that the file can hold."""
    asked = text.strip()
    if asked.lower() == "keep":
        return "keep"
    block = _BLOCK_NAMES.get(asked.lower(), asked.upper())
    if block in WRITTEN:
        return block
    if block in READ:
        raise UnsupportedError(f"{block} is read but not written; written are {', '.join(WRITTEN)}, and in a model "
                               "folder formats such as int4/g32/fp16/min")
    try:
        fmt = QuantFormat.parse(asked)
    except InvalidValueError as error:
        raise InvalidValueError(f"format {text!r} is not keep, a block type ({', '.join(WRITTEN)}) or a number format: "
                                f"{error}") from None
    if gguf and type_of(_rounded(np.ones((1, 32), np.float32), fmt)) is None:
        raise InvalidValueError(f"a GGUF file cannot hold {fmt}; it holds {', '.join(WRITTEN)}; leave .gguf off the "
                                "name to write a model folder")
    return fmt


def _rounded(values: Float32, fmt: QuantFormat) -> QuantizedTensor:
    codes, scales, zero = quantize(values, fmt)
    return QuantizedTensor(codes, scales, fmt, zeros=zero if fmt.zero == "int" else None,
                           minima=zero if fmt.zero == "min" else None)


class _Conversion:
    """Makes converted tensors when a writer asks for them, and remembers the error of each."""

    def __init__(self, checkpoint: Checkpoint, target: str | QuantFormat, embedding: str | QuantFormat, gguf: bool,
                 number: NumberFormat | None) -> None:
        self._source = checkpoint
        self._target = target
        self._embedding = embedding
        self._gguf = gguf
        self._number = number
        self._kept: dict[str, Stored] = {}
        self._kept_bytes = 0
        self.errors: dict[str, TensorError] = {}

    def tensors(self) -> Mapping[str, Stored]:
        def maker(name: str) -> Callable[[], Stored]:
            return lambda: self._tensor(name)

        return LazyTensors({name: maker(name) for name in self._source.tensors})

    def _tensor(self, name: str) -> Stored:
        if name in self._kept:
            return self._kept[name]
        stored = self._source.tensors[name]
        made = self._converted(name, stored)
        if name not in self.errors:
            self.errors[name] = self._error(name, stored, made)
        if made is not stored and self._kept_bytes + _held_bytes(made) <= _KEPT_BYTES:
            self._kept[name] = made
            self._kept_bytes += _held_bytes(made)
        return made

    def _converted(self, name: str, stored: Stored) -> Stored:
        kind = tensor_class(name)
        if len(stored.shape) != 2 or kind in ("table", "norm"):
            if len(stored.shape) > 2 and self._target != "keep":
                notice("fallback", f"{name} has {len(stored.shape)} dimensions and stays as it is stored",
                       where="convert")
            return stored
        target = self._embedding if kind in ("embedding", "head") else self._target
        if isinstance(target, QuantFormat):
            if isinstance(stored, QuantizedTensor) and stored.format == target:
                return stored
            made: Stored = _rounded(np.asarray(stored.dense(), np.float32), target)
            if self._gguf and type_of(made) is None:
                return self._half(name, stored, f"rows of {stored.shape[1]} values are not whole blocks of {target}")
            return made
        if target == "keep":
            if self._gguf and type_of(stored) is None:
                return self._half(name, stored, f"no block type holds {format_of(stored)}")
            return stored
        if type_of(stored) == target:
            return stored
        if stored.shape[1] % codec(target).block:
            return self._half(name, stored, f"rows of {stored.shape[1]} values are not whole blocks of {target}")
        try:
            return encode(stored.dense(), target)
        except InvalidValueError as error:
            if not np.isfinite(stored.dense()).all():
                raise
            return self._half(name, stored, str(error))

    def _half(self, name: str, stored: Stored, why: str) -> Stored:
        values = stored.dense()
        fallback = "F16" if float(np.abs(values).max(initial=0.0)) <= FP16.max_value else "BF16"
        notice("fallback", f"{name} is written as {fallback}: {why}", where="convert")
        return encode(values, fallback)

    def _error(self, name: str, stored: Stored, made: Stored) -> TensorError:
        squares = reference = largest = 0.0
        if made is not stored or self._number is not None:
            before = np.atleast_2d(stored.dense())
            after = before if made is stored else np.atleast_2d(made.dense())
            before, after = before.reshape(-1, before.shape[-1]), after.reshape(-1, after.shape[-1])
            for start in range(0, len(before), _ROWS):
                x = np.asarray(before[start:start + _ROWS], np.float64)
                y = after[start:start + _ROWS]
                error = (y if self._number is None else round_to(y, self._number)) - x
                squares += float(np.square(error).sum())
                reference += float(np.square(x).sum())
                largest = max(largest, float(np.abs(error).max(initial=0.0)))
        else:
            values = np.asarray(stored.dense(), np.float32).reshape(-1)
            reference = float(np.dot(values, values))
        after_name = format_of(made) if self._number is None else self._number.name
        nbytes = made.nbytes if self._number is None else math.prod(made.shape) * self._number.bits // 8
        return TensorError(name, made.shape, format_of(stored), after_name, stored.nbytes, nbytes, squares, reference,
                           largest)


def _held_bytes(stored: Stored) -> int:
    """What keeping a tensor costs in memory: codes are held unpacked."""
    return int(stored.codes.nbytes + stored.scales.nbytes) if isinstance(stored, QuantizedTensor) else stored.nbytes


# ---- the report ---------------------------------------------------------------------------------------------------

def _report(checkpoint: Checkpoint, out: Path, errors: Sequence[TensorError], seconds: float,
            lineage: tuple[Step, ...]) -> Report:
    weights = sum(math.prod(e.shape) for e in errors)
    before, after = sum(e.bytes_before for e in errors), sum(e.bytes_after for e in errors)
    files = [out] if out.is_file() else [file for file in out.rglob("*") if file.is_file()]
    quantities = (
        Quantity("source", checkpoint.source), Quantity("written to", str(out)),
        Quantity("parameters", weights),
        Quantity("tensor_bytes_before", before, "B"), Quantity("tensor_bytes", after, "B"),
        Quantity("bits_per_weight_before", 8 * before / weights), Quantity("bits_per_weight", 8 * after / weights),
        Quantity("storage_bytes", sum(file.stat().st_size for file in files), "B"),
        Quantity("relative_rms_error", relative_rms(errors)),
        Quantity("max_error", max(e.largest for e in errors)),
        Quantity("time", seconds, "s"))
    tables = (
        _grouped("Classes", "class", errors, lambda e: tensor_class(e.name)),
        _grouped("Layers", "layer", errors, lambda e: _layer_of(e.name)),
        Table("Tensors", ("name", "shape", "from", "to", "bytes before", "bytes", "relative RMS error", "max error"),
              tuple((e.name, "x".join(map(str, e.shape)), e.before, e.after, e.bytes_before, e.bytes_after,
                     e.relative_rms, e.largest) for e in errors)))
    return Report(f"Converted to {out.name}", quantities, tables, lineage=lineage)


def _layer_of(name: str) -> int | None:
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else None


def _grouped(title: str, column: str, errors: Sequence[TensorError], key: Callable[[TensorError], Any]) -> Table:
    groups: dict[Any, list[TensorError]] = {}
    for error in errors:
        if key(error) is not None:
            groups.setdefault(key(error), []).append(error)
    rows = []
    for label in sorted(groups):
        group = groups[label]
        formats = sorted({f"{e.before} > {e.after}" if e.before != e.after else e.after for e in group})
        rows.append((str(label), ", ".join(formats), len(group), sum(e.bytes_before for e in group),
                     sum(e.bytes_after for e in group), relative_rms(group), max(e.largest for e in group)))
    if column == "layer":
        rows.sort(key=lambda row: int(row[0]))
    return Table(title, (column, "formats", "tensors", "bytes before", "bytes", "relative RMS error", "max error"),
                 tuple(rows), ("", "", "", "B", "B", "", ""))
