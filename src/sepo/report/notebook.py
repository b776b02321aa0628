"""One pair in a notebook: the report's own page in a frame, with both responses coloured token by token.

The frame holds everything it needs, so it also works offline and in a notebook exported to HTML. Viewers that remove
frames or scripts (GitHub) show an empty output.
"""

from __future__ import annotations

import html
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from sepo.credit.selection import check_rate
from sepo.data import tables
from sepo.data.ragged import SIDES, flat
from sepo.data.tables import require_table
from sepo.data.vocabulary import load_vocabulary
from sepo.errors import UserError, check_number, wrong_type
from sepo.files import expand_home
from sepo.report.build import page, payload_of
from sepo.report.reading import Scores, check_tokenizer, find_tokenizer, shown_sides
from sepo.report.token_texts import TokenTexts

_HEIGHT = 480  # pixels; longer pairs scroll


@dataclass(frozen=True)
class PairView:
    """A pair as HTML, for a notebook to show."""

    html: str

    def _repr_html_(self) -> str:
        return self.html


def display(
    pair_or_table: Mapping | pa.Table | str | os.PathLike,
    index: int = 0,
    *,
    tokenizer: str | os.PathLike | object | None = None,
    k_chosen: float = 0.3,
    k_rejected: float = 0.3,
) -> PairView:
    """Show one scored pair in a notebook.

    Args:
        pair_or_table: a row of a score table as a mapping (with `end_ids` if the token that ends a response cannot be
            a key token), a score table, its path, or a run folder.
        index: the row of the table; ignored for a single pair.
        tokenizer: a folder with a `tokenizer.json`, or a loaded fast tokenizer; by default that of the run
            folder. Without a tokenizer, tokens are shown by id.
        k_chosen, k_rejected: selection rates at which the sliders start; key tokens are underlined.

    Returns:
        An object that a notebook shows as HTML (`_repr_html_`).

    Raises:
        UserError: there is no such table or row, the tokenizer is not the table's, or a rate is not in (0, 1].
    """
    if isinstance(pair_or_table, str | os.PathLike):
        pair_or_table = Path(expand_home(pair_or_table, "the score table"))
    scores = _scores_of(pair_or_table, index)
    if tokenizer is not None:
        check_tokenizer(tokenizer, scores.rows, "the score table")
    elif isinstance(pair_or_table, Path):
        tokenizer = find_tokenizer(pair_or_table)
    token_texts = TokenTexts(None if tokenizer is None else load_vocabulary(tokenizer))
    for name, rate in (("k_chosen", k_chosen), ("k_rejected", k_rejected)):
        check_rate(name, rate)
    title = f"Pair {scores.rows['pair_id'][0]}"
    header = {
        "title": title,
        "k": {"chosen": float(k_chosen), "rejected": float(k_rejected)},
        "summary": scores.summary(),
        "single_pair": True,
    }
    source = html.escape(page(title, payload_of(scores, token_texts, header)))
    style = "width:100%;border:0"
    return PairView(f'<iframe srcdoc="{source}" title="{title}" height="{_HEIGHT}" style="{style}"></iframe>')


def _scores_of(source: Mapping | pa.Table | str | os.PathLike, index: int) -> Scores:
    """The pair to show as a score table of one row."""
    row, provenance = _row(source, index)
    columns = {name: [row[name]] for name in (*tables.SCHEMAS["scores"].names, *tables.CONTEXT_COLUMNS) if name in row}
    table = tables.make_table("scores", columns, provenance)
    rewards = {side: flat(table[f"{side}_rewards"]) for side in shown_sides(table)}
    for side, (values, lengths) in rewards.items():
        count = len(table[f"{side}_ids"][0])
        if lengths[0] != count or not count:
            raise UserError(f"the pair has {lengths[0]} {side} rewards for {count} tokens: expected one per token")
        if not np.isfinite(values).all():
            raise UserError(f"the pair has a {side} reward that is not finite")
    return Scores(table, rewards, np.zeros(1, np.int64), provenance)


def _row(source: Mapping | pa.Table | str | os.PathLike, index: int) -> tuple[Mapping, dict]:
    """The row to show and what is known of its table: the ids that end a response, and whether it holds answers."""
    if isinstance(source, Mapping):
        missing = [f"{side}_{part}" for side in SIDES for part in ("ids", "rewards") if f"{side}_{part}" not in source]
        if missing:
            raise UserError(f"the pair has no '{missing[0]}': expected a row of a score table")
        return {"pair_id": 0, "prompt_ids": [], **source}, {"end_ids": list(source.get("end_ids", ()))}
    if not isinstance(source, pa.Table | Path):
        raise wrong_type("pair_or_table", source, "a row of a score table, the table, or its path")
    if not isinstance(source, pa.Table):
        path = Path(source)
        source = tables.read_table(path / "scores" if (path / "scores").is_dir() else path, "scores")
    require_table("pair_or_table", source, "scores")
    check_number("index", index, whole=True)
    if not -len(source) <= index < len(source):
        raise UserError(f"no pair at row {index}: the score table has {len(source)} rows")
    provenance = tables.provenance_of(source)
    kept = {name: provenance[name] for name in ("end_ids", "answers", "tokenizer") if name in provenance}
    return source.slice(index % len(source), 1).to_pylist()[0], kept
