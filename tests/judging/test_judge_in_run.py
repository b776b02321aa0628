"""A judge in a recipe: checked before the run starts, shown in metrics and report, asked again after a change."""

from __future__ import annotations

import json
import re
import sys

import pyarrow.parquet as pq
import pytest
import torch
from transformers import LlamaForSequenceClassification

from judge_server import completion, serving
from sepo.cli import main
from sepo.report.payload import unpack
from tiny_models import CONFIGS, tiny_tokenizer
from tiny_run import prepare

JUDGE = "def prefer(prompts, responses):\n    return [{} for r in responses]\n"
RECIPE = """
name: tiny
output_dir: run
data: {source: prefs.jsonl, held_out: 6, as_chat: true}
reference: {model: model}
device: cpu
oracle: {training: {learning_rate: 0.002, batch_size: 8}}
policy: {training: {learning_rate: 0.001, batch_size: 8}}
eval: {judge: "reward:reward", prompts: 4, samples: 2, max_new_tokens: 8}
"""


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "run_judges", raising=False)
    prepare(tmp_path, RECIPE)
    config = CONFIGS["llama"]()
    config.num_labels = 1
    torch.manual_seed(3)
    LlamaForSequenceClassification(config).save_pretrained("reward")
    tiny_tokenizer().save_pretrained("reward")
    (tmp_path / "run_judges.py").write_text(JUDGE.format("len(r)"))
    return tmp_path


def stages_done(capsys) -> list[str]:
    lines = capsys.readouterr().err.splitlines()
    return [line.split("]")[0][1:] for line in lines if line.startswith("[") and line.endswith(" s")]


def metrics_of(folder) -> dict:
    return json.loads((folder / "run" / "metrics.json").read_text())


def test_a_run_is_judged_and_judged_again_after_a_change_of_the_judge(workplace, capsys):
    assert main(["run", "recipe.yaml"]) == 0
    metrics = metrics_of(workplace)
    assert metrics["judge/judged"] == 8
    assert metrics["judge/failed"] == 0
    assert 0 < metrics["judge/win_rate"] < 1
    assert metrics["judge/score/difference"] == pytest.approx(
        metrics["judge/score/policy"] - metrics["judge/score/base"], abs=1e-9
    )
    rows = json.loads((workplace / "run" / "eval" / "annotations.json").read_text())
    assert len(rows) == 8
    assert all(row["instruction"].startswith("Is it ") and row["instruction"].endswith("?") for row in rows)
    table = pq.read_table(workplace / "run" / "eval" / "generations.parquet")
    assert {"preference", "base_score", "policy_score"} <= set(table.column_names)
    assert main(["winrate", "run/eval/annotations.json", "--json", "w.json"]) == 0
    found = json.loads((workplace / "w.json").read_text())
    assert found["win_rate"] == pytest.approx(100 * metrics["judge/win_rate"])
    assert found["standard_error"] == pytest.approx(100 * metrics["judge/win_rate_se"])
    page = re.search(r'id="data">([^<]*)</script>', (workplace / "run" / "report.html").read_text())
    assert page is not None
    assert unpack(page[1])[0]["documents"]["metrics"]["judge/win_rate"] == metrics["judge/win_rate"]
    stages_done(capsys)

    assert main(["run", "recipe.yaml"]) == 0
    assert stages_done(capsys) == []
    assert main(["run", "recipe.yaml", "eval.judge=function:run_judges:prefer"]) == 0
    assert stages_done(capsys) == ["eval"]
    longer = metrics_of(workplace)["judge/score/policy"]
    assert 0 <= longer <= 8
    (workplace / "run_judges.py").write_text(JUDGE.format("-len(r)"))
    del sys.modules["run_judges"]
    assert main(["run", "recipe.yaml", "eval.judge=function:run_judges:prefer"]) == 0
    assert stages_done(capsys) == ["eval"]
    assert metrics_of(workplace)["judge/score/policy"] == -longer

    (workplace / "words.txt").write_text("{instruction} m: {output_1} M: {output_2}")
    with serving(lambda body, before: completion("M", {"M": -0.1, "m": -3.0})) as server:
        judge = f"eval.judge={{server: '{server.url}', model: j, prompt: words.txt, cache: cache}}"
        assert main(["run", "recipe.yaml", judge]) == 0
        assert metrics_of(workplace)["judge/win_rate"] == pytest.approx(0.5)
        assert "judge/score/policy" not in metrics_of(workplace)
        asked = len(server.asked)
        stages_done(capsys)
        assert main(["run", "recipe.yaml", judge.replace("}", ", concurrency: 2}")]) == 0
        assert stages_done(capsys) == []  # concurrency is not part of the cache key
        assert len(server.asked) == asked


@pytest.mark.parametrize(
    ("judge", "says"),
    [
        ("reward:nowhere", "nowhere"),
        ("reward:model", "drawn at random"),
        ("function:run_judges:missing", "has no function 'missing'"),
        ("function:run_judges", "MODULE:NAME"),
        ("vader", "expected reward:MODEL"),
        ("server:http://localhost:1/v1", "needs model"),
        ("{server: 'localhost', model: j, prompt: run_judges.py}", "shows no answer"),
        ("{server: 'http://localhost:1/v1', model: j, prompt: nowhere.txt}", "no judge prompt"),
        ("{reward_model: a, function: 'b:c'}", "name one of"),
    ],
)
def test_an_unusable_judge_ends_the_run_before_it_starts(judge, says, workplace, capsys):
    assert main(["run", "recipe.yaml", f"eval.judge={judge}"]) == 2
    error = capsys.readouterr().err
    assert says in error or "is no address" in error
    assert error.count("\n") == 1
    assert not (workplace / "run").exists()


def test_sepo_eval_takes_a_judge_behind_a_server(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path, RECIPE, rows=4)
    (tmp_path / "words.txt").write_text("[{instruction}] m: {output_1} M: {output_2}. Say m or M.")
    command = ["eval", "--policy", "model", "--base", "model", "--data", "prefs.jsonl", "--as-chat", "--device", "cpu"]
    command += ["--prompts", "2", "--max-new-tokens", "4", "--out", "out"]
    down = [True]
    with serving(lambda body, before: 500 if down[0] and "Is it 1?" in str(body) else completion("M")) as server:
        command += [
            "--judge",
            f"server:{server.url}",
            "--model-name",
            "j",
            "--prompt",
            "words.txt",
            "--order",
            "seeded",
        ]
        command += ["--cache", "cache", "--retries", "0", "--judge-temperature", "none", "--request", "top_p=1"]
        for down[0], code in ((True, (0, 1)), (False, (0,))):
            assert main(command) in code
        assert json.loads((tmp_path / "out" / "metrics.json").read_text())["judge/judged"] == 2
        assert all(body["top_p"] == 1 and "temperature" not in body for body in server.asked)
    for options, says in (
        (["--judge-beta", "0.1"], "--judge-beta is for a judge that is an oracle"),
        (["--order", "both"], "--order is for a judge behind a server"),
        (["--judge", "server:http://localhost:1/v1"], "needs --model-name"),
    ):
        capsys.readouterr()
        assert main([*command[: command.index("--judge")], *options]) == 2
        error = capsys.readouterr().err
        assert says in error
        assert error.count("\n") == 1
