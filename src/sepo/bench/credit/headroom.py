"""How much of the room for token credit a rule fills.

    H = (gain of the rule - gain of all tokens) / (gain of the truth - gain of all tokens)      at one KL

0 is no better than training on all tokens, 1 is as good as weights on the very tokens that the gold reward counts. The
denominator is the room. Both differences are paired by seed and prompt, and vary with both (`crossed_mean`). The
interval of their ratio is Fieller's: all h for which the mean of (rule - all) - h (truth - all) is not told from 0. It
is unbounded where the room itself is not told from 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize

from sepo.report.statistics import spread_seen, student_reach
from sepo.study.crossed import Crossed, crossed_mean

_FAR = 1e4  # an end of an interval beyond this is unbounded


class Headroom(NamedTuple):
    """Headroom closed by a rule.

    Attributes:
        value: H; NaN where the room is 0.
        low, high: 95 % interval; infinite where the room is not told from 0, or shows no spread.
        room: gain of the truth minus gain of all tokens.
        ahead: gain of the rule minus gain of all tokens.
    """

    value: float
    low: float
    high: float
    room: Crossed
    ahead: Crossed


def headroom(rule: ArrayLike, everything: ArrayLike, truth: ArrayLike) -> Headroom:
    """Headroom closed at one KL.

    Args:
        rule, everything, truth: gains at that KL by seed and prompt, `[seeds, prompts]`, at least 3 by 2.
    """
    base = np.asarray(everything, np.float64)
    ahead, room = np.asarray(rule, np.float64) - base, np.asarray(truth, np.float64) - base
    whole, part = crossed_mean(room), crossed_mean(ahead)
    value = part.mean / whole.mean if whole.mean else math.nan

    def excess(h: float) -> float:
        """Above 0 where h is refuted."""
        found = crossed_mean(ahead - h * room)
        return abs(found.mean) - student_reach(found.error, found.freedom)

    # Without spread the room has no interval of its own, so that of the ratio would be a point.
    if whole.low <= 0 <= whole.high or math.isnan(value) or not spread_seen(whole.error, whole.mean):
        return Headroom(value, -math.inf, math.inf, whole, part)
    return Headroom(value, _end(excess, value, -1), _end(excess, value, 1), whole, part)


def _end(excess: Callable[[float], float], value: float, sign: int) -> float:
    """Where an interval around `value` ends, below or above."""
    if excess(value) >= -1e-12:  # no spread: the rule is the truth, or all tokens
        return value
    step = 0.05
    while excess(value + sign * step) <= 0:
        step *= 2
        if step > _FAR:
            return sign * math.inf
    return float(optimize.brentq(excess, value, value + sign * step, xtol=1e-4))
