"""How well a token score agrees with a truth, token by token, each token weighted by how often the start writes it."""

from __future__ import annotations

import numpy as np

from sepo.bench.laboratory.tree import Array, Tree, along, total

TOP = 0.3  # "the best tokens" are these many by weight; also the share of key tokens


def agreement(score: Array, truth: Array, weights: Array) -> dict[str, float]:
    """Measures of one seed; the three arrays have one number a token.

    Returns:
        pearson, spearman: weighted correlations.
        error: share of Σ truth² that the best multiple of the score leaves unexplained.
        auc: does the score find the tokens in the top 30 % of the truth?
    """
    score, truth, weights = (np.ravel(array).astype(np.float64) for array in (score, truth, weights))
    weights = weights / weights.sum()
    return {
        "pearson": _correlation(score, truth, weights),
        "spearman": _correlation(_ranks(score, weights), _ranks(truth, weights), weights),
        "error": 1 - _cosine(score, truth, weights) ** 2,
        "auc": _auc(score, truth, weights),
    }


def _cosine(a: Array, b: Array, weights: Array) -> float:
    size = np.sqrt((weights * a**2).sum() * (weights * b**2).sum())
    return float((weights * a * b).sum() / size) if size > 1e-12 else 0.0  # a constant says nothing


def _correlation(a: Array, b: Array, weights: Array) -> float:
    return _cosine(a - (weights * a).sum(), b - (weights * b).sum(), weights)


def _ranks(values: Array, weights: Array) -> Array:
    """Weight below a value, plus half of the weight at it. Values that differ by rounding alone are ties."""
    _, group = np.unique(np.round(values, 9), return_inverse=True)
    mass = np.bincount(group, weights)
    return (np.cumsum(mass) - mass / 2)[group]


def _auc(score: Array, truth: Array, weights: Array) -> float:
    """P(score of a top token > score of another) + P(equal) / 2; NaN where ties leave no other token."""
    ranks = _ranks(truth, weights)
    best = ranks > 1 - TOP + 1e-9
    if not best.any():  # the ties of the highest truth hold more than 30 %
        best = ranks == ranks.max()
    share = weights[best].sum()
    if share > 1 - 1e-9:
        return np.nan
    # The mean rank of the top tokens, as in the Mann-Whitney statistic.
    mean = (weights * _ranks(score, weights))[best].sum() / share
    return float((mean - share / 2) / (1 - share))


def key_tokens(tree: Tree, scores: Array, side: int) -> Array:
    """`[seeds, responses, length]`: True for the 30 % of a response with the highest `side` x score, at least one.

    `side` is 1 for chosen and -1 for rejected responses. Ties go to the earlier token. The end may be a key token.
    """
    order = np.where(tree.real, np.round(side * along(tree, scores), 9), -np.inf)
    place = np.argsort(np.argsort(-order, axis=-1, kind="stable"), axis=-1, kind="stable")
    return place < np.maximum(1, np.floor(TOP * tree.real.sum(-1)))[:, None]


def key_tokens_in_common(tree: Tree, scores: Array, truth: Array, chances: Array) -> tuple[Array, float]:
    """Share of key tokens that a score and a truth have in common, over both sides of all pairs, for each seed.

    Returns:
        the shares `[seeds]`, and the share for two random choices.
    """
    shares, randoms = [], []
    for side, axis in ((1, 2), (-1, 1)):
        ours, theirs = key_tokens(tree, scores, side), key_tokens(tree, truth, side)
        often = chances.sum(axis)
        shares.append((often * (ours & theirs).sum(-1) / ours.sum(-1)).sum(-1))
        randoms.append((often * ours.sum(-1) / tree.real.sum(-1)).sum(-1))
    return np.mean(shares, 0), float(np.mean(randoms))


def accuracy(tree: Tree, score: Array, chances: Array) -> Array:
    """Share of labelled pairs whose winner has the higher sum of scores, ties a half, `[seeds]`."""
    sums = np.round(total(tree, score), 9)
    gap = sums[:, :, None] - sums[:, None, :]
    return (chances * (0.5 + 0.5 * np.sign(gap))).sum((1, 2))
