"""Tables in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sepo.errors import one_line

if TYPE_CHECKING:
    from sepo.report.run_summary import RunSummary


def print_metrics(title: str, metrics: dict[str, Any]) -> None:
    """Print metrics as a table, grouped by the part of the name before the slash; `X_se` joins `X`."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from sepo import processes
    from sepo.report.numbers import number

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
        table.add_row(Text(name), number(value), "" if error is None else number(error))
    Console().print(table)


def print_summary(story: RunSummary) -> None:
    """Print what a run did: sentences, examples side by side, figures, cautions, and what may come next."""
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)

    def head(text: str, rest: str = "") -> None:
        console.print()
        console.print(Text.assemble((text, "bold"), (f" {rest}" if rest else "", "dim")))

    def beside(rows: list[tuple[str, str]]) -> None:
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        table.add_column()
        for name, text in rows:
            table.add_row(Text(name), Text(text))
        console.print(Padding(table, (0, 0, 0, 2)))

    console.print(Text(story.title, "bold"))
    beside(story.trained)
    if story.examples:
        head("Before and after", story.examples_title)
        judged = any(example.gold is not None for example in story.examples)
        table = Table(show_edge=False, pad_edge=False, show_lines=True)
        for name, ratio in (("prompt", 2), ("before", 4), ("after", 4)):
            table.add_column(name, ratio=ratio, overflow="fold")
        if judged:
            table.add_column("gold", justify="right", no_wrap=True)
        for example in story.examples:
            cells = [Text(text or "(empty)") for text in example[:3]]
            gold = [] if example.gold is None else [Text("{:+.2f} → {:+.2f}".format(*example.gold))]
            table.add_row(*cells, *gold)
        console.print(table)
    if story.moved:
        head("What moved", story.moved_title)
        table = Table(show_edge=False, pad_edge=False, box=None)
        for name in ("", "before", "after", "change"):
            table.add_column(name, justify="left" if not name else "right")
        for row in story.moved:
            table.add_row(*map(Text, row))
        console.print(table)
    head("Be careful")
    for sentence in story.cautions:
        console.print(Padding(Text(f"• {sentence}"), (0, 0, 0, 2)))
    head("Look at")
    beside(story.files)
    head("Go on")
    beside(story.following)


def print_plan(title: str, rows: list[dict[str, str]], wide: bool = False) -> None:
    """Print the plan of a dry run as a table; in a pipe no row is folded, nor in a terminal if it is wide."""
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
    (Console(width=max(console.width, 200)) if wide or not console.is_terminal else console).print(table)


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
    from sepo.report.numbers import number

    shown = [key for key in _SCORES if any(key in result for result in results.values())]
    rows = [
        {"name": name, **{_SCORES[key]: number(result.get(key)) for key in shown}} for name, result in results.items()
    ]
    print_plan(title, rows)
