"""Scatter and Pareto plots as small SVG documents, without a plotting library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from edgewise.core.errors import InvalidValueError
from edgewise.core.report import Report, Table
from edgewise.report.text import cell, with_unit

__all__ = ["plot_table", "ticks", "to_svg"]

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 640, 400, 80, 20, 36, 52


def to_svg(report: Report) -> str:
    """The first table with two numeric columns, the first of them against the second."""
    for table in report.tables:
        numeric = [c for i, c in enumerate(table.columns) if table.rows and all(_number(r[i]) for r in table.rows)]
        if len(numeric) >= 2:
            return plot_table(table, x=numeric[0], y=numeric[1])
    raise InvalidValueError(f"report {report.title!r} has no table with two numeric columns to plot")


def plot_table(table: Table, *, x: str, y: str, label: str | None = None, front: Sequence[int] = ()) -> str:
    """Points of two columns of a table. Rows with a missing value are left out.

    label: a column whose text stands at each point. front: row numbers joined by a line in order of x, such as the
    rows of a Pareto front.
    """
    for column in (x, y, *([label] if label else [])):
        if column not in table.columns:
            raise InvalidValueError(
                f"table {table.title!r} has no column {column!r}; it has {', '.join(table.columns)}")
    ix, iy = table.columns.index(x), table.columns.index(y)
    units = table.units or ("",) * len(table.columns)
    points = {i: (float(row[ix]), float(row[iy])) for i, row in enumerate(table.rows)
              if _number(row[ix]) and _number(row[iy])}
    if not points:
        raise InvalidValueError(f"table {table.title!r} has no row with numbers in both {x!r} and {y!r}")
    x_ticks, y_ticks = (ticks([p[axis] for p in points.values()]) for axis in (0, 1))

    def place(point: tuple[float, float]) -> tuple[float, float]:
        across = (point[0] - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = (point[1] - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return (round(_LEFT + across * (_WIDTH - _LEFT - _RIGHT), 2),
                round(_HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM), 2))

    parts = [(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
              'font-family="system-ui,sans-serif" font-size="12" fill="#222">'),
             f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#fff"/>',
             _text(_WIDTH / 2, 20, table.title, "middle", 'font-size="14"')]
    for tick in x_ticks:
        px, _ = place((tick, y_ticks[0]))
        parts += [_line(px, _TOP, px, _HEIGHT - _BOTTOM),
                  _text(px, _HEIGHT - _BOTTOM + 16, _tick_text(tick, units[ix]), "middle")]
    for tick in y_ticks:
        _, py = place((x_ticks[0], tick))
        parts += [_line(_LEFT, py, _WIDTH - _RIGHT, py), _text(_LEFT - 6, py + 4, _tick_text(tick, units[iy]), "end")]
    parts += [_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 12, x, "middle"),
              _text(16, _HEIGHT / 2, y, "middle", f'transform="rotate(-90 16 {_HEIGHT / 2:g})"')]
    if front:
        path = " ".join(f"{a:g},{b:g}" for a, b in sorted(place(points[i]) for i in front if i in points))
        parts.append(f'<polyline points="{path}" fill="none" stroke="#0b6" stroke-width="2"/>')
    for i, point in points.items():
        px, py = place(point)
        parts.append(f'<circle cx="{px:g}" cy="{py:g}" r="4" fill="{"#0b6" if i in front else "#36c"}"/>')
        if label:
            parts.append(_text(px + 6, py - 6, cell(table.rows[i][table.columns.index(label)]), "start"))
    return "\n".join([*parts, "</svg>"]) + "\n"


def ticks(values: Sequence[float], count: int = 5) -> list[float]:
    """Round numbers that enclose the values: steps of 1, 2 or 5 times a power of ten."""
    low, high = min(values), max(values)
    if high == low:
        pad = abs(low) / 2 or 1.0
        low, high = low - pad, high + pad
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _tick_text(value: float, unit: str) -> str:
    return with_unit(value, unit) if unit else cell(value)


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="#ddd"/>'


def _text(x: float, y: float, text: str, anchor: str, more: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" {more}>{escape(text)}</text>'
