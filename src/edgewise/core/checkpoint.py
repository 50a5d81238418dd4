"""A model at rest: architecture name, configuration, tensors, and everything needed to talk to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field, replace
from typing import Any

from edgewise.core.storage import Stored
from edgewise.core.values import dataclass

__all__ = ["Checkpoint", "Step"]


@dataclass(frozen=True)
class Step:
    """One step of a checkpoint's history: what was done, with which configuration, version and seed."""

    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    version: str = ""
    seed: int | None = None

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "config": dict(self.config), "version": self.version, "seed": self.seed}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Step:
        return cls(data["name"], dict(data.get("config", {})), data.get("version", ""), data.get("seed"))


@dataclass(frozen=True, repr=False)
class Checkpoint:
    """Immutable. Tensor names, layouts and configuration keys are Hugging Face's, whatever file it came from.

    arch: the `model_type` of transformers ("llama", "bert", ...).
    config: keys of config.json (`hidden_size`, `num_attention_heads`, ...).
    tensors: lazy; a linear weight is (out, in); rotary layout is rotate-half.
    metadata:
        "tokenizer": bytes of tokenizer.json, or a mapping of GGUF's tokenizer.* keys, or absent
        "chat_template": Jinja source, or absent
        "generation": keys of generation_config.json (eos_token_id: int or list, bos_token_id, ...)
        "licence", "name": strings, when the file says so
    lineage: every step since the original file.
    source: where it was read from, for messages.
    files: the paths that hold its tensors, for hashing and caching.
    """

    arch: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Stored]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    lineage: tuple[Step, ...] = ()
    source: str = ""
    files: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(self.tensors[name].nbytes for name in self.tensors)

    def with_tensors(self, tensors: Mapping[str, Stored], step: Step, **config: Any) -> Checkpoint:
        """The same model with other tensors, the step recorded in its lineage."""
        return replace(self, tensors=tensors, config={**self.config, **config}, lineage=(*self.lineage, step))

    def __repr__(self) -> str:
        return f"Checkpoint({self.arch}, {len(self.tensors)} tensors, {self.source})"
