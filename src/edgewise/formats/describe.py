"""What is in a model file: tensors, formats, sizes, architecture, template, licence and lineage, as a Report.

Reads headers and shapes, not weights, and works on GGUF files of any architecture and on bare safetensors files.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgewise.core.checkpoint import Checkpoint, Step
from edgewise.core.errors import UnsupportedError, notice
from edgewise.core.report import Quantity, Report, Table
from edgewise.core.storage import Blocks, Dense, Factored, InputSparse, QuantizedTensor, Sparse, Stored, Sum
from edgewise.formats.cache import Progress
from edgewise.formats.folder import read_folder
from edgewise.formats.safetensors import SafetensorsFile
from edgewise.formats.sources import resolve

__all__ = ["describe", "describe_checkpoint", "format_of"]

_LONG = 120
"""Characters of a value in the table of keys; longer ones are cut there, and end in three dots."""


@dataclass(frozen=True)
class _Tensor:
    name: str
    shape: tuple[int, ...]
    format: str
    nbytes: int

    @property
    def count(self) -> int:
        return math.prod(self.shape)


def format_of(stored: Stored) -> str:
    """A storage form in a few characters: "fp16", "Q4_1", "int4/g32/fp16/min", "rank 64 (fp16 x fp16)"."""
    if isinstance(stored, Dense):
        return stored.number.name
    if isinstance(stored, Blocks):
        return stored.codec.name
    if isinstance(stored, QuantizedTensor):
        return str(stored.format)
    if isinstance(stored, Factored):
        return f"rank {stored.left.shape[1]} ({format_of(stored.left)} x {format_of(stored.right)})"
    if isinstance(stored, Sparse):
        kept = "csr" if stored.n_m is None else f"{stored.n_m[0]}:{stored.n_m[1]}"
        return f"{kept} sparse ({format_of(stored.values)})"
    if isinstance(stored, Sum):
        return " + ".join(map(format_of, stored.parts))
    if isinstance(stored, InputSparse):
        low_rank = "" if stored.low_rank is None else f" + {format_of(stored.low_rank)}"
        return f"input-sparse {format_of(stored.weight)}{low_rank}"
    return type(stored).__name__


def describe(source: str | os.PathLike[str], *, offline: bool | None = None,
             progress: Progress | None = None) -> Report:
    """A Report on a source: a path, short name, hub repository or wheel.

    Quantities: architecture, parameters, bytes, bits per weight, context, tokenizer, template, licence. Tables:
    Formats, Groups (tensors that differ only in their layer), Tensors (each one), Configuration, and Chat template
    where there is one. Raises SourceError, FormatError or UnsupportedError.
    """
    path = resolve(source, offline=offline, progress=progress)
    if path.is_dir():
        return describe_checkpoint(read_folder(path), kind="model folder")
    if path.suffix == ".safetensors":
        return _bare_safetensors(path)
    return _gguf(path)


def describe_checkpoint(checkpoint: Checkpoint, *, kind: str = "checkpoint") -> Report:
    """A Report on a Checkpoint at hand, under its own tensor names."""
    tensors = []
    for name in checkpoint.tensors:
        stored = checkpoint.tensors[name]
        tensors.append(_Tensor(name, stored.shape, format_of(stored), stored.nbytes))
    return _report(checkpoint.source, kind, tensors, checkpoint, checkpoint.config)


def _gguf(path: Path) -> Report:
    from edgewise.formats.gguf import read_gguf  # only GGUF files need the native core
    from edgewise.formats.gguf_file import GgufShards

    shards = GgufShards.open(path)
    entries = {name: file.tensors[name] for name, file in shards.home.items()}
    tensors = [_Tensor(name, entry.shape, entry.type, entry.nbytes) for name, entry in entries.items()]
    kind = f"GGUF version {shards.files[0].header.version}"
    if len(shards.files) > 1:
        kind += f", {len(shards.files)} shards"
    keys = shards.metadata
    shown = {key: _key_text(keys, key) for key in keys}
    try:
        checkpoint: Checkpoint | None = read_gguf(path)
    except UnsupportedError as error:
        notice("info", f"only names, keys and sizes are shown: {error}", where="inspect")
        checkpoint = None
    arch, template = keys.get("general.architecture"), keys.get("tokenizer.chat_template")
    return _report(str(path), kind, tensors, checkpoint, shown, arch=arch if isinstance(arch, str) else None,
                   template=template if isinstance(template, str) else None)


def _key_text(keys: Any, key: str) -> Any:
    """A GGUF key for a table: arrays by their length, without reading them."""
    count = keys.count(key)
    return keys[key] if count == 1 else f"[{count} values]"


def _bare_safetensors(path: Path) -> Report:
    file = SafetensorsFile(path)
    notice("info", "this file holds tensors alone; the folder that it lies in may say more", where="inspect")
    tensors = [_Tensor(name, entry.shape, entry.dtype, entry.nbytes) for name, entry in file.items()]
    return _report(str(path), "safetensors file", tensors, None, {})


def _report(source: str, kind: str, tensors: Sequence[_Tensor], checkpoint: Checkpoint | None,
            keys: Mapping[str, Any], *, arch: str | None = None, template: str | None = None) -> Report:
    count, nbytes = sum(t.count for t in tensors), sum(t.nbytes for t in tensors)
    quantities = [Quantity("source", source), Quantity("file format", kind)]
    lineage: tuple[Step, ...] = ()
    if checkpoint is not None:
        arch, template, lineage = checkpoint.arch, checkpoint.metadata.get("chat_template"), checkpoint.lineage
        if checkpoint.metadata.get("name"):
            quantities.append(Quantity("name", str(checkpoint.metadata["name"])))
    quantities += [Quantity("architecture", arch or "not stated"), Quantity("tensors", len(tensors)),
                   Quantity("parameters", count), Quantity("tensor_bytes", nbytes, "B"),
                   Quantity("bits_per_weight", 8 * nbytes / count if count else None)]
    if checkpoint is not None:
        quantities += _of_model(checkpoint)
    quantities.append(Quantity("chat template", f"{len(template)} characters" if template else "none"))
    tables = [_formats(tensors), _groups(tensors),
              Table("Tensors", ("name", "shape", "format", "bytes"),
                    tuple((t.name, _shape(t.shape), t.format, t.nbytes) for t in tensors)),
              Table("Configuration", ("key", "value"),
                    tuple((key, _short(value)) for key, value in keys.items() if key != "tokenizer.chat_template"))]
    if template:
        tables.append(Table("Chat template", ("Jinja",), ((template,),)))
    if lineage:
        tables.append(Table("Lineage", ("step", "configuration", "version", "seed"), tuple(
            (step.name, ", ".join(f"{k}={v}" for k, v in step.config.items()), step.version, step.seed)
            for step in lineage)))
    return Report(f"Model {Path(source).name or source}", tuple(quantities), tuple(tables), lineage=lineage)


_NUMBERS = (
    ("context", "max_position_embeddings", "n_positions"), ("layers", "num_hidden_layers", "num_layers"),
    ("decoder layers", "num_decoder_layers", ""), ("hidden", "hidden_size", "d_model"),
    ("feed-forward", "intermediate_size", "d_ff"), ("heads", "num_attention_heads", "num_heads"),
    ("KV heads", "num_key_value_heads", ""), ("vocabulary", "vocab_size", ""))
"""What is shown, the key it has, and the key it has in T5."""


def _of_model(checkpoint: Checkpoint) -> Iterable[Quantity]:
    config, metadata = checkpoint.config, checkpoint.metadata
    for label, key, older in _NUMBERS:
        value = config.get(key, config.get(older))
        if isinstance(value, int | list):
            yield Quantity(label, value if isinstance(value, int) else ", ".join(map(str, value)))
    tokenizer = metadata.get("tokenizer")
    if tokenizer is None:
        yield Quantity("tokenizer", "none")
    elif isinstance(tokenizer, bytes):
        yield Quantity("tokenizer", f"tokenizer.json, {len(tokenizer):,} bytes")
    else:
        yield Quantity("tokenizer", f"GGUF {tokenizer.get('tokenizer.ggml.model', 'of unknown kind')}, "
                                    f"{tokenizer.get('tokenizer.ggml.pre', 'no')} pre-tokenizer")
    if "pooling" in metadata:
        yield Quantity("pooling", str(metadata["pooling"].get("mode")))
    yield Quantity("licence", str(metadata.get("licence") or "not stated"))


def _formats(tensors: Sequence[_Tensor]) -> Table:
    found: dict[str, list[_Tensor]] = {}
    for tensor in tensors:
        found.setdefault(tensor.format, []).append(tensor)
    rows = [(name, len(group), (count := sum(t.count for t in group)), (nbytes := sum(t.nbytes for t in group)),
             8 * nbytes / count if count else None) for name, group in found.items()]
    return Table("Formats", ("format", "tensors", "parameters", "bytes", "bits per weight"),
                 tuple(sorted(rows, key=lambda row: -row[3])), ("", "", "", "B", ""))


def _groups(tensors: Sequence[_Tensor]) -> Table:
    """Tensors that differ only in the number of their layer, shape and format being the same, in one row."""
    found: dict[tuple[str, tuple[int, ...], str], list[_Tensor]] = {}
    for tensor in tensors:
        name = re.sub(r"(?<=\.)\d+(?=\.)", "*", tensor.name)
        found.setdefault((name, tensor.shape, tensor.format), []).append(tensor)
    return Table("Groups", ("name", "tensors", "shape", "format", "bytes"), tuple(
        (name, len(group), _shape(shape), form, sum(t.nbytes for t in group))
        for (name, shape, form), group in found.items()), ("", "", "", "", "B"))


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _short(value: Any) -> Any:
    if isinstance(value, int | float) or value is None:
        return value
    text = str(value)
    return text if len(text) <= _LONG else text[:_LONG - 3] + "..."
