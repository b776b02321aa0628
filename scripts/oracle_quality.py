"""Which property of an oracle predicts what its token rewards teach? Oracles of very different quality, and policies.

    python scripts/oracle_quality.py details --bench runs/bench --out runs/oracles --seeds 2

The bench of the planted task must be finished (`sepo bench credit --task TASK`). Each oracle of `ORACLES` is trained at
each seed and measured on held-out pairs; a policy is trained with its token rewards by each rule of `TRAINED`.
`oracles-TASK.json` holds, for every oracle and seed, its properties, and each policy's gain over all tokens (SimPO) of
the same seed at the bench's KL.
"""

from __future__ import annotations

import argparse
import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sepo.bench.credit.grids import ALL, RULES, bench_of, grid_of
from sepo.bench.credit.localise import localise
from sepo.command import quiet_libraries
from sepo.data.ragged import SIGNED_SIDES, flat
from sepo.data.tables import read_table
from sepo.evaluate.fidelity import token_truth
from sepo.evaluate.gold import gold_reward
from sepo.files import write_json
from sepo.models.tokenizer import load_tokenizer
from sepo.recipe.reading import parse_recipe, set_key
from sepo.runs.folder import open_run
from sepo.runs.method import Method
from sepo.runs.pipeline import RunWalker
from sepo.study.comparison import compare
from sepo.study.curves import at_kl

# Name -> settings that differ from the bench's oracle: a quarter of the pairs, two epochs, rate 5e-4, beta 0.1.
ORACLES: dict[str, dict[str, Any]] = {
    "bench": {},
    "a third of its pairs": {"oracle.sample": 0.33},
    "four times its pairs": {"data.sample": 1.0},
    "half an epoch": {"oracle.training.num_train_epochs": 0.5},
    "eight epochs": {"oracle.training.num_train_epochs": 8},
    "beta 0.02": {"oracle.beta": 0.02},
    "beta 0.5": {"oracle.beta": 0.5},
    "a fifth of the rate": {"oracle.training.learning_rate": 1e-4},
    "three oracles": {"oracle.count": 3, "oracle.sample": 0.67},
    "contrastive": {"oracle.contrastive": True},
    "four times, contrastive": {"data.sample": 1.0, "oracle.contrastive": True},
}
TRAINED = ("hard", "soft")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task")
    parser.add_argument("--bench", type=Path, required=True, help="folder of the bench, with the task's compare.json")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    quiet_libraries()
    bench = bench_of(options.task, options.bench)
    finished = json.loads((options.bench / options.task / "compare.json").read_text())["runs"]
    gains_of_all = {run["seed"]: at_kl(run["points"], bench.kl)[0] for run in finished if run["variant"] == ALL}
    rows = []
    for seed in range(1, options.seeds + 1):
        oracles = {name: trained(options, name, seed) for name in ORACLES}
        variants = {
            f"{slug(name)}-{rule}": {**RULES[rule], "oracle": {"rewards": str(oracles[name] / "scores")}}
            for name in ORACLES
            for rule in TRAINED
        }
        gains = policies(options, variants, seed, bench.kl)
        for name in ORACLES:
            taught = {rule: gains[f"{slug(name)}-{rule}"] - gains_of_all[seed] for rule in TRAINED}
            rows.append({"oracle": name, "seed": seed, **properties(options, oracles[name]), **taught})
        write_json(options.out / f"oracles-{options.task}.json", {"kl": bench.kl, "all": gains_of_all, "rows": rows})


def slug(name: str) -> str:
    """A name as part of a path."""
    return name.replace(" ", "-").replace(",", "")


def trained(options: argparse.Namespace, name: str, seed: int) -> Path:
    """The run folder of an oracle, with the scores of training and held-out pairs."""
    values = copy.deepcopy(bench_of(options.task, options.bench).recipe)
    for key, value in ORACLES[name].items():
        set_key(values, key, value, name)
    folder = options.out / options.task / f"{slug(name)}-{seed}"
    # The seed is the oracle's alone: the pairs are those of the bench, which are drawn once for all seeds.
    recipe = parse_recipe({**values, "name": "oracle", "output_dir": str(folder)}, name)
    with open_run(recipe) as run:
        _ = Method(recipe, RunWalker(run), oracle_seed=seed).scores
    return folder


def policies(
    options: argparse.Namespace, variants: dict[str, Any], seed: int, kl: float, name: str = ""
) -> dict[str, float]:
    """The gain of each variant's policy at a KL."""
    grid, settings = grid_of(options.task, options.bench, variants, [seed])
    work = options.out / options.task / (name or f"policies-{seed}")
    grid = grid.model_copy(update={"output_dir": str(work / "results"), "work_dir": str(work)})
    settings = {
        name: [replace(one, recipe=one.recipe.model_copy(update={"output_dir": str(work)})) for one in group]
        for name, group in settings.items()
    }
    return {run["variant"]: at_kl(run["points"], kl)[0] for run in compare(grid, settings)["runs"]}


def properties(options: argparse.Namespace, run: Path) -> dict[str, float]:
    """What can be measured of an oracle on held-out pairs, without training a policy."""
    tokenizer = load_tokenizer(str(options.bench / "tasks" / options.task / "start"))
    scores = read_table(run / "scores_held_out", "scores")
    truth = gold_reward(options.task).truth
    own = localise(tokenizer, scores, truth, read_table(run / "logps" / "reference" / "held_out", "logps"))["oracle"]
    sums = {}
    carried = total = 0.0
    for side, sign in SIGNED_SIDES:
        rewards, lengths = flat(scores.column(f"{side}_rewards"))
        sums[side] = np.add.reduceat(rewards.astype(np.float64), np.cumsum(lengths) - lengths)
        counted = sign * token_truth(tokenizer, scores, side, truth) > 0
        carried += np.abs(rewards[counted]).sum()
        total += np.abs(rewards).sum()
    margins = sums["chosen"] - sums["rejected"]
    return {
        "accuracy": float(np.mean(margins > 0)),
        "margin": float(margins.mean() / margins.std()),
        "size": float(total / len(margins)),
        "share": float(carried / total),
        **own._asdict(),
    }


if __name__ == "__main__":
    main()
