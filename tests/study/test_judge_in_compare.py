"""A comparison by a judge: every checkpoint's answers against the start's, one judge for all variants."""

from __future__ import annotations

import json
import sys

import pytest

from sepo.cli import main
from sepo.study.curves import at_kl, quality
from tiny_run import prepare

BASE = """
data: {source: prefs.jsonl, held_out: 6, as_chat: true}
reference: {model: model}
device: cpu
policy: {objective: simpo, training: {learning_rate: 0.01, batch_size: 8}}
eval: {judge: "function:compare_judges:high", prompts: 4, samples: 2, max_new_tokens: 6}
"""


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "compare_judges", raising=False)
    prepare(tmp_path, BASE, rows=22)
    (tmp_path / "compare_judges.py").write_text(
        "def high(prompts, responses):\n"
        "    assert all(prompt.startswith('Is it') for prompt in prompts)\n"
        "    return [sum(map(ord, r)) for r in responses]\n"
        "def low(prompts, responses):\n    return [-n for n in high(prompts, responses)]\n"
        "def silent(prompts, responses):\n    return [float('nan') for r in responses]\n"
    )
    (tmp_path / "grid.yaml").write_text(
        "base: recipe.yaml\noutput_dir: out\ncheckpoints: [0.5, 1.0]\nkl: 0.2\nvariants:\n"
        "  simpo: {}\n  cpo: {set: {policy.objective: cpo}}\n"
    )
    return tmp_path


def test_the_gain_of_a_comparison_is_what_its_judge_says(workplace, capsys):
    assert main(["compare", "grid.yaml"]) == 0
    found = json.loads((workplace / "out" / "compare.json").read_text())
    for row, run in zip(found["rows"], found["runs"], strict=True):
        last = run["points"][-1]
        assert quality(last) == last["judge_win_rate"] - 0.5
        assert row["win_rate"] == last["judge_win_rate"]
        assert row["value"] == at_kl(run["points"], 0.2)[0]
        assert last["judge_failed"] == 0
        assert "accuracy" not in last  # a pass over the pairs that nobody reads
    assert any(point["judge_win_rate"] != 0.5 for run in found["runs"] for point in run["points"])
    assert "by the judge compare_judges:high" in (workplace / "out" / "compare.md").read_text()
    assert (workplace / "out" / "win-rate.png").is_file()

    assert main(["compare", "grid.yaml", "eval.judge=function:compare_judges:low"]) == 0
    other = json.loads((workplace / "out" / "compare.json").read_text())
    for one, two in zip(found["runs"], other["runs"], strict=True):
        for before, after in zip(one["points"], two["points"], strict=True):
            assert after["judge_win_rate"] == pytest.approx(1 - before["judge_win_rate"])
            assert after["kl"] == before["kl"]
    capsys.readouterr()
    assert main(["compare", "grid.yaml", "eval.judge=function:compare_judges:silent"]) == 2
    assert "gave none of 8 answers a verdict" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("eval.judge=function:compare_judges:missing", "has no function 'missing'"),
        ("eval.benchmarks={mine: prefs.jsonl}", "no benchmarks"),
        ("variant", "different data or eval settings"),
    ],
)
def test_what_no_comparison_can_judge_by_ends_before_it_starts(setting, says, workplace, capsys):
    overrides = [setting]
    if setting == "variant":
        text = (workplace / "grid.yaml").read_text()
        (workplace / "grid.yaml").write_text(
            text.replace("policy.objective: cpo", "policy.objective: cpo, eval.judge: 'function:compare_judges:low'")
        )
        overrides = []
    assert main(["compare", "grid.yaml", *overrides]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not (workplace / "out").exists()
