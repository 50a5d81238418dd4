"""A conversation with a model: turns, what to do when they no longer fit, and keeping them in a file.

    talk = Conversation(model, GenerationOptions(overflow="restart"), system="Be brief.")
    for token in talk.say("What is a leaf?"):
        print(token.text, end="")

Each turn renders the whole conversation; the engine reads only what it does not hold already.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgewise.core.errors import FormatError, InvalidValueError, UnsupportedError, notice
from edgewise.engine.generate import Generation, GenerationOptions, Token
from edgewise.formats.cache import write_aside
from edgewise.formats.hostile import read_json

if TYPE_CHECKING:
    from edgewise.engine.model import LanguageModel

__all__ = ["Conversation"]

_FILE_LIMIT_BYTES = 16_000_000
_KIND = "edgewise conversation"


class Conversation:
    """messages: the turns so far, without the system message. last: the newest Generation.

    With overflow="restart" the oldest turns are dropped, with a notice, when a prompt and the room for its answer no
    longer fit: at once down to half of the context, so that it does not happen again at every turn.
    """

    def __init__(self, model: LanguageModel, options: GenerationOptions | None = None, *,
                 system: str | None = None) -> None:
        if model.kind != "decoder":
            what = "gives embeddings" if model.kind == "encoder" else "answers one text at a time: use generate(text)"
            raise UnsupportedError(f"a conversation needs a decoder; {model.checkpoint.source} is an {model.kind} "
                                   f"({model.checkpoint.arch}), which {what}")
        self.model = model
        self.options = options or GenerationOptions(overflow="restart")
        self.system = system
        self.messages: list[dict[str, str]] = []
        self.last: Generation | None = None

    def say(self, text: str) -> Iterator[Token]:
        """The answer, token by token. Ended early, by closing the iterator or by an error amid the answer, what was
        said is kept; when nothing could be said at all, the question is dropped too."""
        self.messages.append({"role": "user", "content": text})
        generation: Generation | None = None
        try:
            ids = self._prompt()
            generation = self.model.generate(ids, self._options())
            self.last = generation
            yield from generation
        finally:
            if generation is not None and (generation.finish_reason or generation.prefill_s > 0):
                generation.finish_reason = generation.finish_reason or "interrupted"
                self.messages.append({"role": "assistant", "content": generation.text})
            else:
                self.messages.pop()

    def reset(self) -> None:
        """Forget every turn; the system message stays."""
        self.messages.clear()
        self.last = None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the conversation as JSON. Only a saved conversation is replaced."""
        target = Path(path)
        if target.exists():
            try:
                self._read(target)
            except (FormatError, OSError):
                raise InvalidValueError(f"{target} exists and is not a saved conversation; choose another name"
                                        ) from None
        data = {"kind": _KIND, "model": self.model.checkpoint.source, "system": self.system, "messages": self.messages}
        with write_aside(target, overwrite=True) as file:
            file.write((json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode("utf-8"))

    def load(self, path: str | os.PathLike[str]) -> None:
        """Go on with a saved conversation, its system message included."""
        data = self._read(Path(path))
        self.system, self.messages, self.last = data["system"], data["messages"], None

    @staticmethod
    def _read(path: Path) -> dict[str, Any]:
        data = read_json(path, _FILE_LIMIT_BYTES)
        messages, system = data.get("messages"), data.get("system")
        if data.get("kind") != _KIND or not isinstance(messages, list) or not isinstance(system, str | None):
            raise FormatError("this is not a saved conversation; expected what /save or Conversation.save writes",
                              path=path)
        for number, message in enumerate(messages):
            role = ("user", "assistant")[number % 2]
            if (not isinstance(message, dict) or set(message) != {"role", "content"} or message["role"] != role
                    or not isinstance(message["content"], str)):
                raise FormatError(f"message {number} of the conversation is malformed; expected the {role}'s role and "
                                  "content", path=path)
        if len(messages) % 2:
            raise FormatError("the conversation ends without an answer", path=path)
        return data

    def _prompt(self) -> list[int]:
        """Token ids of everything said; with overflow="restart" shortened so that an answer has room."""
        ids = self._ids(self.messages)
        if self.options.overflow != "restart":
            return ids
        context = self.model.context
        room = min(self.options.max_tokens or context // 4, context // 4)
        if len(ids) + room <= context:
            return ids
        before = len(self.messages)
        while len(ids) > context // 2 and len(self.messages) > 2:
            del self.messages[:2]  # what was asked and what was answered, together
            ids = self._ids(self.messages)
        if len(self.messages) < before:
            notice("truncation", f"the conversation no longer fits the context of {context} positions: its "
                   f"{before - len(self.messages)} oldest messages were dropped", where="context")
        return ids

    def _ids(self, messages: Sequence[dict[str, str]]) -> list[int]:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return self.model.prompt_ids([*system, *messages])

    def _options(self) -> GenerationOptions:
        """The options, with `keep` such that a restart amid an answer keeps what stands before the first turn."""
        if self.options.overflow != "restart" or self.options.keep:
            return self.options
        a, b = (self._ids([{"role": "user", "content": text}]) for text in ("a", "b"))
        same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), 0)
        return replace(self.options, keep=same)
