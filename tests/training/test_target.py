"""Trainings that end at a KL or an accuracy instead of after a number of steps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from sepo.api import run_recipe
from sepo.cli import main
from sepo.errors import UserError
from sepo.recipe.reading import load_recipe
from sepo.recipe.settings import PolicySettings, TrainingSettings
from sepo.stages import oracle
from sepo.study.comparison import check_grid
from sepo.study.grid import Setting
from sepo.targets import auto_rate
from sepo.targets.until import LookAtAccuracy, LookAtKl
from sepo.training.checkpoints import SaveEvery
from tiny_run import prepare

RECIPE = """
name: tiny
output_dir: run
data: {source: prefs.jsonl, as_chat: true, held_out: 6}
reference: {model: model}
device: cpu
oracle: {training: {learning_rate: 0.002, batch_size: 8}}
policy: {training: {learning_rate: 0.0001, batch_size: 8, num_train_epochs: 40, lr_scheduler_type: constant}}
eval: {gold: plain, prompts: 6, samples: 24, max_new_tokens: 8, examples: 0, pairs: 0}
"""
TARGET = ("policy.target_kl=0.5", "policy.training.save_minutes=1.0e-9", "policy.training.learning_rate=0.0005")


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    prepare(tmp_path, RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe_of(*overrides: str):
    return load_recipe("recipe.yaml", list(overrides))


def test_a_training_ends_near_its_kl_and_a_killed_one_keeps_the_same_weights(here, monkeypatch, capsys):
    metrics = run_recipe(recipe_of(*TARGET))
    assert metrics["target_kl/reached"] == 1
    assert metrics["target_kl/kept"] == pytest.approx(0.5, rel=0.35)
    assert metrics["kl"] == pytest.approx(metrics["target_kl/kept"], abs=1e-4)  # the evaluation's own estimate
    assert "policy.target_kl 0.5: kept step" in capsys.readouterr().err
    policy = here / "run/policy"
    last = json.loads((policy / "trainer_state.json").read_text())["global_step"]
    assert metrics["target_kl/step"] <= last < 40 * 3
    weights = (policy / "model.safetensors").read_bytes()
    assert not list(policy.glob("**/target-*"))

    class Killed(BaseException):
        """As a signal would."""

    saved, real = [], SaveEvery.on_save

    def dying(self, args, state, control, **kwargs):
        real(self, args, state, control, **kwargs)
        saved.append(state.global_step)
        if state.global_step == last - 1 and saved.count(last - 1) == 1:
            raise Killed

    monkeypatch.setattr(SaveEvery, "on_save", dying)
    again = recipe_of(*TARGET, "output_dir=again")
    shutil.copytree(here / "run", here / "again", ignore=shutil.ignore_patterns("policy"))
    with pytest.raises(Killed):
        run_recipe(again)
    assert run_recipe(again)["target_kl/step"] == metrics["target_kl/step"]
    assert (here / "again/policy/model.safetensors").read_bytes() == weights


def test_an_oracle_ends_at_its_accuracy_or_says_that_the_pairs_are_used_up(here, capsys):
    settings = ("oracle.training.num_train_epochs=6", "oracle.training.learning_rate=0.003")
    assert main(["run", "recipe.yaml", "--until", "oracle", "oracle.target_accuracy=0.8", *settings]) == 0
    said = capsys.readouterr().err
    assert "oracle.target_accuracy 0.8: kept step" in said
    results = json.loads((here / "run/manifest.json").read_text())["stages"]["oracle"]["results"]
    assert 0.8 <= results["target_accuracy/kept"] <= 1
    short = ("policy.target_kl=500", "policy.training.max_steps=2", "eval.prompts=2", "eval.samples=1")
    metrics = run_recipe(recipe_of(*short))
    assert (metrics["target_kl/reached"], metrics["target_kl/step"]) == (0, 2)
    said = capsys.readouterr().err
    assert "policy.target_kl 500 was not reached: the pairs are used up after 2 steps; kept step 2" in said
    assert "raise policy.training.num_train_epochs or learning_rate" in said


def test_an_automatic_rate_reaches_the_kl_and_a_killed_probe_chooses_the_same(here, monkeypatch, capsys):
    auto = ("policy.target_kl=0.5", "policy.training.learning_rate=auto", "policy.training.num_train_epochs=10")
    metrics = run_recipe(recipe_of(*auto))
    said = capsys.readouterr().err
    assert "learning_rate auto: KL" in said
    assert metrics["target_kl/reached"] == 1
    assert 10 <= metrics["target_kl/step"] <= 30  # planned at 70 % of 30 steps
    rate = metrics["target_kl/learning_rate"]
    assert 1e-5 < rate < 1e-2
    assert not list((here / "run/policy").glob(auto_rate.FOLDER.format("*")))
    weights = (here / "run/policy/model.safetensors").read_bytes()

    class Killed(BaseException):
        """As a signal would."""

    probes, real = [], auto_rate.next_rate

    def dying(*args, **kwargs):
        probes.append(args)
        if len(probes) == 2:
            raise Killed
        return real(*args, **kwargs)

    monkeypatch.setattr(auto_rate, "next_rate", dying)
    shutil.copytree(here / "run", here / "again", ignore=shutil.ignore_patterns("policy"))
    with pytest.raises(Killed):
        run_recipe(recipe_of(*auto, "output_dir=again"))
    run_recipe(recipe_of(*auto, "output_dir=again"))
    assert "reused" in capsys.readouterr().err
    assert (here / "again/policy/model.safetensors").read_bytes() == weights


@pytest.mark.parametrize(("kl", "words"), [(0.0, "do not move the policy"), (float("nan"), "not finite")])
def test_no_rate_is_chosen_where_a_probe_learns_nothing_or_diverges(tmp_path, kl, words):
    policy = PolicySettings(target_kl=1.0, training=TrainingSettings(learning_rate="auto"))
    rates = []

    def train(settings, out):
        rates.append(settings.learning_rate)
        return auto_rate.ProbedKl(kl, kl)

    with pytest.raises(UserError, match=words):
        auto_rate.choose_rate(policy, 60, train, tmp_path)
    assert rates == sorted(set(rates))


def test_no_rate_is_chosen_for_a_training_that_is_all_warm_up(tmp_path):
    training = {"learning_rate": "auto", "warmup_ratio": 0.1}
    policy = PolicySettings.model_validate({"target_kl": 1.0, "training": training})
    with pytest.raises(UserError, match="a training of 1 steps ends in its warm-up"):
        auto_rate.choose_rate(policy, 1, lambda *_: pytest.fail("a probe was trained"), tmp_path)


@pytest.mark.parametrize("planned", [10.0, 200.0])
@pytest.mark.parametrize("target", [0.1, 3.0])
@pytest.mark.parametrize("power", [0.5, 0.8, 1.0])
def test_the_rate_follows_from_how_a_policy_moves_with_its_steps(planned, target, power):
    def moved(rate: float, steps: float) -> float:
        return (40 * rate * steps**power) ** 2

    kl = auto_rate.ProbedKl(moved(1e-3, 4), moved(1e-3, 8))
    rate = auto_rate.next_rate(1e-3, kl, steps=8, target=target, planned=planned)
    assert moved(rate, planned) == pytest.approx(target)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("policy.target_kl=0", "greater than 0"),
        ("policy.target_kl=-1", "greater than 0"),
        ("policy.target_kl=.inf", "finite"),
        ("policy.training.learning_rate=auto", "set target_kl, or give a number"),
        ("oracle.training.learning_rate=auto", "for a policy with target_kl"),
        ("policy.training.learning_rate=fast", "learning_rate"),
        ("oracle.target_accuracy=0.5", "greater than 0.5"),
        ("oracle.target_accuracy=1.1", "less than or equal to 1"),
        ("oracle={target_accuracy: 0.8, model: model}", "none is trained"),
    ],
)
def test_targets_that_make_no_sense_are_refused(here, setting, words):
    with pytest.raises(UserError, match=words):
        recipe_of(setting)


def test_targets_need_held_out_prompts_and_are_refused_in_a_comparison(here, monkeypatch, capsys):
    for settings, words in {
        ("data.held_out=0",): "policy.target_kl is measured on held-out pairs: set data.held_out above 0",
        ("eval.prompts=0",): "set eval.prompts above 0",
        ("eval.temperature=0.7",): "eval.temperature to 1",
    }.items():
        assert main(["run", "recipe.yaml", "policy.target_kl=1", *settings]) == 2
        assert words in capsys.readouterr().err
    monkeypatch.setattr("sepo.processes.launched", lambda: 2)
    with pytest.raises(UserError, match=r"oracle\.target_accuracy measures in one process"):
        oracle.check(recipe_of("oracle.target_accuracy=0.9"))
    with pytest.raises(UserError, match=r"leave policy\.target_kl out"):
        check_grid({"a": [Setting("a", "", recipe_of("policy.target_kl=1"))]})


def test_looks_come_before_the_target_and_at_it_and_follow_the_measured_kl(tmp_path):
    look = LookAtKl(1.0, lambda step: (step / 100) ** 2, tmp_path)  # the probe reads the KL off the step
    points: list[dict] = []
    for step in range(1, 400):
        due = look.due(step, step, points)
        if due is not None:
            points.append({"step": step, "kl": 0.8 * due["probe"], **due})  # a measurement is lower than the probe
        if points and points[-1]["kl"] >= 1:
            break
    assert 3 <= len(points) <= 6
    assert 0.2 < points[0]["kl"] < 0.5
    assert 0.8 < points[-2]["kl"] < 1 <= points[-1]["kl"] < 1.3
    accuracy, steps, points = LookAtAccuracy(), [], []
    for step in range(1, 60):
        if accuracy.due(step, None, points) is not None:
            steps.append(step)
            points.append({"step": step})
    assert steps[:4] == [1, 2, 3, 4]
    assert steps[-2:] == [52, 56]
