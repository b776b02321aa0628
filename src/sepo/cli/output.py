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


# Which figures of a judged model are shown, in their order, and under which heads.
_SCORES = {
    "win_rate": "win rate", "score": "score", "standard_error": "± s.e.",
    "length_controlled_winrate": "length-controlled",
    "score_turn_1": "turn 1", "score_turn_2": "turn 2", "lower": "5 %", "upper": "95 %",
    "style_controlled": "style-controlled", "n_total": "judged", "n_unusable": "unusable", "n_failed": "failed",
    "avg_length": "characters",
}  # fmt: skip


def print_scores(title: str, results: dict[str, dict[str, Any]]) -> None:
    """Print the figures of judged models, one a row."""
    shown = [key for key in _SCORES if any(key in result for result in results.values())]
    rows = [
        {"name": name, **{_SCORES[key]: _number(result.get(key)) for key in shown}} for name, result in results.items()
    ]
    print_plan(title, rows)


def _number(value: Any) -> str:
    if value is None or value != value:
        return "–"
    if not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or float(value).is_integer():
        return f"{int(value):,}"
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
