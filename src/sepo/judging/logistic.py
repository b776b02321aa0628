"""Logistic regression with soft labels and a few features, as the published win rates are defined by it.

AlpacaEval fits with scikit-learn's `LogisticRegressionCV` (L1 penalty, liblinear, five folds by row), Arena-Hard with
L-BFGS. Both minimise what is minimised here; here it is minimised to rounding, by Newton steps on a handful of
features, where liblinear stops at a tolerance of 1e-4.
"""

from __future__ import annotations

import numpy as np

# scikit-learn's grid for Cs=10, the inverse strengths among which cross-validation chooses.
STRENGTHS = np.logspace(-4, 4, 10)
FOLDS = 5
_STEPS, _CLOSE, _RIDGE = 100, 1e-9, 1e-10


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)) without overflow."""
    return np.exp(-np.logaddexp(0, -np.asarray(x, np.float64)))


def fit_logistic(
    features: np.ndarray,
    targets: np.ndarray,
    weights: np.ndarray | None = None,
    strength: float | None = None,
    start: np.ndarray | None = None,
) -> np.ndarray:
    """Coefficients that minimise |w|_1 + C · Σ weight · (log(1 + exp(x·w)) − target · x·w), without an intercept.

    A row with target t stands for a success of weight t and a failure of weight 1 − t.

    Args:
        features: `[rows, features]`.
        targets: `[rows]`, in [0, 1].
        weights: `[rows]`; 1 each if None.
        strength: C, the inverse strength of the penalty; None for no penalty.
        start: coefficients to start from; they change the time, not the result.

    Returns:
        `[features]`. Where the likelihood has no maximum (all rows are wins) and no penalty bounds it, the coefficients
        after a hundred steps: their probabilities are then 0 or 1 to rounding.

    >>> fit_logistic(np.ones((4, 1)), np.array([1.0, 1.0, 1.0, 0.0])).round(4).tolist()  # log(0.75 / 0.25)
    [1.0986]
    """
    features, targets = np.asarray(features, np.float64), np.asarray(targets, np.float64)
    weights = np.ones(len(targets)) if weights is None else np.asarray(weights, np.float64)
    weights = weights if strength is None else weights * strength
    penalty = 0.0 if strength is None else 1.0

    def cost(at: np.ndarray) -> float:
        logits = features @ at
        return float(weights @ (np.logaddexp(0, logits) - targets * logits) + penalty * np.abs(at).sum())

    coefficients = np.zeros(features.shape[1]) if start is None else start
    now = cost(coefficients)
    for _ in range(_STEPS):
        chances = sigmoid(features @ coefficients)
        gradient = features.T @ (weights * (chances - targets))
        curvature = (features.T * (weights * chances * (1 - chances))) @ features
        # Collinear features have no single best step; any of them has the same probabilities.
        curvature[np.diag_indices_from(curvature)] += _RIDGE * (1 + np.trace(curvature))
        step = _newton_step(coefficients, gradient, curvature, penalty)
        if np.abs(step).max() < _CLOSE * (1 + np.abs(coefficients).max()):
            break
        size = 1.0
        while (there := cost(coefficients + size * step)) > now + 1e-14 * abs(now) and size > 1e-6:
            size /= 2
        coefficients, now = coefficients + size * step, there
    return coefficients


def _newton_step(at: np.ndarray, gradient: np.ndarray, curvature: np.ndarray, penalty: float) -> np.ndarray:
    """The step to the minimum of the quadratic model plus the penalty, by coordinate descent where there is one."""
    if not penalty:
        return np.linalg.solve(curvature, -gradient)
    # Where no coefficient changes its sign the penalty is a slope, and one solution of the equations is the minimum.
    signs = np.sign(at)
    if signs.all():
        step = np.linalg.solve(curvature, -gradient - penalty * signs)
        if (np.sign(at + step) == signs).all():
            return step
    target = at.copy()
    for _ in range(500):
        before = target.copy()
        for j in range(len(at)):
            slope = gradient[j] + curvature[j] @ (target - at) - curvature[j, j] * target[j]
            target[j] = -np.sign(slope) * max(abs(slope) - penalty, 0.0) / curvature[j, j]
        if np.abs(target - before).max() < 1e-13 * (1 + np.abs(target).max()):
            break
    return target - at


def fit_cross_validated(features: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, float]:
    """Coefficients at the strength C whose log loss on left-out rows is least, and that C.

    Row r of n is left out in fold (n − 1 − r) mod 5, which is where scikit-learn's `GroupKFold` puts it. The loss of a
    fold is the mean over its rows of weight · log loss; of equally good strengths the smallest is taken.

    Args: as `fit_logistic`; at least five rows.
    """
    folds = (len(targets) - 1 - np.arange(len(targets))) % FOLDS
    losses = np.zeros(len(STRENGTHS))
    for fold in range(FOLDS):
        left_out = folds == fold
        kept = ~left_out
        found = None
        for i, strength in enumerate(STRENGTHS):
            found = fit_logistic(features[kept], targets[kept], weights[kept], strength, found)
            chances = np.clip(sigmoid(features[left_out] @ found), 1e-15, 1 - 1e-15)
            aims = targets[left_out]
            logs = aims * np.log(chances) + (1 - aims) * np.log(1 - chances)
            losses[i] -= np.mean(logs * weights[left_out])
    best = float(STRENGTHS[np.argmin(losses)])
    return fit_logistic(features, targets, weights, best), best
