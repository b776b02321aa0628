"""Numbers and metrics as readable text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sepo.numbers import number


def metrics_table(title: str, metrics: Mapping[str, Any]) -> str:
    """All metrics as a Markdown table; `X_se` is in the row of `X`."""
    lines = [f"# {title}", "", "| metric | value | ± s.e. |", "|---|---:|---:|"]
    for name, value in metrics.items():
        if name.endswith("_se") and name.removesuffix("_se") in metrics:
            continue
        error = metrics.get(f"{name}_se")
        lines.append(f"| `{name}` | {number(value)} | {'' if error is None else number(error)} |")
    return "\n".join(lines) + "\n"
