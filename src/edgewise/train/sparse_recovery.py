"""Recovery of a pruned and quantised model: its kept weights are trained under their quantiser, the mask stays.

AccLLM (arXiv:2505.03745) needs recovery at two bits with two of four weights kept; its way is not public. Here the
student learns the logits of the dense model, KL(teacher || student) on text (Hinton et al., arXiv:1503.02531, at
temperature 1), through fake quantisation with a straight-through gradient whose grid follows the extremes of its group
(train/fake_quant.py, through_scale). What is trained are the kept values of every Sparse linear and nothing else: the
result has the places, the format and the size of what was given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from edgewise import __version__
from edgewise.core.checkpoint import Checkpoint, Step
from edgewise.core.errors import InvalidValueError
from edgewise.core.numbers import QuantFormat, quantize
from edgewise.core.plain import to_plain
from edgewise.core.storage import LazyTensors, QuantizedTensor, Sparse, Stored
from edgewise.train.fake_quant import fake_quantize
from edgewise.train.small_llama import batches, llama_of

__all__ = ["Recovery", "SparseLinear", "recover"]

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Recovery:
    """Steps of AdamW on excerpts of `length` tokens; the rate falls to zero along a cosine."""

    steps: int = 300
    batch: int = 8
    length: int = 64
    learning_rate: float = 1e-3
    clip: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 0 or self.batch < 1 or self.length < 2:
            raise InvalidValueError(f"steps from 0, a batch from 1 and excerpts of at least 2 tokens; given {self}")


class SparseLinear(nn.Module):
    """y = x W^T + b, of W only the kept values, which are rounded on the way in; where they lie is fixed."""

    def __init__(self, stored: Sparse, bias: Tensor | None) -> None:
        super().__init__()
        assert isinstance(stored.values, QuantizedTensor)
        assert stored.n_m is not None
        self.shape, self.fmt, self.n_m = stored.shape, stored.values.format, stored.n_m
        kept, four = self.n_m
        self.places = np.asarray(stored.index)
        columns = np.arange(self.places.shape[1])[None] // kept * four + self.places
        self.register_buffer("columns", torch.from_numpy(columns.astype(np.int64)))
        self.values = nn.Parameter(torch.from_numpy(np.array(stored.values.dense(), np.float32)))
        self.bias = bias

    def weight(self) -> Tensor:
        """(out, in), zeros where it is pruned."""
        rounded = fake_quantize(self.values, self.fmt, through_scale=True)
        columns: Any = self.columns
        return torch.zeros(self.shape, dtype=rounded.dtype).scatter(1, columns, rounded)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight(), self.bias)

    def stored(self) -> Sparse:
        """As it is by now, with the places it was given."""
        fmt: QuantFormat = self.fmt
        codes, scales, second = quantize(self.values.detach().numpy(), fmt)
        values = QuantizedTensor(codes, scales, fmt, zeros=second if fmt.zero == "int" else None,
                                 minima=second if fmt.zero == "min" else None)
        return Sparse("n_m", self.places, values, (self.shape[0], self.shape[1]), self.n_m)


def recover(student: Checkpoint, teacher: Checkpoint, token_ids: NDArray[np.int64], config: Recovery = Recovery(), *,
            progress: Progress | None = None) -> Checkpoint:
    """The student with its Sparse linears trained towards the teacher. Both are Llamas of one shape.

    Raises InvalidValueError where nothing of the student is sparse, or the text is too short.
    """
    names = [name for name in student.tensors if name.endswith("_proj.weight")
             and isinstance(student.tensors[name], Sparse)]
    if not names:
        raise InvalidValueError(f"{student.source or student.arch}: no linear keeps two of four weights; prune first, "
                                "with: edgewise quantize --method accllm")
    guide, model = llama_of(teacher), llama_of(student)
    for parameter in (*guide.parameters(), *model.parameters()):
        parameter.requires_grad_(False)
    layers: dict[str, SparseLinear] = {}
    for name in names:
        stored = student.tensors[name]
        assert isinstance(stored, Sparse)
        parent, _, last = name.removesuffix(".weight").rpartition(".")
        layers[name] = SparseLinear(stored, getattr(model.get_submodule(parent), last).bias)
        setattr(model.get_submodule(parent), last, layers[name])
    trained = [layer.values for layer in layers.values()]
    optimiser = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(config.steps, 1))
    for step, part in zip(range(config.steps), batches(token_ids, config.batch, config.length, config.seed),
                          strict=False):
        with torch.no_grad():
            wanted = functional.log_softmax(guide(part).logits, dim=-1)
        found = functional.log_softmax(model(part).logits, dim=-1)
        loss = functional.kl_div(found, wanted, log_target=True, reduction="none").sum(dim=-1).mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, config.clip)
        optimiser.step()
        schedule.step()
        if progress is not None:
            progress("recovery", step + 1, config.steps)
    made = {name: layer.stored() for name, layer in layers.items()}
    source = student.tensors
    makers: dict[str, Callable[[], Stored]] = {
        name: (lambda name=name: made[name] if name in made else source[name])  # type: ignore[misc]
        for name in source}
    return student.with_tensors(LazyTensors(makers), Step("recover", to_plain(config), __version__))
