"""Read a checkpoint with checks: configuration values of the right kind, tensors of the expected shape, none forgotten.

Tensors stay as they are stored; only vectors (norms, biases) and an encoder's small tables become float32.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from edgewise.core.checkpoint import Checkpoint
from edgewise.core.errors import FormatError, UnsupportedError, notice
from edgewise.core.storage import Dense, Factored, InputSparse, Sparse, Stored, Sum, rows_of
from edgewise.engine.plan import Activation, Linear

__all__ = ["FUNCTIONS", "Config", "Function", "Tensors", "activation_of"]

Value = TypeVar("Value")
Function = Literal["silu", "gelu", "gelu_tanh", "relu"]
FUNCTIONS: dict[str, Function] = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
"""Names that configurations give an activation function -> its name in a Plan."""


def activation_of(weight: Stored) -> Activation:
    """Inputs are rounded to int8 only where the weight is quantised; a float weight deserves float inputs."""
    if isinstance(weight, Dense | Sum):  # a sum runs as floats
        return "float32"
    if isinstance(weight, Factored):
        both = {activation_of(weight.left), activation_of(weight.right)}
        return "int8" if "int8" in both else "float32"
    if isinstance(weight, Sparse):
        return activation_of(weight.values)
    if isinstance(weight, InputSparse):
        return activation_of(weight.weight)
    return "int8"


class Config:
    """The configuration of a checkpoint, or a mapping inside it, read key by key.

    A key that holds None counts as absent. Raises FormatError naming key, value and what was expected.
    """

    def __init__(self, values: Mapping[str, Any], source: str, where: str = "") -> None:
        self._values = values
        self._source = source or None
        self._where = where

    def _fail(self, key: str, expected: str) -> FormatError:
        given = "is missing" if self._values.get(key) is None else f"is {_short(self._values[key])}"
        return FormatError(f"configuration key {self._where + key!r} {given}; expected {expected}", path=self._source)

    def __contains__(self, key: str) -> bool:
        return self._values.get(key) is not None

    def mapping(self, key: str) -> Mapping[str, Any]:
        """The mapping under a key as it stands; empty where it is absent."""
        value = self._values.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise self._fail(key, "a mapping")
        return value or {}

    def section(self, key: str) -> Config | None:
        """The mapping under a key, or None where it is absent or empty."""
        value = self.mapping(key)
        return Config(value, self._source or "", f"{self._where}{key}.") if value else None

    def nested(self) -> list[str]:
        """The keys that hold a mapping."""
        return [key for key, value in self._values.items() if isinstance(value, Mapping)]

    def integer(self, key: str, default: int | None = None, *, least: int = 1, most: int = 2**40) -> int:
        """A whole number from `least` to `most`."""
        value = default if self._values.get(key) is None else self._values[key]
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or not least <= value <= most:
            bound = f"of at least {least}" if most == 2**40 else f"from {least} to {most}"
            raise self._fail(key, f"a whole number {bound}")
        return int(value)

    def layers(self, tensors: Tensors) -> int:
        """`num_hidden_layers`, which is at most the number of tensors: an absurd one must not cost memory."""
        return self.integer("num_hidden_layers", most=max(len(tensors), 1))

    def per_layer(self, key: str, layers: int, default: int | None = None) -> list[int]:
        """A positive whole number per layer; the configuration holds one for all, or a list of them."""
        value = self._values.get(key)
        if not isinstance(value, Sequence) or isinstance(value, str):
            return [self.integer(key, default)] * layers
        whole = all(isinstance(v, int) and not isinstance(v, bool) and 0 < v <= 2**40 for v in value)
        if len(value) != layers or not whole:
            raise self._fail(key, f"one positive whole number, or a list of one for each of the {layers} layers")
        return [int(v) for v in value]

    def names(self, key: str, count: int) -> list[str] | None:
        """A list of `count` strings, or None where the key is absent."""
        value = self._values.get(key)
        if value is None:
            return None
        if not isinstance(value, list | tuple) or len(value) != count or not all(isinstance(v, str) for v in value):
            raise self._fail(key, f"a list of {count} strings")
        return list(value)

    def integers(self, key: str) -> list[int]:
        """A list of whole numbers from 0; empty where the key is absent."""
        value = self._values.get(key)
        if value is None:
            return []
        if not isinstance(value, list | tuple) or not all(type(v) is int and v >= 0 for v in value):
            raise self._fail(key, "a list of whole numbers")
        return list(value)

    def numbers(self, key: str, count: int) -> NDArray[np.float64]:
        """A list of `count` finite positive numbers, (count,)."""
        value = self._values.get(key)
        if not isinstance(value, list | tuple) or len(value) != count or not all(
                isinstance(v, int | float | np.number) and not isinstance(v, bool) and math.isfinite(v) and v > 0
                for v in value):
            raise self._fail(key, f"a list of {count} finite positive numbers")
        return np.array(value, np.float64)

    def number(self, key: str, default: float | None = None, *, above: float = 0.0) -> float:
        """A finite number greater than `above`."""
        value = default if self._values.get(key) is None else self._values[key]
        if isinstance(value, bool) or not isinstance(value, int | float | np.number):
            raise self._fail(key, f"a number above {above:g}")
        if not math.isfinite(value) or value <= above:
            raise self._fail(key, f"a finite number above {above:g}")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self._values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._fail(key, "true or false")
        return value

    def choice(self, key: str, choices: Mapping[str, Value], default: str) -> Value:
        """What `choices` holds under the name in the configuration. Raises UnsupportedError listing the choices."""
        value = self._values.get(key)
        return self.pick(key, default if value is None else value, choices)

    def pick(self, key: str, value: object, choices: Mapping[str, Value]) -> Value:
        """What `choices` holds under `value`, which stands at `key`. Raises UnsupportedError listing the choices."""
        if not isinstance(value, str) or value not in choices:
            raise UnsupportedError(
                f"{self._source + ': ' if self._source else ''}configuration key {self._where + key!r} is "
                f"{_short(value)}, which the engine does not implement; it implements {', '.join(sorted(choices))}")
        return choices[value]


class Tensors:
    """The tensors of a checkpoint by Hugging Face names, with a memory of which were asked for."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._tensors = checkpoint.tensors
        self._source = checkpoint.source or None
        self._used: set[str] = set()

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __len__(self) -> int:
        return len(self._tensors)

    def prefix(self, known: Iterable[str], probe: str) -> str:
        """The first of the known prefixes under which `probe` exists; the first of all where none has it."""
        prefixes = list(known)
        return next((p for p in prefixes if p + probe in self._tensors), prefixes[0])

    def stored(self, name: str, shape: tuple[int, ...], *, older: str | None = None) -> Stored:
        """The tensor of that name as it is stored. older: another name that former checkpoints gave it."""
        if name not in self._tensors and older is not None and older in self._tensors:
            name = older
        if name not in self._tensors:
            raise FormatError(
                f"the model has no such tensor; expected shape {shape} (it holds {len(self._tensors)} tensors)",
                path=self._source, tensor=name)
        tensor = self._tensors[name]
        if tuple(tensor.shape) != shape:
            raise FormatError(f"shape {tuple(tensor.shape)} found; its configuration asks for {shape}",
                              path=self._source, tensor=name)
        self._used.add(name)
        return tensor

    def dense(self, name: str, shape: tuple[int, ...], *, older: str | None = None) -> NDArray[np.float32]:
        """A small tensor as float32: norms, biases, position tables."""
        return np.ascontiguousarray(self.stored(name, shape, older=older).dense(), np.float32)

    def linear(self, name: str, outputs: int, inputs: int, *, bias: bool | None = None) -> Linear:
        """The linear `name` with its weight (outputs, inputs). bias: asked for, not wanted, or None: if it is there."""
        weight = self.stored(f"{name}.weight", (outputs, inputs))
        has_bias = f"{name}.bias" in self._tensors if bias is None else bias
        return Linear(f"{name}.weight", weight, self.dense(f"{name}.bias", (outputs,)) if has_bias else None,
                      activation_of(weight))

    def split(self, name: str, outputs: Sequence[int], inputs: int) -> list[Linear]:
        """The linears that lie in the weight `name` (sum of outputs, inputs) one after the other, without copies."""
        weight = self.stored(f"{name}.weight", (sum(outputs), inputs))
        made, start = [], 0
        for rows in outputs:
            part = rows_of(weight, slice(start, start + rows))
            made.append(Linear(f"{name}.weight", part, None, activation_of(weight), (start, start + rows)))
            start += rows
        return made

    def finish(self, expected: Mapping[str, str]) -> None:
        """Tell of the tensors nobody asked for. expected: regular expressions of known ones -> what they are."""
        left = [name for name in self._tensors if name not in self._used]
        where = self._source or ""
        for pattern, meaning in expected.items():
            known = [name for name in left if re.search(pattern, name)]
            if known:
                notice("info", f"{meaning}: {_names(known)}", where=where)
                left = [name for name in left if name not in known]
        if left:
            notice("ignored", f"the model does not use {_names(left)}", where=where)


def _names(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more tensors"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
