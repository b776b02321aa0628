"""Tables in the terminal."""

from __future__ import annotations

from typing import Any

from sepo.errors import one_line


def print_metrics(title: str, metrics: dict[str, Any]) -> None:
    """Print metrics as a table, grouped by the part of the name before the slash; `X_se` joins `X`."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from sepo import processes

    if not processes.is_main():
        return
    table = Table(title=Text(one_line(title)), title_justify="left", show_edge=False, pad_edge=False)
    table.add_column("metric")
    table.add_column("value", justify="right")
    table.add_column("± s.e.", justify="right")
    previous = None
    for name, value in metrics.items():
        if name.endswith("_se") and name.removesuffix("_se") in metrics:
            continue
        group = name.split("/")[0]
        if previous is not None and group != previous:
            table.add_section()
        previous = group
        error = metrics.get(f"{name}_se")
        table.add_row(Text(name), _number(value), "" if error is None else _number(error))
    Console().print(table)


def print_plan(title: str, rows: list[dict[str, str]], wide: bool = False) -> None:
    """Print the plan of a dry run as a table; a wide one is not folded into the width of a pipe or a terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left", show_edge=False, pad_edge=False)
    for name in rows[0]:
        right = name not in ("stage", "what", "name", "how", "fits", "to fit")
        table.add_column(name, justify="right" if right else "left")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row.values()))
    console = Console()
    (Console(width=max(console.width, 200)) if wide else console).print(table)


def _number(value: Any) -> str:
    if value is None or value != value:
        return "–"
    if not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or float(value).is_integer():
        return f"{int(value):,}"
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
