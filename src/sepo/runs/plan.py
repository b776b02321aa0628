"""Dry runs: what a recipe or a grid would do, with counts and estimates of time and memory; nothing is trained.

The data are read and tokenised for the counts; no model is loaded. Times follow from the FLOPs that each stage says it
costs and the matmul rate measured here and now, at half of it: a guide, not a promise.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sepo.data.ragged import flat
from sepo.data.tables import read_table
from sepo.forward.speed import matmul_rate
from sepo.models.config import describe_model, load_config
from sepo.models.devices import choose_device
from sepo.models.tokenizer import load_tokenizer
from sepo.recipe.grid import Grid, Setting, number_of_runs
from sepo.recipe.settings import Recipe
from sepo.runs.compare import check_grid, check_same_pairs, oracle_key
from sepo.runs.pipeline import check_inputs, check_pairs
from sepo.stages import data, evaluate, oracle, reference, score, select, train
from sepo.stages.stage import Cost, Sizes
from sepo.training.objectives import SELECTIVE, WITH_REFERENCE

# Of the matmul rate, for a stage as a whole (docs/performance.md).
_SHARE = 0.5


def plan_run(recipe: Recipe) -> list[dict[str, str]]:
    """Say what a run would do: one row a stage."""
    check_inputs(recipe)
    sizes = measure_sizes(recipe)
    rate = _SHARE * matmul_rate(sizes.device)
    stages: dict[str, Callable[[Recipe, Sizes], Cost | None]] = {
        "data": data.cost,
        "reference": reference.cost,
        "oracle": oracle.cost,
        "score": score.cost,
        "select": select.cost,
        "train": train.cost,
        "eval": evaluate.cost,
    }
    costs = {name: cost(recipe, sizes) for name, cost in stages.items()}
    return [_row(name, cost, rate) for name, cost in costs.items() if cost is not None]


def measure_sizes(recipe: Recipe, progress: bool = True) -> Sizes:
    """Tokenise the data of a recipe, and lay out its models without memory for their weights."""
    tokenizer = load_tokenizer(recipe.reference.model, revision=recipe.reference.revision)
    counts = []
    with tempfile.TemporaryDirectory() as folder:
        data.prepare_data(recipe.data, tokenizer, Path(folder), recipe.seed, progress=progress)
        check_pairs(recipe, Path(folder))
        for part in ("train", "held_out"):
            table = read_table(Path(folder) / part, "pairs")
            tokens = sum(int(flat(table.column(f"{name}_ids"))[1].sum()) for name in ("prompt", "chosen", "rejected"))
            counts.append((len(table), tokens))
        prompts = len({tuple(ids) for ids in table.column("prompt_ids").to_pylist()})
    small = describe_model(reference.config(recipe))
    large = small
    if recipe.policy.model:
        large = describe_model(load_config(recipe.policy.model, revision=recipe.policy.revision))
    (train_pairs, train_tokens), (held_out, held_out_tokens) = counts
    return Sizes(
        train=train_pairs,
        held_out=held_out,
        train_tokens=train_tokens,
        held_out_tokens=held_out_tokens,
        prompts=prompts,
        small=small,
        large=large,
        device=choose_device(recipe.device),
    )


def plan_grid(grid: Grid, settings: dict[str, list[Setting]]) -> list[dict[str, str]]:
    """Say what a comparison would do: one row a kind of work, with the number of runs and an estimate of time."""
    check_grid(settings)
    everything = [setting.recipe for group in settings.values() for setting in group]
    first = everything[0]
    sizes = measure_sizes(first, progress=False)
    check_same_pairs(settings, sizes.train)
    rate = _SHARE * matmul_rate(sizes.device)
    rows = [_runs_row("data", first.data.source, 1, None)]
    selective = [recipe for recipe in everything if recipe.policy.objective in SELECTIVE]
    oracles = {oracle_key(recipe): recipe for recipe in selective}
    copies = len(grid.all_seeds) if grid.seeds_vary == "oracle" else 1
    if oracles:
        flops = 0.0
        for recipe in oracles.values():
            own = _sizes_of(recipe, sizes)
            costs = oracle.cost(recipe, own), score.cost(recipe, own)
            flops += sum(cost.flops or 0.0 for cost in costs if cost is not None)
        number = sum(recipe.oracle.count for recipe in oracles.values())
        rows.append(_runs_row("oracles", "DPO, then token rewards; shared", number * copies, flops * copies / rate))
    elif any(recipe.policy.objective in WITH_REFERENCE for recipe in everything):
        flops = 2 * sizes.large["parameters"] * sizes.train_tokens
        rows.append(_runs_row("reference", "log-probabilities; shared", 1, flops / rate))
    total = 0.0
    for variant, group in settings.items():
        runs = number_of_runs(grid, {variant: group})
        recipe = group[0].recipe
        own = _sizes_of(recipe, sizes)
        measured = evaluate.measuring_flops(recipe, own, 1) * 4 / 3  # the start reads what was sampled
        if recipe.eval.gold is None:
            measured += 2 * own.large["parameters"] * own.held_out_tokens
        seconds = runs * (train.flops(recipe, own) + measured * len(grid.checkpoints)) / rate
        total += seconds
        swept = f", sweep of {len(group)}" if len(group) > 1 else ""
        pairs = train.epochs(recipe.policy.training, own.train) * own.train
        rows.append(_runs_row(variant, f"{recipe.policy.objective}, {pairs:,.0f} pairs a run{swept}", runs, seconds))
    runs = sum(int(row["runs"]) for row in rows if row["stage"] in settings)
    responses = min(sizes.prompts, first.eval.prompts) * first.eval.samples
    what = f"{len(grid.checkpoints)} checkpoints a run, {responses} responses each"
    return [*rows, _runs_row("total", what, runs, total)]


def _sizes_of(recipe: Recipe, sizes: Sizes) -> Sizes:
    """The same data with the models of another recipe."""
    small = describe_model(reference.config(recipe))
    large = small
    if recipe.policy.model:
        large = describe_model(load_config(recipe.policy.model, revision=recipe.policy.revision))
    return Sizes(**{**vars(sizes), "small": small, "large": large})


def _row(stage: str, cost: Cost, rate: float) -> dict[str, str]:
    def text(value: float | None, form: Callable[[Any], str]) -> str:
        return "" if value is None else form(value)

    return {
        "stage": stage,
        "what": cost.what,
        "pairs": text(cost.pairs, lambda n: f"{n:,}"),
        "tokens": text(cost.tokens, lambda n: f"{n:,}"),
        "time": text(cost.flops, lambda flops: _duration(flops / rate)),
        "memory": text(cost.memory, lambda b: f"~{b / 1e9:.1f} GB"),
    }


def _runs_row(stage: str, what: str, runs: int, seconds: float | None) -> dict[str, str]:
    return {"stage": stage, "what": what, "runs": str(runs), "time": "" if seconds is None else _duration(seconds)}


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"~{seconds:.0f} s"
    return f"~{seconds / 60:.0f} min" if seconds < 7200 else f"~{seconds / 3600:.1f} h"
