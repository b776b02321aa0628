"""Differences over seeds x prompts: intervals cover the truth as often as claimed, and the power is as claimed."""

import numpy as np
import pytest
from scipy import stats

from sepo.evaluate.statistics import mean_and_se
from sepo.study.crossed import StdComponents, crossed_mean, smallest_difference
from sepo.study.results import power_line

DESIGNS = [
    (3, 84, StdComponents(0.05, 0.1, 0.3)),
    (3, 84, StdComponents(0.03, 0.2, 0.35)),
    (5, 84, StdComponents(0.05, 0.1, 0.3)),
    (5, 40, StdComponents(0.0, 0.3, 0.3)),  # an oracle for each seed changes nothing
    (10, 200, StdComponents(0.1, 0.1, 0.3)),
]


def draw(rng, seeds, prompts, std, effect):
    """A paired difference with known effect and standard deviations."""
    by_seed = rng.normal(0, std.seed, (seeds, 1))
    return effect + by_seed + rng.normal(0, std.prompt, prompts) + rng.normal(0, std.rest, (seeds, prompts))


@pytest.mark.parametrize(("seeds", "prompts", "std"), DESIGNS)
@pytest.mark.daily(2)
def test_intervals_cover_the_truth_and_the_power_is_as_claimed(seeds, prompts, std):
    rng = np.random.default_rng(7)
    smallest = smallest_difference(*std.error(seeds, prompts))
    means = [crossed_mean(draw(rng, seeds, prompts, std, smallest)) for _ in range(1500)]
    covered = np.mean([mean.low < smallest < mean.high for mean in means])
    detected = np.mean([mean.low > 0 or mean.high < 0 for mean in means])
    assert 0.93 <= covered <= 0.97
    assert detected == pytest.approx(0.8, abs=0.05)


def test_an_interval_over_prompts_alone_is_too_narrow_where_seeds_differ():
    """Why the crossed interval is needed: the naive one misses the truth far more often than claimed."""
    rng, missed = np.random.default_rng(0), 0
    for _ in range(500):
        values = draw(rng, 5, 84, StdComponents(0.05, 0.1, 0.3), 0.0)
        mean, error = mean_and_se(values.ravel())
        missed += abs(mean) > 1.96 * error
    assert missed / 500 > 0.2


def test_the_components_equal_those_worked_out_by_hand():
    found = crossed_mean([[1.0, 2.0], [3.0, 4.0], [5.0, 9.0]])
    # Means of seeds 1.5, 3.5, 7; of prompts 3, 5; of all 4. Squares: 2 (6.25 + 0.25 + 9) / 2 and 3 (1 + 1) / 1.
    rest = (0.5**2 + 0.5**2 + 0.5**2 + 0.5**2 + 1 + 1) / 2
    assert found.mean == 4
    assert found.std.rest == pytest.approx(np.sqrt(rest))
    assert found.std.seed == pytest.approx(np.sqrt((15.5 - rest) / 2))
    assert found.std.prompt == pytest.approx(np.sqrt((6 - rest) / 3))
    assert found.error == pytest.approx(np.sqrt((15.5 + 6 - rest) / 6))
    assert found.high - found.mean == pytest.approx(stats.t.ppf(0.975, found.freedom) * found.error)
    with pytest.raises(ValueError, match="2 seeds by 5 prompts"):
        crossed_mean(np.zeros((2, 5)))


def test_the_line_of_a_grid_names_its_minimum_detectable_difference():
    std = StdComponents(0.02, 0.1, 0.3)
    smallest = smallest_difference(*std.error(5, 100))
    assert f"difference: {smallest:.2g} (80 % power, 5 seeds x 100 prompts" in power_line(5, 100, std, "x")
    assert smallest_difference(*std.error(10, 400)) < smallest / 1.5
