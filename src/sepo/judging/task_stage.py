"""Stage "tasks": did the policy forget? Tasks of lm-evaluation-harness, with the policy and with its start."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from sepo import processes
from sepo.errors import UserError
from sepo.judging.tasks import RESULTS, check_tasks, run_tasks, tasks_content
from sepo.models.tokenizer import load_tokenizer
from sepo.models.weights import load_model
from sepo.recipe.settings import Recipe
from sepo.stages.stage import Cost, Model, Sizes, Stage


def check(recipe: Recipe) -> None:
    """The harness and its tasks."""
    check_tasks(recipe.eval.tasks)
    if recipe.eval.tasks and processes.read_sharded():
        raise UserError("eval.tasks needs models whole on one device: leave it out of a launch with FSDP or ZeRO-3")


def stage(recipe: Recipe, policy: Model, start: Model) -> Stage:
    """The tasks of the recipe on both models. The main process alone reads them."""
    settings = recipe.eval

    def work(folder: Path) -> dict[str, Any]:
        return processes.on_main(
            lambda: run_tasks(
                settings.tasks,
                policy.folder,
                start.folder,
                partial(load_model, device=recipe.device, dtype=recipe.dtype),
                load_tokenizer(policy.folder),
                folder,
                limit=settings.task_limit,
                batch_size=settings.batch_size or 8,
                seed=recipe.seed,
            )
        )

    return Stage(
        kind="tasks",
        what=", ".join(settings.tasks),
        depends={
            "eval": {"tasks": list(settings.tasks), "task_limit": settings.task_limit},
            "content": tasks_content(settings.tasks),
            "policy": policy.content,
            "start": start.inherited(),
            "seed": recipe.seed,
            "dtype": recipe.dtype,
        },
        outputs=(RESULTS,),
        work=work,
    )


def cost(recipe: Recipe, sizes: Sizes) -> Cost:
    """Not known: how long the tasks are only the harness can say."""
    return Cost(", ".join(recipe.eval.tasks))
