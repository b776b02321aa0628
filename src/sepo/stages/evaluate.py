"""Stage "eval": the policy against the model it started from, on held-out pairs and prompts."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from sepo import processes
from sepo.errors import UserError
from sepo.evaluate import ANNOTATIONS, EXAMPLES, GENERATIONS
from sepo.evaluate.generate import responses_at_once
from sepo.evaluate.gold import gold_reward
from sepo.evaluate.measure import evaluate_run
from sepo.forward.scoring import tokens_per_row_for
from sepo.judging.in_run import check_judge, judge_content, judge_in_words
from sepo.planning.memory import Reading
from sepo.recipe.settings import Recipe
from sepo.stages.logps import width_of
from sepo.stages.stage import SCORES, SCORES_HELD_OUT, Cost, Model, Sizes, Stage, StageResult, Work
from sepo.training.objectives import WITH_REFERENCE


def check(recipe: Recipe) -> None:
    """The gold reward and the judge, and what they need."""
    if recipe.eval.gold is not None:
        gold_reward(recipe.eval.gold)
    if recipe.eval.judge is not None:
        check_judge(recipe.eval.judge)
        own, judge = recipe.oracle.model, recipe.eval.judge.oracle
        if own is not None and judge is not None and os.path.realpath(own) == os.path.realpath(judge):
            raise UserError(
                f"eval.judge: '{judge}' is the oracle that the policy learns from: expected one of other pairs"
            )


def stage(
    recipe: Recipe,
    policy: Model,
    start: Model,
    pairs: StageResult,
    scores: StageResult,
    selection: StageResult,
    start_logps: StageResult | None,
) -> Stage:
    """Everything that is measured about a run.

    Args:
        start_logps: of `start` over the pairs, if they stand already.
    """

    def work(folder: Path) -> dict[str, Any]:
        def forget() -> None:
            for name in (GENERATIONS, EXAMPLES, ANNOTATIONS):
                (folder / name).unlink(missing_ok=True)  # of other settings

        processes.on_main(forget)
        return evaluate_run(
            policy=policy.folder,
            base=start.folder,
            held_out=pairs.folder / "held_out",
            scores=scores.folder / SCORES,
            scores_held_out=scores.folder / SCORES_HELD_OUT,
            selection=selection.folder,
            base_logps=None if start_logps is None else start_logps.folder / "held_out",
            out=folder,
            settings=recipe.eval,
            seed=recipe.seed,
            device=recipe.device,
            dtype=recipe.dtype,
            tokens_per_row=recipe.tokens_per_row,
        )

    judge = recipe.eval.judge
    return Stage(
        kind="eval",
        what=what_judges(recipe),
        depends={
            "eval": recipe.eval.what_is_measured(),
            "policy": policy.content,  # all of its files
            "start": start.inherited(),
            "scores": scores.content,
            "selection": selection.content,
            "seed": recipe.seed,
            "dtype": recipe.dtype,
            **({} if judge is None else {"judge": judge_content(judge)}),
        },
        outputs=(".",),
        work=work,
        verifies=True,  # answers that are finished are looked at by what they depend on
        missing=lambda results: unanswered(results.get("judge/unanswered")),
    )


def unanswered(calls: float | None) -> str | None:
    """What a judge behind a server lacks, in words: the same questions are asked again, and answered ones from disk."""
    return f"{calls:.0f} questions to the judge have no reply" if calls else None


def what_judges(recipe: Recipe) -> str:
    """Gold reward and judge in words."""
    judge = recipe.eval.judge
    return f"gold: {recipe.eval.gold}" + ("" if judge is None else f", judge: {judge_in_words(judge)}")


def responses(recipe: Recipe, sizes: Sizes) -> int:
    """Responses that one model writes."""
    return min(sizes.prompts, recipe.eval.prompts) * recipe.eval.samples


def at_once(recipe: Recipe, sizes: Sizes) -> int:
    """Responses that are written side by side."""
    longest = sizes.longest_prompt + recipe.eval.max_new_tokens
    return recipe.eval.batch_size or responses_at_once(longest, sizes.device)


def measuring_work(recipe: Recipe, sizes: Sizes, dtype: str) -> tuple[Work, ...]:
    """Answering the held-out prompts with one model, each answer as long as it may be."""
    number, model = responses(recipe, sizes), sizes.large
    if not number:
        return ()
    width = min(number, at_once(recipe, sizes))
    batches = math.ceil(number / width)
    prompts = number * sizes.prompt_tokens / sizes.prompts
    return (
        Work("score", model, prompts, number, dtype=dtype),
        Work("generate", model, steps=batches * recipe.eval.max_new_tokens, width=width, dtype=dtype),
    )


def examples_work(recipe: Recipe, sizes: Sizes, dtype: str) -> tuple[Work, ...]:
    """Answering some of the prompts once more, for people."""
    number = min(recipe.eval.examples, recipe.eval.prompts, sizes.prompts)
    if not number:
        return ()
    prompts = number * sizes.prompt_tokens / sizes.prompts
    return (
        Work("score", sizes.large, prompts, number, dtype=dtype),
        Work("generate", sizes.large, steps=recipe.eval.max_new_tokens, width=number, dtype=dtype),
    )


def reading_work(recipe: Recipe, sizes: Sizes, dtype: str) -> tuple[Work, ...]:
    """The base reads what a policy has written, for the KL."""
    number = responses(recipe, sizes)
    written = number * recipe.eval.max_new_tokens
    prompts = number * sizes.prompt_tokens / max(sizes.prompts, 1)
    return (Work("score", sizes.large, prompts + written, written, dtype=dtype),) if number else ()


def cost(recipe: Recipe, sizes: Sizes) -> Cost:
    """Generation with start and policy, one after the other, and a pass of the policy over the held-out pairs."""
    held_out, dtype, model = sizes.held_out, recipe.dtype, sizes.large
    number, length = responses(recipe, sizes), recipe.eval.max_new_tokens
    # The start has read the pairs already where it is the reference, or its objective has one.
    from_reference = recipe.policy.model is None and recipe.oracle.rewards is None
    passes = 1 if from_reference or recipe.policy.objective in WITH_REFERENCE else 2
    share = 1.0 if recipe.eval.pairs is None else min(recipe.eval.pairs / max(held_out.pairs, 1), 1.0)
    read = Work("score", model, held_out.scored, held_out.responses, dtype=dtype).times(share)
    load = Work("load", model, dtype=dtype)
    work = (
        load, load, *[read] * passes, *measuring_work(recipe, sizes, dtype) * 2,
        *examples_work(recipe, sizes, dtype) * 2, *reading_work(recipe, sizes, dtype),
    )  # fmt: skip
    budget = min(max(tokens_per_row_for(sizes.device, scoring=True), held_out.longest), max(held_out.scored, 1))
    need = Reading(
        model.shape,
        sizes.device,
        width_of(dtype, sizes.device),
        budget,
        math.ceil(budget * held_out.responses / max(held_out.tokens, 1)),
        responses=min(number, at_once(recipe, sizes)),
        length=sizes.longest_prompt + length,
        prompt=sizes.longest_prompt,
    )
    tokens = round(passes * share * held_out.scored) + 2 * number * length
    return Cost(what_judges(recipe), held_out.pairs, tokens, work, need)
