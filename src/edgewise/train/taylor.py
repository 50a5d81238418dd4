"""First-order importance of coupled units: what the loss would lose with each of them.

LLM-Pruner, Ma et al., NeurIPS 2023, arXiv:2305.11627, equation 5: I(W_k) = |L(W) - L(W with W_k = 0)| ~ |W_k dL/dW_k|,
element by element, and section 3.2: the importance of a structure is the sum over all it owns.

Differs from the paper: gradients are summed over all windows before they are multiplied (its code does the same for one
batch of ten); the terms of second order (equation 4) are left out, as its default "param_first" does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgewise.compress.surgery.groups import groups_of
from edgewise.core.checkpoint import Checkpoint
from edgewise.models.loader import load

__all__ = ["importance_of"]

Progress = Callable[[str, int, int], None]


def importance_of(checkpoint: Checkpoint, windows: NDArray[np.integer[Any]], *, threads: int | None = None,
                  progress: Progress | None = None) -> dict[str, NDArray[np.float64]]:
    """(units,) of every group of a decoder, by name. windows: (n, tokens), each a sequence whose next tokens are
    predicted. Memory: the weights in float32 twice, and the activations of one window."""
    if threads is not None:
        torch.set_num_threads(threads)
    groups = groups_of(checkpoint)
    model: Any = load(checkpoint).requires_grad_(True)
    for index, row in enumerate(windows):
        ids = torch.from_numpy(np.asarray(row, np.int64)[None])
        model(ids, labels=ids, use_cache=False).loss.backward()
        if progress is not None:
            progress("gradients", index + 1, len(windows))
    terms = {name: (parameter * parameter.grad).detach().abs().double().numpy()
             for name, parameter in model.named_parameters() if parameter.grad is not None}
    found: dict[str, NDArray[np.float64]] = {}
    for name, group in groups.items():
        total = np.zeros(group.units)
        for member in group.members:
            own = _named(terms, member.tensor)
            if own is not None:
                along = own if own.ndim == 1 else own.sum(axis=1 - member.axis)
                total += along[member.index].sum(axis=1)
        found[name] = total
    return found


def _named(terms: dict[str, NDArray[np.float64]], name: str) -> NDArray[np.float64] | None:
    """transformers may put "model." before a name, or leave it out; a tied head is the embedding."""
    for own in (name, f"model.{name}", name.removeprefix("model.")):
        if own in terms:
            return terms[own]
    return None
