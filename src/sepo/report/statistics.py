"""Intervals of means and shares, means over seeds, correlations: for reports, analyses and comparisons."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike


def over_seeds(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error over independent runs; the error of a single run is NaN."""
    if not values:
        return math.nan, math.nan
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(np.mean(values)), error


def interval(mean: float, error: float, number: int) -> tuple[float, float]:
    """95 % interval of a mean of `number` values with this standard error, by Student's t; NaN for one value."""
    reach = student_reach(error, number - 1) if number > 1 else math.nan
    return mean - reach, mean + reach


def student_reach(error: float, freedom: float | None) -> float:
    """Half the width of a 95 % interval; by the normal distribution if the degrees of freedom are not known."""
    from scipy import special  # `scipy.stats` takes a second to import

    return float(special.ndtri(0.975) if freedom is None else special.stdtrit(freedom, 0.975)) * error


def spread_seen(error: float, scale: float = 1.0) -> bool:
    """Whether a standard error is more than rounding. Values that are all equal have an error of 0."""
    return error > 1e-9 * max(1.0, abs(scale))


def wilson(share: float, error: float, groups: int | None) -> tuple[float, float] | None:
    """Wilson's 95 % interval of a share with a clustered standard error; stays in [0, 1].

    The error gives the number of independent answers that the groups are worth, p (1 - p) / error² + 1. Without spread
    every group counts as one answer. As the error itself is estimated, the quantile is Student's.

    Args:
        groups: number of independent groups, 2 or more; None if it is not known.

    Returns:
        the interval; None if it is not known how many groups agree. For 8 right of 8 it begins at 0.589.
    """
    if error > 0:
        number = 1 + share * (1 - share) / error**2
    elif groups is not None:
        number = groups
    else:
        return None
    square = student_reach(1.0, None if groups is None else groups - 1) ** 2
    middle = (share + square / (2 * number)) / (1 + square / number)
    reach = math.sqrt(square * (share * (1 - share) / number + square / (4 * number**2))) / (1 + square / number)
    return max(middle - reach, 0.0) if share > 0 else 0.0, min(middle + reach, 1.0) if share < 1 else 1.0


def correlation(a: ArrayLike, b: ArrayLike) -> float:
    """Pearson's correlation; NaN if either is constant."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:  # a standard deviation may be rounding
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def rank_correlation(a: ArrayLike, b: ArrayLike) -> float:
    """Spearman's correlation, with mean ranks for ties; NaN if either is constant.

    >>> round(rank_correlation([1.0, 2.0, 9.0], [0.0, 0.0, 5.0]), 4)
    0.866
    """
    from scipy import stats

    return correlation(stats.rankdata(a), stats.rankdata(b))


def auc(targets: ArrayLike, others: ArrayLike) -> float:
    """Mann-Whitney statistic P(target > other) + P(target = other) / 2; NaN if either is empty.

    >>> auc([2.0, 1.0], [1.0, 0.0])
    0.875
    """
    from scipy import stats

    targets, others = np.asarray(targets, np.float64), np.asarray(others, np.float64)
    if not len(targets) or not len(others):
        return float("nan")
    ranks = stats.rankdata(np.concatenate([targets, others]))[: len(targets)].sum()
    return float((ranks - len(targets) * (len(targets) + 1) / 2) / (len(targets) * len(others)))
