"""The nouns of edgewise: small immutable types that every room speaks in. NumPy only."""

from __future__ import annotations

from edgewise.core.front_door import front_door

__all__, __getattr__ = front_door(__name__, {
    "activation": "StaticActivation activations_of activations_to_config",
    "budget": "Budget Violation",
    "checkpoint": "Checkpoint Step",
    "device": "Device Link Tier Unit",
    "elements": "BF16 E4M3 E5M2 E8M0 FP4 FP16 FP32 INT1 INT2 INT3 INT4 INT5 INT6 INT7 INT8 NF4 POSIT4 POSIT8 POSIT16 "
                "TERNARY UINT1 UINT2 UINT3 UINT4 UINT5 UINT6 UINT7 UINT8 NumberFormat bf16_to_float32 float32_to_bf16 "
                "int_format nested_prefix posit_format round_to rounding_table",
    "errors": "BudgetError ContextOverflowError EdgewiseError EdgewiseWarning FormatError InvalidValueError "
              "MissingExtraError Notice NoticeKind SourceError StrictError UnsupportedError collect_notices "
              "notice",
    "graph": "Graph Node TensorInfo",
    "numbers": "MXFP4 Granularity QuantFormat best_peak dequantize quantize",
    "quire": "quire_bits quire_matmul",
    "recipe": "Claim Recipe",
    "report": "Origin Quantity Report Table Verdict",
    "schedule": "Buffer Event Schedule Task Timeline",
    "stats": "InputGatherer InputStats Stats",
    "storage": "BlockCodec Blocks Dense Factored InputSparse LazyTensors QuantizedTensor Sparse Stored Sum",
    "workload": "Op Phase Workload",
})
