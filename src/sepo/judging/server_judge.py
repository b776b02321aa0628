"""A language model behind a server as judge: it compares two answers in both orders, or grades one."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sepo.data.conversation import Conversation, conversation_text, in_words
from sepo.judging.endpoint import Endpoint
from sepo.judging.judge_prompts import (
    ARENA,
    LETTERS,
    OUTPUTS,
    RATING,
    TOKENS,
    JudgePrompt,
    arena_verdict,
    choose_prompt,
    prompt_values,
    read_judge_prompts,
    read_preference,
)
from sepo.judging.replies import Reply
from sepo.recipe.settings import JudgeSettings

_PAIRWISE = (TOKENS, LETTERS, OUTPUTS, ARENA)
_REPLY_TOKENS = 2048


class Contest(NamedTuple):
    """Two answers to a conversation, of the baseline and of the model.

    Attributes:
        questions: turns of the user. The first is the whole opening in words, if `opening` has more than one turn.
        baseline, model: an answer to each turn.
        reference: right answers, if there are any.
        opening: JSON text of the conversation before the first answer (`conversation_text`), if it is more than one
            user turn; empty otherwise.
    """

    questions: tuple[str, ...]
    baseline: tuple[str, ...]
    model: tuple[str, ...]
    reference: tuple[str, ...] = ()
    opening: str = ""


def opening_of(conversation: Conversation) -> tuple[str, str]:
    """The first question of a contest, and its `opening`."""
    messages, tools = conversation
    is_single = len(messages) == 1 and messages[0]["role"] == "user" and not tools
    return in_words(messages), "" if is_single else conversation_text(messages, tools)


def contest_of(conversation: Conversation, baseline: str, model: str) -> Contest:
    """A contest of two answers. The beginning of an assistant's turn in the prompt becomes a part of both answers."""
    messages, tools = conversation
    if messages[-1]["role"] == "assistant" and len(messages) > 1:
        begun = messages[-1]["content"]
        messages, baseline, model = messages[:-1], begun + baseline, begun + model
    question, opening = opening_of(Conversation(messages, tools))
    return Contest((question,), (baseline,), (model,), opening=opening)


class Verdict(NamedTuple):
    """The outcome of a contest.

    Attributes:
        preference: in [1, 2], 2 for the model; None without a verdict.
        failure: why there is no verdict.
        raw: the replies.
        orders: the preference in each order that was asked; None where the reply has none.
        labels: the verdict in each order in Arena-Hard's notation.
    """

    preference: float | None
    failure: str | None = None
    raw: tuple[str, ...] = ()
    orders: tuple[float | None, ...] = ()
    labels: tuple[str | None, ...] = ()


class ServerJudge(NamedTuple):
    """A judge behind a server: settings, address, and the prompts of its file."""

    settings: JudgeSettings
    endpoint: Endpoint
    prompts: Mapping[str, JudgePrompt]

    @classmethod
    def of(cls, settings: JudgeSettings, retry_malformed: bool = False) -> ServerJudge:
        """Read the prompts and check the address; nothing is asked."""
        endpoint = Endpoint(
            str(settings.server),
            str(settings.model),
            key_variable=settings.key_variable,
            key_header=settings.key_header,
            headers=settings.headers,
            more=settings.request,
            concurrency=settings.concurrency,
            timeout=settings.timeout,
            retries=settings.retries,
            cache=settings.cache,
            retry_malformed=retry_malformed,
        )
        return cls(settings, endpoint, read_judge_prompts(Path(str(settings.prompt))))

    def pair_requests(
        self, contests: Sequence[Contest]
    ) -> tuple[list[dict[str, Any]], list[tuple[int, bool, JudgePrompt]]]:
        """All requests to compare answers; and for each its contest, whether the model comes first, and the prompt."""
        requests, about = [], []
        for number, contest in enumerate(contests):
            turns, reference = len(contest.questions), contest.reference
            prompt = choose_prompt(
                self.prompts, self.settings.prompt_name, _PAIRWISE, turns, reference=len(reference) >= turns
            )
            for model_first in answer_orders(contest, self.settings.order):
                sides = (contest.model, contest.baseline) if model_first else (contest.baseline, contest.model)
                requests.append(self._request(prompt, prompt_values(contest.questions, *sides, reference)))
                about.append((number, model_first, prompt))
        return requests, about

    def grade_requests(
        self, contests: Sequence[Contest]
    ) -> tuple[list[dict[str, Any]], list[tuple[int, int, JudgePrompt]]]:
        """All requests for a grade of each turn of the model; and for each its contest, turn (from 1), and prompt."""
        requests, about = [], []
        for number, contest in enumerate(contests):
            for turn in range(1, len(contest.questions) + 1):
                has_reference = len(contest.reference) >= turn
                prompt = choose_prompt(self.prompts, self.settings.prompt_name, (RATING,), turn, has_reference)
                values = prompt_values(contest.questions[:turn], contest.model[:turn], (), contest.reference)
                requests.append(self._request(prompt, values))
                about.append((number, turn, prompt))
        return requests, about

    def _request(self, prompt: JudgePrompt, values: Mapping[str, str]) -> dict[str, Any]:
        one_token = prompt.verdict == TOKENS
        options: dict[str, Any] = {
            "temperature": self.settings.temperature,  # None leaves it out
            "max_tokens": self.settings.max_tokens or (1 if one_token else _REPLY_TOKENS),
        }
        if one_token and self.settings.logprobs:
            options |= {"logprobs": True, "top_logprobs": 5}
        return self.endpoint.request(prompt.fill(values), **options)


def answer_orders(contest: Contest, order: str) -> tuple[bool, ...]:
    """For each request about a contest, whether the model's answer comes first.

    "seeded" asks once; the order depends on the prompt alone, by AlpacaEval's rule with its seed 0
    (`RandomSwitchTwoColumnsProcessor`).
    """
    if order == "both":
        return (False, True)
    seed = "is_switched_outputs" + contest.questions[-1] + "0"
    return (random.Random(seed).choices([False, True], k=1)[0],)


def read_verdicts(
    contests: Sequence[Contest], about: Sequence[tuple[int, bool, JudgePrompt]], replies: Sequence[Reply]
) -> list[Verdict]:
    """The verdict on each contest: the mean preference over its orders, or none if one of them failed.

    A judge that prefers the first answer in both orders gets 1.5: it has no preference between the two texts.
    """
    read: list[list[tuple[float | None, str | None, str, str | None]]] = [[] for _ in contests]
    for (number, model_first, prompt), reply in zip(about, replies, strict=True):
        value, failure = read_preference(prompt, reply)
        if value is not None and model_first:
            value = 3 - value
        label = arena_verdict(reply) if prompt.verdict == ARENA else None
        read[number].append((value, failure, reply.text, label))
    verdicts = []
    for orders in read:
        values = [value for value, *_ in orders]
        failures = list(dict.fromkeys(failure for _, failure, *_ in orders if failure is not None))
        known = [value for value in values if value is not None]
        whole = bool(values) and len(known) == len(values)
        verdicts.append(
            Verdict(
                preference=sum(known) / len(known) if whole else None,
                failure=None if whole else "; ".join(failures),
                raw=tuple(text for _, _, text, _ in orders),
                orders=tuple(values),
                labels=tuple(label for *_, label in orders),
            )
        )
    return verdicts
