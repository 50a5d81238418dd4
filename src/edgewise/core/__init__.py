"""The nouns of edgewise: small immutable types that every room speaks in. NumPy only."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_NAMES = {
    "activation": "StaticActivation activations_of activations_to_config",
    "budget": "Budget Violation",
    "checkpoint": "Checkpoint Step",
    "device": "Device Link Tier Unit",
    "errors": "BudgetError ContextOverflowError EdgewiseError EdgewiseWarning FormatError InvalidValueError "
              "MissingExtraError Notice NoticeKind SourceError StrictError UnsupportedError collect_notices "
              "notice",
    "graph": "Graph Node TensorInfo",
    "numbers": "BF16 E4M3 E5M2 E8M0 FP4 FP16 FP32 INT1 INT2 INT3 INT4 INT5 INT6 INT7 INT8 MXFP4 NF4 POSIT8 "
               "TERNARY Granularity NumberFormat QuantFormat bf16_to_float32 dequantize float32_to_bf16 "
               "int_format quantize round_to",
    "recipe": "Claim Recipe",
    "report": "Origin Quantity Report Table Verdict",
    "schedule": "Buffer Event Schedule Task Timeline",
    "stats": "InputStats Stats",
    "storage": "BlockCodec Blocks Dense Factored LazyTensors QuantizedTensor Sparse Stored Sum",
    "workload": "Op Phase Workload",
}
"""Public names by module. A module is imported when one of its names is first used: a start pays for what it uses."""
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
