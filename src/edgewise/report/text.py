"""Values as short text: four significant digits, thousands apart, SI prefixes for units that take them."""

from __future__ import annotations

import math
from typing import Any

from edgewise.core.report import Quantity

__all__ = ["cell", "describe", "with_unit"]

_PREFIXED = {"B", "B/s", "J", "W", "op/s", "s", "FLOP/s", "Hz"}
_UP = ("", "k", "M", "G", "T", "P")
_DOWN = ("", "m", "µ", "n", "p")


def cell(value: Any) -> str:
    """One value without unit: 1234567 -> "1,234,567", 0.123456 -> "0.1235", None -> "–"."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return _float(value)
    return str(value)


def _float(value: float) -> str:
    if math.isnan(value) or math.isinf(value):
        return str(value)
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e15 or size < 1e-4:
        return f"{value:.3e}"
    if size >= 1000:
        return f"{value:,.0f}"
    digits = max(0, 3 - math.floor(math.log10(size)))
    return f"{value:.{digits}f}".rstrip("0").rstrip(".") if digits else f"{value:.0f}"


def with_unit(value: Any, unit: str) -> str:
    """A value and its unit: (1536000, "B") -> "1.536 MB", (0.002, "s") -> "2 ms", (3, "") -> "3"."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not unit:
        return cell(value) if value is None or not unit else f"{cell(value)} {unit}"
    if unit not in _PREFIXED or value == 0 or not math.isfinite(value) or (unit == "s" and abs(value) >= 1):
        return f"{cell(value)} {unit}"
    power = math.floor(math.log10(abs(value)) / 3)
    if power >= 0:
        power = min(power, len(_UP) - 1)
        prefix = _UP[power]
    else:
        power = max(power, 1 - len(_DOWN))
        prefix = _DOWN[-power]
    scaled = value / 1000.0**power
    return f"{cell(scaled if power or isinstance(value, float) else value)} {prefix}{unit}"


def describe(quantity: Quantity) -> str:
    """Value, unit and spread of a quantity on one line."""
    text = with_unit(quantity.value, quantity.unit)
    if quantity.spread is not None:
        low, high = quantity.spread
        text += f" ({with_unit(low, quantity.unit)} to {with_unit(high, quantity.unit)})"
    return text
