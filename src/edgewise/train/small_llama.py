"""A small Llama trained on the offline text: a model with something to lose that a recipe can train again.

`small_llama(SmallLlama())` trains once, in minutes on one core, and keeps the folder in the cache, keyed by its
settings and by the hash of its text; later calls read it. The tokenizer is a byte-level BPE of the same text.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgewise import __version__
from edgewise.core.checkpoint import Checkpoint, Step
from edgewise.core.errors import InvalidValueError
from edgewise.core.storage import Dense
from edgewise.data.texts import Text, text
from edgewise.formats.cache import cache_root, locked
from edgewise.formats.folder import is_model_folder, read_folder
from edgewise.formats.folder_writer import write_folder

__all__ = ["SmallLlama", "batches", "llama_of", "small_llama", "token_ids"]

Progress = Callable[[str, int, int], None]
_SPECIAL = ("<s>", "</s>")
_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
"""It knows no talk: messages are text."""
_BYTES = 256
_LONGEST_TEXT = 3_000_000
"""Characters that the tokenizer and the model learn from."""


@dataclass(frozen=True)
class SmallLlama:
    """Shape and training. hidden, width: of the residual stream and the feed-forward. text: see data.texts."""

    hidden: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    width: int = 256
    vocab: int = 2048
    context: int = 128
    steps: int = 600
    batch: int = 16
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    seed: int = 0
    text: str = "wikipedia_pages/training"

    def __post_init__(self) -> None:
        if self.hidden % self.heads or self.heads % self.kv_heads or self.vocab < _BYTES + len(_SPECIAL):
            raise InvalidValueError("heads divide hidden, kv_heads divide heads, and a vocabulary has "
                                    f"{_BYTES + len(_SPECIAL)} tokens or more; given {self}")


def small_llama(config: SmallLlama = SmallLlama(), *, progress: Progress | None = None) -> Checkpoint:
    """The trained model, from the cache if it was trained before. Needs torch and transformers."""
    source = text(config.text)
    key = hashlib.sha256(json.dumps([asdict(config), source.sha256, __version__, torch.__version__],
                                    sort_keys=True).encode()).hexdigest()[:24]
    folder = cache_root() / "trained" / f"llama-{key}"
    with locked(folder.with_suffix(".lock")):
        if not is_model_folder(folder):
            write_folder(_train(config, source, progress), folder)
    return read_folder(folder)


def llama_of(checkpoint: Checkpoint) -> Any:
    """The transformers model of a dense Llama checkpoint, float32, in evaluation mode."""
    import transformers

    known = transformers.LlamaConfig().to_dict()
    config = {key: value for key, value in checkpoint.config.items() if key in known}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config, attn_implementation="eager"))
    state = {name: torch.from_numpy(np.array(checkpoint.tensors[name].dense())) for name in checkpoint.tensors}
    tied = {"lm_head.weight": state["model.embed_tokens.weight"]} if "lm_head.weight" not in state else {}
    model.load_state_dict({**state, **tied})
    return model.float().eval()


def token_ids(checkpoint: Checkpoint, name: str) -> NDArray[np.int64]:
    """A text (see data.texts) in the model's tokens, without special ones, (n,) int64."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(checkpoint.metadata["tokenizer"].decode("utf-8"))
    return np.array(tokenizer.encode(text(name).content[:_LONGEST_TEXT], add_special_tokens=False).ids, np.int64)


def batches(ids: NDArray[np.int64], batch: int, length: int, seed: int) -> Iterator[Tensor]:
    """Endless random excerpts of a text: (batch, length) int64."""
    if len(ids) <= length:
        raise InvalidValueError(f"excerpts of {length} tokens need a longer text; it has {len(ids)}; give more text")
    rng = np.random.default_rng(seed)
    while True:
        starts = rng.integers(0, len(ids) - length, batch)
        yield torch.from_numpy(np.stack([ids[start:start + length] for start in starts]))


def _train(config: SmallLlama, source: Text, progress: Progress | None) -> Checkpoint:
    import transformers

    content = source.content[:_LONGEST_TEXT]
    tokenizer = _tokenizer(content, config.vocab)
    ids = np.array(tokenizer.encode(content, add_special_tokens=False).ids, np.int64)
    shape = transformers.LlamaConfig(
        vocab_size=config.vocab, hidden_size=config.hidden, intermediate_size=config.width,
        num_hidden_layers=config.layers, num_attention_heads=config.heads, num_key_value_heads=config.kv_heads,
        max_position_embeddings=4 * config.context, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1,
        rms_norm_eps=1e-5, attn_implementation="eager")
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model = transformers.LlamaForCausalLM(shape).float().train()
        optimiser = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.95),
                                      weight_decay=config.weight_decay)
        warm = max(config.steps // 20, 1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min(
            (step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * step / config.steps)))
        source_of_batches = batches(ids, config.batch, config.context, config.seed)
        for step in range(config.steps):
            part = next(source_of_batches)
            loss = model(part, labels=part).loss
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            if progress is not None:
                progress(f"training a small Llama, loss {loss.item():.2f}", step + 1, config.steps)
    tensors = {name: Dense(value.detach().numpy().copy()) for name, value in model.state_dict().items()
               if name != "lm_head.weight"}
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "max_position_embeddings", "tie_word_embeddings", "rms_norm_eps", "hidden_act",
            "bos_token_id", "eos_token_id", "rope_parameters", "head_dim")
    described = shape.to_dict()
    return Checkpoint(
        "llama", {"model_type": "llama", **{key: described[key] for key in kept if described.get(key) is not None}},
        tensors, {"tokenizer": tokenizer.to_str().encode("utf-8"), "name": "small-llama",
                  "chat_template": _TEMPLATE,
                  "generation": {"bos_token_id": 0, "eos_token_id": 1}},
        (Step("train small llama", {**asdict(config), "text_sha256": source.sha256}, __version__, config.seed),))


def _tokenizer(content: str, vocab: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    pieces = (content[start:start + 10_000] for start in range(0, len(content), 10_000))
    made.train_from_iterator(pieces, trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=list(_SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    return made
