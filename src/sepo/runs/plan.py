"""Dry runs: what a recipe or a grid would do, how long it would take here, and whether it fits; nothing is trained.

The data are read and tokenised for the counts. Times are those of a piece of the work, done here and now (`pace.py`).
Memory follows from the models' configs alone (`training/memory.py`), so it can be planned for devices, and for models,
that are not here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from sepo.data.tables import read_table
from sepo.models.devices import choose_device
from sepo.models.tokenizer import load_tokenizer
from sepo.recipe.grid import Grid, Setting, number_of_runs
from sepo.recipe.settings import Recipe
from sepo.runs.compare import check_grid, check_same_pairs, oracle_key
from sepo.runs.costs import SHARED, models_of, prompts_of, sizes_of, stage_costs
from sepo.runs.pace import Paces
from sepo.runs.pipeline import check_inputs, check_pairs
from sepo.stages import data, evaluate, logps, oracle, train
from sepo.stages.stage import Cost, Sizes, Work
from sepo.training.fit import epochs
from sepo.training.memory import PARTS, Reading, Training, smallest_change
from sepo.training.objectives import SELECTIVE, WITH_REFERENCE


@dataclass(frozen=True)
class Target:
    """Devices that a run is planned for: their number, and bytes of each; None for those of this machine."""

    processes: int = 1
    memory: float | None = None


@dataclass(frozen=True)
class Plan:
    """A dry run's tables: `stages` with counts and times, and `memory` (empty unless it was asked for)."""

    stages: list[dict[str, str]]
    memory: list[dict[str, str]]


def plan_run(recipe: Recipe, target: Target | None = None) -> Plan:
    """Say what a run would do, how long it takes here, and for a `target` what each stage needs of a device."""
    target = target or Target()
    elsewhere = target.memory is not None
    check_inputs(recipe, elsewhere)
    sizes, paces = measure_sizes(recipe, target)
    costs = stage_costs(recipe, sizes)
    seconds = {name: _seconds(cost, paces, target) for name, cost in costs.items()}
    rows = [_row(name, cost, seconds[name], paces) for name, cost in costs.items()]
    total = sum(value for value in seconds.values() if value is not None)
    rows.append(dict.fromkeys(rows[0], "") | {"stage": "total", "time": _duration(total)})
    memory = []
    if elsewhere or target.processes > 1:
        memory = [row for name, cost in costs.items() for row in _memory_rows(name, cost, target)]
    return Plan(rows, memory)


def measure_sizes(recipe: Recipe, target: Target | None = None, progress: bool = True) -> tuple[Sizes, Paces]:
    """Tokenise the data of a recipe, and lay out its models without memory for their weights."""
    target = target or Target()
    kind = _kind(recipe, target)
    tokenizer = load_tokenizer(recipe.reference.model, revision=recipe.reference.revision)
    with tempfile.TemporaryDirectory() as folder:
        data.prepare_data(recipe.data, tokenizer, Path(folder), recipe.seed, progress=progress)
        check_pairs(recipe, Path(folder))
        sizes = sizes_of(recipe, Path(folder), kind, target.processes)
        pairs, held_out = (read_table(Path(folder) / part, "pairs") for part in ("train", "held_out"))
        prompts = prompts_of(held_out)
    # Times are of this machine; on another kind of device they would say nothing.
    here = target.memory is None or kind == choose_device("auto").type
    step = max(1, len(pairs) // 256)
    some = pairs.take(pa.array(range(0, len(pairs), step)))
    return sizes, Paces(recipe.device, kind, some, prompts or [(0,)], tokenizer, measure=here)


def _kind(recipe: Recipe, target: Target) -> str:
    """The kind of device that is planned for: a GPU, where its memory is given and the recipe does not say."""
    if target.memory is None:
        return choose_device(recipe.device).type
    return "cuda" if recipe.device == "auto" else recipe.device.split(":")[0]


def plan_grid(grid: Grid, settings: dict[str, list[Setting]]) -> list[dict[str, str]]:
    """Say what a comparison would do: one row a kind of work, with the number of runs and an estimate of time."""
    check_grid(settings)
    everything = [setting.recipe for group in settings.values() for setting in group]
    first = everything[0]
    sizes, paces = measure_sizes(first, progress=False)
    check_same_pairs(settings, sizes.train.pairs)
    rows = [_runs_row("data", first.data.source, 1, None)]
    selective = [recipe for recipe in everything if recipe.policy.objective in SELECTIVE]
    oracles = {oracle_key(recipe): recipe for recipe in selective}
    copies = len(grid.all_seeds) if grid.seeds_vary == "oracle" else 1

    def seconds(work: tuple[Work, ...]) -> float:
        return sum(map(paces.seconds, work))

    shared = 0.0
    if oracles:
        for recipe in oracles.values():
            own = _sizes_of(recipe, sizes)
            one = logps.pass_work(recipe, own, own.small)
            training = oracle.cost(recipe, own)
            work = (training.work or ()) if training is not None else ()
            shared += seconds(one) + copies * (seconds(work) + recipe.oracle.count * seconds(one))
        number = sum(recipe.oracle.count for recipe in oracles.values())
        rows.append(_runs_row("oracles", "DPO, then token rewards; shared", number * copies, shared))
    elif any(recipe.policy.objective in WITH_REFERENCE for recipe in everything):
        shared = seconds(logps.pass_work(first, sizes, sizes.large))
        rows.append(_runs_row("reference", "log-probabilities; shared", 1, shared))
    total = 0.0
    for variant, group in settings.items():
        runs = number_of_runs(grid, {variant: group})
        recipe = group[0].recipe
        own, dtype = _sizes_of(recipe, sizes), logps.scoring_dtype(recipe)
        measured = seconds(evaluate.measuring_work(recipe, own, dtype) + evaluate.reading_work(recipe, own, dtype))
        if recipe.eval.gold is None:
            measured += seconds((Work("score", own.large, own.held_out.scored, own.held_out.responses, dtype=dtype),))
        spent = runs * (seconds(train.work(recipe, own)) + measured * len(grid.checkpoints))
        total += spent
        swept = f", sweep of {len(group)}" if len(group) > 1 else ""
        pairs = epochs(recipe.policy.training, own.train.pairs) * own.train.pairs
        rows.append(_runs_row(variant, f"{recipe.policy.objective}, {pairs:,.0f} pairs a run{swept}", runs, spent))
    runs = sum(int(row["runs"]) for row in rows if row["stage"] in settings)
    answers = min(sizes.prompts, first.eval.prompts) * first.eval.samples
    what = f"{len(grid.checkpoints)} checkpoints a run, {answers} responses each"
    return [*rows, _runs_row("total", what, runs, total + shared)]


def _sizes_of(recipe: Recipe, sizes: Sizes) -> Sizes:
    """The same data with the models of another recipe."""
    small, large = models_of(recipe)
    return replace(sizes, small=small, large=large)


def _seconds(cost: Cost, paces: Paces, target: Target) -> float | None:
    """Seconds of a stage on so many devices like the one here; passes and trainings are shared, generation is not."""
    if cost.work is None or not paces.measure:
        return None
    return sum(paces.seconds(work) / (target.processes if work.kind in SHARED else 1) for work in cost.work)


def _row(stage: str, cost: Cost, seconds: float | None, paces: Paces) -> dict[str, str]:
    def text(value: float | None, form: Callable[[Any], str]) -> str:
        return "" if value is None else form(value)

    parts = _parts(cost.memory)
    estimated = seconds is not None and not all(paces.pace(work).measured for work in cost.work or ())
    return {
        "stage": stage,
        "what": cost.what,
        "pairs": text(cost.pairs, lambda n: f"{n:,}"),
        "tokens": text(cost.tokens, lambda n: f"{n:,}"),
        "time": text(seconds, _duration) + (" (by FLOPs)" if estimated else ""),
        "memory": "" if parts is None else f"~{_bytes(sum(parts.values()))}",
    }


def _parts(memory: Any) -> dict[str, float] | None:
    if memory is None:
        return None
    return memory.parts() if isinstance(memory, Training | Reading) else dict(memory)


def _memory_rows(stage: str, cost: Cost, target: Target) -> list[dict[str, str]]:
    """What a stage needs of each device: with whole weights and, where they can be cut up, with FSDP."""
    if cost.memory is None:
        return []
    number, memory = target.processes, cost.memory
    if isinstance(memory, Reading):
        memory = replace(memory, processes=number)
    ways: list[tuple[str, Any]] = [("whole weights" if number > 1 else "one device", memory)]
    if isinstance(memory, Training | Reading) and number > 1:
        ways.append((f"FSDP over {number}", replace(memory, sharded=True)))
    rows = []
    for how, need in ways:
        parts = _parts(need) or {}
        total = sum(parts.values())
        row = {"stage": stage, "how": how, **{name: _bytes(parts[name]) for name in PARTS}, "total": _bytes(total)}
        if target.memory is not None:
            fits = total <= target.memory
            row["fits"] = "yes" if fits else "no"
            row["to fit"] = (
                "" if fits or not isinstance(need, Training | Reading) else smallest_change(need, target.memory)
            )
        rows.append(row)
    return rows


def _runs_row(stage: str, what: str, runs: int, seconds: float | None) -> dict[str, str]:
    return {"stage": stage, "what": what, "runs": str(runs), "time": "" if seconds is None else _duration(seconds)}


def _bytes(number: float) -> str:
    """A number of bytes in megabytes or gigabytes; "" for none."""
    if number < 0.5e6:
        return "0" if number else ""
    return f"{number / 1e6:.0f} MB" if number < 1e9 else f"{number / 1e9:,.1f} GB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"~{seconds:.0f} s"
    return f"~{seconds / 60:.0f} min" if seconds < 7200 else f"~{seconds / 3600:.1f} h"
