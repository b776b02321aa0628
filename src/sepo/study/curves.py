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
    the accuracy above one half.
    """
    if "judge_win_rate" in point:
        return point["judge_win_rate"] - 0.5
    return point["gold_difference"] if "gold_difference" in point else point["accuracy"] - 0.5


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
    if kl is None:
        return quality(points[-1]), True
    curve = sorted([(0.0, 0.0), *((max(point["kl"], 0.0), quality(point)) for point in points)])
    kls, gains = zip(*curve, strict=True)
    return float(np.interp(np.sqrt(kl), np.sqrt(kls), gains)), kls[-1] >= kl


def at_kl_by_prompt(points: Sequence[Mapping[str, Any]], kl: float | None) -> np.ndarray | None:
    """`at_kl` for each prompt, `[prompts]`: the same weights of the same checkpoints.

    None if a checkpoint has no values by prompt, as in earlier releases.
    """
    if not all("by_prompt" in point for point in points):
        return None
    if kl is None:
        return np.array(points[-1]["by_prompt"])
    curve = sorted(points, key=lambda point: (max(point["kl"], 0.0), quality(point)))
    gains = np.array([np.zeros(len(curve[0]["by_prompt"])), *(point["by_prompt"] for point in curve)])
    roots = np.sqrt([0.0, *(max(point["kl"], 0.0) for point in curve)])
    weights = [np.interp(np.sqrt(kl), roots, row) for row in np.eye(len(roots))]
    return np.array(weights) @ gains


def before_first_checkpoint(points: Sequence[Mapping[str, Any]], kl: float | None) -> bool:
    """Whether `kl` is below that of every checkpoint: `at_kl` then rests on the assumed shape of the curve alone."""
    return kl is not None and kl < min(point["kl"] for point in points)
