"""Means with standard errors clustered by prompt, paired differences, intervals over seeds, correlations."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike


def mean_and_se(values: ArrayLike, groups: Sequence[Hashable] | None = None) -> tuple[float, float]:
    """Mean and its standard error.

    With `groups` (one label a value, for example its prompt) the error is clustered: values of one group may depend on
    each other in any way, groups are independent. Several samples of one prompt then do not count as several prompts.

    Returns:
        (mean, standard error); NaN for the mean of nothing and for the error of fewer than two groups.

    Raises:
        ValueError: `groups` is not as long as `values`.
    """
    values = np.asarray(values, np.float64)
    if groups is None:
        index, count = np.arange(len(values)), len(values)
    else:
        if len(groups) != len(values):
            raise ValueError(f"{len(values)} values but {len(groups)} group labels")
        labels: dict[Hashable, int] = {}
        index = np.array([labels.setdefault(group, len(labels)) for group in groups], dtype=np.int64)
        count = len(labels)
    if len(values) == 0:
        return float("nan"), float("nan")
    mean = values.mean()
    if count < 2:
        return float(mean), float("nan")
    residuals = np.bincount(index, weights=values - mean, minlength=count)
    # Cluster-robust variance of a mean, with the G / (G - 1) correction; s^2 / n where each group has one value.
    variance = count / (count - 1) * np.sum(residuals**2) / len(values) ** 2
    return float(mean), float(np.sqrt(variance))


def paired_difference(
    policy_values: ArrayLike, base_values: ArrayLike, groups: Sequence[Hashable]
) -> tuple[float, float]:
    """Mean of policy minus base and its standard error, clustered by prompt.

    Args:
        policy_values, base_values: `[n]`, measured on the same prompts in the same order.
        groups: `[n]`, the prompt of each value.

    Raises:
        ValueError: the arrays differ in length.
    """
    policy_values, base_values = np.asarray(policy_values, np.float64), np.asarray(base_values, np.float64)
    if policy_values.shape != base_values.shape:
        raise ValueError(f"{policy_values.shape} policy values but {base_values.shape} base values")
    return mean_and_se(policy_values - base_values, groups)


def over_seeds(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error over independent runs; NaN error for a single one."""
    if not values:
        return math.nan, math.nan
    spread = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(np.mean(values)), spread


def interval(mean: float, error: float, number: int) -> tuple[float, float]:
    """Interval of 95 % of a mean of `number` values with this standard error, by Student's t; NaN for one value."""
    from scipy import stats

    reach = float(stats.t.ppf(0.975, number - 1)) * error if number > 1 else math.nan
    return mean - reach, mean + reach


def correlation(a: ArrayLike, b: ArrayLike) -> float:
    """Pearson's correlation; NaN where one of the two does not vary."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if len(a) < 2 or a.std() == 0 or b.std() == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def rank_correlation(a: ArrayLike, b: ArrayLike) -> float:
    """Spearman's correlation, ties at their mean rank; NaN where one of the two does not vary.

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
