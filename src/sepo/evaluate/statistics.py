"""Means with errors clustered by prompt, and paired differences."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike


def mean_and_se(values: ArrayLike, groups: Sequence[Hashable] | np.ndarray | None = None) -> tuple[float, float]:
    """Mean and its standard error.

    With `groups` (one label per value, for example its prompt) the error is clustered: values of one group may depend
    on each other in any way, while groups are independent. Several samples of one prompt then do not count as several
    prompts.

    Returns:
        (mean, standard error); the mean of no values and the error of fewer than two groups are NaN.

    Raises:
        ValueError: `groups` is not as long as `values`.
    """
    values = np.asarray(values, np.float64)
    if groups is None:
        index, count = np.arange(len(values)), len(values)
    else:
        if len(groups) != len(values):
            raise ValueError(f"{len(values)} values but {len(groups)} group labels")
        index, count = numbered(groups)
    if len(values) == 0:
        return float("nan"), float("nan")
    mean = values.mean()
    if count < 2:
        return float(mean), float("nan")
    residuals = np.bincount(index, weights=values - mean, minlength=count)
    # Cluster-robust variance of a mean, with the G / (G - 1) correction; s^2 / n where each group has one value.
    variance = count / (count - 1) * np.sum(residuals**2) / len(values) ** 2
    return float(mean), float(np.sqrt(variance))


def numbered(groups: Sequence[Hashable] | np.ndarray) -> tuple[np.ndarray, int]:
    """Labels as numbers from 0 in the order of first occurrence, and how many there are."""
    if isinstance(groups, np.ndarray):
        _, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
        rank = np.empty(len(first), np.int64)
        rank[np.argsort(first)] = np.arange(len(first))
        return rank[inverse], len(first)
    labels: dict[Hashable, int] = {}
    index = np.array([labels.setdefault(group, len(labels)) for group in groups], dtype=np.int64)
    return index, len(labels)


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
