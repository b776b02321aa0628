"""Numbers and metrics as readable text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def metrics_table(title: str, metrics: Mapping[str, Any]) -> str:
    """All metrics as a Markdown table; `X_se` is in the row of `X`."""
    lines = [f"# {title}", "", "| metric | value | ± s.e. |", "|---|---:|---:|"]
    for name, value in metrics.items():
        if name.endswith("_se") and name.removesuffix("_se") in metrics:
            continue
        error = metrics.get(f"{name}_se")
        lines.append(f"| `{name}` | {number(value)} | {'' if error is None else number(error)} |")
    return "\n".join(lines) + "\n"


def number(value: Any) -> str:
    """A number in four digits.

    >>> [number(value) for value in (None, 0.12345, 1234.5, 12.0)]
    ['–', '0.1235', '1,234', '12']
    """
    if value is None or value != value:
        return "–"
    if not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or float(value).is_integer():
        return f"{int(value):,}"
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
