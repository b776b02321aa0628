"""Benchmarks in a recipe: both models answer in the benchmark's format, and are judged; only changes are redone."""

from __future__ import annotations

import json

import pytest

from sepo.cli import main
from sepo.recipe.reading import parse_recipe
from tiny_run import prepare

JUDGE = "def prefer(prompts, responses):\n    return [{} for r in responses]\n"
RECIPE = """
name: tiny
output_dir: run
data: {source: prefs.jsonl, held_out: 4, as_chat: true}
reference: {model: model}
device: cpu
oracle: {training: {learning_rate: 0.002, batch_size: 8}}
policy: {training: {learning_rate: 0.01, batch_size: 8}}
eval:
  prompts: 0
  judge: "function:bench_judges:prefer"
  benchmarks: {alpaca_eval: alpaca.json, mt_bench: mt.jsonl}
  benchmark_max_new_tokens: 6
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmarks")
    prepare(folder, RECIPE, rows=16)
    (folder / "alpaca.json").write_text(json.dumps([{"instruction": f"Say {i}", "dataset": "d"} for i in range(5)]))
    turns = [{"question_id": 81 + i, "category": "math", "turns": [f"Ask {i}", f"And {i}"]} for i in range(3)]
    (folder / "mt.jsonl").write_text("".join(json.dumps(row) + "\n" for row in turns))
    (folder / "bench_judges.py").write_text(JUDGE.format("len(r)") + JUDGE.replace("prefer", "short").format("-len(r)"))
    return folder


@pytest.fixture
def run(workplace, monkeypatch, capsys):
    """Run the recipe with overrides; returns the stages that were done, and the metrics."""
    monkeypatch.chdir(workplace)

    def do(*overrides):
        capsys.readouterr()
        assert main(["run", "recipe.yaml", *overrides]) == 0
        lines = capsys.readouterr().err.splitlines()
        done = [line.split("]")[0][1:] for line in lines if line.startswith("[") and line.endswith(" s")]
        return done, json.loads((workplace / "run" / "metrics.json").read_text())

    return do


def test_both_models_answer_in_the_benchmark_s_format_and_only_changes_are_redone(run, workplace, capsys):
    _, metrics = run()
    here = workplace / "run" / "benchmarks"
    for role in ("base", "policy"):
        rows = json.loads((here / "alpaca_eval" / role / "model_outputs.json").read_text())
        assert [row["instruction"] for row in rows] == [f"Say {i}" for i in range(5)]
        assert {row["generator"] for row in rows} == {role}
        rows = [json.loads(line) for line in (here / "mt_bench" / role / "model_answer" / f"{role}.jsonl").open()]
        assert all(len(row["choices"][0]["turns"]) == 2 for row in rows)
    notes = json.loads((here / "alpaca_eval" / "annotations.json").read_text())
    shares = [(one["preference"] - 1) for one in notes]
    assert metrics["benchmarks/alpaca_eval/win_rate"] == pytest.approx(sum(shares) / 5)
    for one in notes:
        longer = len(one["output_2"]) - len(one["output_1"])
        assert one["preference"] == 1.5 + 0.5 * ((longer > 0) - (longer < 0))
    assert metrics["benchmarks/mt_bench/questions"] == metrics["benchmarks/mt_bench/judged"] == 3
    assert main(["winrate", str(here / "alpaca_eval" / "annotations.json")]) == 0
    stamps = (here / "alpaca_eval" / "policy" / "model_outputs.json").stat().st_mtime_ns

    assert run()[0] == []
    done, other = run("eval.judge=function:bench_judges:short")
    assert done == ["eval", "benchmark-alpaca_eval_judge", "benchmark-mt_bench_judge"]
    assert other["benchmarks/alpaca_eval/win_rate"] == pytest.approx(1 - metrics["benchmarks/alpaca_eval/win_rate"])
    assert (here / "alpaca_eval" / "policy" / "model_outputs.json").stat().st_mtime_ns == stamps

    # Another file, then other settings.
    (workplace / "mt.jsonl").write_text(json.dumps({"question_id": 1, "category": "math", "turns": ["A", "B"]}) + "\n")
    done, other = run("eval.judge=function:bench_judges:short")
    assert done == ["benchmark-mt_bench", "benchmark-mt_bench_judge"]
    assert other["benchmarks/mt_bench/questions"] == 1
    done, other = run("eval.judge=null", "eval.benchmark_limit=2")
    assert done == ["eval", "benchmark-alpaca_eval"]
    assert other["benchmarks/alpaca_eval/questions"] == 2
    assert "benchmarks/alpaca_eval/win_rate" not in other

    assert main(["run", "recipe.yaml", "eval.benchmarks={alpaca_eval: nowhere.json}"]) == 2
    assert "nowhere.json" in capsys.readouterr().err
    assert main(["run", "recipe.yaml", "eval.benchmarks={../x: alpaca.json}"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_cache_key_of_the_evaluation_leaves_benchmarks_out():
    assert not {name for name in parse_recipe({}, "test").eval.cache_key() if name.startswith("benchmark")}
