"""What judging adds to a run: the judge of the evaluation, and the stages after it.

benchmark-NAME, benchmark-NAME_judge     a benchmark's questions answered by policy and start, and judged
tasks                                    tasks of lm-evaluation-harness on both: did the policy forget?
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from sepo import processes
from sepo.errors import UserError
from sepo.evaluate import ANNOTATIONS
from sepo.judging.answering import questions_digest
from sepo.judging.benchmarks import ROLES, answer_benchmark, judge_benchmark, questions_of
from sepo.judging.in_run import check_judge, judge_content, judge_in_words, judge_responses
from sepo.judging.tasks import RESULTS, check_tasks, run_tasks, tasks_content
from sepo.recipe.settings import JudgeSettings, Recipe
from sepo.runs.method import Method
from sepo.stages.evaluate import RunJudge, unanswered
from sepo.stages.stage import Model, Stage, StageResult


def check(recipe: Recipe) -> None:
    """Check judge, question files and tasks before anything expensive starts."""
    judge, settings = recipe.eval.judge, recipe.eval
    if judge is not None:
        check_judge(judge)
        oracle = recipe.oracle.model
        if None not in (oracle, judge.oracle) and os.path.realpath(str(oracle)) == os.path.realpath(str(judge.oracle)):
            raise UserError(
                f"eval.judge: '{judge.oracle}' is the policy's own oracle: expected an oracle of other pairs"
            )
    check_tasks(settings.tasks)
    for name, file in settings.benchmarks.items():
        questions_of(name, file, settings.benchmark_limit)
    if processes.read_sharded():
        for option, given in (("eval.tasks", settings.tasks), ("eval.benchmarks", settings.benchmarks)):
            if given:
                raise UserError(f"{option} needs whole models on one device: leave it out with FSDP or ZeRO-3")


def run_judge(settings: JudgeSettings) -> RunJudge:
    """A judge as the stage "eval" uses it."""
    return RunJudge(
        judge_in_words(settings),
        lambda conversations, base, policy, groups, device: judge_responses(
            settings, conversations, base, policy, groups, device
        ),
        lambda: judge_content(settings),
    )


def do_stages(method: Method) -> dict[str, Any]:
    """Do the stages that a recipe adds after its evaluation; returns their metrics."""
    recipe, do = method.recipe, method.walker.do
    if not (recipe.eval.benchmarks or recipe.eval.tasks):
        return {}
    policy, start = Model.of(method.policy), method.policy_start
    metrics: dict[str, Any] = {}
    for name in recipe.eval.benchmarks:
        answers = do(answer_stage(recipe, name, policy, start), f"benchmark-{name}")
        results = dict(answers.results)
        if recipe.eval.judge is not None:
            results |= do(judge_stage(recipe, name, answers, recipe.eval.judge), f"benchmark-{name}_judge").results
        metrics |= {f"benchmarks/{name}/{key}": value for key, value in results.items()}
    if recipe.eval.tasks:
        results = do(tasks_stage(recipe, policy, start), "tasks").results
        metrics |= {f"tasks/{key}": value for key, value in results.items()}
    return metrics


def answer_stage(recipe: Recipe, name: str, policy: Model, start: Model) -> Stage:
    """Both models answer one benchmark, in the main process."""
    settings = recipe.eval
    questions, benchmark = questions_of(name, settings.benchmarks[name], settings.benchmark_limit)
    depends = {
        "questions": questions_digest(questions),
        "benchmark": benchmark,
        "max_new_tokens": settings.benchmark_max_new_tokens,
        "chat_template_kwargs": recipe.data.chat_template_kwargs,
        "policy": policy.content,
        "start": start.inherited(),
        "seed": recipe.seed,
        "dtype": recipe.dtype,
    }

    def run(folder: Path) -> dict[str, Any]:
        return processes.on_main(
            lambda: answer_benchmark(
                recipe, questions, benchmark, {"base": start.folder, "policy": policy.folder}, folder, depends
            )
        )

    facts = {"recipe": recipe, "turns": sum(len(question.turns) for question in questions)}
    return Stage(f"benchmark-{name}", f"{len(questions)} questions", depends, ROLES, run, facts)


def judge_stage(recipe: Recipe, name: str, answers: StageResult, judge: JudgeSettings) -> Stage:
    """A judge compares the answers of both models."""
    settings = recipe.eval
    questions, _ = questions_of(name, settings.benchmarks[name], settings.benchmark_limit)

    def run(folder: Path) -> dict[str, Any]:
        place = folder / ANNOTATIONS
        return processes.on_main(lambda: judge_benchmark(questions, answers.folder, judge, place, recipe.device))

    return Stage(
        kind=f"benchmark-{name}_judge",
        what=judge.name,
        depends={
            "answers": answers.content,
            "judge": judge.cache_key(),
            "content": lambda: judge_content(judge),
        },
        outputs=(ANNOTATIONS,),
        run=run,
        missing=lambda results: unanswered(results.get("unanswered")),
    )


def tasks_stage(recipe: Recipe, policy: Model, start: Model) -> Stage:
    """lm-evaluation-harness runs the recipe's tasks on both models, in the main process."""
    settings = recipe.eval

    def run(folder: Path) -> dict[str, Any]:
        return processes.on_main(lambda: run_tasks(recipe, policy.folder, start.folder, folder))

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
        run=run,
    )
