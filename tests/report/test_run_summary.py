"""The summary at the end of a run: true, with its limitations, and safe against control sequences in the data."""

from __future__ import annotations

import pytest

from sepo.recipe.reading import parse_recipe
from sepo.report.run_summary import cautions, print_summary, summary_of

METRICS = {
    "oracle/accuracy": 0.71, "oracle/accuracy_se": 0.04, "oracle/length_baseline": 0.52, "fidelity/auc": 0.66,
    "policy/accuracy": 0.66, "policy/accuracy_se": 0.05, "prompts": 84.0, "length/base": 24.0, "length/policy": 25.0,
    "finished/base": 0.9, "finished/policy": 0.88, "gold_reward/base": 0.30, "gold_reward/policy": 0.55,
    "gold_reward/difference": 0.25, "gold_reward/difference_se": 0.05, "gold_reward/win_rate": 0.68,
    "kl": 6.5, "kl_se": 0.4, "pairs/train": 1240, "pairs/held_out": 90, "seconds/oracle": 70.0, "seconds/oracle-2": 5.0,
    "seconds/train": 130.0, "seconds/eval": 60.0,
}  # fmt: skip
RECIPE = {"name": "mine", "eval": {"gold": "vader", "samples": 2}, "reference": {"layers": 15},
          "policy": {"model": "org/Large-7B"}}  # fmt: skip


def summary(examples=(), **changed):
    return summary_of(parse_recipe(RECIPE, "test"), METRICS | changed, 0.3, list(examples))


def printed(capsys, summary, monkeypatch, width=100) -> str:
    monkeypatch.setenv("COLUMNS", str(width))
    print_summary(summary)
    return capsys.readouterr().out


def test_it_names_models_data_changes_files_and_next_steps(capsys, monkeypatch):
    example = {"prompt": "How was it?", "base": "Bad.", "policy": "Good.", "base_gold": -0.5, "policy_gold": 0.4}
    text = printed(capsys, summary([example]), monkeypatch)
    flat = " ".join(text.split())
    for part in (
        "15 layers of SmolLM2-135M-Instruct, trained with DPO on 1,240 pairs (1 min 15 s)",
        "ranks 71% of held-out pairs right; choosing the longer response: 52%",
        "30% of all response tokens",
        "Large-7B, trained on the key tokens only (2 min 10 s)",
        "84 held-out prompts, 2 responses each at temperature 1",
        "+0.250 ± 0.050 (5.0 s.e.)",
        "6.50 ± 0.40",
        "-0.50 → +0.40",
        "sepo analyse runs/mine",
        "runs/mine/report.html",
    ):
        assert part in flat, part
    assert "mine: 4 min 25 s" in flat


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"gold_reward/difference": 0.1}, "Inconclusive"),
        ({"gold_reward/difference": -0.4}, "got worse"),
        ({"length/policy": 40.0}, "67% longer"),
        ({"length/policy": 12.0}, "50% shorter"),
        ({"finished/policy": 0.4}, "Only 40%"),
        ({"kl": 80.0}, "far from the start"),
        ({"judge/win_rate": 0.6, "judge/failed": 3.0}, "3 answers have no verdict"),
        ({"oracle/accuracy": 0.55}, "may be noise"),
        ({"oracle/length_baseline": 0.7}, "may be noise"),
    ],
)
def test_a_limitation_is_printed_only_where_it_applies(changed, word):
    recipe = parse_recipe(RECIPE, "test")
    assert any(word in sentence for sentence in cautions(recipe, METRICS | changed))
    assert not any(word in sentence for sentence in cautions(recipe, METRICS))


def test_an_oracle_that_finds_the_words_is_not_called_noise_for_ranking_few_pairs():
    recipe = parse_recipe(RECIPE, "test")
    weak = METRICS | {"oracle/accuracy": 0.55}
    for auc, noise in ((0.74, False), (0.55, True), (None, True)):
        found = cautions(recipe, weak | {"fidelity/auc": auc, "fidelity/auc_se": 0.02})
        assert any("may be noise" in sentence for sentence in found) is noise


def test_a_run_without_a_judge_says_so():
    metrics = {name: value for name, value in METRICS.items() if not name.startswith(("gold", "fidelity"))}
    recipe = parse_recipe({"name": "mine"}, "test")
    assert any("Nothing judged" in sentence for sentence in cautions(recipe, metrics))


def test_a_judge_s_win_rate_is_among_the_changes(capsys, monkeypatch):
    shown = summary(**{"judge/win_rate": 0.61, "judge/win_rate_se": 0.04, "judge/length_controlled": 0.57})
    assert "61% ± 4% 57% at equal length" in " ".join(printed(capsys, shown, monkeypatch).split())


def test_a_run_that_measured_nothing_has_a_summary(capsys, monkeypatch):
    shown = summary_of(parse_recipe({"name": "mine", "eval": {"prompts": 0}}, "test"), {"pairs/train": 3}, None, [])
    assert "mine" in printed(capsys, shown, monkeypatch)


def test_texts_of_the_data_cannot_draw_on_the_terminal(capsys, monkeypatch):
    evil = "[bold red]\x1b[2J\x1b]0;title\x07 [link=http://x]y[/link]\n\n\r\u202e end"
    text = printed(capsys, summary([{"prompt": evil, "base": evil, "policy": "  "}]), monkeypatch, width=200)
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "[bold red]" in text
    assert "[link=http://x]y[/link]" in text
    assert "(empty)" in text


def test_an_undefined_metric_does_not_fail(capsys, monkeypatch):
    shown = summary(**{"gold_reward/difference_se": 0.0, "length/base": 0.0, "fidelity/auc": None})
    assert "+0.250 (no spread seen in 84 prompts)" in printed(capsys, shown, monkeypatch)


def test_undefined_metrics_are_left_out():
    errors = {name: None for name in METRICS if name.endswith("_se")}
    rows = {row.what: row for row in summary(**errors).moved}
    assert rows["KL from the start"].after == "6.50"
    assert rows["gold reward (vader)"].change == "+0.250"
    assert summary(**{"kl": None, "gold_reward/difference": float("nan"), "policy/accuracy": None}).moved


def test_a_run_with_two_tokenizers_has_a_line_for_them(capsys, monkeypatch):
    shown = summary(**{"transfer/one_to_one_share": 0.83, "transfer/lost_share": 0.012})
    text = " ".join(printed(capsys, shown, monkeypatch, width=200).split())
    assert "two tokenizers token rewards carried over to the policy's tokenizer; 83% of its tokens" in text
    assert "1.2% of the reward was cut off" in text
    assert "two tokenizers" not in printed(capsys, summary(), monkeypatch)


def test_the_heading_says_what_was_measured(capsys, monkeypatch):
    assert printed(capsys, summary(), monkeypatch).startswith("Run mine: 4 min 25 s in its stages")
