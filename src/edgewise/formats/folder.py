"""Hugging Face model folders: config.json, model.safetensors, tokenizer.json, generation_config.json, chat template.

What is read here is untrusted. Beside our own storage forms, those of GPTQ, AWQ and compressed-tensors are read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from edgewise.core.checkpoint import Checkpoint, Step
from edgewise.core.errors import FormatError, InvalidValueError, SourceError, UnsupportedError, notice
from edgewise.core.storage import BlockCodec, LazyTensors, Stored
from edgewise.formats.foreign import read_foreign
from edgewise.formats.hostile import parse_json, read_json, read_small
from edgewise.formats.quantized_folder import decode, part_names
from edgewise.formats.safetensors import TensorFiles, open_tensors

__all__ = ["is_model_folder", "read_folder"]

TOKENIZER_LIMIT_BYTES = 60_000_000
_TOKENIZER_COMMAS = 2_000_000
_TEXT_LIMIT_BYTES = 4_000_000
CONFIG_LIMIT_BYTES = 16_000_000
GGUF_TOKENIZER = "tokenizer_gguf.json"
_STORAGE_KEYS = ("quant_method", "version", "formats")
"""Of quantization_config: how tensors are stored. The other keys, how the model is run, stay in the configuration."""
POOLING = {"cls": "cls_token", "max": "max_tokens", "mean": "mean_tokens", "mean_sqrt_len": "mean_sqrt_len_tokens",
           "weighted_mean": "weightedmean_tokens", "last": "lasttoken"}
"""Our name of a pooling -> its name in sentence-transformers, after "pooling_mode_"."""
_BUFFERS = re.compile(r"(^|\.)(position_ids|inv_freq|masked_bias|attn\.bias|token_type_ids|num_batches_tracked)$")
"""Constants that older checkpoints carry along and every implementation computes itself."""


def is_model_folder(path: str | Path) -> bool:
    """Whether a directory has a config.json."""
    return (Path(path) / "config.json").is_file()


def read_folder(path: str | Path) -> Checkpoint:
    """A model folder as a Checkpoint with lazy tensors. Folders that edgewise wrote come back to the bit.

    Weights that GPTQ or AWQ tools or compressed-tensors quantised are read as they are, too.

    metadata: "tokenizer" (bytes of tokenizer.json), "tokenizer_config", "chat_template", "generation", "name",
    "licence", and of sentence encoders "pooling": {"mode": "mean", "normalize": True, "max_tokens": 256}.
    config["tie_word_embeddings"] is always there.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise SourceError(f"{folder} is not a folder; expected one with config.json and model.safetensors")
    if not is_model_folder(folder):
        raise SourceError(f"{folder} has no config.json; expected a Hugging Face model folder")
    config = read_json(folder / "config.json", CONFIG_LIMIT_BYTES)
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
    if isinstance(quantization, dict) and quantization.get("quant_method") != "edgewise":
        foreign = read_foreign(quantization, files, folder)
        makers, parts = foreign.makers, foreign.parts
    else:
        makers, parts = _quantised(_formats_of(quantization, folder), files, folder)
        if run := {key: value for key, value in (quantization or {}).items() if key not in _STORAGE_KEYS}:
            config["quantization_config"] = run
    tensors = _tensors_of(files, makers, parts, folder)
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
    if not isinstance(quantization, dict):
        raise FormatError("'quantization_config' must be an object", path=where)
    if quantization.get("version") != 1:
        raise UnsupportedError(f"{where}: written by a newer edgewise (storage version {quantization.get('version')}); "
                               "this one reads version 1; upgrade edgewise")
    formats = quantization.get("formats")
    if not isinstance(formats, dict):
        raise FormatError("quantization_config.formats must be an object", path=where)
    return formats


def _quantised(formats: Mapping[str, Any], files: TensorFiles,
               folder: Path) -> tuple[dict[str, Callable[[], Stored]], set[str]]:
    """Makers of the tensors that `formats` describes, and the entries that they are made of."""
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
    return makers, parts


def _tensors_of(files: TensorFiles, makers: Mapping[str, Callable[[], Stored]], parts: set[str],
                folder: Path) -> LazyTensors:
    makers = dict(makers)
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
    elif (folder / GGUF_TOKENIZER).exists():
        metadata["tokenizer"] = parse_json(read_small(folder / GGUF_TOKENIZER, TOKENIZER_LIMIT_BYTES),
                                           path=folder / GGUF_TOKENIZER, commas=_TOKENIZER_COMMAS)
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
            modes = [mode for mode, key in POOLING.items() if given.get(f"pooling_mode_{key}") is True]
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
    name = {key.removesuffix("_tokens").removesuffix("_token"): mode for mode, key in POOLING.items()}.get(
        str(given.get("pooling_mode")), "")
    if not name:
        notice("fallback", "the pooling configuration names no known pooling; the mean is used", where=str(folder))
    return name or "mean"
