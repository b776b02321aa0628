"""No certainty from little data: intervals and words for no spread, ceilings, few prompts, and nothing learnt."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from properties import examples
from sepo.cli import main
from sepo.evaluate.statistics import mean_and_se
from sepo.hub.card import METRICS as CARD
from sepo.hub.card import metrics_with_intervals
from sepo.recipe.reading import parse_recipe
from sepo.report.edges import Measured, measured, nothing_learnt, ranking_caution
from sepo.report.run_summary import cautions, metrics_table, print_summary, summary_of
from sepo.report.statistics import correlation, rank_correlation

RECIPE = parse_recipe({"name": "mine", "eval": {"gold": "vader"}}, "test")


@examples(300)
@given(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=2, max_size=40))
def test_the_interval_of_a_share_is_never_a_point_and_stays_a_share(values):
    mean, error = mean_and_se(values)
    low, high = Measured(mean, error, len(values), share=True).interval
    assert 0 <= low <= mean <= high <= 1
    assert high - low > 0.01


@pytest.mark.parametrize("share", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("groups", [5, 10, 40])
def test_intervals_of_shares_cover_the_truth(share, groups):
    rng, covered = np.random.default_rng(1), []
    for _ in range(800):
        mean, error = mean_and_se(rng.random(groups) < share)
        low, high = Measured(mean, error, groups, share=True).interval
        covered.append(low <= share <= high)
    assert np.mean(covered) > 0.93


@pytest.mark.parametrize("groups", [2, 4, 8])
def test_intervals_of_means_of_few_prompts_cover_the_truth(groups):
    rng, covered, normal = np.random.default_rng(1), [], []
    for _ in range(1500):
        mean, error = mean_and_se(rng.normal(0.3, 1.0, groups))
        low, high = Measured(mean, error, groups).interval
        covered.append(low <= 0.3 <= high)
        normal.append(abs(mean - 0.3) <= 1.96 * error)
    assert 0.93 <= np.mean(covered) <= 0.97
    assert np.mean(normal) < 0.93


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (Measured(1.0, 0.0, 8, True, "pairs"), "ceiling: no spread seen in 8 pairs"),
        (Measured(0.0, 0.0, 8, True, "pairs"), "floor: no spread seen in 8 pairs"),
        (Measured(0.5, 0.0, 3, True), "no spread seen in 3 prompts"),
        (Measured(0.0, 0.0, 5), "no spread seen in 5 prompts"),
        (Measured(0.0, 1e-17, 5), "no spread seen in 5 prompts"),
        (Measured(0.3, None, 1), "one of the prompts only"),
        (Measured(0.3, 0.1, 5), ""),
    ],
)
def test_a_value_without_spread_is_called_so(value, words):
    assert words in value.remark
    assert bool(value.remark) == bool(words)
    assert "± 0.00" not in value.text(".2f")


# What a run with eight held-out pairs, all right, and three prompts whose answers did not change measures.
EDGE = {
    "oracle/accuracy": 1.0, "oracle/accuracy_se": 0.0, "oracle/length_baseline": 1.0, "oracle/pairs": 8.0,
    "policy/accuracy": 1.0, "policy/accuracy_se": 0.0, "policy/pairs": 8.0, "prompts": 3.0, "kl": 0.0, "kl_se": 0.0,
    "gold_reward/base": 0.2, "gold_reward/policy": 0.2, "gold_reward/difference": 0.0, "gold_reward/difference_se": 0.0,
    "gold_reward/win_rate": 0.5, "gold_reward/win_rate_se": 0.0, "judge/win_rate": 0.5, "judge/win_rate_se": 0.0,
    "judge/judged": 3.0, "length/base": 4.0, "length/base_se": 0.0, "length/policy": 4.0, "length/policy_se": 0.0,
}  # fmt: skip


def test_no_place_where_metrics_are_shown_claims_certainty(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    print_summary(summary_of(RECIPE, EDGE, 0.3, []))
    shown = capsys.readouterr().out
    card = metrics_with_intervals(EDGE, CARD)
    for text in (shown, card, metrics_table("t", EDGE)):
        assert "± 0" not in text
        assert "| 0 |" not in text.replace("| 0 | no spread", "| no spread")
    cells = {row.split("|")[1].strip(): row.split("|")[3].strip() for row in card.splitlines()[2:]}
    intervals = [cell for cell in cells.values() if " to " in cell]
    assert len(intervals) == 4
    for cell in intervals:
        low, high = map(float, cell.split(" to "))
        assert high - low > 0.3
    assert cells["gold reward, difference"] == "no spread seen in 3 prompts"


@pytest.mark.parametrize(
    ("accuracy", "error", "baseline", "words"),
    [
        (1.0, 0.0, 1.0, "length explains everything: the longer"),
        (1.0, 0.0, 0.0, "length explains everything: the shorter"),
        (0.8, 0.05, 0.84, "length explains everything"),
        (0.5, 0.0, 0.5, "hardly better"),
        (0.6, 0.06, 0.5, "hardly better"),
        (1.0, math.nan, 0.5, "hardly better"),  # one prompt has no error
        (1.0, 0.0, 0.5, ""),
        (0.9, 0.03, 0.55, ""),
    ],
)
def test_an_oracle_that_shows_no_more_than_length_or_chance_is_warned_about(accuracy, error, baseline, words):
    metrics = {"oracle/accuracy": accuracy, "oracle/accuracy_se": error, "oracle/length_baseline": baseline,
               "oracle/pairs": 80.0}  # fmt: skip
    assert words in ranking_caution(measured(metrics, "oracle/accuracy"), baseline)
    found = [line for line in cautions(RECIPE, metrics) if "may be noise" in line]
    assert len(found) == bool(words)


@pytest.mark.parametrize(
    ("metrics", "learnt"),
    [
        ({"kl": 0.05, "kl_se": 0.23, "prompts": 84.0}, False),
        ({"kl": 0.0, "kl_se": 0.0, "prompts": 84.0}, False),
        ({"kl": -0.2, "kl_se": 0.01, "prompts": 84.0}, False),
        ({"kl": 0.0, "kl_se": math.nan, "prompts": 1.0}, False),
        ({"kl": 6.5, "kl_se": 0.4, "prompts": 84.0}, True),
        ({"kl": 2.0, "kl_se": 0.9, "prompts": 3.0}, False),  # by Student's t
        ({"policy/accuracy": 0.52, "policy/accuracy_se": 0.05, "policy/pairs": 90.0}, False),
        ({"policy/accuracy": 0.5, "policy/accuracy_se": 0.0, "policy/pairs": 90.0}, False),
        ({"policy/accuracy": 0.3, "policy/accuracy_se": 0.05, "policy/pairs": 90.0}, False),
        ({"policy/accuracy": 0.9, "policy/accuracy_se": 0.03, "policy/pairs": 90.0}, True),
        ({}, True),
    ],
)
def test_a_policy_that_cannot_be_told_from_its_start_is_called_so(metrics, learnt):
    assert (not nothing_learnt(metrics)) == learnt
    assert any("Nothing was learnt" in line for line in cautions(RECIPE, metrics)) != learnt


def test_few_prompts_are_named():
    assert any("Only 4 prompts measured" in line for line in cautions(RECIPE, {"prompts": 4.0}))
    assert not any("measured: intervals" in line for line in cautions(RECIPE, {"prompts": 84.0}))


def test_the_advice_after_a_run_names_no_recipe_of_the_user():
    """The README's recipe is mine.yaml: a redirection into it would empty it."""
    commands = [command for command, _ in summary_of(RECIPE, {}, None, []).following]
    assert not any("> mine.yaml" in command for command in commands)
    assert any("sepo recipe > all-settings.yaml" in command for command in commands)


@pytest.mark.parametrize("ties", [3, 12])
def test_a_judge_of_equal_answers_prints_no_certainty(tmp_path, capsys, ties):
    rows = [{"instruction": f"q{i}", "output_1": "a", "output_2": "a", "generator_1": "x", "generator_2": "y",
             "preference": 1.5} for i in range(ties)]  # fmt: skip
    (tmp_path / "annotations.json").write_text(json.dumps(rows))
    assert main(["winrate", str(tmp_path / "annotations.json")]) == 0
    text = capsys.readouterr().out
    assert "no spread seen" in text
    low, high = map(float, re.search(r"(\S+) to (\S+)", text).groups())
    assert low < 40
    assert high > 60


@pytest.mark.parametrize("groups", [2, 5])
def test_a_mean_s_interval_is_student_s(groups):
    low, high = Measured(1.0, 0.1, groups).interval
    assert (high - low) / 2 == pytest.approx(stats.t.ppf(0.975, groups - 1) * 0.1)


def test_pairs_that_are_scored_are_spread_over_a_sorted_source():
    from sepo.data.tables import make_table
    from sepo.evaluate.measure import _scored
    from sepo.recipe.settings import EvalSettings

    rows = {"pair_id": list(range(1000)), **{f"{name}_ids": [[1]] * 1000 for name in ("prompt", "chosen", "rejected")}}
    table = make_table("pairs", rows, {})
    drawn = _scored(table, EvalSettings(pairs=100))["pair_id"].to_pylist()
    assert len(drawn) == 100
    assert drawn == sorted(drawn)
    assert 35 < sum(number < 500 for number in drawn) < 65
    assert drawn == _scored(table, EvalSettings(pairs=100))["pair_id"].to_pylist()
    assert len(_scored(table, EvalSettings(pairs=5000))) == len(_scored(table, EvalSettings())) == 1000
    assert len(_scored(table, EvalSettings(pairs=0))) == 0


@pytest.mark.parametrize("value", [0.1, 0.7, 1 / 3, 1e8 + 0.1, 1e-9])
@pytest.mark.parametrize("number", [2, 3, 7, 60])
def test_equal_values_correlate_with_nothing(value, number):
    """The standard deviation of three times 0.1 is 1e-17."""
    values = np.arange(number, dtype=float)
    for measure in (correlation, rank_correlation):
        assert math.isnan(measure([value] * number, values))
        assert math.isnan(measure(values, [value] * number))
