"""Conversations to prompts, by the model's own Jinja template.

    template = chat_template_of(checkpoint, tokenizer)
    prompt = template.render([{"role": "user", "content": "Hello"}])

Renders as transformers' apply_chat_template does: blocks trimmed, loop controls, `raise_exception`, `tojson`,
`strftime_now`, `{% generation %}`. A template is a program by a stranger. It runs in Jinja's sandbox, and in a bounded
amount of work: every loop step, call, concatenation and character of output is charged to a budget, and what could
make a lot out of a little (repetition, padding, powers) is checked before it is done.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import field
from functools import cached_property
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes as nodes
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from edgewise.core.checkpoint import Checkpoint
from edgewise.core.errors import EdgewiseError, FormatError, InvalidValueError, notice
from edgewise.core.values import dataclass
from edgewise.data.tokenizer import Tokenizer, named_tokens

__all__ = ["ChatError", "ChatTemplate", "Message", "chat_template_of"]

Message = Mapping[str, Any]
"""{"role": "system" | "user" | "assistant" | "tool", "content": str, ...}; further keys reach the template."""

MAX_SOURCE_CHARACTERS = 1_000_000
MAX_VALUE = 2**22
"""Most characters of a prompt and of any value in a template; an item of a list counts as ITEM_WORK characters."""
MAX_WORK = 2**25
"""Work of a rendering, in units of a character; each character of the messages adds WORK_PER_CHARACTER."""
WORK_PER_CHARACTER = 64
STEP_WORK = 128
"""What a step of a loop and a call cost."""
ITEM_WORK = 16
"""What handling an item of a list costs."""
MAX_INTEGER_BITS = 4_096


class ChatError(EdgewiseError):
    """A template that refused its messages, failed, or did too much; the message names the template's line."""

    exit_code = 2


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template and the tokens it may name.

    source: Jinja. tool_source: the template for conversations with tools, where a model has one of its own.
    tokens: bos_token, eos_token, unk_token, ... as the template spells them.
    where: the model, for messages.
    """

    source: str
    tokens: Mapping[str, str] = field(default_factory=dict)
    tool_source: str | None = None
    where: str = "chat template"

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True,
               tools: Sequence[Mapping[str, Any]] | None = None, **variables: Any) -> str:
        """The prompt for a conversation.

        add_generation_prompt: end with what starts the assistant's turn.
        tools: JSON schemas. variables: what else the template reads (enable_thinking, documents, ...).
        Raises ChatError when the template fails, and InvalidValueError for malformed messages.
        """
        plain = _plain_messages(messages)
        given = {"messages": plain, "tools": _plain(tools), "documents": _plain(variables.pop("documents", None)),
                 "add_generation_prompt": add_generation_prompt, **self.tokens, **_plain(variables)}
        budget = _Budget(MAX_WORK + WORK_PER_CHARACTER * _characters(given))
        token = _budget.set(budget)
        try:
            template = self._tool_compiled if tools is not None and self.tool_source else self._compiled
            return self._run(template, given)
        finally:
            _budget.reset(token)

    def _run(self, template: jinja2.Template, given: Mapping[str, Any]) -> str:
        try:
            return "".join(_limited(template.generate(given)))
        except EdgewiseError:
            raise
        # A template can raise any exception that Python has: division by zero, a missing key, endless recursion.
        except (Exception, RecursionError) as error:
            raise ChatError(self._message(error, _line_of(error))) from error

    @cached_property
    def _compiled(self) -> jinja2.Template:
        return self._compile(self.source)

    @cached_property
    def _tool_compiled(self) -> jinja2.Template:
        return self._compile(self.tool_source or self.source)

    def _compile(self, source: str) -> jinja2.Template:
        if len(source) > MAX_SOURCE_CHARACTERS:
            raise ChatError(f"{self.where}: the chat template has {len(source)} characters; at most "
                            f"{MAX_SOURCE_CHARACTERS} are read")
        try:
            return _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ChatError(self._message(error, error.lineno)) from error
        except (Exception, RecursionError) as error:  # Python's own compiler refuses what is nested too deeply
            raise ChatError(self._message(error, None)) from error

    def _message(self, error: BaseException, line: int | None) -> str:
        text = " ".join(str(error).split())[:300] or type(error).__name__
        place = "" if line is None else f" at line {line}"
        what = "does what a template may not" if isinstance(error, SecurityError) else "failed"
        return f"{self.where}: the chat template {what}{place}: {text}"


def chat_template_of(checkpoint: Checkpoint, tokenizer: Tokenizer | None = None) -> ChatTemplate:
    """The chat template of a checkpoint, or a plain one, with a notice, where it has none.

    metadata["chat_template"]: Jinja source, or sources by name ("default", "tool_use") as a mapping or as a list of
    {"name", "template"}. The plain template writes the system message, then "User: ..." and "Assistant: ..."
    paragraphs.
    """
    stored = checkpoint.metadata.get("chat_template")
    where = checkpoint.source or "model"
    tokens = _token_variables(checkpoint, tokenizer)
    if isinstance(stored, (list, tuple)):
        stored = {str(item.get("name")): item.get("template") for item in stored if isinstance(item, Mapping)}
    if isinstance(stored, Mapping):
        named = {str(name): source for name, source in stored.items() if isinstance(source, str)}
        if not named:
            raise FormatError("the chat template is a mapping without any template in it", path=where)
        default = named.get("default", next(iter(named.values())))
        return ChatTemplate(default, tokens, named.get("tool_use"), where)
    if isinstance(stored, str) and stored.strip():
        return ChatTemplate(stored, tokens, where=where)
    if stored is not None and not isinstance(stored, str):
        raise FormatError(f"the chat template should be text; given {type(stored).__name__}", path=where)
    notice("fallback", "the model has no chat template; messages are written as plain 'User:' and 'Assistant:' "
                       "paragraphs, which it was not trained on", where=where)
    return ChatTemplate(PLAIN_TEMPLATE, tokens, where=where)


PLAIN_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message.role == 'system' %}{{ message.content + '\\n\\n' }}"
    "{% else %}{{ message.role | capitalize + ': ' + message.content + '\\n\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def _token_variables(checkpoint: Checkpoint, tokenizer: Tokenizer | None) -> dict[str, str]:
    """bos_token, eos_token, ... as text. An absent one is undefined in the template, as in transformers."""
    stored = checkpoint.metadata.get("tokenizer")
    keys = stored if isinstance(stored, Mapping) else {}
    generation = checkpoint.metadata.get("generation")
    settings = [s for s in (generation, checkpoint.config) if isinstance(s, Mapping)]
    tokens = named_tokens(checkpoint)
    if tokens or tokenizer is None:  # what tokenizer_config.json leaves out is meant to be absent
        return tokens
    for name, gguf_name in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        ids = [keys.get(f"tokenizer.ggml.{gguf_name}_token_id"), *(s.get(f"{name}_token_id") for s in settings)]
        if name == "bos":
            ids.append(tokenizer.bos_id)
        first = next((i[0] if isinstance(i, (list, tuple)) and i else i for i in ids if i is not None), None)
        if isinstance(first, int) and 0 <= first < tokenizer.vocab_size:
            text = tokenizer.id_to_token(first)
            if text is not None:
                tokens[f"{name}_token"] = text
    return tokens


def _plain_messages(messages: Sequence[Message]) -> list[Any]:
    if isinstance(messages, (str, bytes, Mapping)):
        raise InvalidValueError(f"messages are a list of {{'role', 'content'}}; given {type(messages).__name__}")
    for place, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InvalidValueError(f"message {place} should be a mapping with a 'role' and a 'content'; "
                                    f"given {str(message)[:60]!r}")
    return [_with_reasoning(_plain(message)) for message in messages]


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Templates read an assistant's reasoning under one of two names, and callers write it under three."""
    names = ("reasoning_content", "thinking", "reasoning")
    reasoning = next((message[name] for name in names if message.get(name) is not None), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _plain(value: Any) -> Any:
    """The value rebuilt of plain JSON types, so that a template never holds an object with methods of its own."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    for kind in (str, bool, int, float):
        if isinstance(value, kind):
            return kind(value)
    return f"<{type(value).__name__}>"


def _characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(len(k) + _characters(v) for k, v in value.items())
    return sum(map(_characters, value)) if isinstance(value, list) else 1


def _line_of(error: BaseException) -> int | None:
    """The line of the template in which an error arose: Jinja rewrites the traceback to template lines."""
    line, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>" or trace.tb_frame.f_code.co_filename == "<unknown>":
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


# --- bounded work -----------------------------------------------------------------------------------------------


@dataclass
class _Budget:
    """What a rendering may still do."""

    left: int

    def spend(self, amount: int) -> None:
        self.left -= amount
        if self.left < 0:
            raise SecurityError("it does more work than a chat template may; is there an endless loop?")


_budget: ContextVar[_Budget | None] = ContextVar("edgewise_chat_budget", default=None)


def _spend(amount: int) -> None:
    budget = _budget.get()
    if budget is not None:
        budget.spend(amount)


def _size(value: Any) -> int:
    return len(value) if isinstance(value, (str, bytes, list, tuple, dict, set)) else 0


def _work(value: Any) -> int:
    """What handling a value costs: an item of a list is worth several characters."""
    return _size(value) if isinstance(value, (str, bytes)) else ITEM_WORK * _size(value)


def _checked(value: Any) -> Any:
    """The value itself, charged by its size."""
    work = _work(value)
    if work > MAX_VALUE:
        raise SecurityError(f"it makes a value of {_size(value)} characters or items, which is too large")
    if isinstance(value, int) and value.bit_length() > MAX_INTEGER_BITS:
        raise SecurityError(f"it makes an integer of {value.bit_length()} bits; at most {MAX_INTEGER_BITS}")
    _spend(STEP_WORK + work)
    return value


def _limited(pieces: Iterator[str]) -> Iterator[str]:
    total = 0
    for piece in pieces:
        total += len(piece)
        if total > MAX_VALUE:
            raise SecurityError(f"its output exceeds {MAX_VALUE} characters")
        yield piece


def _metered(items: Any, work: int) -> Iterator[Any]:
    """The items of a loop, each charged. work: the characters of constant text in the loop's body."""
    for item in items:
        _spend(STEP_WORK + work)
        yield item


_AMPLIFIERS = frozenset({"replace", "join", "center", "ljust", "rjust", "zfill", "expandtabs", "indent", "batch",
                         "slice", "format", "format_map", "translate", "tojson"})
"""Methods and filters whose result may be as large as the product of two arguments."""


def _refuse_amplification(name: str, arguments: Sequence[Any]) -> None:
    """Raises for a call whose result may be far larger than its arguments, by the product of the two largest."""
    if name not in _AMPLIFIERS:
        return
    sizes = sorted((abs(a) if isinstance(a, int) and not isinstance(a, bool) else _size(a) for a in arguments),
                   reverse=True)
    widths = [_longest_number(a) for a in arguments if isinstance(a, str)] if name in ("format", "format_map") else []
    if max([_product(sizes[:2]), *widths], default=0) > 4 * MAX_VALUE:
        raise SecurityError(f"{name}() with arguments of sizes {sizes[:3]} would make too large a value")


def _product(sizes: Sequence[int]) -> int:
    first, second = (*sizes, 1, 1)[:2]
    return max(first, 1) * max(second, 1)


def _longest_number(text: str) -> int:
    """The largest number written in a format string, which may be a width."""
    digits = "".join(c if c in "0123456789" else " " for c in text).split()
    return max((int(d) if len(d) < 10 else 10**10 for d in digits), default=0)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox with every operation charged."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            # A number of times something: an integer, or a sequence repeated.
            for one, other in ((left, right), (right, left)):
                if isinstance(one, int) and _work(other) * abs(one) > MAX_VALUE:
                    raise SecurityError(f"it repeats {_size(other)} characters or items {one} times")
        if operator == "**" and isinstance(left, int) and isinstance(right, int) \
                and left.bit_length() * abs(right) > MAX_INTEGER_BITS:
            raise SecurityError("it makes a power that is too large")
        if operator == "%" and isinstance(left, (str, bytes)):
            values = right if isinstance(right, tuple) else (right,)
            _refuse_amplification("format", [str(left), *values])
        return _checked(super().call_binop(context, operator, left, right))

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(function, "__self__", None)
        arguments = [owner, *args, *kwargs.values()]
        _spend(STEP_WORK + sum(map(_work, arguments)))
        if isinstance(owner, (str, bytes, list, dict)):
            _refuse_amplification(getattr(function, "__name__", ""), arguments)
        return _checked(super().call(context, function, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Any:
        safe = super().wrap_str_format(value)
        if safe is None:
            return None
        pattern = str(value.__self__)

        def checked(*args: Any, **kwargs: Any) -> str:
            _refuse_amplification("format", [pattern, *args, *kwargs.values()])
            return str(safe(*args, **kwargs))

        return checked

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        _charge(tree)
        return tree


def _charge(tree: nodes.Template) -> None:
    """Rewrites a parsed template: loops are metered; joined strings, slices and captured blocks are checked."""
    for loop in list(tree.find_all(nodes.For)):
        work = sum(len(data.data) for data in loop.find_all(nodes.TemplateData))
        loop.iter = _filter(loop.iter, "_metered", [nodes.Const(work, lineno=loop.lineno)])
    for block in tree.find_all(nodes.AssignBlock):
        block.filter = _filter(block.filter, "_checked", [])
    # A comparison looks through both of its sides.
    for comparison in list(tree.find_all(nodes.Compare)):
        comparison.expr = _filter(comparison.expr, "_checked", [])
        for operand in comparison.ops:
            operand.expr = _filter(operand.expr, "_checked", [])
    _wrap_copies(tree)


def _wrap_copies(node: nodes.Node) -> None:
    """Puts every expression that copies its operands, a ~ b and a[b:c], into the filter that charges its result."""

    def wrapped(value: Any) -> Any:
        copies = isinstance(value, nodes.Concat) or (
            isinstance(value, nodes.Getitem) and isinstance(value.arg, nodes.Slice))
        return _filter(value, "_checked", []) if copies else value

    for child in list(node.iter_child_nodes()):
        _wrap_copies(child)
    for name, value in list(node.iter_fields()):
        setattr(node, name, [wrapped(v) for v in value] if isinstance(value, list) else wrapped(value))


def _filter(node: Any, name: str, arguments: list[Any]) -> nodes.Filter:
    return nodes.Filter(node, name, arguments, [], None, None, lineno=getattr(node, "lineno", 1))


def _guarded(name: str, function: Any) -> Callable[..., Any]:
    """A filter or test of Jinja, charged and checked. The marks that tell Jinja what to pass to it are kept."""

    def guarded(*args: Any, **kwargs: Any) -> Any:
        arguments = [*args, *kwargs.values()]
        _spend(sum(map(_work, arguments)))
        _refuse_amplification(name, arguments)
        return _checked(function(*args, **kwargs))

    guarded.__dict__.update(getattr(function, "__dict__", {}))
    return guarded


class _Namespace(jinja2.utils.Namespace):
    """namespace() without private names, which lead to Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # a template may pass self= as a name
        self, given = args[0], dict(*args[1:], **kwargs)
        for name in given:
            _Namespace._refuse_private(name)
        jinja2.utils.Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: Any) -> None:
        _Namespace._refuse_private(name)
        super().__setitem__(name, value)

    @staticmethod
    def _refuse_private(name: str) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"it stores the private name {name!r} in a namespace")


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %} marks what the assistant wrote, for training; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012  Jinja's own declaration

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_same"), [], [], body).set_lineno(line)

    def _same(self, caller: Callable[[], str]) -> str:
        return caller()


def _raise_exception(message: Any) -> None:
    raise jinja2.TemplateError(str(message))


def _now(pattern: str) -> str:
    from datetime import datetime

    return datetime.now().strftime(pattern)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None,
             separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
    # Jinja's own filter escapes for HTML, which a prompt is not.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@jinja2.pass_context
def _finalize(context: Any, value: Any) -> Any:
    # Taking the context keeps Jinja from evaluating constant expressions while compiling, outside of any budget.
    _spend(_size(value))
    return value


def _environment() -> _Environment:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, optimized=False, finalize=_finalize,
                               extensions=[_Generation, jinja2.ext.loopcontrols], autoescape=False, cache_size=0)
    environment.filters["tojson"] = _to_json
    environment.filters = {name: _guarded(name, function) for name, function in environment.filters.items()}
    environment.tests = {name: _guarded(name, function) for name, function in environment.tests.items()}
    environment.filters["_metered"] = _metered
    environment.filters["_checked"] = _checked
    environment.globals = {
        "range": environment.globals["range"], "dict": lambda *a, **k: dict(*a, **k), "cycler": jinja2.utils.Cycler,
        "joiner": jinja2.utils.Joiner, "namespace": _Namespace, "raise_exception": _raise_exception,
        "strftime_now": _now,
    }
    return environment
