"""How busy devices are when they take units of work one after the other: a simulation, not a measurement.

`PROFILES` are log-normal distributions of the tokens of a prompt and of each response: median and standard deviation of
the logarithm. They are fitted to the logarithms of two public datasets, in tokens of SmolLM2 (a vocabulary of 49,152),
without those of a chat template:

    profile       dataset                                                 prompts: mean, 90 % below   responses
    short turns   HH-RLHF harmless-base, test split (1,156 dialogues)     123, 271                    45, 101
    long answers  AlpacaEval 2, answers of 57 models (4,538 pairs)        41, 95                      243, 490

The means of the distributions are 130, 48 and 38, 282: the longest real responses are shorter than theirs.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# (median, standard deviation of the logarithm)
PROFILES = {
    "short turns": {"prompt": (80, 0.99), "response": (30, 0.97)},
    "long answers": {"prompt": (25, 0.92), "response": (163, 1.05)},
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
