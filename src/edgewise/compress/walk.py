"""Walk a checkpoint block by block, and give each group of linears what its inputs looked like.

A block is one layer of the stack; a group is the linears of a block that read the same input, in the order in which
they run: attention (q, k, v), output (o), feed_forward (gate, up), down. A method is a function

    change(group, tensors, stats) -> {name: Stored}

of a Group, the tensors of its block as they are by now (lazy, by name) and the InputStats of the group's input, or None
where no statistics were asked for or none exist (experts see some of the tokens only). It returns what it replaces: the
group's weights, and where it moves a scale across, the group's producer or any other tensor of the block.

Statistics come from a StatsSource, which is handed down: `engine.calibrate.EngineStats` runs the model natively,
`train.hooks.TorchStats` runs any model of transformers. A source is either *sequential*, its inputs come from the model
whose earlier groups are already replaced, as GPTQ wants them; or *parallel*, they come from the model as it was.

    source = EngineStats(checkpoint, sequences, gram=True, sequential=True)
    smaller = walk(checkpoint, change, source, step=Step("gptq", {...}), state=folder, progress=bar)

One block is in memory at a time. With a state folder, finished blocks are kept there, a killed walk goes on where it
was, and the result reads its tensors from the folder, which therefore lives as long as the result is used.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgewise.core.checkpoint import Checkpoint, Step
from edgewise.core.errors import InvalidValueError, UnsupportedError
from edgewise.core.shapes import shapes_of
from edgewise.core.stats import InputStats
from edgewise.core.storage import Stored
from edgewise.formats.cache import write_aside
from edgewise.formats.folder import read_folder
from edgewise.formats.folder_writer import write_folder

__all__ = ["Block", "Change", "Finished", "Group", "StatsSource", "blocks_of", "walk"]

Progress = Callable[[str, int, int], None]
Change = Callable[["Group", Mapping[str, Stored], InputStats | None], Mapping[str, Stored]]


@dataclass(frozen=True, eq=False)
class Group:
    """Linears that read one input.

    site: attention, output, feed_forward or down, as the engine captures it; "" where nothing is captured (experts).
    names: the weights, (out, in) each, of one `in`.
    producer: the tensor whose channels become the group's inputs one by one, so that it may be divided by a scale that
        the group's columns are multiplied with: a norm's weight, v_proj, up_proj. None where there is none.
    origin: (in,) the producer's channel that each input comes from; several inputs share one under grouped queries.
    """

    site: str
    names: tuple[str, ...]
    producer: str | None = None
    origin: NDArray[np.int64] | None = None

    def __repr__(self) -> str:
        return f"Group({self.site or 'alone'}: {', '.join(self.names)})"


@dataclass(frozen=True, eq=False)
class Block:
    """A layer. name: what its tensors begin with, without the dot ("model.layers.3"); tensors: all of their names."""

    index: int
    name: str
    groups: tuple[Group, ...]
    tensors: tuple[str, ...]

    def __repr__(self) -> str:
        return f"Block({self.name}, {len(self.groups)} groups)"


class StatsSource(Protocol):
    """Statistics of inputs, in the order of the walk: each block's groups one after the other, then `leave`."""

    def stats(self, block: Block, group: Group, tensors: Mapping[str, Stored]) -> InputStats | None:
        """What the group's linears read. tensors: of the block, as replaced by now; a parallel source ignores that.

        None for a group whose inputs are not captured.
        """
        ...

    def leave(self, block: Block, tensors: Mapping[str, Stored]) -> None:
        """The block is done, and its tensors are these. Also called, alone, for blocks that an earlier run finished."""
        ...


# ---- what a block consists of -------------------------------------------------------------------------------------

_LAYER = re.compile(r"^(?P<stack>(?:.*?\.)?(?:layers?|blocks?|h))\.(?P<index>\d+)\.(?P<rest>.+)$")
_SITES = (
    ("attention", re.compile(r"(self_attn|attention(\.self)?)\.(q_proj|k_proj|v_proj|qkv_proj|query|key|value)")),
    ("output", re.compile(r"self_attn\.o_proj|attention\.output\.dense")),
    ("feed_forward", re.compile(r"mlp\.(gate_proj|up_proj|gate_up_proj)|intermediate\.dense")),
    ("down", re.compile(r"mlp\.down_proj|output\.dense")),
)
_OFFSET = re.compile(r"gemma")
"""Architectures whose norms multiply with one plus their weight: no scale passes such a weight as it is stored."""
_NORMS = {"attention": ("input_layernorm",), "feed_forward": ("pre_feedforward_layernorm", "post_attention_layernorm")}


def blocks_of(checkpoint: Checkpoint) -> tuple[Block, ...]:
    """The blocks of a decoder or an encoder, by the names of its tensors, in order.

    Weights inside a layer that are no linear of the table (experts, routers) are groups of their own without a site.
    Raises UnsupportedError for a checkpoint without such layers, or with more than one stack of them.
    """
    stacks: dict[str, dict[int, dict[str, str]]] = {}
    for name in checkpoint.tensors:
        found = _LAYER.match(name)
        if found:
            stacks.setdefault(found["stack"], {}).setdefault(int(found["index"]), {})[found["rest"]] = name
    if len(stacks) != 1:
        given = f"has {len(stacks)} stacks of layers ({', '.join(sorted(stacks))})" if stacks else "has no layers"
        raise UnsupportedError(
            f"{checkpoint.source or checkpoint.arch}: {checkpoint.arch} {given}; expected one stack, such as "
            "model.layers.N.self_attn.q_proj.weight; convert it with a format instead: edgewise convert --format int8")
    (stack, layers), = stacks.items()
    if sorted(layers) != list(range(len(layers))):
        raise UnsupportedError(f"{checkpoint.source}: layers of {stack} are numbered {sorted(layers)}, not 0, 1, ...")
    return tuple(_block(checkpoint, f"{stack}.{index}", index, layers[index]) for index in sorted(layers))


def _block(checkpoint: Checkpoint, name: str, index: int, rests: Mapping[str, str]) -> Block:
    members: dict[str, list[str]] = {site: [] for site, _ in _SITES}
    alone: list[str] = []
    for rest, full in rests.items():
        if not rest.endswith(".weight") or len(checkpoint.tensors[full].shape) != 2:
            continue
        site = next((site for site, pattern in _SITES if pattern.fullmatch(rest.removesuffix(".weight"))), None)
        (members[site] if site else alone).append(full)
    groups = [Group(site, tuple(sorted(names, key=_order)), *_producer(checkpoint, name, site, names, rests))
              for site, names in members.items() if names]
    groups += [Group("", (full,)) for full in sorted(alone)]
    return Block(index, name, tuple(groups), tuple(rests.values()))


def _order(name: str) -> tuple[int, str]:
    """q, k, v and gate, up: the order in which a layer names them."""
    parts = ("q_proj", "k_proj", "v_proj", "query", "key", "value", "gate_proj", "up_proj")
    return next((i for i, part in enumerate(parts) if f".{part}." in name), len(parts)), name


def _producer(checkpoint: Checkpoint, name: str, site: str, names: Sequence[str], rests: Mapping[str, str]
              ) -> tuple[str | None, NDArray[np.int64] | None]:
    """What the inputs of a group come from channel by channel. Norms that come after their part have none."""
    inputs = checkpoint.tensors[names[0]].shape[1]
    if site in _NORMS:
        for norm in () if _OFFSET.search(checkpoint.arch) else _NORMS[site]:
            if f"{norm}.weight" in rests:
                return rests[f"{norm}.weight"], np.arange(inputs)
        return None, None
    if site == "down":  # the linear branch of a gate; an ungated one ends in a function that no scale passes
        up = rests.get("mlp.up_proj.weight")
        return (up, np.arange(inputs)) if up and "mlp.gate_proj.weight" in rests else (None, None)
    value, config = rests.get("self_attn.v_proj.weight"), checkpoint.config
    shapes = shapes_of(config, checkpoint.source)
    if shapes is not None and value is not None:
        shape = shapes[int(name.rpartition(".")[2])]
        head, place = np.divmod(np.arange(inputs), max(shape.value_dim, 1))
        return value, head // max(shape.heads // max(shape.kv_heads, 1), 1) * shape.value_dim + place
    heads, kv_heads = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if value is None or type(heads) is not int or inputs % heads:
        return None, None
    size = inputs // heads
    kv_heads = checkpoint.tensors[value].shape[0] // size if type(kv_heads) is not int else kv_heads
    if kv_heads < 1 or heads % kv_heads or checkpoint.tensors[value].shape[0] != kv_heads * size:
        return None, None
    head, place = np.divmod(np.arange(inputs), size)
    return value, head // (heads // kv_heads) * size + place


# ---- the walk -----------------------------------------------------------------------------------------------------

def walk(checkpoint: Checkpoint, change: Change, source: StatsSource | None = None, *, step: Step,
         state: Path | None = None, key: str = "", blocks: Iterable[int] | None = None,
         progress: Progress | None = None, **config: Any) -> Checkpoint:
    """The checkpoint with what `change` makes of every group, the step recorded in its lineage.

    state: a folder for finished blocks; made if missing. key: what beside the step tells this run from another in the
    same folder, such as a hash of source and calibration text; a folder of another run is refused.
    blocks: the indices to change; others stay as they are, and run where a sequential source needs them to.
    config: keys of the configuration to set. progress(what, done, total) counts groups.
    """
    every = blocks_of(checkpoint)
    chosen = range(len(every)) if blocks is None else sorted(set(blocks))
    if any(not 0 <= index < len(every) for index in chosen):
        raise InvalidValueError(f"blocks are 0 to {len(every) - 1}; given {list(chosen)}")
    kept = Finished(state, checkpoint, step, key) if state is not None else None
    total, done = sum(len(every[index].groups) for index in chosen), 0
    replaced: dict[str, Stored] = {}
    for block in every[:max(chosen, default=-1) + 1]:
        tensors = _Overlay(checkpoint.tensors, block.tensors)
        finished = kept.load(block) if kept is not None else None
        if finished is not None:
            tensors.replace(finished)
            done += len(block.groups) if block.index in chosen else 0
        elif block.index in chosen:
            for group in block.groups:
                if progress is not None:
                    progress(f"{block.name} {group.site}".rstrip(), done, total)
                stats = source.stats(block, group, tensors) if source is not None else None
                tensors.replace(_checked(change(group, tensors, stats), group, tensors))
                done += 1
            if kept is not None:
                kept.save(block, tensors.changed)
                tensors.changed = kept.load(block) or {}
        if source is not None:
            source.leave(block, tensors)
        replaced.update(tensors.changed)
    if progress is not None:
        progress("done", total, total)
    return checkpoint.with_tensors(_Overlay(checkpoint.tensors, tuple(checkpoint.tensors), replaced), step, **config)


def _checked(made: Mapping[str, Stored], group: Group, tensors: Mapping[str, Stored]) -> Mapping[str, Stored]:
    for name, stored in made.items():
        if name not in tensors:
            raise InvalidValueError(f"a change of {group} returned {name!r}, which is no tensor of its block")
        if tuple(stored.shape) != tuple(tensors[name].shape):
            raise InvalidValueError(f"a change of {group} made {name} of shape {stored.shape} from "
                                    f"{tensors[name].shape}")
    return made


@dataclass(eq=False)
class _Overlay(Mapping[str, Stored]):
    """Some of a checkpoint's tensors, lazily, with what replaced them."""

    source: Mapping[str, Stored]
    names: tuple[str, ...]
    changed: dict[str, Stored] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Stored:
        if name in self.changed:
            return self.changed[name]
        return self.source[name]

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def replace(self, made: Mapping[str, Stored]) -> None:
        self.changed = {**self.changed, **made}


class Finished:
    """Finished blocks in a folder, each a model folder of the tensors it changed. A folder of another run is refused:
    of another step or key, as for `walk`, or of another checkpoint."""

    def __init__(self, folder: Path, checkpoint: Checkpoint, step: Step, key: str) -> None:
        self._folder, self._arch = Path(folder), checkpoint.arch
        identity = json.dumps([step.to_json(), key, checkpoint.source, sorted(checkpoint.tensors)], sort_keys=True,
                              default=str)
        digest = hashlib.sha256(identity.encode()).hexdigest()
        mark = self._folder / "walk.json"
        if mark.is_file():
            held = json.loads(mark.read_text("utf-8"))
            if held.get("sha256") != digest:
                raise InvalidValueError(
                    f"{self._folder} holds the state of another run ({held.get('step')}); choose another folder, or "
                    "delete that one to start anew")
        else:
            self._folder.mkdir(parents=True, exist_ok=True)
            with write_aside(mark) as file:
                file.write(json.dumps({"sha256": digest, "step": step.to_json()}, default=str).encode())

    def _of(self, block: Block) -> Path:
        return self._folder / f"block-{block.index:04d}"

    def save(self, block: Block, tensors: Mapping[str, Stored], note: Mapping[str, Any] | None = None) -> None:
        """note: plain data to be had again by `note`."""
        target = self._of(block)
        if target.exists():
            shutil.rmtree(target)
        write_folder(Checkpoint(self._arch, dict(note or {}), dict(tensors)), target)

    def load(self, block: Block) -> dict[str, Stored] | None:
        """The tensors, lazily; None of a block that is not finished."""
        if not self._of(block).is_dir():
            return None
        tensors = read_folder(self._of(block)).tensors
        return {name: tensors[name] for name in tensors}

    def note(self, block: Block) -> dict[str, Any]:
        """Of a finished block."""
        return dict(read_folder(self._of(block)).config)
