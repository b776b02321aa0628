"""Preference accuracy beside its length-only baseline, and means with standard errors clustered by prompt.

The preferred response is the longer one in most preference data (84 % of the pairs of a typical benchmark), so an
accuracy says little until it is read next to what length alone achieves and on the pairs where length cannot help.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike


def preference_accuracy(
    chosen_scores: ArrayLike,
    rejected_scores: ArrayLike,
    chosen_lengths: ArrayLike,
    rejected_lengths: ArrayLike,
    *,
    groups: Sequence[Hashable] | None = None,
) -> dict[str, float]:
    """How often the chosen response has the higher score; a tie counts one half.

    Args:
        chosen_scores, rejected_scores: `[pairs]`, for example summed token rewards.
        chosen_lengths, rejected_lengths: `[pairs]`, response lengths in tokens.
        groups: `[pairs]`, the prompt of each pair; standard errors are then clustered by it.

    Returns:
        accuracy, accuracy_se: on all pairs.
        accuracy_not_longer, accuracy_not_longer_se: on pairs whose chosen response is not the longer one.
        pairs, pairs_not_longer: how many these are.
        length_baseline: accuracy of always preferring the longer response.
        A figure without a pair (or a standard error without two) is NaN.

    Raises:
        ValueError: the four arrays differ in length.
    """
    arrays = [np.asarray(x, np.float64) for x in (chosen_scores, rejected_scores, chosen_lengths, rejected_lengths)]
    if len({array.shape for array in arrays}) != 1 or arrays[0].ndim != 1:
        raise ValueError(f"expected four arrays of one length, got shapes {[array.shape for array in arrays]}")
    scores, others, lengths, other_lengths = arrays
    won = _won(scores, others)
    not_longer = lengths <= other_lengths
    accuracy, accuracy_se = mean_and_se(won, groups)
    kept = None if groups is None else [groups[index] for index in np.flatnonzero(not_longer).tolist()]
    accuracy_not_longer, accuracy_not_longer_se = mean_and_se(won[not_longer], kept)
    return {
        "accuracy": accuracy,
        "accuracy_se": accuracy_se,
        "accuracy_not_longer": accuracy_not_longer,
        "accuracy_not_longer_se": accuracy_not_longer_se,
        "pairs": len(won),
        "pairs_not_longer": int(not_longer.sum()),
        "length_baseline": mean_and_se(_won(lengths, other_lengths))[0],
    }


def _won(values: np.ndarray, others: np.ndarray) -> np.ndarray:
    # A NaN on either side compares as neither higher nor lower and must not look like a tie.
    half = np.where(np.isnan(values - others) & ~(values == others), np.nan, 0.5 * (values == others))
    return (values > others) + half


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
