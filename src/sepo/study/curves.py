"""Reward-KL curves: what a run gained at a given KL from its start.

A method with a higher reward may only have moved further from its start. A run is therefore a curve from (KL 0, no
gain) through its checkpoints, and methods are compared at the same KL.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def quality(point: Mapping[str, Any]) -> float:
    """The gain of a checkpoint over the start: the judge's win rate above one half, else the mean gold difference, else
    the accuracy above one half, in which every prompt weighs the same however many pairs it has.
    """
    if "judge_win_rate" in point:
        return point["judge_win_rate"] - 0.5
    if "gold_difference" in point:
        return point["gold_difference"]
    return float(np.mean(point["by_prompt"])) if "by_prompt" in point else point["accuracy"] - 0.5


def at_ceiling(point: Mapping[str, Any]) -> bool:
    """Whether a checkpoint has the highest gain there is: no other method can be better."""
    return ("judge_win_rate" in point or "gold_difference" not in point) and quality(point) > 0.5 - 1e-9


def at_kl(points: Sequence[Mapping[str, Any]], kl: float | None) -> tuple[float, bool]:
    """The gain of a run at a KL, interpolated linearly in sqrt(KL) between (0, 0) and its checkpoints.

    A gold reward grows about as sqrt(KL) (Gao et al. 2022, arXiv 2210.10760, before over-optimisation). Interpolation
    in the KL itself would read too low a gain between distant checkpoints, that is for methods that move fast.

    Args:
        points: checkpoints with `kl` and the keys that `quality` reads; a KL estimated below 0 counts as 0.
        kl: None for the end of the run.

    Returns:
        The gain, and whether the run reached `kl`. A run that did not counts with its furthest point, at less KL than
        allowed.

    >>> at_kl([{"kl": 1.0, "gold_difference": 0.2}, {"kl": 4.0, "gold_difference": 0.3}], 2.25)
    (0.25, True)
    >>> at_kl([{"kl": 1.0, "gold_difference": 0.2}], 2.0)
    (0.2, False)
    """
    return float(_weighted(points, kl, [quality(point) for point in points])), reaches(points, kl)


def at_kl_by_prompt(points: Sequence[Mapping[str, Any]], kl: float | None) -> np.ndarray | None:
    """`at_kl` for each prompt, `[prompts]`: the same weights of the same checkpoints.

    None if a checkpoint has no values by prompt, as in earlier releases.
    """
    if not all("by_prompt" in point for point in points):
        return None
    return _weighted(points, kl, [point["by_prompt"] for point in points])


def reaches(points: Sequence[Mapping[str, Any]], kl: float | None) -> bool:
    """Whether a run has a checkpoint at this KL or beyond; always true for its end (None)."""
    return kl is None or max(point["kl"] for point in points) >= kl


def _weighted(points: Sequence[Mapping[str, Any]], kl: float | None, values: Sequence[Any]) -> np.ndarray:
    """The values of the checkpoints at a KL; a checkpoint without weight may be NaN."""
    weights = _weights(points, kl)
    used = np.flatnonzero(weights)
    return weights[used] @ np.array(values, np.float64)[used]


def ceiling_at_kl(points: Sequence[Mapping[str, Any]], kl: float | None) -> bool:
    """Whether all checkpoints that the value at a KL rests on are at the ceiling."""
    used = np.flatnonzero(_weights(points, kl)).tolist()
    return all(at_ceiling(points[i]) for i in used)


def _weights(points: Sequence[Mapping[str, Any]], kl: float | None) -> np.ndarray:
    """The weight of each checkpoint in the value at a KL, `[points]`. The start has the rest, with a gain of 0.

    A checkpoint with a KL estimated at 0 or below takes the place of the start; the last of several does.
    """
    if kl is None:
        return np.eye(len(points))[-1]
    kls = np.maximum([point["kl"] for point in points], 0.0)
    order = np.argsort(kls, kind="stable")
    roots = np.sqrt([0.0, *kls[order]])
    rows = np.eye(len(roots))[1:]  # without the start
    weights = np.empty(len(points))
    weights[order] = [np.interp(np.sqrt(kl), roots, row) for row in rows]
    return weights


def before_first_checkpoint(points: Sequence[Mapping[str, Any]], kl: float | None) -> bool:
    """Whether `kl` is below that of every checkpoint: `at_kl` then rests on the assumed shape of the curve alone."""
    return kl is not None and kl < min(point["kl"] for point in points)
