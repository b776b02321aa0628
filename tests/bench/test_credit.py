"""The bench of token credit, small but whole: tasks, start, policies, leaderboard."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from sepo.bench.credit import grids, run
from sepo.bench.credit.board import rows_of
from sepo.bench.credit.headroom import headroom
from sepo.bench.credit.run import run_bench
from sepo.bench.credit.tasks import Sizes
from sepo.cli import main
from sepo.data.tables import read_table

SIZES = Sizes(train=8, held_out=6, demos=64)


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Short answers and two measurements a run."""
    whole = grids.bench_of

    def small(task, out):
        bench = whole(task, out)
        bench.recipe["eval"]["max_new_tokens"] = 12
        return bench._replace(checkpoints=(0.5, 1.0))

    with pytest.MonkeyPatch.context() as patch:
        for module in (grids, run):
            patch.setattr(module, "bench_of", small)
        yield


@pytest.fixture(scope="module")
def bench(tmp_path_factory, quick):
    """A bench of all tokens, the truth, and a method that comes as a table of weights: 1 for every token."""
    out = tmp_path_factory.mktemp("bench") / "out"
    run_bench(["details"], ["all", "truth"], [1], out, {}, SIZES)
    (pairs,) = (out / "work" / "details" / "shared").glob("data-*")
    table = read_table(pairs / "train", "pairs")
    ones = {
        f"{side}_rewards": [[1.0] * len(ids) for ids in table.column(f"{side}_ids").to_pylist()]
        for side in ("chosen", "rejected")
    }
    weights = out.parent / "weights.parquet"
    pq.write_table(pa.table({"pair_id": table.column("pair_id"), **ones}), weights)
    run_bench(["details"], ["all", "truth"], [1, 2, 3], out, {"ones": weights}, SIZES)
    return out


def test_a_bench_ranks_rules_and_goes_on_where_it_was(bench, capsys):
    text = (bench / "bench.md").read_text()
    assert "| details | 1 |" in text
    assert "\n| ones | " in text
    assert (bench / "bench.png").stat().st_size > 1000
    capsys.readouterr()
    weights = {"ones": bench.parent / "weights.parquet"}
    assert run_bench(["details"], ["all", "truth"], [1, 2, 3], bench, weights, SIZES) == text
    assert "unchanged, reused" in capsys.readouterr().err


def test_the_truth_trains_no_oracle_and_weighs_what_the_gold_reward_counts(bench):
    stages = json.loads((bench / "work" / "details" / "manifest.json").read_text())["stages"]
    assert not [name for name in stages if name.startswith("oracle")]
    tables = [read_table(path, "selection") for path in (bench / "work" / "details" / "shared").glob("select-*")]
    weights = [set(np.concatenate(table.column("chosen_weights").to_pylist()).round(6)) for table in tables]
    assert {0.05, 1.0} in weights  # the truth's
    assert {1.0} in weights  # of the table


def test_the_command_does_the_same(bench, tmp_path, monkeypatch, capsys):
    copy = tmp_path / "bench"
    shutil.copytree(bench, copy)
    prepare = run.prepare
    monkeypatch.setattr(run, "prepare", lambda task, folder, sizes: prepare(task, folder, SIZES))
    weights = f"ones={bench.parent / 'weights.parquet'}"
    command = ["--out", str(copy), "--task", "details", "--rule", "truth", "--seeds", "3", "--weights", weights]
    assert main(["bench", "credit", *command]) == 0
    assert capsys.readouterr().out.strip() == (bench / "bench.md").read_text().strip()


def test_a_table_of_weights_belongs_to_one_task(bench, tmp_path, capsys):
    weights = f"mine={bench.parent / 'weights.parquet'}"
    assert main(["bench", "credit", "--out", str(tmp_path / "out"), "--weights", weights]) == 2
    assert "belongs to the pairs of one task" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_our_rule_is_the_one_of_the_published_grid():
    grid = Path(__file__).parents[2] / "recipes" / "experiments" / "credit.yaml"
    published = yaml.safe_load(grid.read_text())["variants"]
    assert grids.RULES["own"]["select"] == published["own"]["set"]["select"]
    recipe = grids.bench_of("sentiment", Path("nowhere")).recipe
    rate = published["simpo"]["set"]["policy"]["training.learning_rate"]
    faster = grids.bench_of("sentiment", Path("nowhere")).faster
    assert faster * recipe["policy"]["training"]["learning_rate"] == pytest.approx(float(rate))


def test_rows_hold_the_headroom_of_common_seeds():
    rng = np.random.default_rng(0)

    def run(rule, seed, mean):
        gains = (mean + rng.normal(0, 0.1, 20)).tolist()
        point = {"kl": 4.0, "gold_difference": float(np.mean(gains)), "by_prompt": gains}
        return {"variant": rule, "seed": seed, "points": [point]}

    runs = [run(rule, seed, mean) for rule, mean in (("all", 0.2), ("truth", 0.6), ("mine", 0.4)) for seed in range(4)]
    runs.append(run("mine", 9, 5.0))  # no counterpart
    found = rows_of(runs, 4.0)
    gains = {rule: np.array([r["points"][0]["by_prompt"] for r in runs if r["variant"] == rule][:4]) for rule in found}
    assert found["mine"].closed == headroom(gains["mine"], gains["all"], gains["truth"])
    assert found["mine"].seeds == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "chess"], "--task chess: expected one of"),
        (["--rule", "best"], "--rule best: expected one of"),
        (["--weights", "hard=x.parquet"], "a name that no rule of the bench has"),
        (["--weights", "mine=missing.parquet"], "cannot be read as parquet"),
        (["--seeds", "2"], "expected 3 or more"),
    ],
)
def test_bad_arguments_end_before_anything_is_made(tmp_path, capsys, arguments, message):
    assert main(["bench", "credit", "--out", str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_every_rule_of_the_bench_is_a_valid_recipe(tmp_path):
    for task in grids.TASKS:
        _, settings = grids.grid_of(task, tmp_path, grids.RULES, [1])
        assert list(settings) == list(grids.RULES)
