"""Localisation: do token rewards point at the tokens that the truth counts, better than what needs no oracle?

Three measures, each beside surprisal (improbable under the reference), position (early) and diff (not in the other
response):

    auc          P(a counted token ranks above a neutral one), sign-aware (`evaluate.fidelity`)
    precision    average precision of the counted tokens of each side: positive ones of chosen responses, negative ones
                 of rejected responses
    first_error  share of rejected responses with a wrong unit whose lowest token lies in the first wrong unit
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from sepo.analyse.measures import baseline_tables
from sepo.credit.selection import shared_tokens
from sepo.data.ragged import SIGNED_SIDES, flat, ragged
from sepo.evaluate.fidelity import fidelity, token_truth
from sepo.evaluate.words import Truth


class Localisation(NamedTuple):
    """How well values of tokens find the tokens that count; chance is 0.5 for `auc`."""

    auc: float
    precision: float
    first_error: float


def localise(
    tokenizer: PreTrainedTokenizerBase, scores: pa.Table, truth: Truth, reference_logps: pa.Table | None = None
) -> dict[str, Localisation]:
    """Localisation of the rewards of a score table, as "oracle", and of its baselines."""
    tables = {"oracle": scores, **baseline_tables(scores, reference_logps, 0), "diff": _diff(scores)}
    values = {side: token_truth(tokenizer, scores, side, truth) for side, _ in SIGNED_SIDES}
    return {
        name: Localisation(
            fidelity(tokenizer, table, truth=truth, resamples=0)["auc"],
            float(np.nanmean([_precision(table, side, sign * values[side]) for side, sign in SIGNED_SIDES])),
            _first_error(table, values["rejected"]),
        )
        for name, table in tables.items()
    }


def beyond(found: Mapping[str, Localisation]) -> Localisation:
    """The oracle's localisation minus that of the best baseline, measure by measure."""
    others = [value for name, value in found.items() if name != "oracle"]
    return Localisation(
        *(own - max(each) for own, each in zip(found["oracle"], zip(*others, strict=True), strict=True))
    )


def _diff(scores: pa.Table) -> pa.Table:
    """A score table whose rewards are 1 (chosen) or -1 (rejected) for tokens that only one response has."""
    shared = shared_tokens(scores)
    for side, sign in SIGNED_SIDES:
        name = f"{side}_rewards"
        rewards = ragged((sign * ~shared[side]).astype(np.float32), flat(scores.column(f"{side}_ids"))[1])
        scores = scores.set_column(scores.column_names.index(name), name, rewards)
    return scores


def _precision(table: pa.Table, side: str, value: np.ndarray) -> float:
    """Average precision of the tokens with `value` above 0 among the tokens of words; NaN without any."""
    sign = dict(SIGNED_SIDES)[side]
    words = ~np.isnan(value)
    hits = value[words] > 0
    if not hits.any():
        return float("nan")
    ranked = sign * flat(table.column(f"{side}_rewards"))[0][words].astype(np.float64)
    levels, level = np.unique(-ranked, return_inverse=True)  # tokens of equal value are taken together
    found = np.cumsum(np.bincount(level, hits, len(levels)))
    taken = np.cumsum(np.bincount(level, minlength=len(levels)))
    return float(np.sum(np.diff(found, prepend=0.0) * found / taken) / hits.sum())


def _first_error(table: pa.Table, value: np.ndarray) -> float:
    """Share of rejected responses with a wrong unit whose lowest word token lies in the first wrong unit."""
    rewards, lengths = flat(table.column("rejected_rewards"))
    hits = []
    for stop, length in zip(np.cumsum(lengths), lengths, strict=True):
        worth, reward = value[stop - length : stop], rewards[stop - length : stop].astype(np.float64)
        wrong = np.flatnonzero(worth < 0)
        if not len(wrong):
            continue
        end = wrong[0] + 1
        while end < length and worth[end] < 0:
            end += 1
        lowest = reward == np.nanmin(np.where(np.isnan(worth), np.nan, reward))
        lowest &= ~np.isnan(worth)
        hits.append(lowest[wrong[0] : end].sum() / lowest.sum())  # ties share the hit
    return float(np.mean(hits)) if hits else float("nan")
