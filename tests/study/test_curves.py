"""What a comparison says at the edge of its data: one estimand, KLs that nobody reached, ceilings, no spread."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from properties import examples
from sepo.report.build import page_style
from sepo.report.documents import blocks, html_document, print_document
from sepo.study.crossed import StdComponents, crossed_mean, smallest_difference
from sepo.study.curves import at_kl, at_kl_by_prompt, quality
from sepo.study.results import (
    best_setting,
    comparison_markdown,
    differences,
    save_comparison_figures,
    summarise_runs,
    typical_std,
)

GAINS = st.lists(st.floats(-0.5, 0.5), min_size=4, max_size=4)
CURVES = st.lists(st.tuples(st.floats(-1, 9), GAINS), min_size=1, max_size=5)


def point(kl, by_prompt, **more):
    return {"kl": kl, "by_prompt": list(by_prompt), "train_seconds": 1.0, "pairs_seen": 4, **more}


def gold(kl, by_prompt):
    return point(kl, by_prompt, gold_difference=float(np.mean(by_prompt)), win_rate=0.5, length=5.0)


def run(variant, seed, points):
    return {"variant": variant, "label": "", "seed": seed, "reported": True, "points": points, "target_tokens": 1,
            "read_tokens": 1}  # fmt: skip


def compared(runs, kl, **more):
    return {
        "name": "t", "kl": kl, "gold": None, "rows": summarise_runs(runs, kl), "runs": runs, "shared": [],
        "differences": differences(runs, kl), "environment": {"device": "d", "packages": {"torch": "1"}}, **more,
    }  # fmt: skip


@examples(200)
@given(CURVES, st.one_of(st.none(), st.floats(0.01, 9)))
def test_a_run_s_gain_is_the_mean_of_its_prompts_gains_at_every_kl(curve, kl):
    """Also where a measured KL is 0 or below."""
    points = [gold(*values) for values in curve]
    by_prompt = at_kl_by_prompt(points, kl)
    assert at_kl(points, kl)[0] == pytest.approx(float(np.mean(by_prompt)), abs=1e-9)


@pytest.mark.parametrize("gain", [0.1, -0.1])
@pytest.mark.parametrize("kl", [-0.15, 0.0])
def test_a_checkpoint_without_measurable_kl_takes_the_place_of_the_start(kl, gain):
    points = [gold(kl, [gain, gain])]
    assert at_kl(points, 1.0) == (pytest.approx(gain), False)
    assert at_kl_by_prompt(points, 1.0).tolist() == pytest.approx([gain, gain])


def test_both_tables_weigh_prompts_alike_where_they_have_unequal_numbers_of_pairs():
    """Nine pairs of one prompt are ranked right and one of another wrong: by pairs +0.4, by prompts 0."""
    a = [run("a", seed, [point(2.0, [0.5, -0.5 + 0.01 * seed], accuracy=0.9)]) for seed in range(3)]
    b = [run("b", seed, [point(2.0, [0.4, 0.5 - 0.01 * seed], accuracy=0.6)]) for seed in range(3)]
    rows = summarise_runs(a + b, 2.0)
    (difference,) = differences(a + b, 2.0)
    assert rows[1]["value"] - rows[0]["value"] == pytest.approx(difference["difference"])
    assert quality({"kl": 1.0, "accuracy": 0.9}) == pytest.approx(0.4)  # of an earlier release, without prompts


def cells_of(page):
    """The cells of the last table: name, seeds, then three for each KL."""
    *_, table = (block.rows for block in blocks(page) if block.kind == "table")
    return table[-1]


def test_methods_that_all_end_at_the_ceiling_get_no_difference_with_certainty():
    runs = [run(name, seed, [point(3.0, [0.5, 0.5], accuracy=1.0)]) for name in "ab" for seed in range(3)]
    comparison = compared(runs, 2.0)
    page = comparison_markdown(comparison)
    assert "+0.000 to +0.000" not in page
    assert "± 0.000" not in page
    assert "no spread seen, all runs at the ceiling" in cells_of(page)[3]
    assert "b: no verdict at KL 2; all runs are at the ceiling in 3 seeds." in page
    (row,) = comparison["differences"]
    assert (row["low"], row["high"], row["detectable"], row["std"]) == (None, None, None, None)
    assert typical_std([row]) is None


@pytest.mark.parametrize("seeds", [2, 3])
@pytest.mark.parametrize("gain", [0.0, 0.1])
def test_equal_differences_have_no_interval(seeds, gain):
    runs = [run(name, seed, [gold(3.0, [0.1 + shift, 0.2 + shift])])
            for name, shift in (("a", 0.0), ("b", gain)) for seed in range(seeds)]  # fmt: skip
    page = comparison_markdown(compared(runs, 2.0, gold="vader"))
    assert "no spread seen" in cells_of(page)[3]
    assert cells_of(page)[4] == "–"
    assert f"b: no verdict at KL 2; no spread seen in {seeds} seeds." in page


@pytest.mark.parametrize(
    ("furthest", "cell", "words"),
    [
        ((1.18, 0.40), "not reached", "no verdict at KL 2; no run of it or of a got there"),
        ((1.18, 3.0), "+0.075*", "Not every run reached this KL."),
        ((3.0, 0.40), "*", "Not every run reached this KL."),
        ((3.0, 3.0), "+0.", ""),
    ],
)
def test_a_kl_that_no_run_reached_is_refused_and_one_that_some_missed_is_starred(furthest, cell, words):
    runs = [run(name, seed, [gold(kl, [gain + 0.1 * seed, gain - 0.05 * seed**2])])
            for name, kl, gain in (("a", furthest[0], 0.1), ("b", furthest[1], 0.3)) for seed in range(3)]  # fmt: skip
    comparison = compared(runs, 2.0, gold="vader")
    found = cells_of(comparison_markdown(comparison))[2]
    assert cell.strip("+0.75*") in found
    assert ("*" in found) == ("*" in cell)
    assert words in comparison_markdown(comparison)
    assert (comparison["differences"][0]["difference"] is None) == (cell == "not reached")


def test_a_gain_that_is_not_a_number_is_neither_the_best_nor_compared():
    runs = [run("a", seed, [gold(3.0, [0.1 * seed, 0.2])]) for seed in range(3)]
    runs += [run("b", seed, [gold(3.0, [math.nan, 0.2])]) for seed in range(3)]
    page = comparison_markdown(compared(runs, 2.0, gold="vader"))
    assert cells_of(page)[2:5] == ("not measured", "–", "–")
    rows = [{"variant": "a", "label": label, "value": value} for label, value in (("x", math.nan), ("y", -1.0))]
    assert best_setting(rows, "a") == best_setting(rows[::-1], "a") == "y"


def draw(rng, seeds, prompts, std, effect):
    by_seed = rng.normal(0, std.seed, (seeds, 1))
    return effect + by_seed + rng.normal(0, std.prompt, prompts) + rng.normal(0, std.rest, (seeds, prompts))


@pytest.mark.parametrize("seed", [0.0, 0.01, 0.03])
@pytest.mark.parametrize("prompt", [0.0, 0.1])
def test_the_power_is_as_claimed_where_seeds_hardly_differ(seed, prompt):
    std, rng = StdComponents(seed, prompt, 0.3), np.random.default_rng(3)
    smallest = smallest_difference(*std.error(3, 84))
    means = [crossed_mean(draw(rng, 3, 84, std, smallest)) for _ in range(1000)]
    assert np.mean([mean.low > 0 or mean.high < 0 for mean in means]) == pytest.approx(0.8, abs=0.04)


@pytest.mark.parametrize("seed", [0.0, 0.02, 0.05])
@pytest.mark.daily(1)
def test_a_comparison_planned_by_an_earlier_one_has_the_power_that_it_claims(seed):
    """Three seeds often show a component of 0 or below where there is one."""
    std, rng, found = StdComponents(seed, 0.1, 0.3), np.random.default_rng(5), []
    for _ in range(60):
        measured = crossed_mean(draw(rng, 3, 84, std, 0.0)).std
        planned = typical_std([{"std": measured.__dict__, "prompts": 84}])
        smallest = smallest_difference(*planned.error(3, 84))
        means = [crossed_mean(draw(rng, 3, 84, std, smallest)) for _ in range(15)]
        found += [mean.low > 0 or mean.high < 0 for mean in means]
    assert np.mean(found) > 0.76


@pytest.mark.parametrize(("seeds", "prompts"), [(3, 2), (3, 3), (50, 2), (4, 5000)])
def test_the_power_of_extreme_designs_is_finite(seeds, prompts):
    for std in (StdComponents(0, 0, 1.0), StdComponents(1.0, 0, 0), StdComponents(0, 1.0, 1e-6)):
        assert 0 < smallest_difference(*std.error(seeds, prompts)) < 1000


def test_a_curve_is_drawn_where_it_was_measured_and_its_lines_are_named(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("sepo.study.results.write_png", lambda figure, path: drawn.append(figure) or path)
    runs = [run("a", 0, [gold(-0.15, [0.1, 0.1]), gold(3.0, [0.2, 0.3])])]
    save_comparison_figures(compared(runs, 2.0, gold="vader"), tmp_path)
    frontier = drawn[0]
    (axes,) = frontier.axes
    assert any(-0.15 in line.get_xdata() for line in axes.lines)
    assert axes.get_xlim()[0] < -0.15
    names = [text.get_text() for legend in frontier.legends for text in legend.get_texts()]
    assert "KL 2, where methods are compared" in names


def test_a_page_is_printed_as_tables_and_written_as_html(tmp_path, capsys, monkeypatch):
    runs = [run(name, seed, [gold(3.0, [0.1 * seed + gain, 0.2])])
            for name, gain in (("a<b>", 0.0), ("b", 0.3)) for seed in range(3)]  # fmt: skip
    shared = [{"stage": "logps-d361603e7f", "seconds": 3.0, "what": "of the pairs"}]
    comparison = compared(runs, 2.0, gold="vader", shared=shared)
    save_comparison_figures(comparison, tmp_path)
    page = comparison_markdown(comparison)
    monkeypatch.setenv("COLUMNS", "80")
    print_document(page)
    text = capsys.readouterr().out
    assert "|---" not in text
    assert "## " not in text
    assert "log-probabilities" in text
    assert "Verdict" in text
    html = html_document(f"{page}\n![frontier](frontier.png)\n", tmp_path, page_style())
    assert "a&lt;b&gt;" in html
    assert "a<b>" not in html
    assert "<li>b" in html
    assert html.count("data:image/png;base64,") == 1
    assert "<script" not in html
    assert html.count("<ul>") == html.count("</ul>") == 1


@pytest.mark.parametrize("width", [40, 60, 80, 120, 300])
def test_a_printed_table_is_no_wider_than_its_terminal(width, capsys, monkeypatch):
    from rich.console import Console

    rows = ["| method | " + " | ".join(f"column {i}" for i in range(13)) + " |", "|---|" + "---:|" * 13]
    rows += ["| sepo | " + " | ".join("+0.123 ± 0.045" for _ in range(13)) + " |"]
    console = Console(highlight=False, width=width, force_terminal=True, color_system=None)
    monkeypatch.setattr("rich.console.Console", lambda **_: console)
    print_document("\n".join(rows))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    assert sum(line.count("+0.123 ± 0.045") for line in lines) == 13  # whole, not folded
