"""Writing Hugging Face model folders: whole or not at all, and never over somebody else's folder.

A folder that holds our storage forms calls itself `edgewise-<arch>`, so that software that would misread it refuses it;
a folder written with `dense`, or in the layout of compressed-tensors, is a plain one for everybody.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgewise.core.checkpoint import Checkpoint
from edgewise.core.errors import BudgetError, FormatError, InvalidValueError, SourceError, notice
from edgewise.core.numbers import BF16, FP16, FP32, NumberFormat, float32_to_bf16
from edgewise.core.shapes import LAYER_SHAPES
from edgewise.core.storage import Dense, QuantizedTensor, Stored
from edgewise.formats import compressed_tensors
from edgewise.formats.cache import Progress, folder_aside
from edgewise.formats.encodings import encodings_of
from edgewise.formats.equal_shapes import equal_shapes
from edgewise.formats.folder import CONFIG_LIMIT_BYTES, GGUF_TOKENIZER, POOLING
from edgewise.formats.hostile import read_json
from edgewise.formats.quantized_folder import Part, encode
from edgewise.formats.safetensors import nbytes_of, write_safetensors

__all__ = ["Layout", "check_target", "write_folder"]

Layout = Literal["edgewise", "compressed-tensors"]
"""Whose entries hold quantised weights."""
_DTYPE = {FP32: ("F32", "float32"), FP16: ("F16", "float16"), BF16: ("BF16", "bfloat16")}
_OURS = re.compile(
    r"config\.json|generation_config\.json|tokenizer\.json|tokenizer_gguf\.json|tokenizer_config\.json|"
    r"chat_template\.jinja|modules\.json|1_Pooling|sentence_bert_config\.json|"
    r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|fit\.json|fit\.svg|"
    r"encodings\.json")
"""What write_folder writes, and the reports beside it, and so may replace."""


@dataclass(frozen=True)
class _Shape:
    dtype: str
    shape: tuple[int, ...]
    owner: str

    @property
    def nbytes(self) -> int:
        return nbytes_of(self.dtype, self.shape)


def write_folder(checkpoint: Checkpoint, path: str | Path, *, dense: bool | NumberFormat = False,
                 layout: Layout = "edgewise", max_shard_bytes: int = 4_000_000_000, overwrite: bool = False,
                 progress: Progress | None = None) -> Path:
    """Write a checkpoint as a model folder, whole or not at all, and return its path.

    dense: False keeps every tensor as it is stored; FP16, BF16 or FP32 (True) writes plain tensors that any reader of
    safetensors loads. layout "compressed-tensors" writes quantised weights as transformers and vLLM read them, and as
    fp16 what that layout cannot hold (minima, GGUF blocks, quantised embeddings). Both are for other software, so that
    layers of unequal shapes are padded with zeros.
    Each tensor of the checkpoint is made several times, for its sizes and for its bytes.
    A folder that edgewise wrote is replaced; any other only with overwrite, and never one with files we do not know.
    """
    folder = Path(os.path.abspath(path))
    number = FP32 if dense is True else dense if isinstance(dense, NumberFormat) else None
    if number is not None and number not in _DTYPE:
        raise InvalidValueError(f"a dense folder is written as fp32, fp16 or bf16; given {number}")
    replace = check_target(folder, overwrite=overwrite)
    if number is not None or layout != "edgewise":
        checkpoint = equal_shapes(checkpoint)
    formats: dict[str, Any] = {}
    plan: dict[str, _Shape] = {}
    for name in checkpoint.tensors:
        description, parts = _encoded(checkpoint, name, number, layout)
        if description["storage"] != "dense":
            formats[name] = description
        for part, content in parts.items():
            if part in plan:
                raise InvalidValueError(f"two tensors would be stored as {part!r}: {plan[part].owner!r} and {name!r}")
            plan[part] = _Shape(content.dtype, tuple(content.values.shape), name)
    if layout != "edgewise":
        _say_widened(checkpoint, formats, folder)
    total = sum(part.nbytes for part in plan.values())
    _check_space(folder, total)
    try:
        with folder_aside(folder, replace=replace) as aside:
            # Other software maps its integers in place, so that there the widest come first throughout.
            together = formats if layout == "edgewise" else {}
            _write_tensors(aside, _shards(plan, together, max_shard_bytes),
                           lambda name: _encoded(checkpoint, name, number, layout)[1], total, progress)
            _write_json(aside / "config.json", _config_of(checkpoint, formats, number, plan, layout))
            _write_metadata(checkpoint.metadata, aside, str(folder))
            if number is None and "activations" in (checkpoint.config.get("quantization_config") or {}):
                (aside / "encodings.json").write_text(json.dumps(encodings_of(checkpoint)) + "\n", encoding="utf-8")
    except OSError as error:
        raise InvalidValueError(f"cannot write the folder {folder}: {os.strerror(error.errno or 0)}") from error
    return folder


def check_target(path: str | Path, *, overwrite: bool = False) -> bool:
    """Whether a folder is there that write_folder would replace. Raises InvalidValueError where it would refuse."""
    folder = Path(os.path.abspath(path))
    if not os.path.lexists(folder):
        return False
    if not folder.is_dir() or folder.is_symlink():
        raise InvalidValueError(f"{folder} exists and is not a folder; choose another name")
    present = sorted(path.name for path in folder.iterdir() if not path.name.endswith(".part"))
    if not present:
        return True
    foreign = [name for name in present if not _OURS.fullmatch(name)]
    if foreign:
        raise InvalidValueError(f"{folder} holds files that edgewise did not write ({', '.join(foreign[:3])}); "
                                "choose another folder, or remove them yourself")
    if not overwrite and not _is_ours(folder):
        raise InvalidValueError(f"{folder} holds a model that edgewise did not write; choose another folder, "
                                "or ask for it to be overwritten")
    return True


def _is_ours(folder: Path) -> bool:
    try:
        return isinstance(read_json(folder / "config.json", CONFIG_LIMIT_BYTES).get("edgewise"), dict)
    except (SourceError, FormatError):
        return False


def _check_space(folder: Path, needed: int) -> None:
    parent = next(parent for parent in folder.parents if parent.exists())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise BudgetError(f"writing {folder} takes {needed} bytes and {parent} has {free} free; nothing was written")


def _encoded(checkpoint: Checkpoint, name: str, number: NumberFormat | None,
             layout: Layout) -> tuple[dict[str, Any], dict[str, Part]]:
    tensor = checkpoint.tensors[name]
    if number is not None:
        return {"storage": "dense"}, {name: Part(_DTYPE[number][0], _as_number(tensor, number, name))}
    if layout == "edgewise" or isinstance(tensor, Dense):
        return encode(tensor, name)
    # An embedding is looked up, and compressed-tensors quantises what is multiplied.
    if isinstance(tensor, QuantizedTensor) and "embed" not in name:
        made = compressed_tensors.parts_of(tensor, name)
        if made is not None:
            return {"storage": layout, "format": made[0]}, made[1]
    return {"storage": "dense"}, {name: Part("F16", _as_number(tensor, FP16, name))}


def _say_widened(checkpoint: Checkpoint, formats: Mapping[str, Any], folder: Path) -> None:
    widened = [name for name in checkpoint.tensors
               if name not in formats and not isinstance(checkpoint.tensors[name], Dense)]
    if widened:
        notice("fallback", f"{len(widened)} weights are written as fp16, which compressed-tensors has no other form "
               f"for: {', '.join(widened[:3])}{', ...' if len(widened) > 3 else ''}", where=str(folder))


def _as_number(tensor: Stored, number: NumberFormat, name: str) -> NDArray[Any]:
    if isinstance(tensor, Dense) and tensor.number == number:
        return tensor.data
    values = tensor.dense()
    if number == BF16:
        return float32_to_bf16(values)
    if number == FP16:
        beyond = int(np.count_nonzero(np.isfinite(values) & (np.abs(values) > 65504)))
        if beyond:
            notice("clamp", f"{beyond} values of {name} are beyond fp16 and become 65504 in size; use fp32 or bf16")
        with np.errstate(over="ignore"):
            return np.where(np.isfinite(values), np.clip(values, -65504, 65504), values).astype(np.float16)
    return values


def _shards(plan: Mapping[str, _Shape], formats: Mapping[str, Any], limit: int) -> list[dict[str, _Shape]]:
    """Dense tensors first, the widest first, so that they are aligned; then the parts of each tensor side by side."""
    if limit < 1:
        raise InvalidValueError(f"max_shard_bytes must be positive; given {limit}")
    order = sorted((name for name, part in plan.items() if part.owner not in formats),
                   key=lambda name: (-nbytes_of(plan[name].dtype, (1,)), name))
    order += [name for name, part in plan.items() if part.owner in formats]
    shards: list[dict[str, _Shape]] = [{}]
    used = 0
    for name in order:
        if shards[-1] and used + plan[name].nbytes > limit:
            shards.append({})
            used = 0
        shards[-1][name] = plan[name]
        used += plan[name].nbytes
    return shards


def _write_tensors(folder: Path, shards: list[dict[str, _Shape]], parts_of: Callable[[str], dict[str, Part]],
                   total: int, progress: Progress | None) -> None:
    made: tuple[str, dict[str, Part]] = ("", {})

    def values_of(part: str, owner: str) -> NDArray[Any]:
        nonlocal made
        if made[0] != owner:
            made = (owner, parts_of(owner))
        return made[1][part].values

    weight_map: dict[str, str] = {}
    before = 0
    for index, shard in enumerate(shards):
        file = "model.safetensors" if len(shards) == 1 else f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        weight_map.update(dict.fromkeys(shard, file))
        written = before

        def report(what: str, done: int, _: int, written: int = written) -> None:
            if progress is not None:
                progress(what, written + done, total)

        write_safetensors(folder / file, {name: (part.dtype, part.shape) for name, part in shard.items()},
                          lambda name, shard=shard: values_of(name, shard[name].owner),  # type: ignore[misc]
                          metadata={"format": "pt"}, progress=report)
        before += sum(part.nbytes for part in shard.values())
    if len(shards) > 1:
        _write_json(folder / "model.safetensors.index.json",
                    {"metadata": {"total_size": total}, "weight_map": weight_map})


def _config_of(checkpoint: Checkpoint, formats: Mapping[str, Any], number: NumberFormat | None,
               plan: Mapping[str, _Shape], layout: Layout) -> dict[str, Any]:
    config = {key: value for key, value in checkpoint.config.items() if key not in ("edgewise", "quantization_config")}
    config["model_type"] = checkpoint.arch
    generates = "model.embed_tokens.weight" in checkpoint.tensors
    if generates and "lm_head.weight" not in checkpoint.tensors:
        config["tie_word_embeddings"] = True
    widest = max((part.dtype for part in plan.values() if part.owner not in formats and part.dtype in
                  ("F32", "F16", "BF16")), key=("F16", "BF16", "F32").index, default="F32")
    stored = next(text for dtype, text in _DTYPE.values() if dtype == widest)
    config["torch_dtype"] = stored if number is None else _DTYPE[number][1]
    config.pop("dtype", None)  # the newer name of torch_dtype; two that differ would be a riddle
    ours: dict[str, Any] = {"arch": checkpoint.arch, "lineage": [step.to_json() for step in checkpoint.lineage]}
    if "architectures" in config:
        ours["architectures"] = config["architectures"]
    run = checkpoint.config.get("quantization_config") or {}
    if run and (number is not None or layout != "edgewise"):
        notice("ignored", f"a plain folder does not say how to round while running: {', '.join(run)} are left out",
               where="config.json")
        run = {}
    if layout == "compressed-tensors" and number is None:
        config["quantization_config"] = compressed_tensors.described(
            checkpoint, {name: item["format"] for name, item in formats.items()})
    elif formats or run or config.get(LAYER_SHAPES) is not None:
        role = "ForCausalLM" if generates else "Model"
        named: Iterable[str] = config.get("architectures") or [checkpoint.arch.title().replace("_", "") + role]
        config["architectures"] = [f"Edgewise{name}" for name in named]
        config["model_type"] = f"edgewise-{checkpoint.arch}"
        if formats or run:
            config["quantization_config"] = {"quant_method": "edgewise", "version": 1, "formats": dict(formats),
                                             **run}
    config["edgewise"] = ours
    return config


def _write_metadata(metadata: Mapping[str, Any], folder: Path, where: str) -> None:
    tokenizer = metadata.get("tokenizer")
    if isinstance(tokenizer, bytes):
        (folder / "tokenizer.json").write_bytes(tokenizer)
    elif tokenizer is not None:
        notice("info", f"the tokenizer is kept as GGUF describes it, in {GGUF_TOKENIZER}, which only edgewise reads",
               where=where)
        _write_json(folder / GGUF_TOKENIZER, tokenizer)
    template = metadata.get("chat_template")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    tokenizer_config = dict(metadata.get("tokenizer_config", {}))
    tokenizer_config.pop("chat_template", None)  # it has its own file
    if tokenizer_config:
        _write_json(folder / "tokenizer_config.json", tokenizer_config)
    if metadata.get("generation"):
        _write_json(folder / "generation_config.json", metadata["generation"])
    if "pooling" in metadata:
        _write_pooling(metadata["pooling"], folder)
    known = {"tokenizer", "tokenizer_config", "chat_template", "generation", "pooling"}
    if kept := {key: metadata[key] for key in ("name", "licence") if key in metadata}:
        known |= kept.keys()
        config = json.loads((folder / "config.json").read_text("utf-8"))
        config["edgewise"].update(kept)
        _write_json(folder / "config.json", config)
    if dropped := sorted(metadata.keys() - known):
        notice("ignored", f"a model folder has no place for the metadata {', '.join(dropped)}", where=where)


def _write_pooling(pooling: Mapping[str, Any], folder: Path) -> None:
    package = "sentence_transformers.models"
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling")] + [("2_Normalize", "Normalize")] * pooling["normalize"]
    _write_json(folder / "modules.json", [
        {"idx": index, "name": str(index), "path": path, "type": f"{package}.{kind}"}
        for index, (path, kind) in enumerate(kinds)])
    modes = pooling["mode"].split("+")
    if unknown := set(modes) - POOLING.keys():
        raise InvalidValueError(f"pooling {sorted(unknown)} is not one of {', '.join(POOLING)}")
    (folder / "1_Pooling").mkdir()
    width = json.loads((folder / "config.json").read_text("utf-8")).get("hidden_size")
    _write_json(folder / "1_Pooling" / "config.json", {
        "word_embedding_dimension": width,
        **{f"pooling_mode_{key}": mode in modes for mode, key in POOLING.items()}})
    if "max_tokens" in pooling:
        _write_json(folder / "sentence_bert_config.json",
                    {"max_seq_length": pooling["max_tokens"], "do_lower_case": False})


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, default=_plain) + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    """NumPy values as Python ones; what JSON cannot say is our own mistake."""
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, bytes):
        return value.decode("utf-8")
    raise TypeError(f"{type(value).__name__} has no JSON form")
