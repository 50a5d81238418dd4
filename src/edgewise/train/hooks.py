"""Statistics of the inputs of linears from any model of transformers, by hooks; layers run one at a time.

`gather(model, sequences)` runs whole sequences and gives Stats of every linear of the layers, squared gradients of the
loss included where asked for. `TorchStats` is the StatsSource of `compress.walk`: one block in the loop at a time, with
its weights as replaced so far (sequential) or as they were. Both give what the engine gives, up to float32 rounding.
Linears that read one tensor (q, k and v under grouped queries too) share its statistics; the output layer,
tied or not, is not of a layer and is left out.

Squared gradients are those of the cross-entropy of the next token, summed over a sequence, squared, and added up over
sequences: SqueezeLLM's diagonal of the Fisher information (Kim et al., arXiv:2306.07629, equation 3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgewise.compress.walk import Block, Group
from edgewise.core.errors import InvalidValueError, UnsupportedError
from edgewise.core.stats import InputGatherer, InputStats, Stats
from edgewise.core.storage import Stored
from edgewise.models.decoding import CACHE_NAMES
from edgewise.models.static import layers_of

__all__ = ["LayerInputs", "TorchStats", "gather", "inputs_of_layers"]

Ids = Sequence[int] | NDArray[Any]
Progress = Callable[[str, int, int], None]


# ---- whole sequences ----------------------------------------------------------------------------------------------

def gather(model: nn.Module, sequences: Iterable[Ids], *, gram: bool = False, samples: int = 0,
           gradients: bool = False, progress: Progress | None = None) -> Stats:
    """Stats of each linear of the layers, under its weight's name. Linears that read one tensor share one InputStats,
    unless `gradients` are asked for, which each has its own of.
    """
    texts = [_batch(ids) for ids in sequences]
    if not texts:
        raise InvalidValueError("statistics need at least one sequence with at least one token")
    path, layers = layers_of(model)
    linears = {f"{path}.{name}": module for name, module in layers.named_modules() if isinstance(module, nn.Linear)}
    gatherers: dict[str, InputGatherer] = {}
    homes: dict[str, str] = {}  # the linear under whose name shared inputs are kept
    squares: dict[str, Tensor] = {}
    with _training(model, linears if gradients else {}), torch.set_grad_enabled(gradients):
        for done, ids in enumerate(texts):
            with _watching(linears, gatherers, homes, gram=gram, samples=samples):
                result = model(ids)
            if gradients:
                _add_gradients(model, result, ids, linears, squares)
            if progress is not None:
                progress("calibrating", done + 1, len(texts))
    made = {name: gatherer.stats() for name, gatherer in gatherers.items()}
    stats = {f"{name}.weight": made[home] for name, home in homes.items()}
    if gradients:
        stats = {name: replace(item, gradient_square=squares[name.removesuffix(".weight")].numpy())
                 for name, item in stats.items()}
    return Stats(stats)


@contextmanager
def _training(model: nn.Module, linears: Mapping[str, nn.Linear]) -> Iterator[None]:
    """Gradients for these weights alone; the model as it was afterwards."""
    wanted = {id(linear.weight) for linear in linears.values()}
    former = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in former:
            parameter.requires_grad_(id(parameter) in wanted)
        yield
    finally:
        for parameter, requires in former:
            parameter.requires_grad_(requires)
            parameter.grad = None


def _add_gradients(model: nn.Module, result: Any, ids: Tensor, linears: Mapping[str, nn.Linear],
                   squares: dict[str, Tensor]) -> None:
    if not hasattr(result, "logits") or ids.shape[1] < 2:
        raise UnsupportedError("squared gradients are of the loss of the next token: they need a causal model and "
                               f"sequences of at least two tokens; given {type(model).__name__}, {ids.shape[1]} tokens")
    nn.functional.cross_entropy(result.logits[0, :-1].float(), ids[0, 1:], reduction="sum").backward()  # type: ignore[no-untyped-call]
    for name, linear in linears.items():
        gradient = linear.weight.grad
        square = torch.zeros_like(linear.weight, dtype=torch.float64) if gradient is None else gradient.double() ** 2
        squares[name] = squares[name] + square if name in squares else square.detach()
        linear.weight.grad = None


@contextmanager
def _watching(linears: Mapping[str, nn.Linear], gatherers: dict[str, InputGatherer], homes: dict[str, str], *,
              gram: bool, samples: int) -> Iterator[None]:
    """Add what linears read to their gatherers while the block runs; a tensor that several read is added once."""
    seen: dict[int, tuple[str, Tensor]] = {}  # holds the tensors, so that no address is used twice meanwhile

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def add(_: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            home = seen.setdefault(id(x), (name, x))[0]
            if homes.setdefault(name, home) != home:
                raise UnsupportedError(f"{name} shares its input with {homes[name]} in one sequence and with {home} in "
                                       "another; gather one sequence at a time")
            if home == name:
                if name not in gatherers:
                    gatherers[name] = InputGatherer(gram=gram, samples=samples)
                _add(gatherers[name], x, f"{name}.weight")
        return add

    handles = [linear.register_forward_pre_hook(hook(name)) for name, linear in linears.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _add(gatherer: InputGatherer, x: Tensor, name: str) -> None:
    try:
        gatherer.add(x.detach().float().reshape(-1, x.shape[-1]).numpy())
    except InvalidValueError as error:
        raise InvalidValueError(f"inputs of {name}: {error}; a layer before it overflows, or a weight is damaged: take "
                                "the source in another format, or leave that text out") from None


def _batch(ids: Ids) -> Tensor:
    made = torch.as_tensor(np.asarray(ids), dtype=torch.long)[None]
    if made.ndim != 2 or not made.shape[1]:
        raise InvalidValueError(f"a sequence is at least one token id; given shape {tuple(made.shape[1:])}")
    return made


# ---- layer by layer -----------------------------------------------------------------------------------------------

@dataclass(eq=False)
class LayerInputs:
    """What a model hands to its layers for some sequences, so that each layer can be run by itself.

    hidden: states before the first layer, (1, n, width) each. extra: by length of a sequence, each layer's keyword
    arguments (masks and rotary tables, which depend on nothing but the length). layers: of the model.
    """

    path: str
    layers: nn.ModuleList
    hidden: list[Tensor]
    extra: dict[int, list[dict[str, Any]]]

    def run(self, index: int, hidden: Tensor) -> Tensor:
        """States after layer `index`, (1, n, width)."""
        result = self.layers[index](hidden, **self.extra[hidden.shape[1]][index])
        made: Tensor = result[0] if isinstance(result, tuple) else result
        return made


@torch.no_grad()
def inputs_of_layers(model: nn.Module, sequences: Iterable[Ids]) -> LayerInputs:
    """Run the model once per length to see what its layers are given, and stop before the first layer otherwise."""
    path, layers = layers_of(model)
    found = LayerInputs(path, layers, [], {})
    for ids in sequences:
        batch = _batch(ids)
        length = batch.shape[1]
        caught: list[dict[str, Any]] = []
        first: list[Tensor] = []

        def catch(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any],
                  known: bool = length in found.extra, first: list[Tensor] = first,
                  caught: list[dict[str, Any]] = caught) -> None:
            if not first:
                first.append((args[0] if args else kwargs["hidden_states"]).detach().clone())
            caught.append({key: value for key, value in kwargs.items()
                           if key not in ("hidden_states", *CACHE_NAMES, "use_cache", "cache_position")})
            if known or len(caught) == len(layers):
                raise _EnoughError

        handles = [layer.register_forward_pre_hook(catch, with_kwargs=True) for layer in layers]
        try:
            model(batch)
        except _EnoughError:
            pass
        finally:
            for handle in handles:
                handle.remove()
        found.hidden.append(first[0])
        found.extra.setdefault(length, caught)
    if not found.hidden:
        raise InvalidValueError("statistics need at least one sequence with at least one token")
    return found


class _EnoughError(Exception):
    """Ends a run whose layers have been seen."""


class TorchStats:
    """A StatsSource that runs a model of transformers, one layer in the loop at a time.

    model: its weights are those of the checkpoint that is walked; a sequential source writes the replaced ones into it.
    Each group's statistics take a run of its layer over all sequences.
    """

    def __init__(self, model: nn.Module, sequences: Iterable[Ids], *, gram: bool = False, samples: int = 0,
                 sequential: bool = False) -> None:
        self._inputs = inputs_of_layers(model, sequences)
        self._gram, self._samples, self._sequential = gram, samples, sequential

    @torch.no_grad()
    def stats(self, block: Block, group: Group, tensors: Mapping[str, Stored]) -> InputStats | None:
        """See compress.walk.StatsSource."""
        if not group.site:
            return None
        self._write(block, tensors)
        layer = self._inputs.layers[block.index]
        name = group.names[0].removesuffix(".weight")
        linear = layer.get_submodule(name.removeprefix(f"{self._inputs.path}.{block.index}."))
        gatherers: dict[str, InputGatherer] = {}
        with _watching({name: linear}, gatherers, {}, gram=self._gram,  # type: ignore[dict-item]
                       samples=self._samples):
            for hidden in self._inputs.hidden:
                self._inputs.run(block.index, hidden)
        return gatherers[name].stats()

    @torch.no_grad()
    def leave(self, block: Block, tensors: Mapping[str, Stored]) -> None:
        """See compress.walk.StatsSource."""
        self._write(block, tensors)
        self._inputs.hidden = [self._inputs.run(block.index, hidden) for hidden in self._inputs.hidden]

    def _write(self, block: Block, tensors: Mapping[str, Stored]) -> None:
        if not self._sequential:
            return
        layer = self._inputs.layers[block.index]
        prefix = f"{self._inputs.path}.{block.index}."
        state = {name.removeprefix(prefix): torch.from_numpy(np.array(tensors[name].dense(), np.float32))
                 for name in block.tensors}
        present = layer.state_dict()
        if unknown := sorted(state.keys() - present.keys()):
            raise UnsupportedError(f"{type(layer).__name__} has no tensor {unknown[0]!r}")
        layer.load_state_dict(state, strict=False)
