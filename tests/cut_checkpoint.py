"""A tiny Llama whose layers differ in every way that `layer_shapes` has a word for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from edgewise.core.checkpoint import Checkpoint
from edgewise.core.shapes import LayerShape, config_with_shapes
from edgewise.core.storage import Dense, Stored
from tiny_checkpoint import tiny_checkpoint

__all__ = ["SHAPES", "cut_checkpoint"]

SHAPES = (
    LayerShape(4, 2, 16, 16, 128),
    LayerShape(4, 2, 12, 10, 72, ((0, 1, 2, 3, 5, 7), (0, 2, 3, 4, 5, 6))),
    LayerShape(0, 0, 0, 0, 40),
    LayerShape(2, 2, 16, 6, 0),
    LayerShape(3, 1, 6, 16, 33, ((1, 4, 6),)),
)
"""Whole; narrower heads of keys and of values; no attention; no feed-forward; fewer heads in another grouping."""


def cut_checkpoint(shapes: tuple[LayerShape, ...] = SHAPES, *, seed: int = 0, **options: object) -> Checkpoint:
    """Random weights of these shapes; heads of 16 dimensions where whole."""
    base = tiny_checkpoint(layers=len(shapes), seed=seed, **options)  # type: ignore[arg-type]
    rng = np.random.default_rng(seed + 1)
    hidden = base.config["hidden_size"]
    tensors: dict[str, Stored] = {name: base.tensors[name] for name in base.tensors if ".layers." not in name}

    def matrix(rows: int, columns: int) -> Stored:
        return Dense(rng.normal(0, columns**-0.5, (rows, columns)).astype(np.float32))

    for i, shape in enumerate(shapes):
        layer = f"model.layers.{i}."
        if shape.heads:
            tensors |= {f"{layer}self_attn.q_proj.weight": matrix(shape.heads * shape.key_dim, hidden),
                        f"{layer}self_attn.k_proj.weight": matrix(shape.kv_heads * shape.key_dim, hidden),
                        f"{layer}self_attn.v_proj.weight": matrix(shape.kv_heads * shape.value_dim, hidden),
                        f"{layer}self_attn.o_proj.weight": matrix(hidden, shape.heads * shape.value_dim),
                        f"{layer}input_layernorm.weight": Dense(rng.uniform(0.5, 1.5, hidden).astype(np.float32))}
        if shape.width:
            tensors |= {f"{layer}mlp.gate_proj.weight": matrix(shape.width, hidden),
                        f"{layer}mlp.up_proj.weight": matrix(shape.width, hidden),
                        f"{layer}mlp.down_proj.weight": matrix(hidden, shape.width),
                        f"{layer}post_attention_layernorm.weight": Dense(
                            rng.uniform(0.5, 1.5, hidden).astype(np.float32))}
    return replace(base, tensors=tensors, config=config_with_shapes(base.config, shapes, 16))
