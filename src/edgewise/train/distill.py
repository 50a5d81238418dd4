"""Distillation: a student learns the next-token distributions of its teacher, on text or on what it says itself.

    forward  KL(p || q) = sum p (log p - log q)    Hinton et al., 2015, arXiv:1503.02531, section 2: cover all that p
    reverse  KL(q || p) = sum q (log q - log p)    MiniLLM, Gu et al., ICLR 2024, arXiv:2306.08543, equation 1: keep to
                                                   what p finds likely

with p of the teacher and q of the student at one temperature, a mean over positions, times the temperature squared.

On policy (GKD, Agarwal et al., ICLR 2024, arXiv:2306.13649, Algorithm 1): with probability `on_policy` a batch is not
text but what the student samples after the beginnings of texts, and the loss is that of the sampled positions. No
gradient goes through the sampling.

Differs from MiniLLM: its gradient also follows how a sampled token changes what comes later (its equations 2 to 5, with
a teacher-mixed policy, length normalisation and a text loss beside); here every position counts by itself, as in GKD.

What heals a pruned model keeps its zeros: a weight of a layer that has them keeps them where `keep_zeros` says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgewise.core.checkpoint import Checkpoint, Step
from edgewise.core.errors import InvalidValueError
from edgewise.models.decoding import continued
from edgewise.models.loader import checkpoint_of, load
from edgewise.train.kept import Kept

__all__ = ["Distill", "distill", "forward_kl", "reverse_kl"]

Progress = Callable[[str, int, int], None]
Ids = NDArray[np.integer[Any]]
_PRUNED = 0.01
"""A matrix with more zeros than this share was pruned."""


@dataclass(frozen=True)
class Distill:
    """steps of `batch` windows of `length` tokens. prompt: tokens of text before what the student says itself.

    rate: of AdamW, after `warmup` of the steps, falling to zero along a cosine.
    """

    direction: Literal["forward", "reverse"] = "forward"
    temperature: float = 1.0
    on_policy: float = 0.0      # lambda of GKD; its paper trains with 0, 0.5 and 1
    steps: int = 200
    batch: int = 8
    length: int = 256
    prompt: int = 64
    rate: float = 1e-4
    warmup: float = 0.1
    decay: float = 0.0
    clip: float = 1.0           # of the norm of all gradients
    keep_zeros: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.direction not in ("forward", "reverse"):
            raise InvalidValueError(f"direction is forward or reverse; given {self.direction!r}")
        if not (self.temperature > 0 and 0 <= self.on_policy <= 1 and 0 <= self.warmup < 1 and self.rate > 0
                and self.clip > 0):
            raise InvalidValueError("temperature, rate and clip are above 0, on_policy and warmup are shares; given "
                                    f"{self}")
        if min(self.steps, self.batch) < 1 or self.length < 2 or not 1 <= self.prompt < self.length:
            raise InvalidValueError(f"steps and batch are at least 1, length at least 2, and a prompt shorter than "
                                    f"that; given {self}")


def forward_kl(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """(...,): KL(p || q) of each position. teacher, student: logits (..., vocab)."""
    p, q = (torch.log_softmax(logits.float() / temperature, dim=-1) for logits in (teacher, student))
    return (p.exp() * (p - q)).sum(dim=-1) * temperature**2


def reverse_kl(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """(...,): KL(q || p) of each position. teacher, student: logits (..., vocab)."""
    return forward_kl(student, teacher, temperature)


def distill(student: Checkpoint, teacher: Checkpoint, token_ids: Ids, config: Distill = Distill(), *,
            progress: Progress | None = None, state: Path | None = None) -> Checkpoint:
    """The student after `config.steps` steps, in float32. token_ids: (n,) of a text, at least one window.

    state: a folder in which a killed run is kept and goes on, with the same steps as one that was not killed.
    """
    ids = np.asarray(token_ids).reshape(-1)
    if len(ids) < config.length + 1:
        raise InvalidValueError(f"a window has {config.length} tokens, and the text {len(ids)}; give a longer one, or "
                                "a shorter length")
    sizes = [checkpoint.config.get("vocab_size") for checkpoint in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise InvalidValueError(f"student and teacher have one vocabulary; given {sizes[0]} and {sizes[1]} tokens")
    torch.manual_seed(config.seed)
    guide: Any = load(teacher).requires_grad_(False)
    model: Any = load(student).requires_grad_(True).train()
    masks = _masks(model) if config.keep_zeros else {}
    optimiser = torch.optim.AdamW(model.parameters(), lr=config.rate, betas=(0.9, 0.95), weight_decay=config.decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rate(step, config))
    kept = Kept(state, {**asdict(config), "student": student.source, "teacher": teacher.source, "tokens": len(ids)},
                [model, optimiser, schedule])
    measure = forward_kl if config.direction == "forward" else reverse_kl
    for step in range(kept.load(), config.steps):
        rng = np.random.default_rng((config.seed, step))  # of this step alone: a killed run goes on as it would have
        windows = torch.from_numpy(_windows(ids, config, rng))
        first = 0
        if rng.random() < config.on_policy:
            first = config.prompt - 1  # the last position of the prompt says the first token
            windows = sampled(model, windows[:, :config.prompt], config.length - config.prompt, config.temperature,
                              int(rng.integers(2**62)))
        with torch.no_grad():
            wanted = guide(windows, use_cache=False).logits[:, first:]
        loss = measure(wanted, model(windows, use_cache=False).logits[:, first:], config.temperature).mean()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            for parameter, mask in masks.values():
                parameter.mul_(mask)
        kept.save(step + 1)
        if progress is not None:
            progress(f"distilling, KL {loss.item():.4f}", step + 1, config.steps)
    kept.save(config.steps, last=True)
    made = Step("distill", {**asdict(config), "teacher": teacher.source, "tokens": len(ids)}, _version(), config.seed)
    return checkpoint_of(model.eval(), student, made)


@torch.no_grad()
def sampled(model: Any, prompts: Tensor, count: int, temperature: float, seed: int) -> Tensor:
    """(batch, prompt + count): the prompts and what the model says after them. prompts: (batch, prompt) token ids."""
    generator = torch.Generator().manual_seed(seed)
    tokens, cache, fresh = prompts, None, prompts
    training = model.training
    model.eval()
    for _ in range(count):
        logits, cache = continued(model, fresh, cache)
        chances = torch.softmax(logits[:, -1].float() / temperature, dim=-1)
        fresh = torch.multinomial(chances, 1, generator=generator)
        tokens = torch.cat([tokens, fresh], dim=1)
    model.train(training)
    return tokens


def _windows(ids: Ids, config: Distill, rng: np.random.Generator) -> NDArray[np.int64]:
    starts = rng.integers(0, len(ids) - config.length + 1, config.batch)
    return np.stack([ids[start:start + config.length] for start in starts]).astype(np.int64)


def _rate(step: int, config: Distill) -> float:
    warm = config.warmup * config.steps
    if step < warm:
        return (step + 1) / (warm + 1)
    return float(0.5 * (1 + np.cos(np.pi * (step - warm) / max(config.steps - warm, 1))))


def _masks(model: nn.Module) -> dict[str, tuple[nn.Parameter, Tensor]]:
    """Of every pruned matrix of a layer: itself, and where it is not zero."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and ".layers." in f".{name}":
            mask = parameter != 0
            if 1 - mask.float().mean().item() > _PRUNED:
                found[name] = (parameter, mask)
    return found


def _version() -> str:
    from edgewise import __version__

    return __version__
