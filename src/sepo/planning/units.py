"""How busy devices are when they take units of work one after the other: a simulation, not a measurement."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# Tokens of a prompt and of each response: median and spread (standard deviation of the logarithm) of a log-normal
# distribution like those of two public preference datasets, HH-RLHF (short turns) and UltraFeedback (long answers).
PROFILES = {
    "short turns": {"prompt": (120, 0.9), "response": (55, 0.9)},
    "long answers": {"prompt": (90, 1.0), "response": (190, 0.8)},
}


class Simulated(NamedTuple):
    """What a simulation found.

    Attributes:
        seconds: until the last unit is done.
        busy: share of the devices' time in which they do units.
    """

    seconds: float
    busy: float


def simulate(unit_seconds: Sequence[float] | np.ndarray, devices: int, *, load: float = 0.0) -> Simulated:
    """Devices that take the next unit whenever they are free.

    Args:
        unit_seconds: time of each unit, in the order in which they are taken.
        load: seconds that a device needs before its first unit, to load the model; it counts as time, not as busy.

    >>> simulate([2.0, 1.0, 1.0], 2)
    Simulated(seconds=2.0, busy=1.0)
    """
    free = [load] * min(devices, max(len(unit_seconds), 1))
    for seconds in map(float, unit_seconds):
        heapq.heapreplace(free, free[0] + seconds)
    last = max(free)
    return Simulated(last, float(np.sum(unit_seconds)) / (devices * last) if last else 0.0)


def tokens_of_units(
    profile: str, pairs: int, pairs_per_unit: int = 1000, *, most: int = 2048, seed: int = 0
) -> np.ndarray:
    """Tokens to read in each unit, a prompt once for its two responses: `[units]`.

    Args:
        profile: key of `PROFILES`.
        most: tokens of a prompt with one response; longer responses are cut.
    """
    draw = np.random.default_rng(seed)
    units = []
    for start in range(0, pairs, pairs_per_unit):
        number = min(pairs_per_unit, pairs - start)
        median, spread = PROFILES[profile]["prompt"]
        prompt = np.clip(median * np.exp(spread * draw.standard_normal(number)), 1, most // 2)
        median, spread = PROFILES[profile]["response"]
        responses = np.clip(median * np.exp(spread * draw.standard_normal((2, number))), 1, most - prompt)
        units.append(float((prompt + responses.sum(0)).sum()))
    return np.array(units)
