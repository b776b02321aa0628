"""Stage "eval": the policy against the model it started from, on held-out pairs and prompts."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sepo import processes
from sepo.evaluate import ANNOTATIONS, EXAMPLES, GENERATIONS
from sepo.forward.scoring import tokens_per_row_for
from sepo.recipe.settings import Recipe
from sepo.stages.cost import Cost, Estimate, FrozenMemory, Sizes
from sepo.stages.logps import width_of
from sepo.stages.stage import SCORES, SCORES_HELD_OUT, Model, Stage, StageResult

if TYPE_CHECKING:
    from sepo.evaluate.measure import Judge


class RunJudge(NamedTuple):
    """A judge of a run, made by `sepo.judging`: its title, the function that judges, and the digest of its files."""

    title: str
    judge: Judge
    content: Callable[[], str]


def check(recipe: Recipe) -> None:
    """Check that the gold reward and its libraries are there."""
    if recipe.eval.gold is not None:
        from sepo.evaluate.gold import gold_reward

        gold_reward(recipe.eval.gold, "eval.gold")


def stage(
    recipe: Recipe,
    policy: Model,
    start: Model,
    pairs: StageResult,
    scores: StageResult,
    selection: StageResult,
    start_logps: StageResult | None,
    judge: RunJudge | None = None,
) -> Stage:
    """Everything that is measured about a run.

    Args:
        start_logps: stored log-probabilities of `start` on the pairs, if there are any.
    """

    def run(folder: Path) -> dict[str, Any]:
        from sepo.evaluate.measure import Evaluation

        processes.on_main(lambda: _forget(folder))
        evaluation = Evaluation(
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
            judge=None if judge is None else judge.judge,
        )
        return evaluation.measure()

    return Stage(
        kind="eval",
        what=_title(recipe, judge),
        depends={
            "eval": recipe.eval.cache_key(),
            "policy": policy.content,  # all of its files
            "start": start.inherited(),
            "scores": scores.content,
            "selection": selection.content,
            "seed": recipe.seed,
            "dtype": recipe.dtype,
            **({} if judge is None else {"judge": judge.content}),
        },
        outputs=(".",),
        run=run,
        cost=lambda sizes: cost(recipe, sizes.of_policy, _title(recipe, judge), start_logps is not None),
        verifies=True,  # finished answers carry the digest of what they depend on
        missing=lambda results: unanswered(results.get("judge/unanswered")),
    )


def _forget(folder: Path) -> None:
    for name in (GENERATIONS, EXAMPLES, ANNOTATIONS):
        (folder / name).unlink(missing_ok=True)  # of other settings


def unanswered(calls: float | None) -> str | None:
    """One line about questions without a reply from a judge's server; the same command asks them again."""
    return f"{calls:.0f} questions to the judge have no reply" if calls else None


def _title(recipe: Recipe, judge: RunJudge | None) -> str:
    return f"gold: {recipe.eval.gold}" + ("" if judge is None else f", judge: {judge.title}")


def responses(recipe: Recipe, sizes: Sizes) -> int:
    """Number of responses from one model."""
    return min(sizes.prompts, recipe.eval.prompts) * recipe.eval.samples


def at_once(recipe: Recipe, sizes: Sizes) -> int:
    """Number of responses that are generated at once."""
    from sepo.evaluate.generate import responses_at_once

    longest = sizes.longest_prompt + recipe.eval.max_new_tokens
    return recipe.eval.batch_size or responses_at_once(longest, sizes.device)


def sampling_estimates(recipe: Recipe, sizes: Sizes, dtype: str, number: int | None = None) -> tuple[Estimate, ...]:
    """One model answers the held-out prompts, or `number` prompts once more; every answer has full length."""
    number, model = responses(recipe, sizes) if number is None else number, sizes.large
    if not number:
        return ()
    width = min(number, at_once(recipe, sizes))
    batches = math.ceil(number / width)
    prompts = number * sizes.prompt_tokens / sizes.prompts
    return (
        Estimate("score", model, prompts, number, dtype=dtype),
        Estimate("generate", model, steps=batches * recipe.eval.max_new_tokens, width=width, dtype=dtype),
    )


def kl_estimates(recipe: Recipe, sizes: Sizes, dtype: str) -> tuple[Estimate, ...]:
    """The base scores the policy's responses, for the KL."""
    number = responses(recipe, sizes)
    written = number * recipe.eval.max_new_tokens
    prompts = number * sizes.prompt_tokens / max(sizes.prompts, 1)
    return (Estimate("score", sizes.large, prompts + written, written, dtype=dtype),) if number else ()


def cost(recipe: Recipe, sizes: Sizes, title: str, start_scored: bool) -> Cost:
    """Both models generate, one after the other, and score the held-out pairs, the start unless it has scored them."""
    held_out, dtype, model = sizes.held_out, recipe.dtype, sizes.large
    number, length = responses(recipe, sizes), recipe.eval.max_new_tokens
    passes = 1 if start_scored else 2
    examples = min(recipe.eval.examples, recipe.eval.prompts, sizes.prompts)
    share = 1.0 if recipe.eval.pairs is None else min(recipe.eval.pairs / max(held_out.pairs, 1), 1.0)
    scoring = Estimate("score", model, held_out.scored, held_out.responses, dtype=dtype).times(share)
    load = Estimate("load", model, dtype=dtype)
    estimates = (
        load,
        load,
        *[scoring] * passes,
        *sampling_estimates(recipe, sizes, dtype) * 2,
        *sampling_estimates(recipe, sizes, dtype, examples) * 2,
        *kl_estimates(recipe, sizes, dtype),
    )
    budget = min(max(tokens_per_row_for(sizes.device, scoring=True), held_out.longest), max(held_out.scored, 1))
    need = FrozenMemory(
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
    return Cost(title, held_out.pairs, tokens, estimates, need)
