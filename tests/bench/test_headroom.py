"""Headroom closed: its interval holds the truth as often as it says."""

import math

import numpy as np
import pytest

from sepo.bench.credit.headroom import headroom


def gains(rng, means, seeds, prompts, seed_std=0.04, prompt_std=0.15, rest=0.4):
    """Gains of methods that share prompts, `[methods][seeds, prompts]`, which vary by seed, by prompt and at random."""
    shared = rng.normal(0, prompt_std, prompts)
    return [
        mean
        + shared
        + rng.normal(0, prompt_std / 2, prompts)
        + rng.normal(0, seed_std, (seeds, 1))
        + rng.normal(0, rest, (seeds, prompts))
        for mean in means
    ]


@pytest.mark.parametrize(("seeds", "true"), [(6, 0.5), (12, 0.0), (12, 1.2)])
@pytest.mark.daily(1)
def test_the_interval_holds_the_truth_in_93_to_97_percent_of_simulations(seeds, true, nightly_run):
    rng = np.random.default_rng(seeds)
    number = 2000 if nightly_run else 150
    room, everything = 0.2, 0.3
    held = 0
    for _ in range(number):
        rule, base, truth = gains(rng, (everything + true * room, everything, everything + room), seeds, 60)
        found = headroom(rule, base, truth)
        held += found.low <= true <= found.high
    # 93 to 97 %, widened by two standard errors of so few simulations.
    error = 2 * math.sqrt(0.05 * 0.95 / number)
    assert 0.93 - error <= held / number <= 0.97 + error


def test_without_room_nothing_is_said_about_it():
    rule, base, truth = gains(np.random.default_rng(0), (0.3, 0.3, 0.3), 6, 40)
    found = headroom(rule, base, truth)
    assert (found.low, found.high) == (-math.inf, math.inf)


def test_all_tokens_close_nothing_and_the_truth_closes_all():
    _, base, truth = gains(np.random.default_rng(1), (0, 0.3, 0.6), 6, 40)
    assert headroom(base, base, truth).value == 0
    assert headroom(truth, base, truth).value == 1
    assert headroom(2 * truth - base, base, truth).value == pytest.approx(2)


@pytest.mark.parametrize("room", [0.2, 0.5])
def test_a_room_without_spread_gives_no_point_as_an_interval(room):
    """Every seed and prompt at a ceiling, or a gold reward that took the same value everywhere."""
    found = headroom(np.full((3, 4), 0.1), np.zeros((3, 4)), np.full((3, 4), room))
    assert found.value == pytest.approx(0.1 / room)
    assert (found.low, found.high) == (-math.inf, math.inf)
