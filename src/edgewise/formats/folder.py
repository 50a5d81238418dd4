"""Hugging Face model folders: config.json, model.safetensors, tokenizer.json, generation_config.json, chat template.

What is read here is untrusted; what is written appears whole or not at all, and never over somebody else's folder.
A folder that holds our storage forms calls itself `edgewise-<arch>`, so that software that would misread it refuses it;
a folder written with `dense` is a plain one for everybody.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgewise.core.checkpoint import Checkpoint, Step
from edgewise.core.errors import BudgetError, FormatError, InvalidValueError, SourceError, UnsupportedError, notice
from edgewise.core.numbers import BF16, FP16, FP32, NumberFormat, float32_to_bf16
from edgewise.core.storage import BlockCodec, Dense, LazyTensors, Stored
from edgewise.formats.cache import Progress, folder_aside
from edgewise.formats.hostile import parse_json, read_json, read_small
from edgewise.formats.quantized_folder import Part, decode, encode, part_names
from edgewise.formats.safetensors import TensorFiles, nbytes_of, open_tensors, write_safetensors

__all__ = ["check_target", "is_model_folder", "read_folder", "write_folder"]

TOKENIZER_LIMIT_BYTES = 60_000_000
_TOKENIZER_COMMAS = 2_000_000
_TEXT_LIMIT_BYTES = 4_000_000
_CONFIG_LIMIT_BYTES = 16_000_000
_GGUF_TOKENIZER = "tokenizer_gguf.json"
_STORAGE_KEYS = ("quant_method", "version", "formats")
"""Of quantization_config: how tensors are stored. The other keys, how the model is run, stay in the configuration."""
_DTYPE = {FP32: ("F32", "float32"), FP16: ("F16", "float16"), BF16: ("BF16", "bfloat16")}
_POOLING = {"cls": "cls_token", "max": "max_tokens", "mean": "mean_tokens", "mean_sqrt_len": "mean_sqrt_len_tokens",
            "weighted_mean": "weightedmean_tokens", "last": "lasttoken"}
"""Our name of a pooling -> its name in sentence-transformers, after "pooling_mode_"."""
_BUFFERS = re.compile(r"(^|\.)(position_ids|inv_freq|masked_bias|attn\.bias|token_type_ids|num_batches_tracked)$")
"""Constants that older checkpoints carry along and every implementation computes itself."""
_OURS = re.compile(
    r"config\.json|generation_config\.json|tokenizer\.json|tokenizer_gguf\.json|tokenizer_config\.json|"
    r"chat_template\.jinja|modules\.json|1_Pooling|sentence_bert_config\.json|"
    r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|fit\.json|fit\.svg")
"""What write_folder writes, and the reports beside it, and so may replace."""


def is_model_folder(path: str | Path) -> bool:
    """Whether a directory has a config.json."""
    return (Path(path) / "config.json").is_file()


def read_folder(path: str | Path) -> Checkpoint:
    """A model folder as a Checkpoint with lazy tensors. Folders that edgewise wrote come back to the bit.

    metadata: "tokenizer" (bytes of tokenizer.json), "tokenizer_config", "chat_template", "generation", "name",
    "licence", and of sentence encoders "pooling": {"mode": "mean", "normalize": True, "max_tokens": 256}.
    config["tie_word_embeddings"] is always there.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise SourceError(f"{folder} is not a folder; expected one with config.json and model.safetensors")
    if not is_model_folder(folder):
        raise SourceError(f"{folder} has no config.json; expected a Hugging Face model folder")
    config = read_json(folder / "config.json", _CONFIG_LIMIT_BYTES)
    ours = config.pop("edgewise", {})
    quantization = config.pop("quantization_config", None)
    if not isinstance(ours, dict):
        raise FormatError("'edgewise' must be an object", path=folder / "config.json")
    arch = ours.get("arch", config.get("model_type"))
    if not isinstance(arch, str) or not arch:
        raise FormatError("config.json has no 'model_type' that names the architecture", path=folder / "config.json")
    if ours:
        config["model_type"] = arch
        config["architectures"] = ours.get("architectures", config.get("architectures"))
        if config["architectures"] is None:
            del config["architectures"]
    files = open_tensors(folder)
    formats = _formats_of(quantization, folder)
    if run := {key: value for key, value in (quantization or {}).items() if key not in _STORAGE_KEYS}:
        config["quantization_config"] = run
    tensors = _tensors_of(files, formats, folder)
    config.setdefault("tie_word_embeddings", "lm_head.weight" not in tensors)
    try:
        lineage = tuple(Step.from_json(step) for step in ours.get("lineage", ()))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise FormatError(f"'edgewise.lineage' is malformed: {error!r}", path=folder / "config.json") from None
    return Checkpoint(arch, config, tensors, _metadata_of(folder, config, ours), lineage, str(folder), files.files)


def _formats_of(quantization: Any, folder: Path) -> dict[str, Any]:
    if quantization is None:
        return {}
    where = folder / "config.json"
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method != "edgewise":
        raise UnsupportedError(
            f"{where}: the weights are quantised by {str(method)[:60]!r}, which edgewise does not read; "
            "take the unquantised model, or its GGUF, and let `edgewise fit` shrink it")
    if quantization.get("version") != 1:
        raise UnsupportedError(f"{where}: written by a newer edgewise (storage version {quantization.get('version')}); "
                               "this one reads version 1; upgrade edgewise")
    formats = quantization.get("formats")
    if not isinstance(formats, dict):
        raise FormatError("quantization_config.formats must be an object", path=where)
    return formats


def _tensors_of(files: TensorFiles, formats: Mapping[str, Any], folder: Path) -> LazyTensors:
    parts: set[str] = set()
    makers: dict[str, Callable[[], Stored]] = {}
    for name, description in formats.items():
        try:
            needed = part_names(name, description)
        except (InvalidValueError, RecursionError) as error:
            raise FormatError(str(error), path=folder / "config.json", tensor=name[:200]) from None
        missing = [part for part in needed if part not in files]
        if missing:
            raise FormatError(f"entry {missing[0]!r} is missing from the safetensors files", path=folder, tensor=name)
        parts.update(needed)
        makers[name] = _decoder(name, description, files)
    skipped: list[str] = []
    for name, entry in files.items():
        if name in parts:
            continue
        if entry.dtype in ("F32", "F16", "BF16", "F64"):
            makers[name] = _denser(name, files)
        elif _BUFFERS.search(name):
            notice("info", f"the constant {name} is not needed and not read", where=str(folder))
        else:
            skipped.append(f"{name} ({entry.dtype})")
    if skipped:
        notice("ignored", f"{len(skipped)} tensors are not of a float type and not described by config.json: "
                          f"{', '.join(skipped[:3])}{', ...' if len(skipped) > 3 else ''}", where=str(folder))
    return LazyTensors(makers)


def _denser(name: str, files: TensorFiles) -> Callable[[], Stored]:
    return lambda: files.dense(name)


def _decoder(name: str, description: Mapping[str, Any], files: TensorFiles) -> Callable[[], Stored]:
    return lambda: decode(name, description, files, _codec_of)


def _codec_of(name: str) -> BlockCodec:
    from edgewise.formats.ggml_blocks import codec  # only folders with GGUF blocks need the native core

    return codec(name)


def _metadata_of(folder: Path, config: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    metadata: dict[str, Any] = {"name": str(ours.get("name") or config.get("_name_or_path") or folder.resolve().name)}
    if "licence" in ours:
        metadata["licence"] = str(ours["licence"])
    if (folder / "tokenizer.json").exists():
        metadata["tokenizer"] = read_small(folder / "tokenizer.json", TOKENIZER_LIMIT_BYTES)
    elif (folder / _GGUF_TOKENIZER).exists():
        metadata["tokenizer"] = parse_json(read_small(folder / _GGUF_TOKENIZER, TOKENIZER_LIMIT_BYTES),
                                           path=folder / _GGUF_TOKENIZER, commas=_TOKENIZER_COMMAS)
    if (folder / "tokenizer_config.json").exists():
        metadata["tokenizer_config"] = read_json(folder / "tokenizer_config.json")
    template = _chat_template(folder, metadata.get("tokenizer_config", {}))
    if template is not None:
        metadata["chat_template"] = template
    if (folder / "generation_config.json").exists():
        metadata["generation"] = read_json(folder / "generation_config.json")
    else:
        known = ("bos_token_id", "eos_token_id", "pad_token_id")
        metadata["generation"] = {key: config[key] for key in known if config.get(key) is not None}
    pooling = _pooling_of(folder)
    if pooling is not None:
        metadata["pooling"] = pooling
    with suppress(SourceError, FormatError):  # a README is prose; only its licence line is of use
        front = re.match(rb"---\s*\n(.*?)\n---", read_small(folder / "README.md", _TEXT_LIMIT_BYTES), re.DOTALL)
        licence = re.search(rb"(?m)^license:\s*([\w.+-]{1,60})\s*$", front.group(1)) if front else None
        if licence:
            metadata["licence"] = licence.group(1).decode("ascii", "replace")
    return metadata


def _chat_template(folder: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    """The Jinja source: chat_template.jinja, else chat_template.json, else the one in tokenizer_config.json."""
    plain, wrapped = folder / "chat_template.jinja", folder / "chat_template.json"
    template: Any
    if plain.exists():
        try:
            return read_small(plain, _TEXT_LIMIT_BYTES).decode("utf-8")
        except UnicodeDecodeError as error:
            raise FormatError("the chat template is not UTF-8", path=plain, offset=error.start) from None
    where = wrapped if wrapped.exists() else folder / "tokenizer_config.json"
    template = (read_json(wrapped) if wrapped.exists() else tokenizer_config).get("chat_template")
    if isinstance(template, list):
        named = {str(item.get("name")): item.get("template") for item in template if isinstance(item, dict)}
        chosen = "default" if "default" in named else next(iter(named), "")
        if len(named) > 1:
            notice("ignored", f"of the chat templates {', '.join(named)[:120]} only {chosen!r} is used",
                   where=str(where))
        template = named.get(chosen)
    if template is not None and not isinstance(template, str):
        raise FormatError("chat_template must be a text or a list of named texts", path=where)
    return template


def _pooling_of(folder: Path) -> dict[str, Any] | None:
    """How a sentence encoder makes one vector of many: modules.json and what it points to."""
    if not (folder / "modules.json").exists():
        return None
    modules = parse_json(read_small(folder / "modules.json", _TEXT_LIMIT_BYTES), path=folder / "modules.json")
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise FormatError("expected a list of modules", path=folder / "modules.json")
    pooling: dict[str, Any] = {"mode": "mean", "normalize": False}
    for module in modules:
        kind, place = str(module.get("type", "")).rsplit(".", 1)[-1], str(module.get("path", ""))
        if kind == "Pooling":
            if not re.fullmatch(r"\w[\w.-]*", place):
                raise FormatError(f"module path {place[:80]!r} is not a plain folder name",
                                  path=folder / "modules.json")
            given = read_json(folder / place / "config.json")
            modes = [mode for mode, key in _POOLING.items() if given.get(f"pooling_mode_{key}") is True]
            pooling["mode"] = "+".join(modes) or _named_pooling(given, folder)
        elif kind == "Normalize":
            pooling["normalize"] = True
        elif kind != "Transformer":
            notice("ignored", f"the module {kind[:60]!r} after the encoder is not applied", where=str(folder))
    if (folder / "sentence_bert_config.json").exists():
        length = read_json(folder / "sentence_bert_config.json").get("max_seq_length")
        if type(length) is int and length > 0:
            pooling["max_tokens"] = length
    return pooling


def _named_pooling(given: Mapping[str, Any], folder: Path) -> str:
    """The pooling of a configuration that has none of the switches, but may name it (a newer form)."""
    name = {key.removesuffix("_tokens").removesuffix("_token"): mode for mode, key in _POOLING.items()}.get(
        str(given.get("pooling_mode")), "")
    if not name:
        notice("fallback", "the pooling configuration names no known pooling; the mean is used", where=str(folder))
    return name or "mean"


@dataclass(frozen=True)
class _Shape:
    dtype: str
    shape: tuple[int, ...]
    owner: str

    @property
    def nbytes(self) -> int:
        return nbytes_of(self.dtype, self.shape)


def write_folder(checkpoint: Checkpoint, path: str | Path, *, dense: bool | NumberFormat = False,
                 max_shard_bytes: int = 4_000_000_000, overwrite: bool = False,
                 progress: Progress | None = None) -> Path:
    """Write a checkpoint as a model folder, whole or not at all, and return its path.

    dense: False keeps every tensor as it is stored; FP16, BF16 or FP32 (True) writes plain tensors that any reader of
    safetensors loads. Each tensor of the checkpoint is made twice, once for its sizes and once for its bytes.
    A folder that edgewise wrote is replaced; any other only with overwrite, and never one with files we do not know.
    """
    folder = Path(os.path.abspath(path))
    number = FP32 if dense is True else dense if isinstance(dense, NumberFormat) else None
    if number is not None and number not in _DTYPE:
        raise InvalidValueError(f"a dense folder is written as fp32, fp16 or bf16; given {number}")
    replace = check_target(folder, overwrite=overwrite)
    formats: dict[str, Any] = {}
    plan: dict[str, _Shape] = {}
    for name in checkpoint.tensors:
        description, parts = _encoded(checkpoint, name, number)
        if description["storage"] != "dense":
            formats[name] = description
        for part, content in parts.items():
            if part in plan:
                raise InvalidValueError(f"two tensors would be stored as {part!r}: {plan[part].owner!r} and {name!r}")
            plan[part] = _Shape(content.dtype, tuple(content.values.shape), name)
    total = sum(part.nbytes for part in plan.values())
    _check_space(folder, total)
    try:
        with folder_aside(folder, replace=replace) as aside:
            _write_tensors(checkpoint, aside, _shards(plan, formats, max_shard_bytes), number, total, progress)
            _write_json(aside / "config.json", _config_of(checkpoint, formats, number, plan))
            _write_metadata(checkpoint.metadata, aside, str(folder))
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
        return isinstance(read_json(folder / "config.json", _CONFIG_LIMIT_BYTES).get("edgewise"), dict)
    except (SourceError, FormatError):
        return False


def _check_space(folder: Path, needed: int) -> None:
    parent = next(parent for parent in folder.parents if parent.exists())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise BudgetError(f"writing {folder} takes {needed} bytes and {parent} has {free} free; nothing was written")


def _encoded(checkpoint: Checkpoint, name: str, number: NumberFormat | None) -> tuple[dict[str, Any], dict[str, Part]]:
    tensor = checkpoint.tensors[name]
    if number is None:
        return encode(tensor, name)
    return {"storage": "dense"}, {name: Part(_DTYPE[number][0], _as_number(tensor, number, name))}


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


def _write_tensors(checkpoint: Checkpoint, folder: Path, shards: list[dict[str, _Shape]],
                   number: NumberFormat | None, total: int, progress: Progress | None) -> None:
    made: tuple[str, dict[str, Part]] = ("", {})

    def values_of(part: str, owner: str) -> NDArray[Any]:
        nonlocal made
        if made[0] != owner:
            made = (owner, _encoded(checkpoint, owner, number)[1])
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
               plan: Mapping[str, _Shape]) -> dict[str, Any]:
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
    if run and number is not None:
        notice("ignored", f"a plain folder does not say how to round while running: {', '.join(run)} are left out",
               where="config.json")
        run = {}
    if formats or run:
        role = "ForCausalLM" if generates else "Model"
        named: Iterable[str] = config.get("architectures") or [checkpoint.arch.title().replace("_", "") + role]
        config["architectures"] = [f"Edgewise{name}" for name in named]
        config["model_type"] = f"edgewise-{checkpoint.arch}"
        config["quantization_config"] = {"quant_method": "edgewise", "version": 1, "formats": dict(formats), **run}
    config["edgewise"] = ours
    return config


def _write_metadata(metadata: Mapping[str, Any], folder: Path, where: str) -> None:
    tokenizer = metadata.get("tokenizer")
    if isinstance(tokenizer, bytes):
        (folder / "tokenizer.json").write_bytes(tokenizer)
    elif tokenizer is not None:
        notice("info", f"the tokenizer is kept as GGUF describes it, in {_GGUF_TOKENIZER}, which only edgewise reads",
               where=where)
        _write_json(folder / _GGUF_TOKENIZER, tokenizer)
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
    if unknown := set(modes) - _POOLING.keys():
        raise InvalidValueError(f"pooling {sorted(unknown)} is not one of {', '.join(_POOLING)}")
    (folder / "1_Pooling").mkdir()
    width = json.loads((folder / "config.json").read_text("utf-8")).get("hidden_size")
    _write_json(folder / "1_Pooling" / "config.json", {
        "word_embedding_dimension": width,
        **{f"pooling_mode_{key}": mode in modes for mode, key in _POOLING.items()}})
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
