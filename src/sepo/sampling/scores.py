"""Scores of sampled answers: by a gold reward, a reward model, a DPO oracle (beta times the sum of its token rewards),
a function, or a language model behind a server that grades. A judge that fails for an answer loses that answer alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np

from sepo.data.conversation import Conversation
from sepo.errors import UserError
from sepo.evaluate.gold import gold_reward
from sepo.files import digest
from sepo.judging.in_run import check_judge, judge_content, log_spent
from sepo.judging.judge import prepare_judge, score_answers, scorer_of
from sepo.judging.judge_prompts import read_grade
from sepo.judging.server_judge import Contest, ServerJudge, contest_of, opening_of
from sepo.recipe.settings import JudgeSettings
from sepo.sampling.prompts import Prompt
from sepo.sampling.responses import Answers, Grown

_AT_ONCE = 512  # prompts whose scores are stored together


class Scoring(NamedTuple):
    """What scores the answers: a gold reward or a judge."""

    gold: str | None = None
    judge: JudgeSettings | None = None

    @property
    def name(self) -> str:
        """In words."""
        return f"gold reward {self.gold}" if self.judge is None else self.judge.name

    def check(self) -> None:
        """Raise a UserError for a gold reward or a judge that cannot be used, before anything is sampled."""
        if self.gold is not None:
            gold_reward(self.gold)
        if self.judge is not None and self.judge.server is not None:
            judge = ServerJudge.of(self.judge)
            judge.grade_requests([Contest(("question",), (), ("answer",))])
            judge.endpoint.log_key()
        elif self.judge is not None:
            check_judge(self.judge)

    def key(self) -> list[Any]:
        """What the scores depend on beside the answers."""
        if self.judge is None:
            return [self.gold]
        return [self.judge.cache_key(), judge_content(self.judge)]


# (prompts, answers to each) -> a score for each answer, None without one.
Scorer = Callable[[Sequence[Prompt], Sequence[Sequence[str]]], list[list[float | None]]]


def score_all(
    prompts: Sequence[Prompt], answers: Sequence[Answers], scoring: Scoring, grown: Grown, device: str = "auto"
) -> tuple[list[list[float | None]], int]:
    """The scores of all answers; those of an earlier attempt are reused.

    Args:
        grown: keeps the scores. A server's grades are kept only where no answer to the prompt lacks one.

    Returns:
        the scores, and the number of calls to a server without a reply, which a second attempt makes again.
    """
    keys = [digest([prompt.key(), one.texts]) for prompt, one in zip(prompts, answers, strict=True)]
    server = scoring.judge is not None and scoring.judge.server is not None
    known, unanswered = dict(grown.values), [0]
    scorer: Scorer | None = None
    for start in range(0, len(prompts), _AT_ONCE):
        numbers = range(start, min(start + _AT_ONCE, len(prompts)))
        if all(keys[i] in known for i in numbers):
            continue
        scorer = scorer or _scorer(scoring, device, unanswered)
        rows = scorer([prompts[i] for i in numbers], [answers[i].texts for i in numbers])
        new = {keys[i]: row for i, row in zip(numbers, rows, strict=True)}
        grown.add({key: row for key, row in new.items() if not (server and None in row)})
        known |= new
    return [known[key] for key in keys], unanswered[0]


def _scorer(scoring: Scoring, device: str, unanswered: list[int]) -> Scorer:
    """A scorer of prompts and their answers. Models are loaded here, once.

    Args:
        unanswered: one number, to which a server's calls without a reply are added.
    """
    if scoring.judge is None:
        reward = gold_reward(str(scoring.gold))
        return _by(lambda rows: reward.scores([prompt.words for prompt, _ in rows], [text for _, text in rows]))
    if scoring.judge.server is not None:
        judge = scoring.judge
        return _by(lambda rows: _grades(judge, rows, unanswered))
    scorer = scorer_of(scoring.judge, device)

    def judged(rows: Sequence[tuple[Prompt, str]]) -> np.ndarray:
        openings = [opening_of(Conversation(list(prompt.messages), [])) for prompt, _ in rows]
        return score_answers(
            [((asked,), text, opening) for (asked, opening), (_, text) in zip(openings, rows, strict=True)], scorer
        )

    return _by(judged)


def _by(score: Callable[[Sequence[tuple[Prompt, str]]], Sequence[float] | np.ndarray]) -> Scorer:
    """A scorer from a function of (prompt, answer) pairs. Empty answers have no score."""

    def run(prompts: Sequence[Prompt], answers: Sequence[Sequence[str]]) -> list[list[float | None]]:
        places = [(i, j) for i, texts in enumerate(answers) for j, text in enumerate(texts) if text]
        values = score([(prompts[i], answers[i][j]) for i, j in places]) if places else []
        scores: list[list[float | None]] = [[None] * len(texts) for texts in answers]
        for (i, j), value in zip(places, values, strict=True):
            scores[i][j] = float(value) if math.isfinite(value) else None
        return scores

    return run


def _grades(judge: JudgeSettings, rows: Sequence[tuple[Prompt, str]], unanswered: list[int]) -> list[float]:
    """Grades of a judge behind a server; NaN where a reply holds none."""
    contests = [contest_of(Conversation(list(prompt.messages), []), "", text) for prompt, text in rows]
    prepared = prepare_judge(judge, [contest._replace(baseline=()) for contest in contests], grade=True)
    if prepared.endpoint is None:
        raise UserError("a judge that is no server gives no grades")
    replies, spent = prepared.endpoint.ask_all(prepared.requests, "judge")
    unanswered[0] += int(log_spent(prepared, asdict(spent)).get("unanswered", 0))
    grades = [math.nan] * len(rows)
    for (number, _, _), reply in zip(prepared.about, replies, strict=True):
        value, _ = read_grade(reply)
        grades[number] = math.nan if value is None else float(value)
    return grades
