"""What Python users and the command line call: the method together with what a recipe asks for beyond it.

The method (`sepo.runs`) never imports judging, comparisons, planning, cards or the report. This module does, when a
recipe needs them:

>>> from sepo import load_recipe, run_recipe
>>> metrics = run_recipe(load_recipe("quickstart"))  # doctest: +SKIP
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from sepo import processes
from sepo.errors import UserError, named_error, wrong_type
from sepo.files import defined, write_text
from sepo.processes import log
from sepo.recipe.settings import Recipe

if TYPE_CHECKING:
    from sepo.planning.plan import RunPlan, Target
    from sepo.runs.folder import ProgressLine, Run
    from sepo.runs.method import Extension, Method


def run_recipe(recipe: Recipe, until: str | None = None) -> dict[str, float]:
    """Run the stages of a recipe, reusing results that are up to date.

    Args:
        until: stop after this stage: data, reference, oracle, score, select, train or eval. Default: run all of them,
            then write metrics, report and model card.

    Returns:
        the metrics that `metrics.json` holds; with `until` none. With `rounds` those of each round, under `round-N/`.

    Raises:
        UserError: bad input.
    """
    if not isinstance(recipe, Recipe):
        raise wrong_type("recipe", recipe, "a Recipe: load_recipe reads one from a file")
    if recipe.rounds is not None:
        if until is not None:
            raise UserError("rounds are run to their end: leave --until out, or rounds")
        from sepo.sampling.rounds import run_rounds

        return run_rounds(recipe, run_recipe)
    from sepo.runs import pipeline

    extension = extension_of(recipe)

    @contextlib.contextmanager
    def progress(method: Method) -> Iterator[ProgressLine | None]:
        from sepo.planning.eta import eta_of, one_line

        # Every rank plans: stages ask the main process for digests while they are made.
        eta = eta_of(method, extension, until)
        with one_line(eta if processes.is_main() else None) as line:
            yield line

    with _engine(recipe):
        return pipeline.run(recipe, extension, until, progress, _write_pages)


def _engine(recipe: Recipe) -> contextlib.AbstractContextManager[None]:
    """What does the units of the run; the wing is loaded if it is not this process."""
    if recipe.engine == "local":
        return contextlib.nullcontext()
    from sepo import engines

    return engines.use(recipe.engine, recipe.run_folder, passes=True)


def plan_run(recipe: Recipe, target: Target | None = None, until: str | None = None) -> RunPlan:
    """Plan a run without training: its stages (up to `until`) with counts, time and, for a `target`, memory."""
    if not isinstance(recipe, Recipe):
        raise wrong_type("recipe", recipe, "a Recipe: load_recipe reads one from a file")
    from sepo import engines
    from sepo.planning import plan

    engines.check_engine(recipe.engine)
    if recipe.rounds is not None:
        from sepo.sampling.rounds import check_rounds, round_recipe

        check_rounds(recipe)
        recipe = round_recipe(recipe, 1)  # the others do the same
    return plan.plan_run(recipe, extension_of(recipe), target, until)


def extension_of(recipe: Recipe) -> Extension:
    """The wings that a recipe asks for: what they check, and the stages and functions that they give to the method."""
    from sepo.runs.method import NOTHING, Extension

    settings, samples = recipe.eval, recipe.data.on_policy is not None
    found = NOTHING
    if settings.judge is not None or settings.benchmarks or settings.tasks or samples:
        from sepo.judging import stages

        judge = None if settings.judge is None else stages.run_judge(settings.judge)
        found = Extension(stages.check, judge, stages.do_stages)
    if samples:
        from sepo.sampling import stages as sampling

        found = found.and_also(Extension(sampling.check, None, sampling.metrics_of, sampling.before_data))
    if recipe.policy.model is not None:
        from sepo.transfer import stages as transfer

        found = found.and_also(Extension(transfer.check, transfer=transfer))
    if recipe.policy.target_kl is not None or recipe.oracle.target_accuracy is not None:
        from sepo.targets import stages as targets

        found = found.and_also(Extension(targets=targets))
    if recipe.reference.sft is not None:
        from sepo import sft

        found = found.and_also(Extension(sft.check, fine_tune=sft.train_reference))
    trainings = [section.training for section in (recipe.reference.sft, recipe.oracle, recipe.policy) if section]
    if any(training.checkpoints == "sharded" for training in trainings):
        from sepo import sharded

        sharded.enable()
        found = found.and_also(Extension(sharded.check))
    return found


def _write_pages(run: Run, metrics: dict[str, Any]) -> None:
    """Write the table of metrics, the report, and the model card; a run does not fail for its card."""
    from sepo.hub.card import write_policy_card
    from sepo.report.build import build_report
    from sepo.report.run_summary import metrics_table

    write_text(run.path("metrics.md"), metrics_table(run.recipe.name, metrics))
    build_report(run.folder, out=run.path("report.html"))
    try:
        if write_policy_card(run.folder, run.recipe, defined(metrics)) is None:
            log("policy/README.md was not written by sepo: kept")
    except Exception as error:
        log(f"no model card was written ({named_error(error)})")
