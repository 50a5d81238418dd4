"""The table of quantisation methods: what `edgewise quantize --method` may name. docs/quantization.md is made from it.

A closed method is a function (QuantFormat, settings) -> Change of compress.walk. A trained one is a function
(checkpoint, token ids, QuantFormat, settings, *, progress, state) -> Checkpoint. Both are named here and imported when
they are called, so that a method whose room needs torch costs nothing to list.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal, get_type_hints

from edgewise.core.errors import InvalidValueError
from edgewise.core.numbers import QuantFormat
from edgewise.core.plain import from_plain
from edgewise.core.report import Report, Table
from edgewise.report import render

__all__ = ["METHODS", "Method", "method_of", "methods_markdown"]

Needs = Literal["nothing", "inputs", "gram", "tokens"]


@dataclass(frozen=True)
class Method:
    """One row. function, config: dotted paths, "package.module:name". format: what is taken where none is asked for.

    needs: nothing; the statistics of inputs; their Gram matrix as well; or tokens to train on.
    sequential: inputs come from the layers as already replaced.
    exact_zero: only formats in which zero is exact.
    run: how the result is meant to run, the "edgewise_run" of its config.json.
    windows: of text that it takes where nobody says how many; None: as many as are usual for what it needs.
    """

    name: str
    title: str
    citation: str
    kind: Literal["closed", "trained"]
    needs: Needs
    format: str
    function: str
    config: str
    says: str
    sequential: bool = False
    exact_zero: bool = False
    run: tuple[tuple[str, str], ...] = ()
    windows: int | None = None

    def call(self) -> Any:
        """The function itself. Raises MissingExtraError where its room needs what is not installed."""
        return _named(self.function)

    def settings(self, given: Mapping[str, Any] | None = None) -> Any:
        """The method's settings, the defaults of its paper but for what is given; text is read as the field's type."""
        kind = _named(self.config)
        hints = get_type_hints(kind)
        fields = {field.name for field in dataclasses.fields(kind)}
        values: dict[str, Any] = {}
        for key, value in (given or {}).items():
            if key not in fields:
                raise InvalidValueError(f"{self.name} has no setting {key!r}; it has {', '.join(sorted(fields))}")
            values[key] = from_plain(hints[key], _read(value, hints[key], f"{self.name}, {key}"), key)
        return kind(**values)


def _named(path: str) -> Any:
    module, name = path.split(":")
    return getattr(import_module(module), name)


def _read(value: Any, hint: Any, where: str) -> Any:
    if not isinstance(value, str) or hint is str:
        return value
    text = value.strip().lower()
    if hint is bool and text in ("true", "yes", "on", "1", "false", "no", "off", "0"):
        return text in ("true", "yes", "on", "1")
    if hint in (int, float):
        try:
            return hint(text)
        except ValueError:
            raise InvalidValueError(f"{where}: {value!r} is not a number") from None
    return value


_CHANGES = "edgewise.compress.quantize.changes:"
_METHODS = "edgewise.compress.quantize."
METHODS: tuple[Method, ...] = (
    Method("rtn", "Round to nearest", "Jacob et al., CVPR 2018, arXiv:1712.05877", "closed", "inputs",
           "int4/g32/fp16/min", _CHANGES + "rtn", _METHODS + "rtn:Rtn",
           "each weight by itself, on the grid of its group with the least error, weighed by the inputs"),
    Method("gptq", "GPTQ", "Frantar et al., ICLR 2023, arXiv:2210.17323", "closed", "gram", "int4/g32/fp16/min",
           _CHANGES + "gptq", _METHODS + "gptq:Gptq",
           "column by column, the error of each made up for by those after it", sequential=True),
    Method("awq", "AWQ", "Lin et al., MLSys 2024, arXiv:2306.00978", "closed", "gram", "int4/g32/fp16/min",
           _CHANGES + "awq", _METHODS + "awq:Awq",
           "weights that meet large inputs scaled up first, the inputs down by as much; then clipping"),
    Method("smoothquant", "SmoothQuant", "Xiao et al., ICML 2023, arXiv:2211.10438", "closed", "inputs", "int8/axis",
           _CHANGES + "smoothquant", _METHODS + "smoothquant:SmoothQuant",
           "the range of activations moved into the weights, for products of 8-bit numbers"),
    Method("llm-int8", "LLM.int8()", "Dettmers et al., NeurIPS 2022, arXiv:2208.07339", "closed", "inputs", "int8/axis",
           _CHANGES + "llm_int8", _METHODS + "llm_int8:LlmInt8",
           "inputs with outliers apart in 16 bits, all others in 8; the engine runs the sum as 16-bit floats",
           exact_zero=True),
    Method("lorc", "LoRC (ZeroQuant-V2)", "Yao et al., 2023, arXiv:2303.08302", "closed", "inputs",
           "int4/g32/fp16/min", _CHANGES + "lorc", _METHODS + "lorc:Lorc",
           "rounding plus a low-rank product of what it did, which the engine adds as it is"),
    Method("accllm", "AccLLM", "Liang et al., 2025, arXiv:2505.03745", "closed", "gram", "int2/g64/fp16/min",
           _METHODS + "w2a8kv4:accllm", _METHODS + "w2a8kv4:AccLlm",
           "two of every four weights kept (SparseGPT), these in two bits with the errors made up for; cache in four",
           sequential=True, run=(("kv", "int4"),)),
    Method("mobilequant", "MobileQuant", "Tan et al., EMNLP Findings 2024, arXiv:2408.13933", "trained", "tokens",
           "int8/tensor/fp32/int", "edgewise.train.mobilequant:quantize", "edgewise.train.mobilequant:MobileQuant",
           "scales between layers, clipping and static ranges of activations, learned together from end to end",
           windows=60),  # a sequence of 256 tokens for each of its 120 steps
    Method("edgeqat", "EdgeQAT", "Shen et al., 2024, arXiv:2402.10787", "trained", "tokens", "int4/tensor/fp32",
           "edgewise.train.edgeqat:quantize", "edgewise.train.edgeqat:EdgeQat",
           "trained with one learned scale per tensor, attention maps and the entropy of queries and keys as guides"),
    Method("r-sparse", "R-Sparse", "Zhang et al., ICLR 2025, arXiv:2504.19449", "trained", "tokens",
           "int4/g32/fp16/min", "edgewise.engine.r_sparse:quantize", "edgewise.compress.lowrank.r_sparse:RSparse",
           "weights by rounding; a decoded token reads only inputs above calibrated thresholds, the others go through "
           "a low rank"),
    Method("zeroqat", "ZeroQAT", "2025, arXiv:2509.00031", "trained", "tokens", "int4/axis/fp32/int",
           "edgewise.train.zeroqat:quantize", "edgewise.train.zeroqat:ZeroQat",
           "trained under its quantisers by forward passes alone, in the memory of one"),
)


def method_of(name: str) -> Method:
    """The row of that name. Raises InvalidValueError with the names there are."""
    known = name.strip().lower().replace("_", "-")
    for method in METHODS:
        if method.name == known:
            return method
    raise InvalidValueError(f"no method {name!r}; there are {', '.join(method.name for method in METHODS)}")


def check_format(method: Method, fmt: QuantFormat) -> None:
    """Raises InvalidValueError for a format that the method has no use for, whatever the model."""
    if isinstance(fmt.scale, QuantFormat):
        raise InvalidValueError(f"{fmt} has scales that are themselves quantised, which no method writes; take one "
                                "with plain scales, such as int4/g32/fp16")
    if method.exact_zero and fmt.zero == "min":
        raise InvalidValueError(f"{method.name} needs a format with an exact zero, and {fmt} has minima; take "
                                f"{method.format}")


def methods_markdown() -> str:
    """The table as Markdown."""
    from edgewise.report.text import cell

    rows = tuple((method.name, f"{method.title}: {method.citation}", method.kind, method.needs, method.format,
                  method.says, "; ".join(f"{field.name} = {cell(field.default)}"
                                         for field in dataclasses.fields(_named(method.config))
                                         if field.default is not dataclasses.MISSING) if method.kind == "closed" else
                  f"see {method.config.split(':')[0]}") for method in METHODS)
    table = Table("Methods of `edgewise quantize`",
                  ("method", "paper", "kind", "needs", "format by default", "what it does", "settings"), rows)
    return render(Report("Quantisation", tables=(table,)), "markdown")
