"""Best of n and steering as points of a comparison."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

from sepo.cli import main
from sepo.errors import UserError
from sepo.evaluate.generate import Generation, generate_responses
from sepo.judging.steering import Steered
from sepo.study.baselines import best_answers, check_baselines, steered_point
from sepo.study.beside import above, against_baselines, baselines_section, in_a_sentence
from sepo.study.crossed import crossed_mean
from sepo.study.grid import load_grid
from tiny_models import tiny_model, tiny_tokenizer
from tiny_run import prepare

RECIPE = """
data: {source: prefs.jsonl, as_chat: true, held_out: 6}
reference: {model: model}
device: cpu
oracle: {training: {learning_rate: 0.002, batch_size: 8}}
policy: {training: {learning_rate: 0.001, batch_size: 6}}
eval: {gold: plain, prompts: 4, samples: 2, max_new_tokens: 6}
"""
GRID = """
base: recipe.yaml
output_dir: out
seeds: [0]
checkpoints: 1
baselines: {best_of: [2, 4], steer: [1.0]}
variants: {sepo: {}}
"""


def test_a_comparison_draws_and_lists_its_baselines(tmp_path, monkeypatch, capsys):
    prepare(tmp_path, RECIPE)
    (tmp_path / "grid.yaml").write_text(GRID)
    monkeypatch.chdir(tmp_path)
    assert main(["compare", "grid.yaml", "--dry-run"]) == 0
    assert "best of n, steering" in capsys.readouterr().out
    assert main(["compare", "grid.yaml"]) == 0
    results = json.loads((tmp_path / "out/compare.json").read_text())
    names = [point["name"] for point in results["baselines"]]
    assert names == [
        *(f"best of {n} by the {what}" for what in ("oracle", "gold reward") for n in (2, 4)),
        "steering by 1 of the oracle",
    ]
    points = dict(zip(names, results["baselines"], strict=True))
    assert points["best of 4 by the oracle"]["kl"] == pytest.approx(math.log(4) - 3 / 4)
    assert points["best of 4 by the gold reward"]["gold_difference"] >= 0
    assert len(points["steering by 1 of the oracle"]["by_prompt"]) == 4
    page = (tmp_path / "out/compare.md").read_text()
    assert "## Baselines without training" in page
    assert "| best of 4 by the gold reward | ≤ 0.64 |" in page
    before = (tmp_path / "out/compare.json").read_bytes()
    assert main(["compare", "grid.yaml"]) == 0
    assert (tmp_path / "out/compare.json").read_bytes() == before  # reused


def test_steering_by_nothing_gives_the_answers_of_the_start():
    start, oracle = (tiny_model("llama", initializer_range=scale) for scale in (0.1, 0.3))
    prompts = [[1, 4, 20, 30, 2, 5], [1, 4, 50, 2, 5], [1, 4, *range(10, 40), 2, 5]]
    given: list = []
    evaluator = SimpleNamespace(
        base=start, tokenizer=tiny_tokenizer(), prompts=prompts, seed=3,
        settings=SimpleNamespace(samples=2, max_new_tokens=7, temperature=1.0, batch_size=2),
        of_answers=lambda answers, kl, device: given.append((answers, kl)) or {},
    )  # fmt: skip
    for alpha in (0.0, 1.0):
        steered_point(evaluator, Steered(start, oracle, None, alpha))
    expected = [
        generate_responses(m, tiny_tokenizer(), prompts, samples=2, max_new_tokens=7, seed=3, progress=False)
        for m in (start, oracle)
    ]
    for (answers, kl), plain, moved in zip(given, expected, (False, True), strict=True):
        assert [answer[:3] for answer in answers] == [answer[:3] for answer in plain]
        assert (np.abs(kl).max() > 0.1) == moved


def test_the_best_of_each_group_of_answers_is_kept():
    answers = [
        Generation(prompt, sample, [10 * prompt + sample], True, [0.0]) for prompt in range(2) for sample in range(6)
    ]
    scores = np.array([1, 3, 3, 0, 5, 4, 9, 1, 2, 7, 0, 0])
    best = best_answers(answers, scores, 3, 2)
    assert [answer.response_ids[0] for answer in best] == [1, 4, 10, 13]
    assert [(answer.prompt_index, answer.sample_index) for answer in best] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [answer.response_ids[0] for answer in best_answers(answers, scores, 2, 2)] == [1, 2, 10, 13]


def points_of(kl, gains):
    return {"kl": kl, "gold_difference": float(np.mean(gains)), "by_prompt": list(gains)}


def test_the_trained_method_with_the_highest_gain_at_a_baselines_kl_stands_beside_it():
    draw = np.random.default_rng(0)
    noise = draw.normal(0, 0.05, (4, 30))
    curves = {
        "good": {seed: [points_of(1.0, 0.4 + noise[seed])] for seed in range(4)},
        "bad": {seed: [points_of(4.0, 0.2 + noise[seed])] for seed in range(4)},
        "few": {0: [points_of(1.0, np.full(30, 9.0))]},
    }
    other = draw.normal(0, 0.05, (4, 30))
    kinds = (("best of 2 by the oracle", "best_of", 0.25, 0.1), ("steering by 1 of the oracle", "steer", 1.0, 0.7))
    baselines = [
        {"name": name, "kind": kind, "seed": seed, **points_of(kl, gain + other[seed])}
        for name, kind, kl, gain in kinds
        for seed in range(4)
    ]
    rows = against_baselines(curves, baselines)
    assert [(row["method"], above(row)) for row in rows] == [("good", "yes"), ("good", "no")]
    expected = crossed_mean([0.5 * (0.4 + noise[seed]) - (0.1 + other[seed]) for seed in range(4)])
    assert rows[0]["difference"] == pytest.approx(expected.mean)
    assert (rows[0]["low"], rows[0]["high"]) == (pytest.approx(expected.low), pytest.approx(expected.high))
    assert "no trained method gains as much at its KL" in in_a_sentence(rows)
    assert "A trained method gains more than every baseline" in in_a_sentence(rows[:1])
    assert baselines_section(rows)[-1].startswith("| steering by 1 of the oracle | 1.00 |")
    alone = against_baselines({}, baselines)
    assert (alone[0]["method"], above(alone[0])) == (None, "not known")


def test_baselines_that_cannot_be_measured_are_refused(tmp_path, monkeypatch):
    prepare(tmp_path, RECIPE)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "grid.yaml").write_text(GRID)
    for overrides, words in {
        ("eval.gold=null", "variants={a: {}}"): "set eval.gold or eval.judge",
        ("variants={a: {set: {select.credit: truth}}}",): "needs a variant whose token rewards come from one oracle",
        ("variants={a: {set: {oracle.count: 2}}}",): "needs a variant whose token rewards come from one oracle",
    }.items():
        with pytest.raises(UserError, match=words):
            check_baselines(*load_grid("grid.yaml", list(overrides)))
    for value, words in {
        "{}": "name best_of, steer or both",
        "{best_of: [1]}": "greater than or equal to 2",
        "{steer: [0]}": "greater than 0",
        "{best_of: [2, 2]}": "lists a value twice",
    }.items():
        with pytest.raises(UserError, match=words):
            load_grid("grid.yaml", [f"baselines={value}"])
