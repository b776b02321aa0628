"""Stage "eval": the policy against the model it started from, on held-out pairs and prompts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sepo import processes
from sepo.evaluate import ANNOTATIONS, EXAMPLES, GENERATIONS
from sepo.recipe.settings import Recipe
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
        what=f"gold: {recipe.eval.gold}" + ("" if judge is None else f", judge: {judge.title}"),
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
        facts={"recipe": recipe, "start_scored": start_logps is not None},
        verifies=True,  # finished answers carry the digest of what they depend on
        missing=lambda results: unanswered(results.get("judge/unanswered")),
    )


def _forget(folder: Path) -> None:
    for name in (GENERATIONS, EXAMPLES, ANNOTATIONS):
        (folder / name).unlink(missing_ok=True)  # of other settings


def unanswered(calls: float | None) -> str | None:
    """One line about questions without a reply from a judge's server; the same command asks them again."""
    return f"{calls:.0f} questions to the judge have no reply" if calls else None
