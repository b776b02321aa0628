"""Points of the reward-KL plane that need no training: best of n, and steering at decoding time.

    best of n    the best of n answers of the start, by the oracle's summed token rewards or by the gold reward itself;
                 its KL from the start is at most log n - (n - 1)/n nats (`sampling.best`)
    steering     the start with alpha times the oracle's token rewards added to its logits (`judging.steering`); its KL
                 is measured like a policy's, as the mean log-ratio of its own answers

Both are measured on the prompts, samples and gold reward (or judge) of the comparison. The choice by the gold reward
knows what is measured, which no trained policy does: it bounds what n answers of the start hold.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from sepo.errors import UserError
from sepo.evaluate.generate import Generation, responses_at_once
from sepo.evaluate.measure import response_logps, sample
from sepo.files import write_json
from sepo.judging.in_run import judge_content
from sepo.judging.steering import Steered, steered_responses
from sepo.models.weights import load_model
from sepo.processes import log
from sepo.recipe.settings import Recipe
from sepo.runs.method import Method
from sepo.sampling.best import kl_bound
from sepo.stages.logps import scoring_dtype
from sepo.stages.stage import Model, Stage, StageResult
from sepo.study.grid import Baselines, Grid, Setting
from sepo.study.policy_evaluator import PolicyEvaluator, gold_of
from sepo.study.stages import Measured, evaluator_of, training_types

BASELINES = "baselines.json"
# Best of n draws other answers than those of the start that all policies are paired with.
_OTHER_ANSWERS = 2**31

Scores = Callable[[Sequence[Generation]], np.ndarray]


class Guide(NamedTuple):
    """The models that token rewards come from."""

    oracle: Model
    reference: Model


def setting_with_oracle(settings: Mapping[str, Sequence[Setting]]) -> Setting | None:
    """The first setting whose token rewards come from one oracle; None if there is none."""
    for setting in (setting for group in settings.values() for setting in group):
        oracle = setting.recipe.oracle
        if setting.recipe.reads_oracle and oracle.count == 1 and not oracle.contrastive:
            return setting
    return None


def check_baselines(grid: Grid, settings: Mapping[str, Sequence[Setting]]) -> None:
    """Check what baselines need of a grid, before any model is loaded. Raises UserError."""
    if grid.baselines is None:
        return
    first = next(iter(settings.values()))[0].recipe
    if first.eval.gold is None and first.eval.judge is None:
        raise UserError("baselines are measured by their answers: set eval.gold or eval.judge, or leave baselines out")
    if setting_with_oracle(settings) is None:
        if grid.baselines.steer:
            raise UserError(
                "baselines.steer needs a variant whose token rewards come from one oracle (oracle.count 1, without "
                "oracle.contrastive): add one, or leave steer out"
            )
        if first.eval.gold is None:
            raise UserError(
                "baselines.best_of chooses by one oracle or by eval.gold, and there is neither: add a variant with an "
                "oracle, or leave best_of out"
            )


def guide_of(method: Method) -> Guide:
    """The oracle of a method and the reference of its rewards. Raises UserError for a policy with another tokenizer."""
    if method.transfers:
        raise UserError(
            "baselines add the oracle's token rewards to the policy's: both need one tokenizer; leave baselines out"
        )
    return Guide(method.oracles["oracle"], method.reference)


def stage(
    method: Method, baselines: Baselines, guide: Guide | None, pairs: StageResult, samples: StageResult, how: Measured
) -> Stage:
    """The points of all baselines at one seed, in `baselines.json`.

    Args:
        method: of the setting whose start answers.
        guide: None without an oracle; best of n then chooses by the gold reward alone.
        samples: result of `stages.start_stage`.
    """
    recipe, start, judge = method.recipe, method.policy_start, method.recipe.eval.judge

    def run(folder: Path) -> dict[str, Any]:
        evaluator = evaluator_of(recipe, start, pairs, samples, None, how)
        loaded = None if guide is None else _loaded(recipe, start, guide)
        points = measure(evaluator, baselines, loaded)
        write_json(folder / BASELINES, points, indent=1)
        return {"points": len(points)}

    return Stage(
        kind="baselines",
        what=f"{_in_words(baselines)}, seed {how.seed}",
        depends={
            "baselines": baselines.model_dump(mode="json"),
            "start": start.inherited(),
            "oracle": guide and guide.oracle.content,
            "reference": guide and guide.reference.content,
            "pairs": pairs.content,
            "samples": samples.content,
            "eval": recipe.eval.cache_key(),
            **({} if judge is None else {"judge": lambda: judge_content(judge)}),
            "seed": how.seed,
            **training_types(recipe, start),
        },
        outputs=(BASELINES,),
        run=run,
        facts={"recipe": recipe, "answers": max(baselines.best_of, default=0) + 3 * len(baselines.steer)},
    )


def read_points(folder: Path) -> list[dict[str, Any]]:
    """The points that a stage wrote."""
    points: list[dict[str, Any]] = json.loads((folder / BASELINES).read_text(encoding="utf-8"))
    return points


def measure(
    evaluator: PolicyEvaluator, baselines: Baselines, guide: tuple[nn.Module, nn.Module | None] | None
) -> list[dict[str, Any]]:
    """A point for each baseline: name, and the values of `PolicyEvaluator.of_answers`.

    Args:
        guide: the oracle, and the reference of its rewards unless it is the start; None without an oracle.
    """
    points = []
    if baselines.best_of:
        choices: dict[str, Scores] = {}
        if guide is not None:
            choices["oracle"] = partial(oracle_sums, evaluator, *guide)
        if evaluator.settings.gold is not None:
            choices["gold reward"] = partial(_gold_scores, evaluator, evaluator.settings.gold)
        points += best_of_points(evaluator, baselines.best_of, choices)
    for alpha in baselines.steer:
        assert guide is not None
        points.append(steered_point(evaluator, Steered(evaluator.base, *guide, alpha)))
    for point in points:
        log(f"  {point['name']}: KL {point['kl']:.2f}")
    return points


def best_of_points(
    evaluator: PolicyEvaluator, numbers: Sequence[int], choices: Mapping[str, Scores]
) -> list[dict[str, Any]]:
    """The best of n answers of the start, for each choice and each n. One sampling serves all of them.

    Args:
        choices: what scores answers, by its name.
    """
    settings, samples = evaluator.settings, evaluator.settings.samples
    many = settings.model_copy(update={"samples": samples * max(numbers)})
    seed = (evaluator.seed + _OTHER_ANSWERS) % 2**32
    answers = sample(evaluator.base, evaluator.tokenizer, evaluator.prompts, many, seed)
    points = []
    for name, scores in choices.items():
        values = scores(answers)
        for n in numbers:
            best = best_answers(answers, values, n, samples)
            kl = np.full(len(best), kl_bound(n))
            measured = evaluator.of_answers(best, kl, _device(evaluator))
            points.append({"name": f"best of {n} by the {name}", "kind": "best_of", **measured})
    return points


def best_answers(answers: Sequence[Generation], scores: np.ndarray, n: int, samples: int) -> list[Generation]:
    """The best of the first n answers to each prompt, the best of the next n, and so on, `samples` times.

    Args:
        answers: at least n × `samples` to each prompt, as many to each, by prompt.
        scores: `[answers]`; the first of equal ones is taken.
    """
    each = len({answer.sample_index for answer in answers})
    table = np.asarray(scores, np.float64).reshape(-1, each)[:, : n * samples].reshape(-1, samples, n)
    best: list[Generation] = []
    for prompt, places in enumerate(table.argmax(-1)):
        for number, place in enumerate(places.tolist()):
            best.append(answers[prompt * each + number * n + place]._replace(sample_index=number))
    return best


def oracle_sums(
    evaluator: PolicyEvaluator, oracle: nn.Module, reference: nn.Module | None, answers: Sequence[Generation]
) -> np.ndarray:
    """The sum of each answer's token rewards, log π_oracle − log π_reference, `[answers]` in nats."""
    before = evaluator.base if reference is None else reference
    return response_logps(oracle, evaluator.prompts, answers) - response_logps(before, evaluator.prompts, answers)


def steered_point(evaluator: PolicyEvaluator, steered: Steered) -> dict[str, Any]:
    """Answers of the steered start, with the random numbers of the policies' answers."""
    settings, prompts, device = evaluator.settings, evaluator.prompts, _device(evaluator)
    order = sorted(range(len(prompts)), key=lambda prompt: -len(prompts[prompt]))
    longest = len(prompts[order[0]]) + settings.max_new_tokens
    width = settings.batch_size or max(1, responses_at_once(longest, device) // len(steered.models()))
    answers: list[Generation] = []
    ratios: dict[tuple[int, int], float] = {}
    for number in range(settings.samples):
        for at in range(0, len(order), width):
            batch = order[at : at + width]
            made, sums = steered_responses(
                steered,
                evaluator.tokenizer,
                [prompts[prompt] for prompt in batch],
                max_new_tokens=settings.max_new_tokens,
                temperature=settings.temperature,
                seed=evaluator.seed,
                sample=number,
            )
            for prompt, answer, ratio in zip(batch, made, sums.tolist(), strict=True):
                answers.append(answer._replace(prompt_index=prompt))
                ratios[prompt, number] = ratio
    answers.sort(key=lambda answer: (answer.prompt_index, answer.sample_index))
    kl = np.array([ratios[answer.prompt_index, answer.sample_index] for answer in answers])
    return {
        "name": f"steering by {steered.alpha:g} of the oracle",
        "kind": "steer",
        **evaluator.of_answers(answers, kl, device),
    }


def _in_words(baselines: Baselines) -> str:
    parts: dict[str, Sequence[float]] = {"best of": baselines.best_of, "steering by": baselines.steer}
    return ", ".join(
        f"{name} {', '.join(f'{value:g}' for value in values)}" for name, values in parts.items() if values
    )


def _gold_scores(evaluator: PolicyEvaluator, name: str, answers: Sequence[Generation]) -> np.ndarray:
    return gold_of(answers, evaluator.tokenizer, name, evaluator.asked)


def _loaded(recipe: Recipe, start: Model, guide: Guide) -> tuple[nn.Module, nn.Module | None]:
    """Oracle and reference in memory; None for a reference that is the start."""
    options: dict[str, Any] = {"device": recipe.device, "dtype": scoring_dtype(recipe)}
    same = guide.reference.content == start.content
    return load_model(guide.oracle.folder, **options), None if same else load_model(guide.reference.folder, **options)


def _device(evaluator: PolicyEvaluator) -> str:
    return str(next(evaluator.base.parameters()).device)
