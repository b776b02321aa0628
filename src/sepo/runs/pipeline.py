"""The run: the stages of a recipe in one folder, in their order.

    data -> reference -> logps -> oracle -> logps -> score -> select -> train -> eval

What each stage is, is said in `sepo.stages`; what stands and what is done again, in `folder.py`.
"""

from __future__ import annotations

from typing import Any

from sepo import processes
from sepo.files import write_json
from sepo.models.tokenizer import load_tokenizer
from sepo.processes import say
from sepo.recipe.settings import Recipe
from sepo.report.build import build_report
from sepo.runs.folder import Run, check_run_folder, open_run
from sepo.stages import data, evaluate, logps, oracle, reference, score, select, train
from sepo.stages.stage import Made, Model

# What the stages of a run are called, in their order; more than one oracle adds its own (oracle-2, oracle-2_logps).
STAGES = (
    "data", "reference", "reference_logps", "oracle", "oracle_logps", "score", "select", "train", "eval",
)  # fmt: skip


def run_recipe(recipe: Recipe) -> dict[str, float]:
    """Run all stages of a recipe, reusing what stands; returns the metrics that `metrics.json` holds."""
    processes.join(recipe.device)
    processes.on_main(lambda: check_inputs(recipe))
    with open_run(recipe) as run:
        return _run_stages(run)


def check_inputs(recipe: Recipe, elsewhere: bool = False) -> None:
    """Raise a UserError for anything about a recipe that can be known to be wrong before a model is loaded.

    Args:
        elsewhere: it is only planned, for machines that have what this one may lack (`stages.train.check`).
    """
    check_run_folder(recipe)
    for stage in (reference, oracle, train):
        stage.check(recipe, elsewhere)
    for stage in (evaluate, data, select):
        stage.check(recipe)


def _run_stages(run: Run) -> dict[str, float]:
    recipe, seed = run.recipe, run.recipe.seed
    start = reference.start(recipe)
    pairs = run.do(data.stage(recipe.data, load_tokenizer(start.folder), seed), run.path("pairs"))

    small = start
    tuning = reference.stage(recipe, start)
    if tuning is not None:
        small = Model.of(run.do(tuning, run.path("reference")))
    else:
        run.forget("reference")

    def passed(model: Model, role: str) -> Made:
        return run.do(logps.stage(recipe, model, pairs, role), run.path("logps", role), name=f"{role}_logps")

    small_logps = passed(small, "reference")
    oracles: dict[str, Model] = {}
    if (existing := oracle.existing(recipe.oracle)) is not None:
        oracles["oracle"] = existing
    names = oracle.names(recipe.oracle)
    _forget_oracles(run, names)
    for name, oracle_seed in zip(names, oracle.seeds(seed, len(names)), strict=True):
        made = run.do(oracle.stage(recipe, small, pairs, small_logps, oracle_seed), run.path(name), name=name)
        oracles[name] = Model.of(made)

    oracle_logps = [passed(model, role) for role, model in oracles.items()]
    scores = run.do(score.stage(pairs, oracle_logps, small_logps), run.folder)
    selection = run.do(select.stage(recipe.select, scores, seed), run.path("selection"))

    large = train.start(recipe, small)
    large_logps = small_logps if large == small else None
    if train.needs_reference(recipe) and large_logps is None:
        large_logps = passed(large, "policy_start")
    targets = large_logps if train.needs_reference(recipe) else None
    policy = run.do(train.stage(recipe, large, selection, targets, seed), run.path("policy"))

    evaluation = run.do(
        evaluate.stage(recipe, Model.of(policy), large, pairs, scores, selection, large_logps), run.path("eval")
    )
    return processes.on_main(lambda: _finish(run, pairs, evaluation))


def _forget_oracles(run: Run, names: list[str]) -> None:
    for stage in list(run.manifest.get("stages", {})):
        if stage.startswith("oracle") and stage.removesuffix("_logps") not in [*names, "oracle"]:
            run.forget(stage)
    if "oracle" not in names:
        run.forget("oracle")


def _finish(run: Run, pairs: Made, evaluation: Made) -> dict[str, float]:
    """Write metrics.json and the report; returns the metrics."""
    metrics: dict[str, Any] = {
        **evaluation.results,
        "pairs/train": pairs.results["train"],
        "pairs/held_out": pairs.results["held_out"],
        **{f"seconds/{name}": record["seconds"] for name, record in run.manifest["stages"].items()},
    }
    write_json(run.path("metrics.json"), metrics)
    build_report(run.folder, out=run.path("report.html"))
    say(f"report: {run.path('report.html')}")
    return metrics
