"""Label statistics of token ids: does an id occur more often in chosen than in rejected responses?

An oracle trained on few pairs gives noisy token rewards. The counts of an id on both sides of the same pairs are a
second noisy signal, which needs no model. Let an id occur y_w times among the n_w tokens of chosen responses and y_l
times among the n_l tokens of rejected ones. Its standardised residual in the table of ids by sides (Haberman,
Biometrics 1973) is the number of occurrences in chosen responses above the expected number, in standard deviations:

    z = (y_w - y p) / sqrt(y p (1 - p)),      y = y_w + y_l,  p = n_w / (n_w + n_l)

It is mixed into v, which measures how much a token speaks for its label, with share e:

    v' = (1 - e) v / sd(v) + e (± z) / sd(z),      both centred at their mean over the tokens of the side

An id that is equally frequent on both sides has z near 0, an id that occurs once about ±1. Preferences for the order of
words rather than for words leave no trace in z; z is then noise, and e should be small.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from sepo.data.ragged import SIDES, flat


class LabelStatistics(NamedTuple):
    """Label statistics of a dataset.

    Attributes:
        z: `[ids]` float64, standardised residual of each token id.
        mean, std: for each side, mean and standard deviation of s and of z over the tokens: `[2]` float64.
    """

    z: np.ndarray
    mean: dict[str, np.ndarray]
    std: dict[str, np.ndarray]


def label_statistics(tables: Iterable[pa.Table]) -> LabelStatistics:
    """Compute the label statistics of a dataset from the shards of its score table, in one pass."""
    counts = {side: np.zeros(0) for side in SIDES}
    moments = {side: np.zeros(2) for side in SIDES}
    for table in tables:
        for side in SIDES:
            ids, _ = flat(table.column(f"{side}_ids"))
            rewards = flat(table.column(f"{side}_rewards"))[0].astype(np.float64)
            counts[side] = _added(counts[side], np.bincount(ids))
            moments[side] += rewards.sum(), rewards @ rewards
    size = max(map(len, counts.values()))
    chosen, rejected = (np.pad(counts[side], (0, size - len(counts[side]))) for side in SIDES)
    z = residuals(chosen, rejected)
    mean, std = {}, {}
    for side, number in zip(SIDES, (chosen, rejected), strict=True):
        tokens = max(number.sum(), 1)
        means = np.array([moments[side][0], number @ z]) / tokens
        squares = np.array([moments[side][1], number @ z**2]) / tokens
        deviations = np.sqrt(np.maximum(squares - means**2, 0))
        mean[side], std[side] = means, np.where(deviations > 0, deviations, 1.0)
    return LabelStatistics(z, mean, std)


def residuals(chosen: np.ndarray, rejected: np.ndarray) -> np.ndarray:
    """z of each id (see the module's text) from its counts on both sides: `[ids]`, 0 for an id that does not occur.

    >>> residuals(np.array([4.0, 1.0, 0.0]), np.array([0.0, 5.0, 0.0])).tolist()
    [2.0, -1.6329931618554523, 0.0]
    """
    number, share = chosen + rejected, chosen.sum() / max(chosen.sum() + rejected.sum(), 1)
    expected = number * share
    deviation = np.sqrt(expected * (1 - share))
    return np.divide(chosen - expected, deviation, out=np.zeros(len(number)), where=deviation > 0)


def with_label_log_odds(
    rewards: np.ndarray, ids: np.ndarray, side: str, statistics: LabelStatistics, share: float
) -> np.ndarray:
    """Mix label statistics into the rewards of one side, in standard deviations: `[tokens]` float64.

    The sign is that of rewards: low values speak for the label of a rejected response.

    Args:
        rewards, ids: `[tokens]`.
        side: "chosen" or "rejected".
        share: e, the share of the label statistics.
    """
    given = np.stack([rewards.astype(np.float64), statistics.z[ids]], 1)
    scaled = (given - statistics.mean[side]) / statistics.std[side]
    return scaled @ np.array([1 - share, share])


def _added(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The sum of two arrays, the shorter one padded with zeros."""
    longer, shorter = (a, b) if len(a) >= len(b) else (b, a)
    return longer + np.pad(shorter, (0, len(longer) - len(shorter)))
