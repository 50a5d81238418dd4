"""edgewise run: answer a prompt with a language model, or embed it with an encoder."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgewise.cli import options as shared
from edgewise.cli.frame import current
from edgewise.core.errors import InvalidValueError, collect_notices, notice
from edgewise.core.report import Quantity, Report, Table

if TYPE_CHECKING:
    from edgewise.engine.generate import Generation, GenerationOptions, Token
    from edgewise.engine.model import LanguageModel

EXAMPLES = (
    'edgewise run smollm2 "What is a leaf?"',
    'edgewise run smollm2 "Name three rivers." --memory 90MB --max-tokens 60 --stats',
    "edgewise run model.gguf --file question.txt --temperature 0.7 --seed 1",
    'echo "Once upon a time" | edgewise run smollm2 --raw -n 40',
    'edgewise run smollm2 "Hi" --json --logprobs 3',
    'edgewise run minilm "a sentence" --json',
)

FIRST_VALUES = 8
"""Of an embedding, what a person is shown; --json has all."""


def command(
    model: shared.Model,
    prompt: Annotated[str | None, typer.Argument(metavar="[PROMPT]", help="What to say to the model. By default what "
                                                 "is piped in; - reads standard input.", show_default=False)] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="Read the prompt from a UTF-8 file.",
                                              show_default=False)] = None,
    system: Annotated[str | None, typer.Option("--system", help="What the model is told before the prompt.",
                                               show_default=False)] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it stands, without the chat template.",
                                      )] = False,
    embed: Annotated[bool, typer.Option("--embed", help="Print the prompt's embedding instead of an answer; an "
                                        "encoder always does.")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Print speed, memory, sampling and instruction tier to "
                                        "standard error.")] = False,
    *,
    sampled: shared.Sampling,
    logprobs: Annotated[int | None, typer.Option("--logprobs", min=0, max=100, help="Report each token's "
                                                 "log-probability, and this many of the likeliest tokens.",
                                                 rich_help_panel="Generation", show_default=False)] = None,
    overflow: shared.Overflow = "stop",
    loading: shared.Loading,
) -> Report | None:
    """Answer a prompt. The answer goes to standard output as it comes, everything else to standard error."""
    shared.check_overflow(overflow)
    text = prompt_text(prompt, file, raw)
    if raw and system is not None:
        raise InvalidValueError("--raw continues the text as it stands, so there is no place for --system; "
                                "leave one of them out")
    asked = sampled.given() | ({} if logprobs is None else {"logprobs": logprobs})
    with collect_notices(strict=current().strict) as notices:
        started = time.perf_counter()
        loaded = loading.load(model)
        load_s = time.perf_counter() - started
        if embed or loaded.kind == "encoder":
            given = [f"--{name.replace('_', '-')}" for name in asked]
            if given or system is not None:
                notice("ignored", f"an embedding has no use for {', '.join(given) or '--system'}", where="run")
            answer: dict[str, Any] = _embedding(loaded, text, model)
            report = None if current().json else _embedding_report(answer)
        else:
            options, source = shared.sampling(loaded, seed=sampled.seed, overflow=overflow, **asked)
            answer, report = _answer(loaded, text, system, raw, options, source, logprobs is not None, stats, load_s,
                                     model)
    if current().json:
        print(json.dumps({**answer, "notices": [item.to_json() for item in notices]}, ensure_ascii=False, indent=2))
    else:
        for item in notices:
            notice(item.kind, item.message, where=item.where)
    if answer.get("finish_reason") == "interrupted":
        raise KeyboardInterrupt
    return report


def prompt_text(prompt: str | None, file: Path | None, raw: bool) -> str:
    """The prompt from argument, file or standard input. Without `raw`, its last line end is not part of it."""
    if prompt is not None and file is not None:
        raise InvalidValueError("give the prompt as an argument or with --file, not both")
    if prompt is not None and prompt != "-":
        text = prompt
    else:
        if file is None and prompt is None and sys.stdin.isatty():
            raise InvalidValueError('there is no prompt; give it as an argument ("What is a leaf?"), with --file, or '
                                    "pipe it in; to talk, use: edgewise chat")
        text = _decoded(file)
        if not raw:
            text = text.removesuffix("\n").removesuffix("\r")
    if not text:
        raise InvalidValueError("the prompt is empty; give at least one character")
    return text


def _decoded(file: Path | None) -> str:
    data = sys.stdin.buffer.read() if file is None else file.read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidValueError(f"{file or 'standard input'}: byte {error.start} is not UTF-8; convert the text "
                                "first") from None


# ---- answers ------------------------------------------------------------------------------------------------------

def _answer(model: LanguageModel, text: str, system: str | None, raw: bool, options: GenerationOptions, source: str,
            logprobs: bool, stats: bool, load_s: float, name: str) -> tuple[dict[str, Any], Report | None]:
    turns = [{"role": "system", "content": system}] if system is not None else []
    turns.append({"role": "user", "content": text})
    generation = model.generate(turns if system is not None else text, options, raw=raw)
    tokens: list[Token] = []
    try:
        for token in generation:
            tokens.append(token)
            current().write(token.text)
    except KeyboardInterrupt:
        generation.finish_reason = "interrupted"
    finally:  # what was said ends its line, even where an error ends it
        if not current().json and generation.text and not generation.text.endswith("\n"):
            current().write("\n")
    if stats:
        _print_stats(model, generation, options, source, load_s)
    chosen = [token for token in tokens if token.id is not None]  # the last may carry text and no token of its own
    answer = {
        "model": name, "arch": model.checkpoint.arch, "text": generation.text, "ids": generation.ids,
        "finish_reason": generation.finish_reason,
        "usage": {"prompt_tokens": generation.prompt_tokens, "completion_tokens": len(generation.ids),
                  "total_tokens": generation.prompt_tokens + len(generation.ids),
                  "reused_tokens": generation.reused_tokens},
        "timings": {"load_s": load_s, "prefill_s": generation.prefill_s, "decode_s": generation.decode_s,
                    "prefill_tokens_per_s": shared.rate(generation.prompt_tokens - generation.reused_tokens,
                                                        generation.prefill_s),
                    "decode_tokens_per_s": shared.rate(len(generation.ids), generation.decode_s)},
        "logprobs": [_logprob(model, token) for token in chosen] if logprobs else None,
        "sampling": {"from": source, "temperature": options.temperature, "top_k": options.top_k,
                     "top_p": options.top_p, "min_p": options.min_p,
                     "repetition_penalty": options.repetition_penalty, "seed": options.seed},
        **_described(model),
    }
    report = None
    if logprobs and not current().json:
        rows = tuple((item["token"], item["logprob"], "  ".join(f"{a['token']!r} {a['logprob']:.3f}"
                                                                for a in item["alternatives"]))
                     for item in answer["logprobs"])
        report = Report("Log-probabilities", tables=(Table("Tokens", ("token", "logprob", "likeliest"), rows),))
    return answer, report


def _described(model: LanguageModel) -> dict[str, Any]:
    memory = model.memory
    return {"tier": model.tier, "threads": int(model.session.threads), "context": model.context, "kv": model.kv,
            "tuning": model.tuning.changed,
            "memory": {"weights_bytes": memory.weights_bytes, "kv_bytes": memory.kv_bytes,
                       "scratch_bytes": memory.scratch_bytes, "total_bytes": memory.total_bytes}}


def _logprob(model: LanguageModel, token: Token) -> dict[str, Any]:
    def spelled(token_id: int) -> str:
        return model.tokenizer.decode([token_id], skip_special=False) if model.tokenizer is not None else str(token_id)

    return {"id": token.id, "token": spelled(token.id), "logprob": token.logprob,
            "alternatives": [{"id": i, "token": spelled(i), "logprob": p} for i, p in token.alternatives]}


def _print_stats(model: LanguageModel, generation: Generation, options: GenerationOptions, source: str,
                 load_s: float) -> None:
    def speed(tokens: int, seconds: float) -> str:
        per_s = shared.rate(tokens, seconds)
        return f"{tokens} tokens in {seconds:.3f} s" + ("" if per_s is None else f", {per_s:.1f} tokens/s")

    read = generation.prompt_tokens - generation.reused_tokens
    for label, value in (
            ("load", f"{load_s:.3f} s"),
            ("prefill", speed(read, generation.prefill_s)),
            ("decode", speed(len(generation.ids), generation.decode_s)),
            ("ended", str(generation.finish_reason)),
            ("sampling", shared.sampling_line(options, source)),
            ("memory", shared.memory_line(model)),
            ("tier", f"{model.tier}, {model.session.threads} threads")):
        print(f"{label:9}{value}", file=sys.stderr)


# ---- embeddings ---------------------------------------------------------------------------------------------------

def _embedding(model: LanguageModel, text: str, name: str) -> dict[str, Any]:
    pooling = str((model.checkpoint.metadata.get("pooling") or {}).get("mode", "mean"))
    row = model.embed(text)[0]
    return {"model": name, "arch": model.checkpoint.arch, "embedding": [float(value) for value in row],
            "dimensions": len(row), "pooling": pooling, "normalised": True,
            "usage": {"prompt_tokens": len(model.encode(text))}, **_described(model)}


def _embedding_report(answer: dict[str, Any]) -> Report:
    first = ", ".join(f"{value:.4f}" for value in answer["embedding"][:FIRST_VALUES])
    return Report(f"Embedding by {answer['model']}", (
        Quantity("dimensions", answer["dimensions"]), Quantity("tokens", answer["usage"]["prompt_tokens"]),
        Quantity("pooling", f"{answer['pooling']}, length 1"),
        Quantity("first values", f"{first}, ... (all of them with --json)"), Quantity("tier", answer["tier"])))
