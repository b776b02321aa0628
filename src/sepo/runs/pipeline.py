"""A run: the method of one recipe in one folder.

The folder keeps every result with what it depends on (`runs.folder`), so a run that was killed continues, and a changed
recipe redoes only what the change touches. `sepo.api.run_recipe` puts a run together with what a recipe asks for beyond
the method: judges, benchmarks, the line that shows the time left, report and card.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from sepo import processes
from sepo.data.tables import read_table
from sepo.files import write_json
from sepo.recipe.settings import Recipe
from sepo.runs.folder import ProgressLine, Run, check_run_folder, open_run
from sepo.runs.method import NOTHING, Extension, Method, check_until
from sepo.stages import data, evaluate, oracle, reference, select, train
from sepo.stages.reference import hash_model
from sepo.stages.stage import Model, Stage, StageResult

# The folder of a stage in the run folder, by its role.
_FOLDERS = {
    "data": ("pairs",),
    "policy_pairs": ("transfer", "pairs"),
    "score": (),
    "transfer": ("transfer",),
    "select": ("selection",),
    "train": ("policy",),
}


def folder_of(role: str) -> tuple[str, ...]:
    """The folder of a stage in the run folder, as parts of a path."""
    if role in _FOLDERS:
        return _FOLDERS[role]
    if role.endswith("_logps"):
        return "logps", role.removesuffix("_logps")
    if role.startswith("benchmark-"):
        return "benchmarks", role.removeprefix("benchmark-").removesuffix("_judge")
    return (role,)  # reference, oracle, oracle-2, ..., eval, tasks


class RunWalker:
    """Does each stage in its folder of the run, unless an up-to-date result is there."""

    def __init__(self, run: Run):
        self.run = run

    def model(self, name: str, revision: str | None = None) -> Model:
        return hash_model(name, revision)

    def do(self, stage: Stage, role: str) -> StageResult:
        return self.run.do(stage, self.run.path(*folder_of(role)), role)


def run(
    recipe: Recipe,
    extension: Extension = NOTHING,
    until: str | None = None,
    progress: Callable[[Method], AbstractContextManager[ProgressLine | None]] = lambda method: nullcontext(),
    on_end: Callable[[Run, dict[str, Any]], None] = lambda run, metrics: None,
) -> dict[str, Any]:
    """Do the stages of a recipe, reusing results that are up to date.

    Args:
        until: the last stage (`method.UNTIL`); default: all.
        progress: called when the pairs are there; gives the line that shows the progress.
        on_end: called in the main process with the metrics of a whole run.

    Returns:
        the metrics that `metrics.json` holds; with `until` none.
    """
    check_until(until)
    processes.join(recipe.device)
    processes.on_main(lambda: check_inputs(recipe, extension))
    with open_run(recipe) as folder:
        walker = RunWalker(folder)
        if extension.before_data is not None:
            recipe = extension.before_data(recipe, walker, extension)
        method = Method(recipe, walker, extension=extension)
        check_method_pairs(method)
        if until == "data":
            return {}
        with progress(method) as folder.line:
            if until is not None:
                method.until(until)
                return {}
            measured = {**method.evaluation.results, **extension.do_stages(method)}
            return processes.on_main(lambda: _finish(folder, method, measured, on_end))


def check_inputs(recipe: Recipe, extension: Extension = NOTHING, elsewhere: bool = False) -> None:
    """Check a recipe before any model is loaded. Raises UserError.

    Args:
        elsewhere: the recipe is only planned, for machines that may have what this one lacks (`stages.train.check`).
    """
    check_run_folder(recipe)
    for stage in (reference, oracle, train):
        stage.check(recipe, elsewhere)
    for stage in (evaluate, data, select):
        stage.check(recipe)
    extension.check(recipe)
    asked = recipe.eval.judge is not None or recipe.eval.benchmarks or recipe.eval.tasks or recipe.data.on_policy
    if extension is NOTHING and asked:
        raise ValueError("eval.judge, eval.benchmarks, eval.tasks and data.on_policy need sepo.api.run_recipe")


def check_method_pairs(method: Method) -> None:
    """Do the stages of the data, and check that every model of the recipe can read the pairs."""
    pairs, policy_pairs = method.pairs, method.policy_pairs
    of_policy = policy_pairs.folder if method.transfers else None
    extremes = pairs.results.get("extremes")
    processes.on_main(lambda: check_pairs(method.recipe, pairs.folder, extremes, of_policy))


def check_pairs(
    recipe: Recipe, folder: Path, extremes: Mapping[str, Any] | None = None, policy_folder: Path | None = None
) -> None:
    """Raise a UserError if a model of the recipe cannot read the pairs of a folder, or answer their prompts.

    Args:
        extremes: largest id and lengths that the data stage found; the tables are read only if one exceeds a limit.
        policy_folder: the pairs under the policy's tokenizer, if it differs.
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


def _finish(
    run: Run, method: Method, measured: dict[str, Any], on_end: Callable[[Run, dict[str, Any]], None]
) -> dict[str, Any]:
    """Write metrics.json, and log which results earlier settings left."""
    run.forget_others()
    stages = run.manifest["stages"]
    metrics: dict[str, Any] = {
        **measured,
        "pairs/train": method.pairs.results["train"],
        "pairs/held_out": method.pairs.results["held_out"],
        **{
            f"pairs/{part}/{number}": source[part]
            for number, source in enumerate(method.pairs.results.get("sources", ()), 1)
            for part in source.keys() & {"train", "held_out"}
        },
        **(_transfer_metrics(method) if method.transfers else {}),
        **_target_metrics(stages),
        **{f"seconds/{name}": record["seconds"] for name, record in stages.items()},
        **{f"memory_gb/{name}": record.get("memory_gb") for name, record in stages.items()},
    }
    write_json(run.path("metrics.json"), metrics)
    on_end(run, metrics)
    run.log_unused("reference", "oracle", "oracle-[2-9]", "oracle*-reversed", "logps/*")
    return metrics


def _target_metrics(stages: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Where trainings that end at a KL or an accuracy ended; of several oracles the first."""
    results = [stages[role].get("results") or {} for role in ("oracle", "train") if role in stages]
    return {name: value for row in results for name, value in row.items() if name.startswith("target_")}


def _transfer_metrics(method: Method) -> dict[str, Any]:
    """How the training pairs (drops included) and their rewards came through the change of tokenizer."""
    pairs, scores = method.policy_pairs.results, method.policy_scores.results
    rewards = {name: scores[name] for name in ("larger_groups_share", "lost_share")}
    figures = {**pairs["train_transfer"], **rewards, "held_out": pairs["held_out"]}
    return {f"transfer/{name}": value for name, value in figures.items()}
