"""The Markdown pages that sepo writes, shown in a terminal and as HTML.

These pages hold headings, paragraphs, lists, tables and pictures, and no other markup.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_PICTURE = re.compile(r"!\[([^\]]*)\]\(([^)]+)\)")


class Block(NamedTuple):
    """A part of a page.

    Attributes:
        kind: "heading", "text", "item", "table" or "picture".
        text: of a heading, paragraph or list item; of a picture its description.
        level: of a heading; 1 is the title.
        rows: of a table, its header first.
        path: of a picture, relative to the page.
    """

    kind: str
    text: str = ""
    level: int = 0
    rows: tuple[tuple[str, ...], ...] = ()
    path: str = ""


def blocks(markdown: str) -> Iterator[Block]:
    """The parts of a Markdown page that sepo wrote."""
    table: list[tuple[str, ...]] = []
    for line in [*markdown.splitlines(), ""]:
        if line.startswith("|"):
            cells = tuple(_plain(cell) for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1])
            if not all(re.fullmatch(r":?-+:?", cell) for cell in cells):
                table.append(cells)
            continue
        if table:
            yield Block("table", rows=tuple(table))
            table = []
        if heading := re.match(r"(#+) (.*)", line):
            yield Block("heading", _plain(heading[2]), level=len(heading[1]))
        elif picture := _PICTURE.fullmatch(line.strip()):
            yield Block("picture", picture[1], path=picture[2])
        elif line.startswith("- "):
            yield Block("item", _plain(line[2:]))
        elif line.strip():
            yield Block("text", _plain(line))


def _plain(text: str) -> str:
    r"""A text without its markup.

    >>> _plain(r" *Detectable* is `k`, Σ\|s\| * 2 ")
    'Detectable is k, Σ|s| * 2'
    """
    text = re.sub(r"(?<!\w)\*([^*\s][^*]*)\*(?!\w)|`([^`]*)`", lambda match: match[1] or match[2] or "", text.strip())
    return re.sub(r"\\([|*_`])", r"\1", text)


def print_document(markdown: str) -> None:
    """Print a page in the terminal. A table that is too wide is cut into parts that repeat its first column."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=max(console.width, 200))
    for block in blocks(markdown):
        if block.kind == "heading":
            console.print(Text(f"{block.text}\n" if block.level == 1 else block.text, "bold"))
        elif block.kind == "table":
            for part in _parts(block.rows, console.width):
                console.print(_table(part))
                console.print()
        elif block.kind != "picture":
            console.print(Text(f"• {block.text}" if block.kind == "item" else f"{block.text}\n"))


def _table(rows: tuple[tuple[str, ...], ...]):
    from rich.table import Table
    from rich.text import Text

    table = Table(show_edge=False, pad_edge=False)
    for place, name in enumerate(rows[0]):
        numbers = all(re.match(r"[-+−–]?[\d–]|$|no |not ", row[place]) for row in rows[1:])
        table.add_column(Text(name), justify="right" if place and numbers else "left", overflow="fold")
    for row in rows[1:]:
        table.add_row(*map(Text, row))
    return table


def _parts(rows: tuple[tuple[str, ...], ...], width: int) -> Iterator[tuple[tuple[str, ...], ...]]:
    """Cut a table into tables of at most `width` characters where the columns allow it."""
    # A header may be folded at its words; cells are not, but for long texts.
    widths = [
        max(max(map(len, rows[0][place].split()), default=1), *(min(len(row[place]), 40) for row in rows), 1)
        for place in range(len(rows[0]))
    ] if len(rows) > 1 else [len(name) for name in rows[0]]  # fmt: skip
    columns = [0]
    for place in range(1, len(widths)):
        if len(columns) > 1 and sum(widths[i] + 3 for i in (*columns, place)) > width + 3:
            yield tuple(tuple(row[i] for i in columns) for row in rows)
            columns = [0]
        columns.append(place)
    yield tuple(tuple(row[i] for i in columns) for row in rows)


def html_document(markdown: str, folder: Path, style: str) -> str:
    """A page as one self-contained HTML file without scripts; pictures are read from `folder`.

    Args:
        style: the style sheet.
    """
    parts: list[str] = []
    title = ""
    listed = False
    for block in blocks(markdown):
        if listed != (block.kind == "item"):
            parts.append("</ul>" if listed else "<ul>")
            listed = not listed
        text = html.escape(block.text)
        if block.kind == "heading":
            title = title or text
            parts.append(f"<h{block.level}>{text}</h{block.level}>")
        elif block.kind == "item":
            parts.append(f"<li>{text}</li>")
        elif block.kind == "text":
            parts.append(f"<p>{text}</p>")
        elif block.kind == "table":
            head, *rows = block.rows
            cells = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in head)
            body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
            table = f"<table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>"
            parts.append(f'<div class="scroll">{table}</div>')
        elif (folder / block.path).is_file():
            picture = base64.b64encode((folder / block.path).read_bytes()).decode("ascii")
            parts.append(f'<p><img alt="{text}" src="data:image/png;base64,{picture}"></p>')
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    return (
        f'<!doctype html>\n<html lang="en" data-ready="true"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>'
        f'<style>{style}</style></head><body><main class="page">{"".join(parts)}</main></body></html>\n'
    )
