"""Forgetting: tasks of lm-evaluation-harness on the policy and on the model that it started from.

The harness (package lm_eval, extra `tasks`) runs the models through its own Transformers wrapper and defines everything
about a task: prompts, scores, errors. This file adds the difference between the two models, paired by document where
the harness returns a score for each document.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from sepo import processes
from sepo.errors import UserError, named_error, nearest
from sepo.evaluate.statistics import paired_difference
from sepo.files import file_digest, write_json
from sepo.models.tokenizer import load_tokenizer
from sepo.models.weights import load_model
from sepo.recipe.settings import Recipe

RESULTS = "results.json"
_INSTALL = 'pip install -e ".[tasks]"'
# Rounds of the bootstrap for scores that are no mean over documents; the error of a mean has a formula.
_BOOTSTRAP = 1000
_FILES = (".yaml", ".yml")


def check_tasks(names: Sequence[str]) -> None:
    """Raise a UserError if the harness or a task is missing. Nothing is downloaded.

    To find a name the harness reads all of its tasks, which takes some seconds; a YAML file is found at once.
    """
    if not names:
        return
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(f"eval.tasks needs lm-evaluation-harness: {_INSTALL}, or leave eval.tasks out")
    if len(set(names)) < len(names):
        raise UserError(f"eval.tasks names a task twice: {', '.join(names)}")
    for name in names:
        if _is_file(name) and not Path(name).is_file():
            raise UserError(f"eval.tasks: there is no file '{name}'; expected a task's YAML file, or a task's name")
    if looked_up := [name for name in names if not _is_file(name)]:
        known = _manager(names).task_index
        for name in looked_up:
            if name not in known:
                raise UserError(f"eval.tasks: lm-evaluation-harness has no task '{name}'{nearest(name, known)}")


def tasks_content(names: Sequence[str]) -> dict[str, str]:
    """The cache key of tasks apart from the models: version of the harness, and digests of YAML files."""
    files = {name: file_digest(Path(name)) for name in names if _is_file(name)}
    return {"lm_eval": metadata.version("lm_eval"), **files}


def run_tasks(recipe: Recipe, policy: str, base: str, out: Path) -> dict[str, float]:
    """Run the tasks of a recipe on a policy and on the model that it started from, one after the other.

    Args:
        policy, base: model folders.
        out: folder for `results.json`, the harness's results of both models.

    Returns:
        flat metrics, as `task_metrics`.

    Raises:
        UserError: a task cannot be set up, for example because its data set cannot be downloaded.
    """
    settings, tokenizer, results = recipe.eval, load_tokenizer(policy), {}
    for role, folder in (("base", base), ("policy", policy)):
        processes.log(f"  {len(settings.tasks)} tasks with {role}")
        model = load_model(folder, device=recipe.device, dtype=recipe.dtype)
        batch = settings.batch_size or 8
        results[role] = _evaluate(settings.tasks, model, tokenizer, settings.task_limit, batch, recipe.seed)
        del model  # frees it before the next one is loaded
    kept = ("results", "groups", "versions", "n-shot", "n-samples", "lm_eval_version")
    stored = {role: {key: result.get(key) for key in kept} for role, result in results.items()}
    write_json(out / RESULTS, stored, indent=1)
    return task_metrics(results["base"], results["policy"], settings.tasks)


def task_metrics(base: Mapping[str, Any], policy: Mapping[str, Any], names: Sequence[str]) -> dict[str, float]:
    """The harness's results of two models as flat metrics.

    Args:
        base, policy: results of `lm_eval.simple_evaluate` with samples, of the same tasks.
        names: tasks of the recipe; a group has one result of its own, a tag or a file has those of its tasks.

    Returns:
        for each score of each task `NAME/SCORE/base` and `/policy` with their `_se`, `/difference` (policy − base) with
        its `_se`, and `NAME/documents`. The error of a difference is paired by document if the task's score is the mean
        of scores of documents; else it assumes independence and is larger.
    """
    metrics: dict[str, float] = {}
    for task in _rows(base, names):
        before, after = base["results"][task], policy["results"].get(task, {})
        for key, value in before.items():
            score, comma, filtered = key.partition(",")
            value_after = after.get(key)
            if not comma or score.endswith("_stderr") or not _is_number(value) or not _is_number(value_after):
                continue
            name = f"{task}/{score}" + ("" if filtered == "none" else f"-{filtered}")
            errors = [scores.get(f"{score}_stderr,{filtered}") for scores in (before, after)]
            for role, figure, error in zip(("base", "policy"), (value, value_after), errors, strict=True):
                metrics[f"{name}/{role}"] = float(figure)
                if _is_number(error):
                    metrics[f"{name}/{role}_se"] = float(error)
            metrics[f"{name}/difference"] = float(value_after) - float(value)
            paired = _paired_error(base, policy, task, score, filtered)
            if paired is None and all(map(_is_number, errors)):
                paired = math.hypot(*errors)
            if paired is not None:
                metrics[f"{name}/difference_se"] = paired
        if _is_number(number := (base.get("n-samples") or {}).get(task, {}).get("effective")):
            metrics[f"{task}/documents"] = float(number)
    return metrics


def _rows(result: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """The tasks to report: those with a name in `names`, and those of a tag or a file, except members of a group."""
    results = result["results"]
    asked = [name for name in names if name in results]
    if len(asked) == len(names):
        return asked
    inside: set[str] = set()
    waiting = list(asked)
    while waiting:
        children = (result.get("group_subtasks") or {}).get(waiting.pop(), [])
        waiting += [child for child in children if child not in inside]
        inside |= set(children)
    return [*asked, *(name for name in results if name not in asked and name not in inside)]


def _paired_error(
    base: Mapping[str, Any], policy: Mapping[str, Any], task: str, score: str, filtered: str
) -> float | None:
    """Standard error of the mean difference of a score over documents; None if documents have no such score."""
    sides = []
    for result in (base, policy):
        samples = (result.get("samples") or {}).get(task) or []
        scores = {
            sample["doc_id"]: sample.get(score) for sample in samples if sample.get("filter", "none") == filtered
        }  # fmt: skip
        if len(scores) < 2 or not all(map(_is_number, scores.values())):
            return None
        mean = sum(map(float, scores.values())) / len(scores)
        if not math.isclose(mean, result["results"][task][f"{score},{filtered}"], rel_tol=1e-6, abs_tol=1e-9):
            return None  # not a mean over documents: an F1, a perplexity
        sides.append(scores)
    before, after = sides
    if before.keys() != after.keys():
        return None
    documents = list(before)
    return paired_difference([after[key] for key in documents], [before[key] for key in documents], documents)[1]


def _evaluate(
    names: Sequence[str],
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    limit: int | None,
    batch_size: int,
    seed: int,
) -> dict[str, Any]:
    """The harness's results of one model."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    _quiet()
    manager = _manager(names)
    try:
        manager.load(list(names))  # reads the data sets
    except Exception as error:  # data sets and foreign YAML may raise anything
        raise UserError(f"eval.tasks: a task cannot be set up ({named_error(error)})") from None
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    return simple_evaluate(
        wrapped, tasks=list(names), task_manager=manager, limit=limit, bootstrap_iters=_BOOTSTRAP, log_samples=True,
        random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed, fewshot_random_seed=seed,
    )  # fmt: skip


def _manager(names: Sequence[str]) -> Any:
    """The harness's index of tasks. With YAML files only, it does not read its own tasks."""
    from lm_eval.tasks import TaskManager

    _quiet()
    return TaskManager(include_defaults=not all(map(_is_file, names)))


def _quiet() -> None:
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def _is_file(name: str) -> bool:
    return name.endswith(_FILES)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
