"""Best of n: the answer with the best score among n samples, a policy without training.

Its KL from the model that answers is at most log n − (n − 1)/n nats (Beirami et al., arXiv 2401.01879): 1.20 for n = 8.
A trained policy that gains less at this KL is not worth its training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import comb, log
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from sepo.errors import UserError
from sepo.evaluate.statistics import mean_and_se
from sepo.sampling.responses import rows_of


class Best(NamedTuple):
    """The best of n: the bound of its KL in nats; its mean score and tokens, and its gain over one answer, with errors
    over prompts.
    """

    n: int
    kl: float
    score: float
    score_se: float
    gain: float
    gain_se: float
    tokens: float


def kl_bound(n: int) -> float:
    """The largest KL of best of n from its model, in nats.

    >>> round(kl_bound(8), 2)
    1.2
    """
    return log(n) - (n - 1) / n


def best_shares(scores: Sequence[float], n: int) -> np.ndarray:
    """The probability of each answer to be the best of n drawn without replacement; equal scores share theirs.

    >>> best_shares([1.0, 3.0, 2.0], 2).round(3).tolist()
    [0.0, 0.667, 0.333]
    """
    values = np.asarray(scores, np.float64)
    order = np.argsort(values, kind="stable")
    shares = np.empty(len(values))
    shares[order] = [comb(rank, n - 1) / comb(len(values), n) for rank in range(len(values))]
    _, group = np.unique(values, return_inverse=True)
    return (np.bincount(group, shares) / np.bincount(group))[group]


def best_of(table: pa.Table, sizes: Sequence[int], measured: pa.Table | None = None) -> list[Best]:
    """The mean score of the best of n, for several n, without the noise of drawing the n answers.

    Args:
        table: a responses table whose scores choose the best.
        measured: the same answers with the scores that are reported; default: the same scores.

    Raises:
        UserError: an n above the number of samples, other answers in `measured`, or no prompt has scores for all.
    """
    rows = _scored(table, measured or table)
    results = []
    for n in sizes:
        if not 1 <= n <= min(len(row["choose"]) for row in rows):
            raise UserError(f"best of {n}: expected 1 to {min(len(row['choose']) for row in rows)}, the samples scored")
        shares = [best_shares(row["choose"], n) for row in rows]
        best = np.array([float(share @ row["score"]) for share, row in zip(shares, rows, strict=True)])
        plain = np.array([float(np.mean(row["score"])) for row in rows])
        tokens = float(np.mean([float(share @ row["tokens"]) for share, row in zip(shares, rows, strict=True)]))
        results.append(Best(n, kl_bound(n), *mean_and_se(best), *mean_and_se(best - plain), tokens))
    return results


def _scored(table: pa.Table, measured: pa.Table) -> list[Mapping[str, Any]]:
    """For each prompt whose answers all have both scores: the scores that choose and those reported, and the tokens."""
    others = {row["conversation"]: row for row in rows_of(measured)}
    rows = []
    for row in rows_of(table):
        other = others.get(row["conversation"])
        if other is None or other["answers"] != row["answers"]:
            raise UserError("the measured table holds other answers: score the same samples with another judge")
        if None not in row["scores"] and None not in other["scores"]:
            scores = {"choose": row["scores"], "score": np.array(other["scores"]), "tokens": np.array(row["tokens"])}
            rows.append(scores)
    if not rows:
        raise UserError("no prompt has a score for each of its answers")
    return rows
