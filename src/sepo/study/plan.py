"""Dry run of a comparison: the shared passes and the runs of a grid, with an estimate of time."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from sepo.engines import check_engine
from sepo.files import digest
from sepo.models.devices import choose_device
from sepo.planning.cost import Cost, Sizes
from sepo.planning.plan import Planner, approximate, examples_of, throughputs_of
from sepo.planning.sizes import method_sizes, models_of
from sepo.planning.stages import cost_of
from sepo.planning.throughput import Throughputs
from sepo.recipe.settings import Recipe
from sepo.runs.method import Method
from sepo.runs.pipeline import check_method_pairs
from sepo.stages.stage import StageResult
from sepo.study.baselines import check_baselines, setting_with_oracle
from sepo.study.comparison import (
    baselines_stage,
    can_tell,
    check_grid,
    check_prompts,
    check_same_pairs,
    method_of,
    run_stage,
    schedule,
)
from sepo.study.grid import Grid, Setting

# Rows of the plan, by the kind of the stages that they add up.
_SHARED = {
    "policy_pairs": "pairs under the policies' tokenizers",
    "reference": "cut or fine-tuned references",
    "logps": "log-probabilities",
    "oracle": "DPO",
    "score": "token rewards",
    "transfer": "token rewards under the policies' tokenizers",
    "select": "key tokens",
    "start": "samples of the starting models",
    "baselines": "best of n, steering",
}


class GridPlan(NamedTuple):
    """A row for each kind of shared stage and for each variant; and one pair as each tokenizer reads it, in lines."""

    rows: list[dict[str, str]]
    example: list[str]


def plan_grid(grid: Grid, settings: dict[str, list[Setting]]) -> GridPlan:
    """Plan a comparison, with numbers and times."""
    check_grid(settings)
    check_baselines(grid, settings)
    first = next(iter(settings.values()))[0].recipe
    check_engine(first.engine)
    with tempfile.TemporaryDirectory() as folder:
        planner = Planner(Path(folder))
        pairs = Method(first, planner).pairs
        sizes, throughputs = _Sizes(), None
        examples: dict[str, list[str]] = {}
        shared: dict[str, list[Cost]] = {kind: [] for kind in _SHARED}
        runs: dict[str, dict[str, Cost]] = {variant: {} for variant in settings}
        for setting, seed, reported in schedule(grid, settings, lambda variant, group: group[0]):
            method = method_of(setting.recipe, planner, grid, seed, pairs)
            check_method_pairs(method)
            if not {setting.recipe.reference.model, setting.recipe.policy.model} - {None} <= examples.keys():
                examples |= examples_of(method)
            if throughputs is None:
                throughputs = throughputs_of(method)
            elif method.transfers:
                throughputs.others |= throughputs_of(method).others
            before = set(planner.by_key)
            stage = run_stage(method, grid, reported)
            for key in planner.by_key.keys() - before:
                made = planner.by_key[key]
                shared.setdefault(made.kind, []).append(cost_of(made, sizes.of(method)))
            runs[setting.variant][digest(stage.key())] = cost_of(stage, sizes.of(method))
        assert throughputs is not None
        shared["baselines"] = _baselines(grid, settings, planner, sizes, pairs)
        check_same_pairs(settings, lambda recipe: sizes.known(recipe).of_policy.train.pairs)
    prompts = sizes.known(first).prompts
    check_prompts(grid, first, prompts)
    rows = [_row("data", first.data.what, 1, None)]
    for kind, costs in shared.items():
        if costs and kind in _SHARED:
            rows.append(_row(kind, f"{_SHARED[kind]}; shared", len(costs), _seconds(costs, throughputs)))
    for variant, group in settings.items():
        costs = list(runs[variant].values())
        swept = f", sweep of {len(group)}" if len(group) > 1 else ""
        what = costs[0].what
        rows.append(_row(variant, what + swept, len(costs), _seconds(costs, throughputs)))
    answers = min(prompts, first.eval.prompts) * first.eval.samples
    power = {"stage": "power", "what": can_tell(grid, first, prompts), "runs": "", "time": ""}
    everything = [cost for costs in (*shared.values(), *(of.values() for of in runs.values())) for cost in costs]
    number = sum(map(len, runs.values()))
    what = f"{_checkpoints(grid)}, {answers} responses each"
    rows += [power, _row("total", what, number, _seconds(everything, throughputs))]
    return GridPlan(rows, [line for lines in examples.values() for line in lines])


def _baselines(
    grid: Grid, settings: dict[str, list[Setting]], planner: Planner, sizes: _Sizes, pairs: StageResult
) -> list[Cost]:
    """The costs of the baselines, one a seed."""
    if grid.baselines is None:
        return []
    setting = setting_with_oracle(settings)
    recipe = next(iter(settings.values()))[0].recipe if setting is None else setting.recipe
    costs = []
    for seed in grid.seeds:
        method = method_of(recipe, planner, grid, seed, pairs)
        costs.append(cost_of(baselines_stage(method, grid, setting is not None), sizes.of(method)))
    return costs


class _Sizes:
    """Sizes of a grid's recipes. Recipes with the same policy and reference share the counts of the pairs."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str | None, ...], Sizes] = {}

    def of(self, method: Method) -> Sizes:
        key = _models(method.recipe)
        if key not in self._counts:
            self._counts[key] = method_sizes(method, choose_device(method.recipe.device).type)
        return self.known(method.recipe)

    def known(self, recipe: Recipe) -> Sizes:
        """Sizes of a recipe whose method was seen."""
        counts = self._counts[_models(recipe)]
        small, large = models_of(recipe)
        policy = counts.policy and replace(counts.policy, small=small, large=large)
        return replace(counts, small=small, large=large, policy=policy)


def _models(recipe: Recipe) -> tuple[str | None, ...]:
    return recipe.policy.model, recipe.policy.revision, recipe.reference.model


def _seconds(costs: Iterable[Cost], throughputs: Throughputs) -> float:
    parts = [part for cost in costs for part in cost.estimates or ()]
    return sum(map(throughputs.seconds, parts))


def _row(stage: str, what: str, runs: int, seconds: float | None) -> dict[str, str]:
    return {"stage": stage, "what": what, "runs": str(runs), "time": "" if seconds is None else approximate(seconds)}


def _checkpoints(grid: Grid) -> str:
    """How often a run is measured, for a plan's row."""
    if not grid.checkpoints_at_kl:
        return f"{len(grid.shares)} checkpoints a run"
    targets = ", ".join(f"{kl:g}" for kl in grid.checkpoints_at_kl)
    return f"a run is measured where it passes KL {targets} and at its end"
