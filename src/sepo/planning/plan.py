"""Dry runs: what a recipe or a grid would do, how long it would take here, and whether it fits; nothing is trained.

The data are read and tokenised for the counts. Times are those of a piece of the work, done here and now (`pace.py`).
Memory follows from the models' configs alone (`planning/memory.py`), so it can be planned for devices, and for models,
that are not here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from sepo.data.tables import read_table
from sepo.models.devices import choose_device
from sepo.models.tokenizer import load_tokenizer
from sepo.planning.memory import PARTS, Reading, Training, smallest_change
from sepo.planning.sizes import SHARED, models_of, prompts_of, sizes_of, stage_costs
from sepo.planning.throughput import Throughputs
from sepo.recipe.objectives import OBJECTIVES
from sepo.recipe.settings import Recipe
from sepo.runs.pipeline import check_inputs, check_pairs
from sepo.stages import data, evaluate, logps, oracle, train, transfer
from sepo.stages.stage import Cost, Sizes, Work
from sepo.study.comparison import can_tell, check_grid, check_prompts, check_same_pairs, oracle_key
from sepo.study.grid import Grid, Setting, number_of_runs
from sepo.training.fit import epochs


@dataclass(frozen=True)
class Target:
    """Devices that a run is planned for: their number, and bytes of each; None for those of this machine."""

    processes: int = 1
    memory: float | None = None


@dataclass(frozen=True)
class RunPlan:
    """A dry run's tables: `stages` with counts and times, and `memory` (empty unless it was asked for)."""

    stages: list[dict[str, str]]
    memory: list[dict[str, str]]


def plan_run(recipe: Recipe, target: Target | None = None) -> RunPlan:
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
    return RunPlan(rows, memory)


def measure_sizes(recipe: Recipe, target: Target | None = None, progress: bool = True) -> tuple[Sizes, Throughputs]:
    """Tokenise the data of a recipe, and lay out its models without memory for their weights."""
    target = target or Target()
    kind = _kind(recipe, target)
    tokenizer = load_tokenizer(recipe.reference.model, revision=recipe.reference.revision)
    with tempfile.TemporaryDirectory() as folder:
        read, own = Path(folder) / "pairs", Path(folder) / "policy"
        data.prepare_data(recipe.data, tokenizer, read, recipe.seed, progress=progress)
        with_transfer = transfer.needed(recipe)
        found = transfer.prepare_pairs(recipe, read, own, progress=progress) if with_transfer else {}
        check_pairs(recipe, read, policy_folder=own if with_transfer else None)
        # Times are of this machine; on another kind of device they would say nothing.
        here = target.memory is None or kind == choose_device("auto").type
        sizes, paces = _read_sizes(recipe, read, tokenizer, kind, target, here)
        if with_transfer:
            both = transfer.tokenizers(recipe)
            of_policy, its_paces = _read_sizes(recipe, own, both[1], kind, target, here)
            sizes = replace(sizes, policy=of_policy, transfer=_cuts(found["train_transfer"]))
            paces.others[sizes.large.name] = its_paces
    return sizes, paces


def _cuts(figures: dict[str, float]) -> str:
    """How two tokenizers cut the same responses, for a plan's row."""
    dropped = f", {figures['dropped']:,.0f} pairs dropped" if figures["dropped"] else ""
    return (
        f"again, as the policy reads them: {figures['one_to_one_share']:.0%} of the tokens one of both, "
        f"{figures['bytes_per_group']:.1f} bytes a group{dropped}"
    )


def _read_sizes(
    recipe: Recipe, folder: Path, tokenizer: PreTrainedTokenizerBase, kind: str, target: Target, here: bool
) -> tuple[Sizes, Throughputs]:
    """Counts of the pairs in a folder, and paces of models that read them."""
    sizes = sizes_of(recipe, folder, kind, target.processes)
    pairs, held_out = (read_table(folder / part, "pairs") for part in ("train", "held_out"))
    prompts = prompts_of(held_out)
    step = max(1, len(pairs) // 256)
    some = pairs.take(pa.array(range(0, len(pairs), step)))
    return sizes, Throughputs(recipe.device, kind, some, prompts or [(0,)], tokenizer, measure=here)


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
    known = {_policy_of(first): sizes}
    for recipe in everything:
        if (whose := _policy_of(recipe)) not in known:  # a policy of another tokenizer has other counts
            known[whose] = sizes
            if transfer.needed(recipe) or sizes.policy is not None:
                known[whose], more = measure_sizes(recipe, progress=False)
                paces.others |= more.others

    def own_sizes(recipe: Recipe) -> Sizes:
        """The same data with the models of a recipe."""
        small, large = models_of(recipe)
        found = known[_policy_of(recipe)]
        own = found.policy and replace(found.policy, small=small, large=large)
        return replace(found, small=small, large=large, policy=own)

    check_same_pairs(settings, lambda recipe: own_sizes(recipe).of_policy.train.pairs)
    check_prompts(grid, first, sizes.prompts)
    rows = [_runs_row("data", first.data.source, 1, None)]
    selective = [recipe for recipe in everything if train.reads_selection(recipe)]
    oracles = {oracle_key(recipe): recipe for recipe in selective if recipe.oracle.rewards is None}
    copies = len(grid.all_seeds) if grid.seeds_vary == "oracle" else 1

    def seconds(work: tuple[Work, ...]) -> float:
        return sum(map(paces.seconds, work))

    shared = 0.0
    if oracles:
        for recipe in oracles.values():
            own = own_sizes(recipe)
            one = logps.pass_work(recipe, own, own.small)
            training = oracle.cost(recipe, own)
            work = (training.work or ()) if training is not None else ()
            shared += seconds(one) + copies * (seconds(work) + oracle.readings(recipe.oracle) * seconds(one))
        number = sum(oracle.readings(recipe.oracle) for recipe in oracles.values())
        rows.append(_runs_row("oracles", "DPO, then token rewards; shared", number * copies, shared))
    elif any(OBJECTIVES[recipe.policy.objective].reads_reference for recipe in everything):
        shared = seconds(logps.pass_work(first, sizes.of_policy, sizes.large))
        rows.append(_runs_row("reference", "log-probabilities; shared", 1, shared))
    total = 0.0
    for variant, group in settings.items():
        runs = number_of_runs(grid, {variant: group})
        recipe = group[0].recipe
        own, dtype = own_sizes(recipe).of_policy, logps.scoring_dtype(recipe)
        measured = seconds(evaluate.measuring_work(recipe, own, dtype) + evaluate.reading_work(recipe, own, dtype))
        if recipe.eval.gold is None and recipe.eval.judge is None:
            measured += seconds((Work("score", own.large, own.held_out.scored, own.held_out.responses, dtype=dtype),))
        spent = runs * (seconds(train.work(recipe, own)) + measured * grid.measurements)
        total += spent
        swept = f", sweep of {len(group)}" if len(group) > 1 else ""
        pairs = epochs(recipe.policy.training, own.train.pairs) * own.train.pairs
        rows.append(_runs_row(variant, f"{recipe.policy.objective}, {pairs:,.0f} pairs a run{swept}", runs, spent))
    runs = sum(int(row["runs"]) for row in rows if row["stage"] in settings)
    answers = min(sizes.prompts, first.eval.prompts) * first.eval.samples
    what = f"{_checkpoints(grid)}, {answers} responses each"
    tells = {"stage": "tells", "what": can_tell(grid, first, sizes.prompts), "runs": "", "time": ""}
    return [*rows, tells, _runs_row("total", what, runs, total + shared)]


def _checkpoints(grid: Grid) -> str:
    """How often a run is measured, for a plan's row."""
    if not grid.checkpoints_at_kl:
        return f"{len(grid.shares)} checkpoints a run"
    targets = ", ".join(f"{kl:g}" for kl in grid.checkpoints_at_kl)
    return f"a run is measured where it passes KL {targets} and at its end"


def _policy_of(recipe: Recipe) -> tuple[str | None, ...]:
    """Recipes of one grid with the same of this have the same pairs."""
    return recipe.policy.model, recipe.policy.revision, recipe.reference.model


def _seconds(cost: Cost, paces: Throughputs, target: Target) -> float | None:
    """Seconds of a stage on so many devices like the one here; passes and trainings are shared, generation is not."""
    if cost.work is None or not paces.measure:
        return None
    return sum(paces.seconds(work) / (target.processes if work.kind in SHARED else 1) for work in cost.work)


def _row(stage: str, cost: Cost, seconds: float | None, paces: Throughputs) -> dict[str, str]:
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
