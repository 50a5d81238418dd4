"""edgewise chat: talk with a language model."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgewise.cli import options as shared
from edgewise.cli.frame import current
from edgewise.core.errors import EdgewiseError, collect_notices
from edgewise.core.report import Report

if TYPE_CHECKING:
    from edgewise.engine.conversation import Conversation

EXAMPLES = (
    "edgewise chat smollm2",
    'edgewise chat smollm2 --system "Answer in one sentence." --temperature 0.7',
    "edgewise chat model.gguf --memory 300MB --stats",
    "printf 'Hello\\nAnd again\\n' | edgewise chat smollm2 --json",
)

HELP = """\
/help           this list
/system [TEXT]  show or change what the model is told beforehand
/reset          forget what was said
/save FILE      write the conversation to a file
/load FILE      go on with a saved conversation
/stats          speed, memory and room in the context
/exit           leave; so does Ctrl-D. Ctrl-C ends an answer
A line that ends in \\ goes on in the next one. A message that begins with / begins with // here."""


def command(
    model: shared.Model,
    system: Annotated[str | None, typer.Option("--system", help="What the model is told beforehand.",
                                               show_default=False)] = None,
    stats: Annotated[bool, typer.Option("--stats", help="Print the speed of each answer to standard error.")] = False,
    *,
    sampled: shared.Sampling,
    overflow: shared.Overflow = "restart",
    loading: shared.Loading,
) -> Report | None:
    """Talk with a model, turn by turn. Lines that are piped in are turns too. /help lists the commands."""
    shared.check_overflow(overflow)
    from edgewise.engine.conversation import Conversation

    loaded = loading.load(model)
    options, source = shared.sampling(loaded, seed=sampled.seed, overflow=overflow, **sampled.given())
    session = _Session(Conversation(loaded, options, system=system), sys.stdin.isatty(), stats,
                       shared.sampling_line(options, source))
    if session.interactive:
        _say(f"{model}: {loaded!r}. /help lists the commands.")
    for line in _lines(session.interactive):
        if not session.take(line):
            break
    if current().json:
        talk = session.talk
        print(json.dumps({"model": model, "system": talk.system, "messages": talk.messages, "turns": session.turns,
                          "tier": loaded.tier, "sampling": session.sampling}, ensure_ascii=False, indent=2))
    return None


class _Session:
    """What one run of the verb knows. take(line) does what a line asks for; False ends the run."""

    def __init__(self, talk: Conversation, interactive: bool, stats: bool, sampling: str) -> None:
        self.talk = talk
        self.interactive = interactive
        self.stats = stats
        self.sampling = sampling
        self.turns: list[dict[str, Any]] = []

    def take(self, line: str) -> bool:
        if not line.strip():
            return True
        try:
            if line.startswith("/") and not line.startswith("//"):
                return self._command(line)
            self._answer(line[1:] if line.startswith("//") else line)
        except (EdgewiseError, OSError) as error:
            if not self.interactive:
                raise
            _say(f"edgewise: error: {error}")
        return True

    def _answer(self, text: str) -> None:
        started = time.perf_counter()
        with collect_notices(strict=current().strict) as notices, contextlib.closing(self.talk.say(text)) as tokens:
            try:
                for token in tokens:
                    current().write(token.text)
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
        current().write("\n")
        seconds = time.perf_counter() - started
        generation = self.talk.last
        if generation is None:  # interrupted before it began
            return
        self.turns.append({
            "finish_reason": generation.finish_reason, "prompt_tokens": generation.prompt_tokens,
            "completion_tokens": len(generation.ids), "reused_tokens": generation.reused_tokens,
            "prefill_s": generation.prefill_s, "decode_s": generation.decode_s, "time_s": seconds,
            "notices": [item.to_json() for item in notices]})
        if not current().json:
            for item in notices:
                _say(f"edgewise: {item}")
            if self.stats:
                _say(self._speed())

    def _command(self, line: str) -> bool:
        name, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        if name in ("/exit", "/quit", "/bye"):
            return False
        if name == "/help":
            _say(HELP)
        elif name == "/reset":
            self.talk.reset()
            _say("Forgotten.")
        elif name == "/system":
            if rest:
                self.talk.system = rest
            _say(f"System message: {self.talk.system or 'none'}")
        elif name == "/stats":
            _say(self._state())
        elif name in ("/save", "/load"):
            if not rest:
                _say(f"{name} needs the name of a file")
            elif name == "/save":
                self.talk.save(rest)
                _say(f"Saved {len(self.talk.messages)} messages to {rest}.")
            else:
                self.talk.load(rest)
                _say(f"{len(self.talk.messages)} messages from {rest}.")
        else:
            _say(f"{name} is no command; /help lists them, and a message that begins with / begins with // here")
        return True

    def _speed(self) -> str:
        turn = self.turns[-1]
        parts = []
        for label, tokens, seconds in (("read", turn["prompt_tokens"] - turn["reused_tokens"], turn["prefill_s"]),
                                       ("wrote", turn["completion_tokens"], turn["decode_s"])):
            per_s = shared.rate(tokens, seconds)
            parts.append(f"{label} {tokens} tokens" + ("" if per_s is None else f" at {per_s:.1f} tokens/s"))
        return f"{', '.join(parts)}, held {turn['reused_tokens']}, {turn['finish_reason']}"

    def _state(self) -> str:
        model = self.talk.model
        used = int(model.session.length(0))
        room = "endless" if model.endless else model.context
        lines = [f"context  {used} of {room} positions, {len(self.talk.messages)} messages",
                 f"memory   {shared.memory_line(model)}", f"sampling {self.sampling}",
                 f"tier     {model.tier}, {model.session.threads} threads"]
        if self.turns:
            lines.insert(0, f"last     {self._speed()}")
        return "\n".join(lines)


def _say(text: str) -> None:
    """What is not the model's goes to standard error, so that a pipe carries answers alone."""
    print(text, file=sys.stderr, flush=True)


def _lines(interactive: bool) -> Iterator[str]:
    """Turns from the keyboard, or from a pipe, one a line; a line that ends in a backslash goes on in the next one."""
    if not interactive:
        raw = iter(sys.stdin.readline, "")
        yield from _joined(line.rstrip("\r\n") for line in raw)
        return
    with _history():
        yield from _joined(_typed())


def _typed() -> Iterator[str]:
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            _say("\nCtrl-D or /exit leaves.")


def _joined(lines: Iterator[str]) -> Iterator[str]:
    parts: list[str] = []
    for line in lines:
        if line.endswith("\\"):
            parts.append(line[:-1])
            continue
        yield "\n".join([*parts, line])
        parts = []
    if parts:
        yield "\n".join(parts)


@contextlib.contextmanager
def _history() -> Iterator[None]:
    """Arrow keys and lines of earlier runs, where Python was built with readline."""
    try:
        import readline
    except ImportError:
        yield
        return
    from edgewise.formats.cache import cache_root

    path = cache_root() / "chat_history"
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(1000)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # a full disk must not cost the conversation its end
            path.touch(mode=0o600)
            readline.write_history_file(path)
