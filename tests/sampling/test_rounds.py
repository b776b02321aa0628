"""`data.on_policy` and `rounds` in a recipe."""

from __future__ import annotations

import json
import random
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

from kills import run_in_child
from sepo.api import plan_run, run_recipe
from sepo.cli import main
from sepo.data.tables import read_table
from sepo.errors import UserError
from sepo.recipe.reading import load_recipe
from sepo.report.run_summary import summarise_run
from sepo.sampling.rounds import check_rounds, round_recipe
from sepo.sampling.rounds_report import rounds_page, table_of
from sepo.study.comparison import check_grid
from tiny_run import prepare

RECIPE = """
name: tiny
output_dir: run
data:
  source: prefs.jsonl
  as_chat: true
  held_out: 4
  on_policy: {gold: plain, samples: 4, max_new_tokens: 120, limit: 12}
reference: {model: model}
device: cpu
oracle: {training: {learning_rate: 0.002, batch_size: 8}}
policy: {training: {learning_rate: 0.001, batch_size: 8}}
eval: {gold: plain, prompts: 2, max_new_tokens: 20, examples: 0, pairs: 0}
"""
# Files with times.
TIMED = ("manifest.json", "metrics.json", "metrics.md", "trainer_state.json", "report.html", "README.md")


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    prepare(tmp_path, RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe_of(*overrides: str):
    return load_recipe("recipe.yaml", list(overrides))


def contents(folder: Path) -> dict[str, bytes]:
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {
        name: path.read_bytes()
        for name, path in sorted(files.items())
        if path.name not in TIMED and "logs" not in path.parts and not path.name.startswith(".")
    }


def test_a_fine_tuned_reference_answers_the_prompts(here):
    rows = [{"prompt": f"Is it {number}?", "completion": "Yes, it is."} for number in range(8)]
    Path("chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sft = "reference.sft={source: chats.jsonl, training: {batch_size: 8, num_train_epochs: 1}}"
    run_recipe(recipe_of(sft), until="data")
    stages = json.loads((here / "run/manifest.json").read_text())["stages"]
    assert list(stages)[:3] == ["prompts", "reference", "samples"]


def test_a_run_trains_on_answers_of_its_own_model(here, capsys):
    """Prompts of the training pairs, held-out pairs as they are; a second command reuses everything."""
    plan = plan_run(recipe_of())
    assert [row["stage"] for row in plan.stages][:4] == ["prompts", "samples", "responses", "sampled_pairs"]
    metrics = run_recipe(recipe_of())
    pairs = json.loads((here / "run/sampled_pairs/pairs.json").read_text())
    assert metrics["on_policy/length/gap"] == pairs["length/gap"]
    summary = summarise_run(recipe_of(), metrics)
    assert "of the answers of model to 12 prompts" in dict(summary.trained)["pairs"]
    assert any("Of the sampled pairs: length" in line for line in summary.cautions) == bool(pairs["caution"])
    assert metrics["pairs/train"] == pairs["pairs"] > 0
    assert pairs["prompts"] == 12
    trained = {tuple(ids) for ids in read_table(here / "run/pairs/train", "pairs")["prompt_ids"].to_pylist()}
    source = read_table(here / "run/prompts/train", "pairs")
    assert trained <= {tuple(ids) for ids in source["prompt_ids"].to_pylist()}
    held_out = [read_table(here / "run" / part / "held_out", "pairs") for part in ("pairs", "prompts")]
    assert held_out[0]["chosen_ids"] == held_out[1]["chosen_ids"]
    before = contents(here / "run")
    capsys.readouterr()
    run_recipe(recipe_of())
    assert capsys.readouterr().err.count("unchanged, reused") == 12
    assert contents(here / "run") == before


@pytest.mark.nightly
def test_two_rounds_go_on_from_the_policy_and_compare_with_the_first_start(here, capsys):
    assert main(["run", "recipe.yaml", "rounds=2", "eval.prompts=2", "policy.objective=dpo"]) == 0
    printed, log = capsys.readouterr()
    assert log.count("the reference is another model than the policy") == 1  # DPO's reference is the first start
    assert "the new policy's answers" in printed
    second = load_recipe("run/round-2/recipe.yaml")
    assert second.data.on_policy.model == second.policy.model == "run/round-1/policy"
    assert (second.policy.reference, second.eval.base, second.reference.model) == ("model", "model", "model")
    found = json.loads((here / "run/rounds.json").read_text())["rounds"]
    assert [row["oracle/new_pairs"] > 0 for row in found] == [True, True]
    seeds = [json.loads((here / f"run/round-{i}/sampled_pairs/pairs.json").read_text()) for i in (1, 2)]
    assert [one["made_with"]["seed"] for one in seeds] == [0, 1]
    assert main(["run", "recipe.yaml", "rounds=2", "--until", "train"]) == 2


def test_rounds_end_where_no_pair_can_be_made_of_a_policys_answers(here, capsys):
    """A policy that went too far does not end its answers. What was trained before is kept, with its report."""
    far = ("eval.max_new_tokens=8", "policy.training.learning_rate=3", "policy.training.num_train_epochs=4")
    metrics = run_recipe(recipe_of("rounds.number=3", *far))
    said = capsys.readouterr().err
    stored = json.loads((here / "run/rounds.json").read_text())
    assert len(stored["rounds"]) == 1
    assert stored["stopped"].startswith("stopped before round 2: no pair can be made")
    assert "round-1/kl" in metrics
    run_recipe(recipe_of("rounds.number=1", *far))
    assert "accuracy on the last policy's answers is not known: no pair can be made" in said + capsys.readouterr().err


@pytest.mark.nightly
@pytest.mark.parametrize("options", [("rounds.reference=moving", "oracle.lora={r: 2}", "policy.lora={r: 2}"), ()])
def test_three_rounds_killed_and_resumed_end_with_the_same_bytes(here, options):
    """A real SIGKILL, before writes drawn from the whole run, and again in what was left to do."""

    def run() -> None:
        run_recipe(recipe_of("rounds.number=3", *options))

    code, number = run_in_child(here / "run", run)
    assert code == 0
    whole = contents(here / "run")
    shutil.rmtree(here / "run")
    draw, killed = random.Random(len(options)), 0
    for _ in range(5):
        code, done = run_in_child(here / "run", run, round(draw.uniform(0.1, 0.5) * number))
        assert code in (-signal.SIGKILL, 0)
        killed += code != 0
        number = max(number - done, 20)
    assert killed >= 3
    assert run_in_child(here / "run", run)[0] == 0
    again = contents(here / "run")
    assert list(again) == list(whole)
    assert [name for name in whole if again[name] != whole[name]] == []


def test_the_recipe_of_a_round(here):
    split = recipe_of("rounds={number: 3, prompts: split, oracle: kept}")
    third = round_recipe(split, 3, "p")
    assert third.data.on_policy.part == (3, 3)
    assert third.oracle.model == "run/round-1/oracle"
    assert third.policy.reference is None  # sepo has no reference
    moving = round_recipe(recipe_of("rounds={number: 2, reference: moving}"), 2, "p")
    assert (moving.reference.model, moving.policy.model, moving.eval.base) == ("p", None, "model")
    with pytest.raises(UserError, match=r"without data\.on_policy"):
        check_grid({"one": [SimpleNamespace(recipe=recipe_of())]})
    for options, text in {
        ("rounds={reference: moving, oracle: kept}",): "needs rounds.reference=fixed",
        ("rounds={oracle: kept}", "oracle.count=2"): "keeps one oracle",
        ("rounds=2", "policy.objective=tdpo1"): "set rounds.reference=moving",
        ("rounds=2", "eval.base=model"): "leave them out",
    }.items():
        with pytest.raises(UserError, match=text):
            check_rounds(recipe_of(*options))
    for options, text in {
        ("rounds=2", "data.on_policy=null"): "rounds train on a policy's own answers",
        ("data.on_policy={samples: 4}",): "judge or gold, one of both",
        ("data.on_policy.part=[3, 2]",): "i from 1 to n",
    }.items():
        with pytest.raises(UserError, match=text):
            recipe_of(*options)


def test_rounds_stop_where_the_held_out_score_falls():
    from sepo.recipe.settings import RoundsSettings
    from sepo.sampling.rounds import _stopped

    found = [{"gold_reward/policy": value} for value in (0.2, 0.5, 0.4)]
    on, off = RoundsSettings(number=5, stop=True), RoundsSettings(number=5)
    assert not _stopped(on, found[:2])
    assert "round 2 is the better one" in _stopped(on, found)
    assert not _stopped(off, found)


def test_a_page_of_rounds_escapes_names(tmp_path):
    rows = table_of([{"kl": 1.0, "kl_se": 0.1, "gold_reward/policy": float("nan")}])
    assert rows[0] == ["round", "KL from the first start, nats"]
    page = rounds_page("<script>", rows, ["<b>"], tmp_path)
    assert "<script>" not in page
    assert "&lt;b&gt;" in page
