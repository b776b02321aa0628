"""The simulation of devices that take units of work."""

from __future__ import annotations

import numpy as np
import pytest

from sepo.planning.units import PROFILES, Simulated, simulate, tokens_of_units


@pytest.mark.parametrize("profile", PROFILES)
def test_64_devices_are_busy_where_there_are_units_enough(profile):
    """A million pairs in shards of 1,000, at the tokens a second that an H200 reads with a model of 1.24 billion."""
    units = tokens_of_units(profile, 1_000_000) / 220_400
    assert simulate(units, 64).busy > 0.9
    assert simulate(units[:64], 64).busy < simulate(units, 64).busy
    together = simulate(units, 1).seconds
    assert together == pytest.approx(units.sum())
    assert simulate(units, 64).seconds >= together / 64


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.daily(1)
def test_64_devices_are_busy_with_ten_million_pairs_though_workers_start_and_load_two_models(profile):
    """A worker starts in 10 s, and loads each model in 2.5 s; the second pass waits for the end of the first."""
    units = tokens_of_units(profile, 10_000_000) / 220_400
    seconds = sum(simulate(units, 64, load=load).seconds for load in (12.5, 2.5))
    assert 2 * units.sum() / (64 * seconds) > 0.9


def test_a_simulation_of_few_units_by_hand():
    assert simulate([4.0, 1.0, 1.0, 1.0], 2) == Simulated(4.0, 7 / 8)
    assert simulate([1.0], 3, load=1.0) == Simulated(2.0, 1 / 6)
    assert simulate([], 3) == Simulated(0.0, 0.0)


def test_the_tokens_of_a_profile_are_repeatable_and_within_bounds():
    units = tokens_of_units("long answers", 2500, 1000)
    assert len(units) == 3
    assert np.array_equal(units, tokens_of_units("long answers", 2500, 1000))
    assert all(units[:2] < 1000 * 2 * 2048)
    assert units[2] < units[0]


def test_the_profiles_are_close_to_the_datasets_that_they_were_fitted_to():
    """Tokens a pair, the prompt once, without a limit: 123 + 2 x 45 and 41 + 2 x 243."""
    for profile, tokens in (("short turns", 213), ("long answers", 527)):
        assert tokens_of_units(profile, 50_000, 50_000, most=10**6)[0] / 50_000 == pytest.approx(tokens, rel=0.16)
