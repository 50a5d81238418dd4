"""A Llama with random weights, as large as asked for: speed does not depend on what the weights say.

    python benchmarks/random_llama.py 1b Q4_0 --out random-1b.gguf

One tensor is in memory at a time. The file is written by edgewise's own writer and loads in llama.cpp as well.
"""

from __future__ import annotations

import argparse
import itertools
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgewise.core.checkpoint import Checkpoint, Step
from edgewise.core.storage import Dense, LazyTensors, Stored
from edgewise.formats.cache import cache_root
from edgewise.formats.gguf import write_gguf

__all__ = ["SHAPES", "Shape", "random_file", "random_llama"]

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama; the head is tied to the embedding."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    width: int
    vocab: int
    context: int = 8192


SHAPES = {"1b": Shape(2048, 16, 32, 8, 8192, 32_000), "tiny": Shape(64, 2, 4, 2, 128, 1_000, 512)}
"""1b: 1.04 billion parameters, the layers of Llama 3.2 1B with a smaller vocabulary."""


@dataclass(frozen=True)
class Normal:
    """A Stored of normal numbers, drawn anew whenever its values are asked for."""

    shape: tuple[int, ...]
    seed: tuple[int, int]
    deviation: float

    @property
    def nbytes(self) -> int:
        return 4 * int(np.prod(self.shape))

    def dense(self) -> Float32:
        values = np.random.default_rng(self.seed).standard_normal(self.shape, np.float32)
        values *= np.float32(self.deviation)
        return values

    def matmul(self, x: Float32) -> Float32:
        return np.asarray(x @ self.dense().T, np.float32)


def random_llama(shape: Shape, seed: int = 0) -> Checkpoint:
    """A checkpoint whose tensors are made when asked for."""
    tensors: dict[str, Stored] = {}

    def matrix(name: str, rows: int, columns: int) -> None:
        tensors[name] = Normal((rows, columns), (seed, len(tensors)), columns**-0.5)

    def ones(name: str) -> None:
        tensors[name] = Dense(np.ones(shape.hidden, np.float32))

    head_dim = shape.hidden // shape.heads
    matrix("model.embed_tokens.weight", shape.vocab, shape.hidden)
    for i in range(shape.layers):
        layer = f"model.layers.{i}."
        for part, rows, columns in (
                ("self_attn.q_proj", shape.hidden, shape.hidden),
                ("self_attn.k_proj", shape.kv_heads * head_dim, shape.hidden),
                ("self_attn.v_proj", shape.kv_heads * head_dim, shape.hidden),
                ("self_attn.o_proj", shape.hidden, shape.hidden), ("mlp.gate_proj", shape.width, shape.hidden),
                ("mlp.up_proj", shape.width, shape.hidden), ("mlp.down_proj", shape.hidden, shape.width)):
            matrix(f"{layer}{part}.weight", rows, columns)
        ones(f"{layer}input_layernorm.weight")
        ones(f"{layer}post_attention_layernorm.weight")
    ones("model.norm.weight")
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": shape.vocab,
              "hidden_size": shape.hidden, "intermediate_size": shape.width, "num_hidden_layers": shape.layers,
              "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "rms_norm_eps": 1e-5,
              "max_position_embeddings": shape.context, "rope_theta": 10000.0, "hidden_act": "silu",
              "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2}
    parts = {name: (lambda stored=stored: stored) for name, stored in tensors.items()}
    metadata = {"name": "random llama", "tokenizer": vocabulary(shape.vocab)}
    return Checkpoint("llama", config, LazyTensors(parts), metadata, (Step("random", {"seed": seed}),),
                      source="random llama")


def vocabulary(size: int) -> dict[str, Any]:
    """Keys of a SentencePiece vocabulary: special tokens, all bytes, then every run of one to three letters."""
    runs = ("".join(letters) for length in (1, 2, 3) for letters in itertools.product(string.ascii_lowercase,
                                                                                     repeat=length))
    pieces = itertools.chain(["\u2581"], itertools.chain.from_iterable((run, f"\u2581{run}") for run in runs))
    special = ["<unk>", "<s>", "</s>"]
    octets = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = [*special, *octets, *itertools.islice(pieces, size - len(special) - len(octets))]
    kinds = [2, 3, 3, *[6] * len(octets)]  # unknown, control, byte
    kinds += [1] * (len(tokens) - len(kinds))
    scores = np.zeros(len(tokens), np.float32)
    scores[len(special) + len(octets):] = -np.arange(len(tokens) - len(special) - len(octets), dtype=np.float32)
    return {"model": "llama", "tokens": tokens, "scores": scores, "token_type": np.array(kinds, np.int32),
            "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, "add_bos_token": True}


def random_file(name: str, block_type: str = "Q4_0") -> Path:
    """The GGUF file of SHAPES[name] in a block type, in the cache; made when it is not there yet."""
    path = cache_root() / "benchmarks" / f"random-{name}.{block_type}.gguf"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_gguf(random_llama(SHAPES[name]), path, block_type)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("type", nargs="?", default="Q4_0", help="block type of the matrices")
    parser.add_argument("--out", type=Path, help="by default a file in the cache")
    options = parser.parse_args()
    if options.out is None:
        print(random_file(options.shape, options.type))
    else:
        write_gguf(random_llama(SHAPES[options.shape]), options.out, options.type)


if __name__ == "__main__":
    main()
