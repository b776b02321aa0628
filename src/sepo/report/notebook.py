"""One pair in a notebook: both responses with every token coloured by its reward.

Plain HTML without a script, so it also shows where notebooks are only rendered (a repository, an export).
"""

from __future__ import annotations

import html
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from sepo.credit.selection import check_rate, keep_counts, selection_order
from sepo.data import tables
from sepo.data.ragged import SIDES
from sepo.data.tables import require_table
from sepo.data.vocabulary import load_vocabulary
from sepo.errors import UserError, check_number, wrong_type
from sepo.files import expand_home
from sepo.report.build import find_tokenizer
from sepo.report.style import NEGATIVE, POSITIVE
from sepo.report.token_texts import MARK_OFF, MARK_ON, TokenText, TokenTexts

# Blue for positive rewards, orange for negative ones, laid over whatever background the notebook has.
_COLOURS = {True: POSITIVE, False: NEGATIVE}
_STRONGEST = 0.75


@dataclass(frozen=True)
class PairView:
    """A pair as HTML, for a notebook to show."""

    html: str

    def _repr_html_(self) -> str:
        return self.html


def _token_html(piece: TokenText, reward: float, place: str, limit: float, key: bool) -> str:
    strength = _STRONGEST * min(1.0, abs(reward) / limit) ** 0.75
    style = f"background:rgba({_COLOURS[reward > 0]},{strength:.2f});border-radius:3px;padding:2px 0;"
    if key:
        style += "box-shadow:inset 0 -2.5px 0 currentColor;"
    title = f"{piece.label} | id {piece.token_id} | reward {reward:+.4f} | rank {place}"
    # The space before a word stands outside the coloured box, so that boxes read as words.
    spaced = len(piece.shown) > 1 and piece.shown.startswith(" ")
    shown = html.escape(piece.shown[spaced:])
    shown = shown.replace(MARK_ON, '<span dir="ltr" style="opacity:.7;font-size:.85em">').replace(MARK_OFF, "</span>")
    tooltip = html.escape(title + (" | key token" if key else ""))
    return f'{" " if spaced else ""}<span style="{style}" title="{tooltip}">{shown}</span>'


def _side_html(row: Mapping, side: str, pieces: TokenTexts, k: float, limit: float) -> str:
    rewards = np.asarray(row[f"{side}_rewards"], dtype=np.float32)
    ids = np.asarray(row[f"{side}_ids"], dtype=np.int32)
    count = len(ids)
    if len(rewards) != count:
        raise UserError(f"the pair has {len(rewards)} {side} rewards for {count} tokens: expected one a token")
    numbers = pieces.encode(ids, np.array([count]))
    rank = np.empty(count, dtype=np.int64)
    ended = count > 0 and int(ids[-1]) in row.get("end_ids", ())
    rank[selection_order(rewards, side, ended)] = np.arange(count)
    keys = min(max(1, count - ended), int(keep_counts(np.array([count]), k)[0]))
    tokens = "".join(
        _token_html(pieces.pieces[number], float(reward), f"{place + 1} of {count}", limit, bool(place < keys))
        for number, reward, place in zip(numbers, rewards, rank, strict=True)
    )
    heading = f"<b>{side.capitalize()}</b> · {count} tokens · {keys} key · sum {float(rewards.sum()):+.2f}"
    text_style = "white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:plaintext;line-height:1.9"
    return (
        '<div style="flex:1 1 320px;min-width:0">'
        f'<div style="font-size:.85em;opacity:.75;margin-bottom:4px">{heading}</div>'
        f'<div dir="auto" style="{text_style}">{tokens}</div></div>'
    )


def _row(source: Mapping | pa.Table | str | os.PathLike, index: int) -> Mapping:
    if isinstance(source, Mapping):
        missing = [f"{side}_{part}" for side in SIDES for part in ("ids", "rewards") if f"{side}_{part}" not in source]
        if missing:
            raise UserError(f"the pair has no '{missing[0]}': expected a row of a score table")
        return source
    if not isinstance(source, pa.Table | Path):
        raise wrong_type("pair_or_table", source, "a row of a score table, the table, or its path")
    if not isinstance(source, pa.Table):
        path = Path(source)
        source = tables.read_table(path / "scores" if (path / "scores").is_dir() else path, "scores")
    require_table("pair_or_table", source, "scores")
    check_number("index", index, whole=True)
    if not -len(source) <= index < len(source):
        raise UserError(f"no pair at row {index}: the score table has {len(source)} rows")
    end_ids = tables.provenance_of(source).get("end_ids", [])
    return {**source.slice(index % len(source), 1).to_pylist()[0], "end_ids": end_ids}


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
        pair_or_table: a row of a score table as a mapping (with `end_ids` if the token that ends a response is no
            key token), a score table, its path, or a run folder.
        index: which row of the table; a single pair ignores it.
        tokenizer: a folder with a `tokenizer.json`, or a loaded fast tokenizer; by default that of the run
            folder. Without one, tokens are shown by id.
        k_chosen, k_rejected: selection rates for the underlined key tokens.

    Returns:
        An object that a notebook shows as HTML (`_repr_html_`).

    Raises:
        UserError: there is no such table or row, the tokenizer is not the table's, or a rate is not in (0, 1].
    """
    if isinstance(pair_or_table, str | os.PathLike):
        pair_or_table = Path(expand_home(pair_or_table, "the score table"))
        tokenizer = find_tokenizer(pair_or_table) if tokenizer is None else tokenizer
    row = _row(pair_or_table, index)
    pieces = TokenTexts(None if tokenizer is None else load_vocabulary(tokenizer))
    for name, rate in (("k_chosen", k_chosen), ("k_rejected", k_rejected)):
        check_rate(name, rate)
    magnitude = np.abs(np.concatenate([np.asarray(row[f"{side}_rewards"], dtype=np.float32) for side in SIDES]))
    limit = float(np.quantile(magnitude, 0.98)) if len(magnitude) else 0.0
    sides = "".join(
        _side_html(row, side, pieces, k, limit or 1.0) for side, k in zip(SIDES, (k_chosen, k_rejected), strict=True)
    )
    caption = "Blue: more likely under the oracle than under the reference; orange: less. Underlined: key tokens."
    return PairView(
        f'<div style="display:flex;flex-wrap:wrap;gap:32px">{sides}</div>'
        f'<div style="font-size:.8em;opacity:.7;margin-top:8px">{caption}</div>'
    )
