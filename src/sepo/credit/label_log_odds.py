"""What the labels say of a token's id: is it found in chosen responses more than in rejected ones?

An oracle of few pairs gives a token a noisy reward. How often its id stands on each side of the same pairs is another
noisy witness, which needs no model. Of an id with y_w, y_l occurrences in chosen and rejected responses, among n_w and
n_l tokens, take the standardised residual of the table of ids by sides (Haberman, Biometrics 1973): the occurrences in
chosen responses beyond those expected, in standard deviations,

    z = (y_w - y p) / sqrt(y p (1 - p)),      y = y_w + y_l,  p = n_w / (n_w + n_l)

and let v, how much a token speaks for its label, become

    v' = (1 - e) v / sd(v) + e (± z) / sd(z),      both around their mean over the tokens of the side

Words that are as frequent on both sides have a z near 0, one that was seen once has about ±1. What is preferred for the
order of its words and not for the words leaves no trace in z: there it is noise, and e should be small.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from sepo.data.ragged import SIDES, flat


class LabelStatistics(NamedTuple):
    """Of a dataset.

    Attributes:
        z: `[ids]` float64, standardised residual of each token id.
        center, spread: of each side, mean and standard deviation over its tokens of s and of z: `[2]` float64.
    """

    z: np.ndarray
    center: dict[str, np.ndarray]
    spread: dict[str, np.ndarray]


def label_statistics(tables: Iterable[pa.Table]) -> LabelStatistics:
    """Read the statistics of a dataset.

    Args:
        tables: the shards of a score table, read once.
    """
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
    center, spread = {}, {}
    for side, number in zip(SIDES, (chosen, rejected), strict=True):
        tokens = max(number.sum(), 1)
        means = np.array([moments[side][0], number @ z]) / tokens
        squares = np.array([moments[side][1], number @ z**2]) / tokens
        deviations = np.sqrt(np.maximum(squares - means**2, 0))
        center[side], spread[side] = means, np.where(deviations > 0, deviations, 1.0)
    return LabelStatistics(z, center, spread)


def residuals(chosen: np.ndarray, rejected: np.ndarray) -> np.ndarray:
    """z of each id (see the module's text) from its occurrences on both sides: `[ids]`, 0 for an id without any.

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
    """Rewards of one side's tokens with the labels' evidence mixed in, in standard deviations: `[tokens]` float64.

    Args:
        rewards, ids: `[tokens]`.
        side: "chosen" or "rejected"; the sign is that of rewards: low ones speak for the label of a rejected response.
        share: e, of the evidence.
    """
    given = np.stack([rewards.astype(np.float64), statistics.z[ids]], 1)
    scaled = (given - statistics.center[side]) / statistics.spread[side]
    return scaled @ np.array([1 - share, share])


def _added(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    longer, shorter = (one, other) if len(one) >= len(other) else (other, one)
    return longer + np.pad(shorter, (0, len(longer) - len(shorter)))
