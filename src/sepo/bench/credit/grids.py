"""The bench's grids: which rules train on which task, with which settings.

Tasks, splits, seeds and sizes are fixed, so that figures of different methods and days can be put side by side.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sepo.bench.credit.checks import CHECKS
from sepo.recipe.reading import load_recipe, parse_recipe, set_key
from sepo.recipe.settings import Recipe
from sepo.study.grid import Grid, Setting

EMBEDDED = {"sentiment": "vader", "plain": "plain"}  # task -> its gold reward
TASKS = (*EMBEDDED, *CHECKS)
# The rules that every bench has: the room lies between the first two.
ALL, TRUTH = "all", "truth"

_ALL_TOKENS = {"k_chosen": 1.0, "k_rejected": 1.0, "include_end": True}
RULES: dict[str, dict[str, Any]] = {
    ALL: {"policy": {"objective": "simpo"}},
    TRUTH: {"select": {**_ALL_TOKENS, "credit": "truth"}},
    "hard": {},
    "soft": {"select": {**_ALL_TOKENS, "credit": "soft", "clip_low": -2.0, "clip_high": 2.0, "temperature": 0.3}},
    "own": {
        "select": {
            "k_chosen": 1.0, "k_rejected": 1.0, "credit": "soft", "label_log_odds": 0.5, "skip_shared": True,
            "temperature": 0.5, "clip_low": -3.0, "clip_high": 3.0,
        }
    },
    "random": {"select": {"rule_chosen": "random", "rule_rejected": "random"}},
    "reversed": {"select": {"rule_chosen": "reversed", "rule_rejected": "reversed"}},
    "diff": {"select": {"k_chosen": 1.0, "k_rejected": 1.0, "skip_shared": True}},
}  # fmt: skip


class Bench(NamedTuple):
    """One task of the bench.

    Attributes:
        recipe: the settings of all rules.
        kl: where rules are compared, nats a response.
        faster: how much faster objectives over whole responses learn, to get as far as the others.
        checkpoints: shares of a run at which it is measured.
    """

    recipe: dict[str, Any]
    kl: float
    faster: float
    checkpoints: tuple[float, ...]


def bench_of(task: str, out: Path) -> Bench:
    """The fixed settings of a task; `out` is the folder of the bench, with the planted tasks (`run.prepare`)."""
    if task in EMBEDDED:
        base = load_recipe("quickstart").model_dump(mode="json", exclude_unset=True)
        base["data"]["source"], base["eval"]["gold"], base["eval"]["samples"] = f"embedded:{task}", EMBEDDED[task], 1
        return Bench(base, 3.0, 1e-3 / 4.5e-4, (0.375, 1.0))
    folder = out / "tasks" / task
    training = {"batch_size": 16, "num_train_epochs": 2}
    base = {
        "data": {
            "source": str(folder / "train.parquet"),
            "held_out_source": str(folder / "held_out.parquet"),
            "sample": 0.25,
        },
        "reference": {"model": str(folder / "start")},
        "oracle": {"beta": 0.1, "training": {**training, "learning_rate": 5e-4}},
        "policy": {"gamma": 1.0, "training": {**training, "num_train_epochs": 4, "learning_rate": 1.2e-4}},
        "eval": {"gold": task, "pairs": 0, "prompts": 140, "samples": 2, "max_new_tokens": 64, "examples": 0},
    }
    return Bench(base, 1.0, 1.0, (0.25, 0.5, 0.75, 1.0))


def variants_of(rules: Sequence[str], weights: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """The settings of the bench's rules, and of methods that come as tables of weights."""
    return {name: RULES[name] for name in rules} | {name: _given(path) for name, path in weights.items()}


def grid_of(
    task: str, out: Path, variants: Mapping[str, Mapping[str, Any]], seeds: Sequence[int]
) -> tuple[Grid, dict[str, list[Setting]]]:
    """The grid of one task: every variant at every seed."""
    bench = bench_of(task, out)
    settings = {name: [Setting(name, "", _recipe(task, out, bench, variant))] for name, variant in variants.items()}
    grid = Grid(
        name=task,
        output_dir=str(out / task),
        work_dir=str(out / "work" / task),
        seeds=list(seeds),
        checkpoints=list(bench.checkpoints),
        kl=bench.kl,
        also_at=[bench.kl / 2],
        variants={name: {"set": variant} for name, variant in variants.items()},
    )
    return grid, settings


def _given(path: Path) -> dict[str, Any]:
    """A method that comes as a table of weights: pair_id, and a list of numbers for each side."""
    return {"oracle": {"rewards": str(path)}, "select": {**_ALL_TOKENS, "credit": "reward"}}


def _recipe(task: str, out: Path, bench: Bench, variant: Mapping[str, Any]) -> Recipe:
    values = copy.deepcopy(bench.recipe)
    for section, settings in variant.items():
        for key, value in settings.items():
            set_key(values, f"{section}.{key}", value, f"bench, {task}")
    if "objective" in variant.get("policy", {}):
        training = values["policy"]["training"]
        values["policy"]["training"] = {**training, "learning_rate": bench.faster * training["learning_rate"]}
    return parse_recipe({**values, "name": task, "output_dir": str(out / "work" / task)}, f"bench, {task}")
