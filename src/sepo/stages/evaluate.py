"""Stage "eval": the policy against the model it started from, on held-out pairs and prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sepo import processes
from sepo.evaluate.generate import responses_at_once
from sepo.evaluate.gold import gold_reward
from sepo.evaluate.measure import evaluate_run
from sepo.models.devices import choose_dtype
from sepo.recipe.settings import Recipe
from sepo.stages.stage import SCORES, SCORES_HELD_OUT, Cost, Made, Model, Sizes, Stage

GENERATIONS = "generations.parquet"


def check(recipe: Recipe) -> None:
    """The gold reward, and what it needs."""
    if recipe.eval.gold is not None:
        gold_reward(recipe.eval.gold)


def stage(
    recipe: Recipe,
    policy: Model,
    start: Model,
    pairs: Made,
    scores: Made,
    selection: Made,
    start_logps: Made | None,
) -> Stage:
    """Everything that is measured about a run.

    Args:
        start_logps: of `start` over the pairs, if they stand already.
    """

    def work(folder: Path) -> dict[str, Any]:
        (folder / GENERATIONS).unlink(missing_ok=True)  # of other settings
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

    return Stage(
        kind="eval",
        what=f"gold: {recipe.eval.gold}",
        depends={
            "eval": recipe.eval.what_is_measured(),
            "policy": policy.content,  # all of its files
            "start": start.inherited(),
            "scores": scores.content,
            "selection": selection.content,
            "seed": recipe.seed,
            "dtype": recipe.dtype,
        },
        outputs=(".",),
        work=lambda folder: processes.on_main(lambda: work(folder)),
    )


def measuring_flops(recipe: Recipe, sizes: Sizes, models: int) -> float:
    """FLOPs of answering the held-out prompts with some models; a decoding step takes 3 times as long as its own."""
    answers = min(sizes.prompts, recipe.eval.prompts) * recipe.eval.samples * recipe.eval.max_new_tokens
    return 2 * sizes.large["parameters"] * 3 * models * answers


def cost(recipe: Recipe, sizes: Sizes) -> Cost:
    """Generation with start and policy, one after the other, and a pass of both over the held-out pairs."""
    answers = 2 * min(sizes.prompts, recipe.eval.prompts) * recipe.eval.samples * recipe.eval.max_new_tokens
    large = sizes.large["parameters"]
    tokens = 2 * sizes.held_out_tokens
    work = 2 * large * tokens + measuring_flops(recipe, sizes, 2)
    return Cost(f"gold: {recipe.eval.gold}", sizes.held_out, tokens + answers, work, generating_memory(recipe, sizes))


def generating_memory(recipe: Recipe, sizes: Sizes) -> float:
    """Bytes: the weights of one model, and keys and values of the responses of a batch with their prompts."""
    responses = min(sizes.prompts, recipe.eval.prompts) * recipe.eval.samples
    # A pair's tokens stand for a prompt's, of which they are the larger number.
    length = recipe.eval.max_new_tokens + round(sizes.held_out_tokens / max(sizes.held_out, 1))
    batch = min(responses, recipe.eval.batch_size or responses_at_once(length, sizes.device))
    numbers = sizes.large["parameters"] + sizes.large["cached"] * batch * length
    return float(choose_dtype(recipe.dtype, sizes.device).itemsize * numbers)
