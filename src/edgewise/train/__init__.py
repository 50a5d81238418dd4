"""Learning: quantisation-aware training, and the torch twin of the core's numbers. Needs the extra `torch`."""

from __future__ import annotations

from typing import Any

from edgewise.core.errors import require
from edgewise.core.front_door import front_door

__all__, _opened = front_door(__name__, {
    "bitnet": "BitLinear ternary ternary_weight",
    "distill": "Distill forward_kl reverse_kl",
    "export": "graph_of",
    "fake_quant": "EmaRange LearnedClip Lsq LsqPlus StaticAffine fake_quantize per_token round_ste scale_gradient snap "
                  "static_affine straight_through",
    "small_llama": "SmallLlama small_llama",
    "greenformers": "Greenformers crossover factorised layer_macs",
    "hooks": "TorchStats gather",
    "mobilequant": "Learner MobileQuant",
    "qat": "Phase Qat QuantizedLayer calibrate prepare quantisable stored_bits train_phases",
    "taylor": "importance_of",
    "filter_pruning": "FilterPruning prune_filters rank_filters",
    "pictures": "Epochs learn predictions scores",
    "surgery": "Unit cut fold_batch_norm macs remove_blocks units_of write_onnx_net",
    "wgsef": "Level Wgsef block_level tensor_level train_wgsef unit_levels",
    "sensitivity": "Sensitivity layer_fisher layer_scores under_budget weight_error widest_first",
})


def __getattr__(name: str) -> Any:
    if name in __all__:
        require("torch", extra="torch", purpose=f"edgewise.train.{name}")
    return _opened(name)
