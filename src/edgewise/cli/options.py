"""What the verbs that load a model share: their options, a progress bar for loading, and sampling by default."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgewise.cli.frame import bytes_option, current
from edgewise.core.errors import InvalidValueError

if TYPE_CHECKING:
    from edgewise.engine.generate import GenerationOptions
    from edgewise.engine.model import LanguageModel
    from edgewise.formats.cache import Progress

__all__ = ["Attention", "Cache", "Context", "Format", "Kv", "Loading", "Memory", "Model", "Overflow", "Sampling",
           "Threads", "check_overflow", "loading", "memory_line", "rate", "sampling", "sampling_line"]

_LOADING, _SAMPLING = "Loading", "Generation"

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A path, a short name such as smollm2, ORG/REPO[:FILE] of "
                                      "the Hugging Face hub, or pip:NAME[:FILE].", show_default=False)]
Memory = Annotated[int | None, bytes_option("--memory", help="Most that weights, KV cache and scratch may take; the "
                                            "context shrinks to fit.", rich_help_panel=_LOADING, show_default=False)]
Context = Annotated[int | None, typer.Option("--context", min=1, help="Positions of the context; by default the "
                                             "model's own.", rich_help_panel=_LOADING, show_default=False)]
Kv = Annotated[str | None, typer.Option("--kv", help="Number format of the KV cache: bf16, fp16, int8, int4 or fp32.",
                                        rich_help_panel=_LOADING, show_default=False)]
Attention = Annotated[str | None, typer.Option("--attention", help="What a token sees: full, or sink=4,window=512 for "
                                               "the first four positions and the last 512, in constant memory however "
                                               "long the text. By default as the model says.",
                                               rich_help_panel=_LOADING, show_default=False)]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="Threads; by default the physical cores that "
                                             "this process may use.", rich_help_panel=_LOADING, show_default=False)]
Format = Annotated[str | None, typer.Option("--format", help="Round the linear weights to this format while loading, "
                                            "such as int4/g32/fp16/min, fp16 or bf16.", rich_help_panel=_LOADING,
                                            show_default=False)]
Cache = Annotated[bool, typer.Option("--cache/--no-cache", help="Keep the packed weights for the next start.",
                                     rich_help_panel=_LOADING)]

Overflow = Annotated[str, typer.Option("--overflow", help="When the context is full: error; stop, with a notice; or "
                                       "restart, which drops the oldest tokens and goes on, with a notice.",
                                       rich_help_panel=_SAMPLING)]


@dataclass(frozen=True)
class Loading:
    """How a model is loaded to answer: each field is an option."""

    memory: Memory = None
    context: Context = None
    kv: Kv = None
    attention: Attention = None
    threads: Threads = None
    format: Format = None
    cache: Cache = True

    def load(self, model: str) -> LanguageModel:
        """The model, with a bar while it is packed."""
        from edgewise.engine import load

        with loading("loading") as progress:
            loaded: LanguageModel = load(
                model, format=self.format, memory_bytes=self.memory, threads=self.threads, context=self.context,
                kv=self.kv, attention=self.attention, cache=self.cache, progress=progress)
        return loaded


@dataclass(frozen=True)
class Sampling:
    """How an answer is sampled: each field is an option, and None leaves it to the model."""

    max_tokens: Annotated[int | None, typer.Option(
        "--max-tokens", "-n", min=0, help="Most new tokens; by default until the model stops.",
        rich_help_panel=_SAMPLING, show_default=False)] = None
    temperature: Annotated[float | None, typer.Option(
        "--temperature", help="0 takes the likeliest token. Default: as the model's generation_config says, else 0.",
        rich_help_panel=_SAMPLING, show_default=False)] = None
    top_k: Annotated[int | None, typer.Option(
        "--top-k", help="Sample among the k likeliest tokens.", rich_help_panel=_SAMPLING, show_default=False)] = None
    top_p: Annotated[float | None, typer.Option(
        "--top-p", help="Sample among the likeliest tokens that hold this share.", rich_help_panel=_SAMPLING,
        show_default=False)] = None
    min_p: Annotated[float | None, typer.Option(
        "--min-p", help="Leave out tokens below this share of the likeliest.", rich_help_panel=_SAMPLING,
        show_default=False)] = None
    repetition_penalty: Annotated[float | None, typer.Option(
        "--repetition-penalty", help="Above 1, tokens of late become less likely.", rich_help_panel=_SAMPLING,
        show_default=False)] = None
    seed: Annotated[int | None, typer.Option(
        "--seed", help="The same seed gives the same answer. By default a new one, which --stats and --json name.",
        rich_help_panel=_SAMPLING, show_default=False)] = None
    stop: Annotated[list[str] | None, typer.Option(
        "--stop", help="End before this text. May be given more than once.", rich_help_panel=_SAMPLING,
        show_default=False)] = None

    def given(self) -> dict[str, Any]:
        """What was asked for, under the names of GenerationOptions; without the seed."""
        asked = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "seed"}
        asked["stop"] = tuple(self.stop) if self.stop else None
        return {name: value for name, value in asked.items() if value is not None}


@contextmanager
def loading(title: str) -> Iterator[Progress]:
    """A bar on stderr that appears with the first step: a warm start has none, and does not pay for one."""
    with ExitStack() as stack:
        updates: list[Any] = []

        def progress(what: str, done: int, total: int) -> None:
            if not updates:
                updates.append(stack.enter_context(current().progress(title, unit="B")))
            updates[0](done, total or None, what)

        yield progress


def sampling(model: LanguageModel, *, seed: int | None, **given: Any) -> tuple[GenerationOptions, str]:
    """Options for a model: what was given (not None), over the model's own defaults. Second: where they come from."""
    from edgewise.engine.defaults import generation_defaults
    from edgewise.engine.generate import GenerationOptions

    defaults = generation_defaults(model.checkpoint)
    asked = {name: value for name, value in given.items() if value is not None}
    options = GenerationOptions().with_changes(**{**defaults, **asked})
    if seed is None and options.temperature > 0:
        import secrets

        seed = secrets.randbits(32)
    source = "generation_config" if set(defaults) - set(asked) else "options" if set(asked) & _SAMPLED else "default"
    return options.with_changes(seed=seed or 0), source


_SAMPLED = {"temperature", "top_k", "top_p", "min_p", "repetition_penalty"}


def sampling_line(options: GenerationOptions, source: str) -> str:
    """Sampling in words, for --stats."""
    parts = []
    if options.temperature > 0:
        parts.append(f"temperature {options.temperature:g}")
        parts += [f"{label} {value:g}" for label, value, off in (
            ("top-k", options.top_k, 0), ("top-p", options.top_p, 1), ("min-p", options.min_p, 0)) if value != off]
        parts.append(f"seed {options.seed}")
    else:
        parts.append("greedy")
    if options.repetition_penalty != 1:
        parts.append(f"repetition penalty {options.repetition_penalty:g}")
    origin = {"generation_config": "from the model's generation_config", "options": "as asked",
              "default": "the model names no sampling"}[source]
    return f"{', '.join(parts)} ({origin})"


def memory_line(model: LanguageModel) -> str:
    """Where the memory goes, for --stats."""
    memory = model.memory
    positions = model.attention if model.endless else f"{model.context} positions"
    return (f"{memory.total_bytes / 1e6:.1f} MB: weights {memory.weights_bytes / 1e6:.1f}, KV {model.kv} of "
            f"{positions} {memory.kv_bytes / 1e6:.1f}, scratch {memory.scratch_bytes / 1e6:.1f}")


def rate(tokens: int, seconds: float) -> float | None:
    """Tokens per second; None where nothing was measured."""
    return tokens / seconds if tokens and seconds > 0 else None


def check_overflow(overflow: str) -> None:
    """Refuse an unknown policy before anything is loaded."""
    if overflow not in ("error", "stop", "restart"):
        raise InvalidValueError(f"--overflow is error, stop or restart; given {overflow!r}")
