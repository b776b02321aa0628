"""Answers before and after for the report: what both models wrote to the held-out prompts, and how it was judged."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sepo.data.previews import common_starts
from sepo.data.tables import arrow_file
from sepo.errors import UserError, named_error

# Characters of prompts and answers in a page, all together: about a megabyte of its file.
BUDGET = 3_000_000
_TEXTS = ("prompt", "base", "policy")
_NUMBERS = ("base_gold", "policy_gold", "preference", "base_score", "policy_score", "policy_kl")


def read_answers(path: Path, budget: int = BUDGET) -> dict[str, Any] | None:
    """The answers of a run for the page.

    Args:
        path: `eval/generations.parquet`.
        budget: characters at most; beyond it some rows stand for all, spread evenly, at least one.

    Returns:
        `total` rows of the file and, of those shown, `prompt` (without what all prompts begin and end with), `base` and
        `policy` as texts, and `base_gold`, `policy_gold`, `preference` (in [1, 2], above 1.5 the policy is preferred),
        `base_score`, `policy_score` and `policy_kl` where the run has them, null where one has none. None without a
        file or without a row.

    Raises:
        UserError: the file is no such table.
    """
    if not path.is_file():
        return None
    try:
        with arrow_file(path) as file:
            table = pq.read_table(file)
        texts = {name: [str(text or "") for text in table[name].to_pylist()] for name in _TEXTS}
    except (KeyError, OSError, pa.ArrowException) as error:
        raise UserError(f"'{path}' is no table of answers ({named_error(error)}): run the evaluation again") from None
    if not len(table):
        return None
    lengths = np.sum([[len(text) for text in column] for column in texts.values()], axis=0)
    number = len(table) if lengths.sum() <= budget else max(1, int(len(table) * budget / lengths.sum()))
    shown = np.unique(np.linspace(0, len(table) - 1, number).round().astype(int))
    while len(shown) > 1 and lengths[shown].sum() > budget:  # those that were picked may be the longer ones
        shown = shown[:-1]
    found: dict[str, Any] = {"total": len(table)}
    texts["prompt"] = _without_frame(texts["prompt"])
    for name in _TEXTS:
        found[name] = [texts[name][i] for i in shown]
    for name in _NUMBERS:
        if name in table.column_names:
            values = table[name].to_pylist()
            found[name] = [_number(values[i]) for i in shown]
    return found


def _without_frame(prompts: list[str]) -> list[str]:
    """Prompts without what most of them begin and end with, as the chat template writes it."""
    rows = [[ord(c) for c in prompt] for prompt in prompts]

    def is_boundary(character: int) -> bool:
        return chr(character) in "\n<>[]|"

    starts = common_starts(rows, is_boundary)
    ends = common_starts([row[::-1] for row in rows], is_boundary)
    return [
        prompt[start : len(prompt) - end].strip() if start + end < len(prompt) else prompt
        for prompt, start, end in zip(prompts, starts, ends, strict=True)
    ]


def _number(value: Any) -> float | None:
    good = isinstance(value, int | float) and math.isfinite(value)
    return round(float(value), 5) if good else None
