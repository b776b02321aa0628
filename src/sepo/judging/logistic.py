"""Logistic regression with soft labels and few features, which defines the published win rates.

AlpacaEval fits with scikit-learn's `LogisticRegressionCV` (L1 penalty, liblinear, five folds by row), Arena-Hard with
L-BFGS. SciPy minimises the same functions here: the penalised one to 1e-9, where liblinear stops at a tolerance of
1e-4.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize, root
from scipy.special import expit

# scikit-learn's grid for Cs=10: cross-validation chooses among these inverse strengths.
STRENGTHS = np.logspace(-4, 4, 10)
FOLDS = 5
_PRECISION = {"maxiter": 1000, "ftol": 1e-15, "gtol": 1e-9}


def fit_logistic(
    features: np.ndarray, targets: np.ndarray, weights: np.ndarray | None = None, strength: float | None = None
) -> np.ndarray:
    """Coefficients that minimise |w|_1 + C · Σ weight · (log(1 + exp(x·w)) − target · x·w), without an intercept.

    A row with target t counts as a success of weight t and a failure of weight 1 − t.

    Args:
        features: `[rows, features]`.
        targets: `[rows]`, in [0, 1].
        weights: `[rows]`; 1 each if None.
        strength: C, the inverse strength of the penalty; None for no penalty.

    Returns:
        `[features]`. Without a penalty, and where the likelihood has no maximum (all rows are wins), the coefficients
        grow until the gradient vanishes: their probabilities are then 0 or 1 to rounding.

    >>> fit_logistic(np.ones((4, 1)), np.array([1.0, 1.0, 1.0, 0.0])).round(4).tolist()  # log(0.75 / 0.25)
    [1.0986]
    """
    features, targets = np.asarray(features, np.float64), np.asarray(targets, np.float64)
    weights = np.ones(len(targets)) if weights is None else np.asarray(weights, np.float64)
    # The mean instead of the sum over rows, which leaves more digits to the line search.
    penalty = 0.0 if strength is None else 1 / (strength * weights.sum())
    weights = weights / weights.sum()
    number = features.shape[1]

    def loss(coefficients: np.ndarray) -> tuple[float, np.ndarray]:
        logits = features @ coefficients
        value = weights @ (np.logaddexp(0, logits) - targets * logits)
        return float(value), features.T @ (weights * (expit(logits) - targets))

    if not penalty:
        return minimize(loss, np.zeros(number), jac=True, method="L-BFGS-B", options=_PRECISION).x

    def penalised(parts: np.ndarray) -> tuple[float, np.ndarray]:
        # w = positive part − negative part, both ≥ 0: |w|_1 is then their sum, which is smooth.
        value, gradient = loss(parts[:number] - parts[number:])
        return value + penalty * parts.sum(), np.concatenate([penalty + gradient, penalty - gradient])

    bounds = [(0.0, None)] * (2 * number)
    parts = minimize(penalised, np.zeros(2 * number), jac=True, method="L-BFGS-B", bounds=bounds, options=_PRECISION).x
    coefficients = parts[:number] - parts[number:]
    kept = coefficients != 0
    if kept.any():
        # Zeros and signs are known now: the rest is a smooth system of equations, which `root` solves exactly.
        used, slope = features[:, kept], penalty * np.sign(coefficients[kept])
        solution = root(
            lambda at: used.T @ (weights * (expit(used @ at) - targets)) + slope,
            coefficients[kept],
            jac=lambda at: (used.T * (weights * expit(used @ at) * expit(-used @ at))) @ used,
        )
        if solution.success:
            coefficients[kept] = solution.x
    return coefficients


def fit_cross_validated(features: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, float]:
    """Coefficients at the strength C whose log loss on left-out rows is least, and that C.

    Row r of n is left out in fold (n − 1 − r) mod 5, as in scikit-learn's `GroupKFold`. The loss of a fold is the mean
    over its rows of weight · log loss; of equally good strengths the smallest is taken.

    Args: as `fit_logistic`; at least five rows.
    """
    folds = (len(targets) - 1 - np.arange(len(targets))) % FOLDS
    losses = np.zeros(len(STRENGTHS))
    for fold in range(FOLDS):
        left_out, kept = folds == fold, folds != fold
        aims = targets[left_out]
        for i, strength in enumerate(STRENGTHS):
            fitted = fit_logistic(features[kept], targets[kept], weights[kept], strength)
            chances = np.clip(expit(features[left_out] @ fitted), 1e-15, 1 - 1e-15)
            logs = aims * np.log(chances) + (1 - aims) * np.log(1 - chances)
            losses[i] -= np.mean(logs * weights[left_out])
    best = float(STRENGTHS[np.argmin(losses)])
    return fit_logistic(features, targets, weights, best), best
