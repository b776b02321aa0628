"""Answers of a model against those of another, and a judge -> annotations in AlpacaEval's form, and what it cost."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sepo.errors import UserError
from sepo.evaluate.statistics import mean_and_se
from sepo.judging import judge_prompts as templates
from sepo.judging import scorers as scores
from sepo.judging import server_judge as server
from sepo.judging.endpoint import CallEstimate, estimate_calls
from sepo.judging.questions import Answer, Question
from sepo.judging.server_judge import Contest, Verdict
from sepo.recipe.settings import JudgeSettings

# MT-Bench's categories whose grades want a reference answer.
WITH_REFERENCE = ("math", "reasoning", "coding", "arena-hard-200")


class Match(NamedTuple):
    """Answers to one question that are to be judged.

    Attributes:
        number: of the answer in its file.
        contest: what the judge sees; its baseline is empty where there is none.
        model, baseline: the answers as they were read.
    """

    number: int
    contest: Contest
    model: Answer
    baseline: Answer | None


class Missing(NamedTuple):
    """What could not be judged: numbers of answers without a counterpart, without a text, and of the other's alone."""

    unmatched: int
    no_text: int
    others: int

    def lines(self) -> list[str]:
        """In words, for those that there are."""
        texts = (
            (self.unmatched, "answers have no counterpart in --against"),
            (self.others, "answers of --against have no counterpart"),
            (self.no_text, "answers are no text on one of the two sides"),
        )
        return [f"{number} {text}: not judged" for number, text in texts if number]


def match(
    answers: Sequence[Answer],
    against: Sequence[Answer] | None,
    questions: Sequence[Question] = (),
    references: Sequence[Answer] = (),
) -> tuple[list[Match], Missing]:
    """Bring answers to the same question together, with the question's words.

    Args:
        questions: needed where the answers do not repeat what they answer (MT-Bench, Arena-Hard v0.1).
        references: right answers, used for the categories that want them.

    Raises:
        UserError: nothing matches, or the questions' words are not known.
    """
    asked = {question.key: question for question in questions}
    right = {answer.key: answer for answer in references}
    others = None if against is None else {answer.key: answer for answer in against}
    found, unmatched, no_text = [], 0, 0
    for number, answer in enumerate(answers):
        question = asked.get(answer.key)
        turns = answer.turns or (question.turns if question is not None else ())
        if not turns:
            raise UserError(
                f"the words of question {answer.key[:60]!r} are not in the answers: give its file as --questions"
            )
        category = answer.category or (question.category if question is not None else "")
        other = None if others is None else others.get(answer.key)
        if others is not None and other is None:
            unmatched += 1
            continue
        ours, theirs = _texts(answer, len(turns)), () if other is None else _texts(other, len(turns))
        if ours is None or theirs is None:
            no_text += 1
            continue
        reference: tuple[str, ...] = ()
        if category in WITH_REFERENCE and answer.key in right:
            reference = _texts(right[answer.key], len(turns)) or ()
        contest = Contest(tuple(turns), theirs, ours, reference)
        found.append(Match(number, contest, answer._replace(category=category), other))
    if not found:
        raise UserError(
            f"none of {len(answers)} answers has a counterpart: expected two files of answers to the same questions"
        )
    alone = 0 if others is None else len(others.keys() - {answer.key for answer in answers})
    return found, Missing(unmatched, no_text, alone)


def _texts(answer: Answer, turns: int) -> tuple[str, ...] | None:
    if len(answer.answers) < turns or not all(isinstance(text, str) for text in answer.answers[:turns]):
        return None
    return tuple(text for text in answer.answers[:turns] if text is not None)


class Prepared(NamedTuple):
    """A judge that is ready, all that it needs read: what it will be asked is known, nothing is paid yet."""

    settings: JudgeSettings
    requests: list[dict[str, Any]]
    about: list[tuple[int, Any, Any]]
    endpoint: Any = None


def prepare(
    settings: JudgeSettings, contests: Sequence[Contest], grade: bool = False, retry_malformed: bool = False
) -> Prepared:
    """Everything that can be wrong about a judge is found here."""
    if settings.server is None:
        if settings.function is not None:
            scores.user_function(settings.function)
        if settings.oracle is not None:
            from sepo.judging.oracle_judge import find_oracle  # PyTorch, which a server does without

            find_oracle(settings)
        return Prepared(settings, [], [])
    endpoint = server.endpoint_of(settings, retry_malformed)
    prompts = server.read_prompts(settings)
    make = server.grade_requests if grade else server.pair_requests
    requests, about = make(settings, endpoint, prompts, contests)
    return Prepared(settings, requests, about, endpoint)


def expected(prepared: Prepared, prices: tuple[float, float] | None, seconds_each: float = 2.0) -> CallEstimate | None:
    """What asking will take; None for a judge that asks nobody."""
    return (
        None
        if prepared.endpoint is None
        else estimate_calls(prepared.endpoint, prepared.requests, prices, seconds_each)
    )


def judge_pairs(
    prepared: Prepared, contests: Sequence[Contest], device: str = "auto", scorer: scores.Scorer | None = None
) -> tuple[list[Verdict], list[dict[str, Any]], dict[str, Any]]:
    """A verdict of each contest; further columns of its annotation; what was spent.

    Args:
        scorer: of the judge, where it is in memory already (`scorer_of`).
    """
    settings = prepared.settings
    if prepared.endpoint is not None:
        replies, spent = prepared.endpoint.ask_all(prepared.requests, "judge")
        found = server.verdicts(contests, prepared.about, replies)
        extra = [{"raw_completion": list(one.raw), "preferences": list(one.orders)} for one in found]
        return found, extra, asdict(spent)
    began = time.monotonic()
    values = score_answers(
        [*(_ask(one, one.baseline) for one in contests), *(_ask(one, one.model) for one in contests)],
        scorer or scorer_of(settings, device),
    )
    baseline, model = values[: len(contests)], values[len(contests) :]
    found, extra = [], []
    for theirs, ours in zip(baseline, model, strict=True):
        extra.append({"score_1": float(theirs), "score_2": float(ours)})
        if math.isnan(theirs) or math.isnan(ours):
            found.append(Verdict(None, "no score of one of the answers"))
        elif settings.function is None:
            found.append(Verdict(1 + float(np.exp(-np.logaddexp(0, theirs - ours)))))
        else:
            found.append(Verdict(1.5 + 0.5 * float(np.sign(ours - theirs))))
    return found, extra, {"scored": len(values), "elapsed": time.monotonic() - began}


def scorer_of(settings: JudgeSettings, device: str = "auto") -> scores.Scorer:
    """What gives each answer its number, for a judge that is no server; it holds its models in memory."""
    if settings.function is not None:
        return scores.function_scorer(settings.function)
    if settings.oracle is not None:
        from sepo.judging.oracle_judge import find_oracle, oracle_scorer

        return oracle_scorer(find_oracle(settings), device=device)
    return scores.reward_scorer(str(settings.reward_model), revision=settings.revision, device=device)


def score_answers(conversations: Sequence[scores.Conversation], scorer: scores.Scorer) -> np.ndarray:
    """The number of each answer, NaN where it has none; equal ones are read once."""
    places: dict[scores.Conversation, int] = {}
    for one in conversations:
        places.setdefault(one, len(places))
    values = scorer(list(places))
    return np.array([values[places[one]] for one in conversations], np.float64)


def _ask(contest: Contest, answers: tuple[str, ...]) -> scores.Conversation:
    """The conversation as one model had it, up to its last answer."""
    turns = [text for pair in zip(contest.questions, answers, strict=False) for text in pair]
    return tuple(turns[:-1]), turns[-1]


def conversation(contest: Contest) -> scores.Conversation:
    """The model's conversation, up to its last answer."""
    return _ask(contest, contest.model)


def annotation_rows(
    matches: Sequence[Match], verdicts: Sequence[Verdict], extra: Sequence[dict[str, Any]], annotator: str
) -> list[dict[str, Any]]:
    """Rows of AlpacaEval's annotations.json: output_1 is the baseline's, output_2 the model's."""
    rows = []
    for one, verdict, columns in zip(matches, verdicts, extra, strict=True):
        assert one.baseline is not None
        rows.append(
            {
                "instruction": "\n\n".join(one.contest.questions),
                "output_1": one.contest.baseline[-1],
                "generator_1": one.baseline.model,
                "output_2": one.contest.model[-1],
                "generator_2": one.model.model,
                "dataset": one.model.dataset or one.baseline.dataset,
                "index": one.number,
                "annotator": annotator,
                "preference": verdict.preference,
                "failure": verdict.failure,
                **columns,
            }
        )
    return rows


def arena_rows(matches: Sequence[Match], verdicts: Sequence[Verdict], judge: str) -> list[dict[str, Any]]:
    """Rows of Arena-Hard's judgement files, where the judge was asked in both orders and in its words; else none."""
    if not all(len(one.labels) == 2 for one in verdicts) or not any(any(one.labels) for one in verdicts):
        return []
    rows = []
    for one, verdict in zip(matches, verdicts, strict=True):
        assert one.baseline is not None
        games = [
            {"score": label, "judgment": {"answer": text}}
            for label, text in zip(verdict.labels, verdict.raw, strict=True)
        ]
        rows.append(
            {
                "uid": one.model.key,
                "category": one.model.category or "hard_prompt",
                "judge": judge,
                "model": one.model.model,
                "baseline": one.baseline.model,
                "games": games,
            }
        )
    return rows


def grade_rows(prepared: Prepared, matches: Sequence[Match]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Grades of every turn in FastChat's form (-1 where there is none, and why), and what was spent."""
    replies, spent = prepared.endpoint.ask_all(prepared.requests, "judge")
    rows = []
    for (number, turn, template), reply in zip(prepared.about, replies, strict=True):
        value, failure = templates.grade(reply)
        key = matches[number].model.key
        rows.append(
            {
                "question_id": int(key) if key.isdecimal() else key,
                "model": matches[number].model.model,
                "judge": [prepared.settings.name, template.name],
                "judgment": reply.text,
                "score": -1 if value is None else value,
                "turn": turn,
                "failure": failure,
                "tstamp": time.time(),
            }
        )
    return rows, asdict(spent)


def score_rows(matches: Sequence[Match], values: np.ndarray) -> list[dict[str, Any]]:
    """The number of each answer, with what it answers; null and why where there is none."""
    return [
        {
            "question": one.contest.questions[-1],
            "model": one.model.model,
            "score": None if math.isnan(value) else float(value),
            "failure": "no score of the answer" if math.isnan(value) else None,
        }
        for one, value in zip(matches, values, strict=True)
    ]


def mean_scores(rows: Sequence[Mapping[str, Any]], judge: str) -> dict[str, dict[str, Any]]:
    """The mean of `score_rows` with its error, under the model's name.

    Raises:
        UserError: no answer has a number.
    """
    values = [row["score"] for row in rows if row["score"] is not None]
    if not values:
        raise UserError(f"the judge '{judge}' gave none of {len(rows)} answers a number")
    mean, error = mean_and_se(values)
    result = {"benchmark": judge, "score": mean, "standard_error": error, "n_total": len(values)}
    return {str(rows[0]["model"]): {**result, "n_failed": len(rows) - len(values), "warnings": []}}


def read_all(
    answers: Path, against: Path | None, questions: Path | None, references: Path | None
) -> tuple[list[Match], Missing]:
    """`match` over files."""
    from sepo.judging.questions import read_answers, read_questions

    return match(
        read_answers(answers),
        None if against is None else read_answers(against),
        [] if questions is None else read_questions(questions)[0],
        [] if references is None else read_answers(references),
    )
