"""A step of a causal model of transformers that keeps its keys and values, whatever they are called there.

transformers 5.24 renamed the argument and the output `past_key_values` to `cache`; versions before know only the old
name, and later ones warn of it.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor

__all__ = ["CACHE_NAMES", "continued"]

CACHE_NAMES = ("cache", "past_key_values")


def continued(model: Any, ids: Tensor, state: Any = None) -> tuple[Tensor, Any]:
    """Logits (batch, n, vocab) of token ids (batch, n) after those that `state` has seen, and the state after them."""
    known = inspect.signature(model.forward).parameters
    name = next(name for name in CACHE_NAMES if name in known)
    out = model(ids, use_cache=True, **{name: state})
    return out.logits, getattr(out, name)
