"""Stages "benchmark-NAME" and "benchmark-NAME_judge": a benchmark's questions, answered by policy and start, judged."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from sepo import processes
from sepo.errors import UserError
from sepo.evaluate import ANNOTATIONS
from sepo.judging.answering import questions_digest
from sepo.judging.benchmarks import ROLES, answer_benchmark, judge_benchmark, questions_of
from sepo.judging.in_run import judge_content
from sepo.models.tokenizer import load_tokenizer
from sepo.models.weights import load_model
from sepo.recipe.settings import JudgeSettings, Recipe
from sepo.stages.evaluate import unanswered
from sepo.stages.stage import Cost, Model, Sizes, Stage, StageResult, Work


def check(recipe: Recipe) -> None:
    """The question files; the judge is checked with the evaluation."""
    for name, file in recipe.eval.benchmarks.items():
        questions_of(name, file, recipe.eval.benchmark_limit)
    if recipe.eval.benchmarks and processes.read_sharded():
        raise UserError("eval.benchmarks needs models whole on one device: leave it out with FSDP or ZeRO-3")


def stage(recipe: Recipe, name: str, policy: Model, start: Model) -> Stage:
    """The answers of both models to one benchmark. The main process alone reads them."""
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

    def work(folder: Path) -> dict[str, Any]:
        return processes.on_main(
            lambda: answer_benchmark(
                questions,
                benchmark,
                {"base": start.folder, "policy": policy.folder},
                partial(load_model, device=recipe.device, dtype=recipe.dtype),
                load_tokenizer(policy.folder),
                folder,
                depends,
                max_new_tokens=settings.benchmark_max_new_tokens,
                seed=recipe.seed,
                batch_size=settings.batch_size,
                options=recipe.data.chat_template_kwargs,
            )
        )

    return Stage(f"benchmark-{name}", f"{len(questions)} questions", depends, ROLES, work)


def judge_stage(recipe: Recipe, name: str, answers: StageResult, judge: JudgeSettings) -> Stage:
    """The verdicts on them."""
    settings = recipe.eval
    questions, _ = questions_of(name, settings.benchmarks[name], settings.benchmark_limit)

    def work(folder: Path) -> dict[str, Any]:
        place = folder / ANNOTATIONS
        return processes.on_main(lambda: judge_benchmark(questions, answers.folder, judge, place, recipe.device))

    return Stage(
        kind=f"benchmark-{name}_judge",
        what=judge.name,
        depends={"answers": answers.content, "judge": judge.what_is_asked(), "content": judge_content(judge)},
        outputs=(ANNOTATIONS,),
        work=work,
        missing=lambda results: unanswered(results.get("unanswered")),
    )


def cost(recipe: Recipe, sizes: Sizes, name: str) -> Cost:
    """Both models write one answer to each turn, each as long as it may be; the questions are not counted as read."""
    settings = recipe.eval
    questions, _ = questions_of(name, settings.benchmarks[name], settings.benchmark_limit)
    number = sum(len(question.turns) for question in questions)
    width = min(number, settings.batch_size or 32)
    load = Work("load", sizes.large, dtype=recipe.dtype)
    steps = -(-number // width) * settings.benchmark_max_new_tokens
    write = Work("generate", sizes.large, steps=steps, width=width, dtype=recipe.dtype)
    tokens = 2 * number * settings.benchmark_max_new_tokens
    return Cost(f"{len(questions)} questions", None, tokens, (load, load, write, write))
