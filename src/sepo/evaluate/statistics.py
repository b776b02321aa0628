"""Means with standard errors clustered by prompt, paired differences, seeds x prompts, power, correlations."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class StdComponents:
    """Standard deviations of a paired difference between two methods.

    Attributes:
        seed: of a seed's mean around the mean of all seeds (another oracle, another order of the pairs).
        prompt: of a prompt's mean around the mean of all prompts.
        rest: of one prompt at one seed around what these two explain: sampling, and how seeds and prompts interact.
    """

    seed: float
    prompt: float
    rest: float

    def error(self, seeds: int, prompts: int) -> tuple[float, float]:
        """Standard error of the mean over `seeds` x `prompts`, and its degrees of freedom by Satterthwaite."""
        rest = self.rest**2
        squares = (prompts * self.seed**2 + rest, seeds * self.prompt**2 + rest, rest)
        return _crossed_error(squares, seeds, prompts)


@dataclass(frozen=True)
class Crossed:
    """A mean over seeds x prompts with its interval of 95 %, and what moved it."""

    mean: float
    error: float
    freedom: float
    low: float
    high: float
    spread: StdComponents


def crossed_mean(values: ArrayLike) -> Crossed:
    """The mean of a paired difference over seeds and prompts, both of which stand for all that there could be.

    Two-way random effects, by moments: difference = mean + seed + prompt + rest. Every seed answers the same prompts,
    so neither the values of a seed nor those of a prompt are independent. A component that is estimated below 0 is
    taken as 0. The intervals hold 93 to 97 % in simulations with 3 seeds or more, up to 98 % where seeds do not differ.

    Args:
        values: `[seeds, prompts]`, at least 3 by 2; each the mean over a prompt's samples.

    Raises:
        ValueError: there are fewer: two seeds do not tell how seeds differ.
    """
    from scipy import stats

    values = np.asarray(values, np.float64)
    seeds, prompts = values.shape
    if seeds < 3 or prompts < 2:
        raise ValueError(f"{seeds} seeds by {prompts} prompts: expected at least 3 by 2")
    mean, by_seed, by_prompt = values.mean(), values.mean(1), values.mean(0)
    of_seeds = prompts * np.sum((by_seed - mean) ** 2) / (seeds - 1)
    of_prompts = seeds * np.sum((by_prompt - mean) ** 2) / (prompts - 1)
    rest = np.sum((values - by_seed[:, None] - by_prompt + mean) ** 2) / ((seeds - 1) * (prompts - 1))
    error, freedom = _crossed_error((of_seeds, of_prompts, rest), seeds, prompts)
    reach = float(stats.t.ppf(0.975, freedom)) * error
    spread = StdComponents(
        math.sqrt(max(of_seeds - rest, 0) / prompts), math.sqrt(max(of_prompts - rest, 0) / seeds), math.sqrt(rest)
    )
    return Crossed(float(mean), error, freedom, float(mean) - reach, float(mean) + reach, spread)


def _crossed_error(squares: tuple[float, float, float], seeds: int, prompts: int) -> tuple[float, float]:
    """Standard error and degrees of freedom from the mean squares of seeds, prompts and the rest."""
    of_seeds, of_prompts, rest = squares
    with_seeds, with_prompts = of_seeds > rest, of_prompts > rest
    variance = max(of_seeds - rest, 0) + max(of_prompts - rest, 0) + rest
    own = (seeds - 1, prompts - 1, (seeds - 1) * (prompts - 1))
    # The mean squares that the sum above consists of: a component at 0 drops out.
    used = (of_seeds if with_seeds else 0, of_prompts if with_prompts else 0, rest if with_seeds == with_prompts else 0)
    below = sum(square**2 / number for square, number in zip(used, own, strict=True))
    freedom = variance**2 / below if below else math.inf
    return math.sqrt(variance / (seeds * prompts)), max(freedom, min(own[:2]))


def smallest_difference(error: float, freedom: float, power: float = 0.8) -> float:
    """The difference that an interval of 95 % leaves 0 out of with this probability: what a design can tell apart.

    Args:
        error, freedom: standard error of the difference, and its degrees of freedom.

    >>> round(smallest_difference(1.0, 1e6), 2)
    2.8
    """
    from scipy import optimize, stats

    critical = stats.t.ppf(0.975, freedom)

    def missing(ratio: float) -> float:
        # The other tail is nothing at powers that one wants; far out, scipy has no number for what is 1.
        return float(np.nan_to_num(stats.nct.sf(critical, freedom, ratio), nan=1.0)) - power

    return float(optimize.brentq(missing, 0.0, 2 * critical + 10)) * error


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
