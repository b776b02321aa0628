"""The run: the stages of a recipe in one folder, in their order.

    data -> reference -> logps -> oracle -> logps -> score -> [transfer ->] select -> train -> eval

A policy with another tokenizer than the oracle's has pairs of its own, and the token rewards are carried over to them.
What each stage is, is said in `sepo.stages`; what stands and what is done again, in `folder.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sepo import processes
from sepo.data.tables import read_table
from sepo.errors import named_error, wrong_type
from sepo.files import defined, write_json, write_text
from sepo.hub.card import write_policy_card
from sepo.judging import benchmark_stages as benchmarks
from sepo.judging import task_stage as tasks
from sepo.models.devices import choose_device
from sepo.models.tokenizer import load_tokenizer
from sepo.planning.eta import Eta, one_line
from sepo.planning.sizes import sizes_of, stage_costs, work_by_record
from sepo.planning.throughput import stage_rate
from sepo.processes import log
from sepo.recipe.settings import Recipe
from sepo.report.build import build_report
from sepo.report.numbers import metrics_table
from sepo.runs.folder import Run, check_run_folder, open_run
from sepo.stages import data, evaluate, logps, oracle, reference, score, select, train, transfer
from sepo.stages.stage import Model, StageResult

# What the stages of a run are called, in their order; more than one oracle adds its own (oracle-2, oracle-2_logps), and
# a policy with another tokenizer two: policy_pairs after data, transfer after score; eval.tasks adds
# tasks at the end, eval.benchmarks benchmark-NAME and benchmark-NAME_judge.
STAGES = (
    "data", "reference", "reference_logps", "oracle", "oracle_logps", "score", "select", "train", "eval",
)  # fmt: skip

# Seconds of a run that are announced.
_WORTH_SAYING = 10.0


def run_recipe(recipe: Recipe) -> dict[str, float]:
    """Run all stages of a recipe, reusing what stands; returns the metrics that `metrics.json` holds."""
    if not isinstance(recipe, Recipe):
        raise wrong_type("recipe", recipe, "a Recipe: load_recipe reads one from a file")
    processes.join(recipe.device)
    processes.on_main(lambda: check_inputs(recipe))
    with open_run(recipe) as run:
        start, pairs, own = _prepare(run)
        with one_line(_outlook(recipe, pairs, own) if processes.is_main() else None) as run.line:
            return _run_stages(run, start, pairs, own)


def check_inputs(recipe: Recipe, elsewhere: bool = False) -> None:
    """Raise a UserError for anything about a recipe that can be known to be wrong before a model is loaded.

    Args:
        elsewhere: it is only planned, for machines that have what this one may lack (`stages.train.check`).
    """
    check_run_folder(recipe)
    for stage in (reference, oracle, train):
        stage.check(recipe, elsewhere)
    for stage in (evaluate, data, select, tasks, benchmarks):
        stage.check(recipe)


def check_pairs(
    recipe: Recipe, folder: Path, extremes: Mapping[str, Any] | None = None, policy_folder: Path | None = None
) -> None:
    """Raise a UserError if a model of the recipe cannot read the pairs that lie in a folder, or answer to them.

    Args:
        extremes: what the data stage found in them, if it did: they are read only where a limit is reached.
        policy_folder: the pairs that the policy reads, where it has a tokenizer of its own.
    """
    everyone = data.ROLES if policy_folder is None else ("reference", "oracle")
    if policy_folder is None and extremes is not None and data.within_limits(recipe, extremes):
        return
    held_out = read_table(folder / "held_out", "pairs")
    data.check_limits(recipe, [read_table(folder / "train", "pairs"), held_out], roles=everyone)
    if policy_folder is not None:
        held_out = read_table(policy_folder / "held_out", "pairs")
        data.check_limits(recipe, [read_table(policy_folder / "train", "pairs"), held_out], roles=("policy",))
    if recipe.eval.prompts:
        roles = data.ROLES if policy_folder is None else ("policy",)
        data.check_limits(recipe, [held_out], recipe.eval.max_new_tokens, roles)


def _prepare(run: Run) -> tuple[Model, StageResult, StageResult]:
    """The model to start from, the pairs, which its tokenizer reads, and those that the policy reads."""
    recipe = run.recipe
    start = reference.start(recipe)
    pairs = run.do(data.stage(recipe.data, load_tokenizer(start.folder), recipe.seed), run.path("pairs"))
    own = pairs
    if with_transfer := processes.on_main(lambda: transfer.needed(recipe)):
        own = run.do(transfer.pairs_stage(recipe, pairs), run.path("transfer", "pairs"))
    of_policy = own.folder if with_transfer else None
    processes.on_main(lambda: check_pairs(recipe, pairs.folder, pairs.results.get("extremes"), of_policy))
    return start, pairs, own


def _outlook(recipe: Recipe, pairs: StageResult, own: StageResult) -> Eta:
    """What the stages after the data are expected to take."""
    kind = choose_device(recipe.device).type
    sizes = sizes_of(recipe, pairs.folder, kind, processes.size())
    if own is not pairs:
        sizes = replace(sizes, policy=sizes_of(recipe, own.folder, kind, processes.size()))
    costs = stage_costs(recipe, sizes)
    outlook = Eta(work_by_record(recipe, costs, processes.size()), stage_rate(kind))
    if sum(outlook.expected.values()) > _WORTH_SAYING:
        log(f"{len(outlook.expected)} stages, {outlook}")
    return outlook


def _run_stages(run: Run, start: Model, pairs: StageResult, own: StageResult) -> dict[str, float]:
    recipe, seed = run.recipe, run.recipe.seed
    small = start
    tuning = reference.stage(recipe, start)
    if tuning is not None:
        small = Model.of(run.do(tuning, run.path("reference")))

    def passed(model: Model, role: str, read: StageResult = pairs) -> StageResult:
        return run.do(logps.stage(recipe, model, read, role), run.path("logps", role), name=f"{role}_logps")

    small_logps: StageResult | None = None
    if recipe.oracle.rewards is not None:
        scores = run.do(score.given_stage(recipe.oracle, pairs), run.folder)
    else:
        small_logps = passed(small, "reference")
        oracles: dict[str, Model] = {}
        if (existing := oracle.existing(recipe.oracle, small)) is not None:
            oracles["oracle"] = existing
        members = oracle.members(recipe.oracle, seed)
        for name, its_seed, swapped in members:
            training = oracle.stage(recipe, small, pairs, small_logps, its_seed, swapped)
            oracles[name] = Model.of(run.do(training, run.path(name), name=name))
        read = {role: passed(model, role) for role, model in oracles.items()}
        opposites = [read.pop(name) for name, _, swapped in members if swapped]
        scores = run.do(score.stage(pairs, list(read.values()), opposites or small_logps), run.folder)
    moved: StageResult | None = None
    if own is not pairs:
        scores = moved = run.do(transfer.stage(recipe, scores, pairs, own), run.path("transfer"))
    selection = run.do(select.stage(select.settings_of(recipe), scores, seed), run.path("selection"))

    large = train.start(recipe, small)
    large_logps = small_logps if large.content == small.content else None
    if train.needs_reference(recipe) and large_logps is None:
        large_logps = passed(large, "policy_start", own)
    targets = large_logps if train.needs_reference(recipe) else None
    policy = run.do(train.stage(recipe, large, selection, targets, seed), run.path("policy"))

    evaluation = run.do(
        evaluate.stage(recipe, Model.of(policy), large, own, scores, selection, large_logps), run.path("eval")
    )
    measured = {**evaluation.results}
    for name in recipe.eval.benchmarks:
        place, trained = run.path("benchmarks", name), Model.of(policy)
        answers = run.do(benchmarks.stage(recipe, name, trained, large), place, name=f"benchmark-{name}")
        measured |= {f"benchmarks/{name}/{key}": value for key, value in answers.results.items()}
        if recipe.eval.judge is not None:
            judged = run.do(benchmarks.judge_stage(recipe, name, answers, recipe.eval.judge), place)
            measured |= {f"benchmarks/{name}/{key}": value for key, value in judged.results.items()}
    if recipe.eval.tasks:
        done = run.do(tasks.stage(recipe, Model.of(policy), large), run.path("tasks"))
        measured |= {f"tasks/{name}": value for name, value in done.results.items()}
    return processes.on_main(lambda: _finish(run, pairs, measured, own, moved))


def _finish(
    run: Run, pairs: StageResult, measured: dict[str, Any], own: StageResult, moved: StageResult | None
) -> dict[str, float]:
    """Write metrics.json and the report, and say what earlier settings left; returns the metrics."""
    run.forget_others()
    metrics: dict[str, Any] = {
        **measured,
        "pairs/train": pairs.results["train"],
        "pairs/held_out": pairs.results["held_out"],
        **({} if moved is None else {f"transfer/{name}": value for name, value in _transferred(own, moved).items()}),
        **{f"seconds/{name}": record["seconds"] for name, record in run.manifest["stages"].items()},
        **{f"memory_gb/{name}": record.get("memory_gb") for name, record in run.manifest["stages"].items()},
    }
    write_json(run.path("metrics.json"), metrics)
    write_text(run.path("metrics.md"), metrics_table(run.recipe.name, metrics))
    build_report(run.folder, out=run.path("report.html"))
    _write_card(run, metrics)
    run.log_unused("reference", "oracle", "oracle-[2-9]", "oracle*-reversed", "logps/*")
    return metrics


def _write_card(run: Run, metrics: dict[str, Any]) -> None:
    """Put the model card beside the policy; a run does not fail for it."""
    try:
        if write_policy_card(run.folder, run.recipe, defined(metrics)) is None:
            log("policy/README.md is not the run's own: kept as it is")
    except Exception as error:
        log(f"no model card was written ({named_error(error)})")


def _transferred(own: StageResult, moved: StageResult) -> dict[str, Any]:
    """Figures of the training pairs: those of the cuts, which count every drop, and those of the rewards."""
    rewards = {name: moved.results[name] for name in ("larger_groups_share", "lost_share")}
    return {**own.results["train_transfer"], **rewards, "held_out": own.results["held_out"]}
