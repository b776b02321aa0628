"""Read texts with marked mistakes, in the two public formats, as answers with their wrong parts.

BIG-Bench-Mistake (Tyen et al., arXiv 2311.08516): JSON lines with `input`, `steps` and `mistake_index`, the first
    wrong step or null. The first mistake is to be found among all steps; what follows it is not labelled.
Fine-Grained RLHF (Wu et al., arXiv 2306.01693): a JSON list with `question`, `passages`, `prediction 1` and
    `feedback.errors`, people's error spans in characters of that prediction.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sepo.errors import UserError, one_line

Span = tuple[int, int]


class Marked(NamedTuple):
    """An answer with marked mistakes; spans are characters of `answer`.

    Attributes:
        parts: the parts that were judged, in order: the steps of a trace; () if the whole text was judged.
        wrong: the wrong parts, of a trace the first mistake; () in an answer without a mistake.
    """

    prompt: str
    answer: str
    parts: tuple[Span, ...]
    wrong: tuple[Span, ...]


def read_marked(path: Path) -> list[Marked]:
    """The answers of a file in one of the two formats.

    Raises:
        UserError: the file cannot be read, or a row lacks a field or marks what is not there.
    """
    try:
        text = path.read_text(encoding="utf-8")
        rows = json.loads(text) if text.lstrip()[:1] == "[" else [json.loads(line) for line in text.split("\n") if line]
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read '{path}' ({one_line(error, 150)}): expected a JSON list or JSON lines") from None
    marked = []
    for number, row in enumerate(rows, 1):
        try:
            marked.append(_trace(row) if "steps" in row else _spans(row))
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise UserError(
                f"row {number} of '{path}' ({one_line(repr(error), 100)}): expected input, steps and mistake_index, or "
                "question, prediction 1 and feedback.errors with start and end"
            ) from None
    if not any(item.wrong for item in marked):
        raise UserError(f"'{path}' marks no mistake: expected answers with a wrong part")
    return marked


def _trace(row: Mapping[str, Any]) -> Marked:
    mistake = row["mistake_index"]
    steps = [str(step) for step in row["steps"]]
    if mistake is not None and not 0 <= mistake < len(steps):
        raise ValueError(f"mistake_index {mistake} of {len(steps)} steps")
    spans, start = [], 0
    for step in steps:
        spans.append((start, start + len(step)))
        start += len(step) + 1
    return Marked(str(row["input"]), "\n".join(steps), tuple(spans), () if mistake is None else (spans[mistake],))


def _spans(row: Mapping[str, Any]) -> Marked:
    answer = str(row["prediction 1"])
    wrong = [(int(error["start"]), int(error["end"])) for error in row["feedback"]["errors"]]
    if any(not 0 <= start <= end for start, end in wrong):
        raise ValueError(f"error spans {wrong[:3]}")
    kept = tuple((start, min(end, len(answer))) for start, end in wrong if start < min(end, len(answer)))
    passages = "\n\n".join("\n".join(map(str, passage[1:])) for passage in row.get("passages") or [])
    return Marked(f"{passages}\n\n{row['question']}".strip(), answer, (), kept)
