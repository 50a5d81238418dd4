"""Shapes that differ from layer to layer: what config.json says under `layer_shapes`, and nothing else does.

    "layer_shapes": [{"heads": 9, "kv_heads": 3, "key_dim": 48, "value_dim": 40, "width": 1152,
                      "pairs": [[0, 1, ..., 23], [0, 2, ..., 31], [...]]}, ...]

One entry per layer. heads is a multiple of kv_heads: a key and value head serves as many query heads as its neighbours,
which is how the engine's cache, transformers and GGUF all see grouped queries; what is cut is a whole group, or as many
query heads of each. key_dim is the width of a head of queries and keys, value_dim that of values. heads 0 (and kv_heads
0): the layer has no attention. width 0: no feed-forward. A layer without both is left out, and the others renumbered.

pairs: for each key head, which rotary frequencies its pairs of dimensions are turned by, key_dim / 2 of them, in
ascending order, numbered as in a whole head of `head_dim`; left out where all are kept. Pair j of a head is its
dimensions j and j + key_dim / 2. Scores are scaled by `head_dim`, the width of a whole head, however many are left.

The keys that describe equal layers (num_attention_heads, intermediate_size, ...) stay as they were before the cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from edgewise.core.errors import FormatError, InvalidValueError
from edgewise.core.values import dataclass

__all__ = ["LAYER_SHAPES", "LayerShape", "config_with_shapes", "shapes_of"]

LAYER_SHAPES = "layer_shapes"
_MOST = 1 << 40
_NUMBERS = ("heads", "kv_heads", "key_dim", "value_dim", "width")


@dataclass(frozen=True)
class LayerShape:
    """The sizes of one decoder layer. Raises InvalidValueError for sizes that contradict each other."""

    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    width: int
    pairs: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        for name in _NUMBERS:
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value <= _MOST:
                raise InvalidValueError(f"{name} is {value!r}; expected a whole number from 0")
        if not self.heads:
            if self.kv_heads or self.pairs is not None:
                raise InvalidValueError(f"heads is 0, so that kv_heads is 0 and pairs is left out; given kv_heads "
                                        f"{self.kv_heads} and pairs {self.pairs}")
            if not self.width:
                raise InvalidValueError("heads and width are 0: leave such a layer out, and number the others anew")
        elif not self.kv_heads or self.heads % self.kv_heads or not self.key_dim or not self.value_dim:
            raise InvalidValueError(f"heads is a multiple of kv_heads, and heads have dimensions; given heads "
                                    f"{self.heads}, kv_heads {self.kv_heads}, key_dim {self.key_dim}, value_dim "
                                    f"{self.value_dim}")
        if self.pairs is not None:
            if self.key_dim % 2 or len(self.pairs) != self.kv_heads:
                raise InvalidValueError(f"pairs has a list for each of the {self.kv_heads} key heads, and key_dim is "
                                        f"even; given {len(self.pairs)} lists and key_dim {self.key_dim}")
            for own in self.pairs:
                whole = all(type(pair) is int and 0 <= pair < 1 << 16 for pair in own)
                if not whole or len(own) != self.key_dim // 2 or any(
                        after <= pair for pair, after in pairwise(own)):
                    raise InvalidValueError(f"the pairs of a head are {self.key_dim // 2} ascending whole numbers from "
                                            f"0; given {str(list(own))[:60]}")

    def to_json(self) -> dict[str, Any]:
        """Plain data; `from_json` is its inverse."""
        made: dict[str, Any] = {name: getattr(self, name) for name in _NUMBERS}
        if self.pairs is not None:
            made["pairs"] = [list(own) for own in self.pairs]
        return made

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LayerShape:
        """Raises InvalidValueError for keys that are missing or unknown, and as the class does."""
        if missing := [name for name in _NUMBERS if name not in data]:
            raise InvalidValueError(f"{', '.join(missing)} missing; expected {', '.join(_NUMBERS)}")
        if unknown := sorted(set(data) - {*_NUMBERS, "pairs"}):
            raise InvalidValueError(f"{', '.join(map(repr, unknown))} unknown; expected {', '.join(_NUMBERS)}, pairs")
        pairs = data.get("pairs")
        if pairs is not None and not (isinstance(pairs, list | tuple) and all(isinstance(o, list | tuple)
                                                                              for o in pairs)):
            raise InvalidValueError(f"pairs is a list of lists; given {str(pairs)[:60]}")
        return cls(**{name: data[name] for name in _NUMBERS},
                   pairs=None if pairs is None else tuple(map(tuple, pairs)))


def shapes_of(config: Mapping[str, Any], source: str = "") -> tuple[LayerShape, ...] | None:
    """What a configuration says under `layer_shapes`; None where it does not. Raises FormatError naming the entry."""
    given = config.get(LAYER_SHAPES)
    if given is None:
        return None
    count = config.get("num_hidden_layers")
    if not isinstance(given, list | tuple) or len(given) != count:
        shown = f"{len(given)} entries" if isinstance(given, list | tuple) else repr(given)[:60]
        raise FormatError(f"configuration key '{LAYER_SHAPES}' is a list of one entry for each of the {count} layers "
                          f"of num_hidden_layers; given {shown}", path=source or None)
    made = []
    for index, entry in enumerate(given):
        if not isinstance(entry, Mapping):
            raise FormatError(f"configuration key '{LAYER_SHAPES}[{index}]' is {entry!r}; expected a mapping",
                              path=source or None)
        try:
            made.append(LayerShape.from_json(entry))
        except InvalidValueError as error:
            raise FormatError(f"configuration key '{LAYER_SHAPES}[{index}]': {error}", path=source or None) from None
    return tuple(made)


def config_with_shapes(config: Mapping[str, Any], shapes: Sequence[LayerShape], head_dim: int) -> dict[str, Any]:
    """The configuration with these layers; head_dim: of a whole head.

    Where all are alike, whole heads throughout, the common keys say so and there is no `layer_shapes`.
    """
    made = {key: value for key, value in config.items() if key != LAYER_SHAPES}
    made |= {"num_hidden_layers": len(shapes), "head_dim": head_dim}
    first = shapes[0]
    if all(shape == first for shape in shapes) and first.heads and first.width and (
            first.key_dim == first.value_dim == head_dim and first.pairs is None):
        return made | {"num_attention_heads": first.heads, "num_key_value_heads": first.kv_heads,
                       "intermediate_size": first.width}
    return made | {LAYER_SHAPES: [shape.to_json() for shape in shapes]}
