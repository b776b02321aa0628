"""The rounds of a recipe as a table: gain, KL, length, and the oracle's accuracy, round by round."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sepo.files import write_json, write_text
from sepo.numbers import number, with_error
from sepo.recipe.settings import Recipe

MARKDOWN, PAGE, JSON = "rounds.md", "rounds.html", "rounds.json"
# Columns of the table: heading, metric, format.
_COLUMNS = (
    ("pairs", "pairs/train", ",.0f"),
    ("gold reward", "gold_reward/policy", ".3f"),
    ("gain over the first start", "gold_reward/difference", "+.3f"),
    ("judge's win rate", "judge/win_rate", ".2f"),
    ("KL from the first start, nats", "kl", ".2f"),
    ("tokens per answer", "length/policy", ".1f"),
    ("oracle, held-out pairs", "oracle/accuracy", ".2f"),
    ("oracle, the new policy's answers", "oracle/new_accuracy", ".2f"),
)
_STYLE = "body{font:15px sans-serif;margin:2em;max-width:70em}table{border-collapse:collapse}td,th{padding:.3em .8em;\
border-bottom:1px solid #bbb;text-align:right}"


def held_out_score(metrics: Mapping[str, Any]) -> float | None:
    """What the rule `rounds.stop` compares: the gold reward of the held-out answers, else the judge's win rate."""
    for name in ("gold_reward/policy", "judge/win_rate"):
        if isinstance(value := metrics.get(name), int | float) and value == value:
            return float(value)
    return None


def write_rounds(recipe: Recipe, found: Sequence[Mapping[str, Any]], stopped: str = "") -> None:
    """Write the table as Markdown, as a page and as JSON into the run folder.

    Args:
        found: the metrics of each round.
        stopped: why the rounds stopped before their number; empty if they did not.
    """
    folder = recipe.run_folder
    rows, notes = table_of(found), notes_of(recipe, stopped)
    write_json(folder / JSON, {"rounds": [_plain(row) for row in found], "stopped": stopped, "notes": notes})
    write_text(folder / MARKDOWN, rounds_markdown(recipe.name, rows, notes))
    write_text(folder / PAGE, rounds_page(recipe.name, rows, notes, folder))


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of a round without those of its speed, which differ from run to run."""
    return {name: value for name, value in row.items() if not name.startswith(("seconds/", "memory_gb/"))}


def table_of(found: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Heading and rows; columns without a value are left out."""
    columns = [column for column in _COLUMNS if any(_value(row, column[1]) is not None for row in found)]
    rows = [["round", *(heading for heading, _, _ in columns)]]
    for count, row in enumerate(found, 1):
        rows.append([str(count), *(_cell(row, name, form) for _, name, form in columns)])
    return rows


def _value(row: Mapping[str, Any], name: str) -> float | None:
    value = row.get(name)
    return float(value) if isinstance(value, int | float) and value == value else None


def _cell(row: Mapping[str, Any], name: str, form: str) -> str:
    value, error = _value(row, name), _value(row, f"{name}_se")
    if value is None:
        return ""
    return number(value, form) if error is None else with_error(value, error, form)


def notes_of(recipe: Recipe, stopped: str) -> list[str]:
    """How to read the table."""
    rounds = recipe.rounds
    assert rounds is not None
    reference = {
        "fixed": "The reference is fixed: oracles start from the recipe's reference, and an objective with a reference "
        "compares with the first start.",
        "moving": "The reference moves: an objective with a reference compares with the policy of the round before, "
        "and where reference and policy are one model, the oracle starts from it, too.",
    }[rounds.reference]
    oracle = {
        "again": "The oracle is trained again in each round.",
        "kept": "The oracle of the first round is kept.",
    }[rounds.oracle]
    notes = [
        reference,
        oracle,
        "Held-out prompts are the same in all rounds; gain and KL are from the first start. Values are means ± "
        "standard errors, clustered by prompt, of one seed.",
        "The last column is the round's oracle on pairs of the answers that its policy gives. An oracle that falls "
        "there knows answers that the policy no longer gives.",
    ]
    return [*notes, stopped[:1].upper() + stopped[1:] + "."] if stopped else notes


def rounds_markdown(name: str, rows: Sequence[Sequence[str]], notes: Sequence[str]) -> str:
    """The table as Markdown."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    ruler = "|" + "---:|" * len(rows[0])
    return "\n".join([f"# Rounds of {name}", "", lines[0], ruler, *lines[1:], "", *(f"- {note}" for note in notes), ""])


def rounds_page(name: str, rows: Sequence[Sequence[str]], notes: Sequence[str], folder: Path) -> str:
    """The table as a page; each round links its report."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in rows[0])
    body = []
    for row in rows[1:]:
        first = html.escape(row[0])
        if (folder / f"round-{row[0]}" / "report.html").is_file():
            first = f'<a href="round-{first}/report.html">{first}</a>'
        body.append(f"<tr><td>{first}</td>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:]) + "</tr>")
    items = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    title = html.escape(f"Rounds of {name}")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        f"<h1>{title}</h1><table><tr>{head}</tr>{''.join(body)}</table><ul>{items}</ul></html>\n"
    )
