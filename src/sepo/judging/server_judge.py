"""A language model as a judge: two answers in both orders, or a grade for one."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sepo.judging import judge_prompts as templates
from sepo.judging.endpoint import Endpoint, Reply, Spent
from sepo.judging.judge_prompts import ARENA, LETTERS, OUTPUTS, RATING, TOKENS, JudgePrompt
from sepo.recipe.settings import JudgeSettings

_PAIRWISE = (TOKENS, LETTERS, OUTPUTS, ARENA)
_REPLY_TOKENS = 2048


class Contest(NamedTuple):
    """Two answers to a conversation, of the baseline and of the model.

    Attributes:
        questions: turns of the user.
        baseline, model: an answer to each.
        reference: answers that are right, if there are any.
    """

    questions: tuple[str, ...]
    baseline: tuple[str, ...]
    model: tuple[str, ...]
    reference: tuple[str, ...] = ()


class Verdict(NamedTuple):
    """What became of a contest.

    Attributes:
        preference: in [1, 2], 2 for the model; None where the judge gave none.
        failure: why there is none.
        raw: the replies.
        orders: the preference of each order that was asked; None for a failed one.
        labels: Arena-Hard's words of each order.
    """

    preference: float | None
    failure: str | None = None
    raw: tuple[str, ...] = ()
    orders: tuple[float | None, ...] = ()
    labels: tuple[str | None, ...] = ()


def endpoint_of(settings: JudgeSettings, retry_malformed: bool = False) -> Endpoint:
    """The server that settings name."""
    return Endpoint(
        str(settings.server),
        str(settings.model),
        key_variable=settings.key_variable,
        concurrency=settings.concurrency,
        timeout=settings.timeout,
        retries=settings.retries,
        cache=settings.cache,
        retry_malformed=retry_malformed,
    )


def read_prompts(settings: JudgeSettings) -> dict[str, JudgePrompt]:
    """The templates of the file that settings name."""
    return templates.read_templates(Path(str(settings.prompt)))


def request(
    settings: JudgeSettings, endpoint: Endpoint, template: JudgePrompt, values: Mapping[str, str]
) -> dict[str, Any]:
    """One question to the judge."""
    token = template.verdict == TOKENS
    more: dict[str, Any] = {
        "temperature": settings.temperature,
        "max_tokens": settings.max_tokens or (1 if token else _REPLY_TOKENS),
    }
    if token and settings.logprobs:
        more |= {"logprobs": True, "top_logprobs": 5}
    return endpoint.request(template.fill(values), **more)


def pair_requests(
    settings: JudgeSettings, endpoint: Endpoint, prompts: Mapping[str, JudgePrompt], contests: Sequence[Contest]
) -> tuple[list[dict[str, Any]], list[tuple[int, bool, JudgePrompt]]]:
    """All questions about contests, and of each its contest, whether the model stands first, and the template."""
    requests, about = [], []
    for number, one in enumerate(contests):
        template = templates.choose(
            prompts, settings.prompt_name, _PAIRWISE, len(one.questions), len(one.reference) >= len(one.questions)
        )
        for model_first in orders(one, settings.order):
            sides = (one.model, one.baseline) if model_first else (one.baseline, one.model)
            requests.append(
                request(settings, endpoint, template, templates.values_of(one.questions, *sides, one.reference))
            )
            about.append((number, model_first, template))
    return requests, about


def orders(contest: Contest, order: str) -> tuple[bool, ...]:
    """Whether the model's answer stands first, in each question that is asked about a contest.

    "seeded" asks once; which order it is depends on the prompt alone, by AlpacaEval's rule.
    """
    if order == "both":
        return (False, True)
    seed = "is_switched_outputs" + contest.questions[-1] + "123"
    return (random.Random(seed).choice([False, True]),)


def verdicts(
    contests: Sequence[Contest], about: Sequence[tuple[int, bool, JudgePrompt]], replies: Sequence[Reply]
) -> list[Verdict]:
    """What the replies say of each contest: the mean preference over its orders, none where one of them failed.

    A judge that names the first answer in both orders has no preference of its own: 1.5.
    """
    found: list[list[tuple[float | None, str | None, str, str | None]]] = [[] for _ in contests]
    for (number, model_first, template), reply in zip(about, replies, strict=True):
        value, failure = templates.preference(template, reply)
        if value is not None and model_first:
            value = 3 - value
        label = templates.arena_verdict(reply) if template.verdict == ARENA else None
        found[number].append((value, failure, reply.text, label))
    result = []
    for parts in found:
        values = [value for value, *_ in parts]
        failures = list(dict.fromkeys(failure for _, failure, *_ in parts if failure is not None))
        known = [value for value in values if value is not None]
        whole = bool(values) and len(known) == len(values)
        result.append(
            Verdict(
                sum(known) / len(known) if whole else None,
                None if whole else "; ".join(failures),
                tuple(text for _, _, text, _ in parts),
                tuple(values),
                tuple(label for *_, label in parts),
            )
        )
    return result


def grade_requests(
    settings: JudgeSettings, endpoint: Endpoint, prompts: Mapping[str, JudgePrompt], contests: Sequence[Contest]
) -> tuple[list[dict[str, Any]], list[tuple[int, int, JudgePrompt]]]:
    """Questions for a grade of every turn of the model's answers, and of each its contest, turn (from 1), template."""
    requests, about = [], []
    for number, one in enumerate(contests):
        for turn in range(1, len(one.questions) + 1):
            has_reference = len(one.reference) >= turn
            template = templates.choose(prompts, settings.prompt_name, (RATING,), turn, has_reference)
            values = templates.values_of(one.questions[:turn], one.model[:turn], (), one.reference)
            requests.append(request(settings, endpoint, template, values))
            about.append((number, turn, template))
    return requests, about


def spent_text(spent: Spent, prices: tuple[float, float] | None) -> str:
    """What was paid for, in one line."""
    parts = [f"{spent.asked} calls", f"{spent.cached} from the cache", f"{spent.retried} retries"]
    parts += [f"{spent.malformed} malformed replies"] * bool(spent.malformed)
    parts += [f"{spent.unanswered} without a reply"] * bool(spent.unanswered)
    parts.append(f"{spent.prompt_tokens:,} + {spent.completion_tokens:,} tokens in {spent.elapsed:.0f} s")
    if prices is not None:
        parts.append(f"cost {spent.cost(prices):.4g}")
    return ", ".join(parts)
