"""Judge a model's answers against another model's, or grade them: annotations in AlpacaEval's form, and the cost."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sepo.data.conversation import Conversation
from sepo.data.thinking import without_thinking
from sepo.errors import UserError
from sepo.evaluate.statistics import mean_and_se
from sepo.judging.endpoint import CallEstimate, Endpoint, estimate_calls
from sepo.judging.judge_prompts import read_grade
from sepo.judging.questions import Answer, Question, read_answers, read_questions
from sepo.judging.scorers import Judged, Scorer, function_scorer, reward_scorer, user_function
from sepo.judging.server_judge import Contest, ServerJudge, Verdict, opening_of, read_verdicts
from sepo.recipe.settings import JudgeSettings

# MT-Bench's categories whose grades need a reference answer.
WITH_REFERENCE = ("math", "reasoning", "coding", "arena-hard-200")


# --- answers to the same questions ----------------------------------------------------------------------------------


class Match(NamedTuple):
    """Answers to one question that are to be judged.

    Attributes:
        number: position of the answer in its file.
        contest: what the judge sees; its baseline is empty if there is none.
        model, baseline: the answers as read.
    """

    number: int
    contest: Contest
    model: Answer
    baseline: Answer | None


class Missing(NamedTuple):
    """Numbers of answers that cannot be judged.

    Attributes:
        unmatched: answers without a counterpart.
        no_text: pairs in which an answer is no text.
        others: answers of the other file without a counterpart.
        thinking: answers with thinking in their text. They are judged with it, because they come from a file.
    """

    unmatched: int
    no_text: int
    others: int
    thinking: int = 0

    def lines(self) -> list[str]:
        """A sentence for each number above 0."""
        texts = (
            (self.unmatched, "answers have no counterpart in --against: not judged"),
            (self.others, "answers of --against have no counterpart: not judged"),
            (self.no_text, "pairs have an answer that is no text: not judged"),
            (self.thinking, "answers hold thinking (<think>...), which the judge reads too: take it out of the files"),
        )
        return [f"{number} {text}" for number, text in texts if number]


def match_answers(
    answers: Sequence[Answer],
    against: Sequence[Answer] | None,
    questions: Sequence[Question] = (),
    references: Sequence[Answer] = (),
) -> tuple[list[Match], Missing]:
    """Match the answers to the same question, and add the question's text.

    Args:
        questions: needed where the answers do not repeat their question (MT-Bench, Arena-Hard v0.1).
        references: right answers, used for the categories that need them.

    Raises:
        UserError: nothing matches, or the text of a question is not known.
    """
    question_of = {question.key: question for question in questions}
    reference_of = {answer.key: answer for answer in references}
    baseline_of = None if against is None else {answer.key: answer for answer in against}
    matches, unmatched, no_text = [], 0, 0
    for number, answer in enumerate(answers):
        turns, opening, category = _asked(answer, question_of.get(answer.key))
        baseline = None if baseline_of is None else baseline_of.get(answer.key)
        if baseline_of is not None and baseline is None:
            unmatched += 1
            continue
        ours, theirs = _texts(answer, len(turns)), () if baseline is None else _texts(baseline, len(turns))
        if ours is None or theirs is None:
            no_text += 1
            continue
        if baseline is not None and baseline.turns and answer.turns and _words(baseline) != _words(answer):
            raise UserError(
                f"the two files answer different questions under the name {answer.key[:60]!r}: expected answers to the "
                "same questions"
            )
        reference: tuple[str, ...] = ()
        if category in WITH_REFERENCE and answer.key in reference_of:
            reference = _texts(reference_of[answer.key], len(turns)) or ()
        contest = Contest(turns, theirs, ours, reference, opening)
        matches.append(Match(number, contest, answer._replace(category=category), baseline))
    if not matches:
        raise UserError(
            f"none of {len(answers)} answers has a counterpart: expected two files of answers to the same questions"
        )
    thinking = sum(
        without_thinking(text) != text for match in matches for text in (*match.contest.model, *match.contest.baseline)
    )
    others = 0 if baseline_of is None else len(baseline_of.keys() - {answer.key for answer in answers})
    return matches, Missing(unmatched, no_text, others, thinking)


def _asked(answer: Answer, question: Question | None) -> tuple[tuple[str, ...], str, str]:
    """The turns of the user that an answer belongs to, the opening (`Contest.opening`), and the category."""
    source = answer if answer.turns or question is None else question
    turns, opening = source.turns, ""
    if source.context:
        messages = [*source.context, {"role": "user", "content": turns[0]}]
        first, opening = opening_of(Conversation(messages, []))
        turns = (first, *turns[1:])
    if not turns:
        raise UserError(
            f"the answers do not repeat the text of question {answer.key[:60]!r}: name the file of the questions "
            "with --questions"
        )
    return tuple(turns), opening, answer.category or (question.category if question is not None else "")


def _words(answer: Answer) -> list[list[str]]:
    return [turn.split() for turn in answer.turns]


def _texts(answer: Answer, turns: int) -> tuple[str, ...] | None:
    """An answer's first turns; None unless all of them are texts."""
    texts = tuple(text for text in answer.answers[:turns] if text is not None)
    return texts if len(texts) == turns else None


def read_matches(
    answers: Path, against: Path | None, questions: Path | None, references: Path | None
) -> tuple[list[Match], Missing]:
    """`match_answers` for files."""
    return match_answers(
        read_answers(answers),
        None if against is None else read_answers(against),
        [] if questions is None else read_questions(questions)[0],
        [] if references is None else read_answers(references),
    )


# --- verdicts -------------------------------------------------------------------------------------------------------


class Prepared(NamedTuple):
    """A judge that was checked. All requests to a server are known; none was sent yet."""

    settings: JudgeSettings
    requests: list[dict[str, Any]]
    about: list[tuple[int, Any, Any]]
    endpoint: Endpoint | None = None


def prepare_judge(
    settings: JudgeSettings, contests: Sequence[Contest], grade: bool = False, retry_malformed: bool = False
) -> Prepared:
    """Check a judge and make its requests.

    Raises:
        UserError: the function, the oracle, the prompt or the address cannot be used.
    """
    if settings.server is None:
        if settings.function is not None:
            user_function(settings.function)
        if settings.oracle is not None:
            from sepo.judging.oracle_judge import find_oracle  # imports PyTorch, which a server does not need

            find_oracle(settings)
        return Prepared(settings, [], [])
    judge = ServerJudge.of(settings, retry_malformed)
    requests, about = judge.grade_requests(contests) if grade else judge.pair_requests(contests)
    return Prepared(settings, requests, about, judge.endpoint)


def expected_calls(
    prepared: Prepared, prices: tuple[float, float] | None, seconds_each: float = 2.0
) -> CallEstimate | None:
    """The expected cost of asking a server; None for another judge."""
    if prepared.endpoint is None:
        return None
    return estimate_calls(prepared.endpoint, prepared.requests, prices, seconds_each)


def judge_pairs(
    prepared: Prepared, contests: Sequence[Contest], device: str = "auto", scorer: Scorer | None = None
) -> tuple[list[Verdict], list[dict[str, Any]], dict[str, Any]]:
    """The verdict on each contest, further columns of its annotation, and the cost.

    Args:
        scorer: of this judge, if its models are in memory already (`scorer_of`).
    """
    settings = prepared.settings
    if prepared.endpoint is not None:
        replies, spent = prepared.endpoint.ask_all(prepared.requests, "judge")
        verdicts = read_verdicts(contests, prepared.about, replies)
        columns = [{"raw_completion": list(one.raw), "preferences": list(one.orders)} for one in verdicts]
        return verdicts, columns, asdict(spent)
    began = time.monotonic()
    sides = [_conversation(contest, contest.baseline) for contest in contests]
    sides += [_conversation(contest, contest.model) for contest in contests]
    values = score_answers(sides, scorer or scorer_of(settings, device))
    scores = list(zip(values[: len(contests)], values[len(contests) :], strict=True))
    verdicts = [_verdict_by_scores(*pair, only_order=settings.function is not None) for pair in scores]
    columns = [{"score_1": float(baseline), "score_2": float(model)} for baseline, model in scores]
    return verdicts, columns, {"scored": len(values), "elapsed": time.monotonic() - began}


def _verdict_by_scores(baseline: float, model: float, only_order: bool) -> Verdict:
    """The verdict by two scores, of which a user's function gives only the order."""
    if math.isnan(baseline) or math.isnan(model):
        return Verdict(None, "no score of one of the answers")
    if only_order:
        return Verdict(1.5 + 0.5 * float(np.sign(model - baseline)))
    return Verdict(1 + float(np.exp(-np.logaddexp(0, baseline - model))))


def scorer_of(settings: JudgeSettings, device: str = "auto") -> Scorer:
    """The scorer of a judge that is no server. It keeps its models in memory."""
    if settings.function is not None:
        return function_scorer(settings.function)
    if settings.oracle is not None:
        from sepo.judging.oracle_judge import find_oracle, oracle_scorer

        return oracle_scorer(find_oracle(settings), device=device)
    return reward_scorer(str(settings.reward_model), revision=settings.revision, device=device)


def score_answers(conversations: Sequence[Judged], scorer: Scorer) -> np.ndarray:
    """The score of each answer, NaN where there is none. Equal conversations are read once."""
    places: dict[Judged, int] = {}
    for conversation in conversations:
        places.setdefault(conversation, len(places))
    values = scorer(list(places))
    return np.array([values[places[conversation]] for conversation in conversations], np.float64)


def _conversation(contest: Contest, answers: tuple[str, ...]) -> Judged:
    """A conversation of the user with one model, up to its last answer."""
    turns = [text for pair in zip(contest.questions, answers, strict=False) for text in pair]
    return tuple(turns[:-1]), turns[-1], contest.opening


# --- rows of result files -------------------------------------------------------------------------------------------


def annotation_rows(
    matches: Sequence[Match], verdicts: Sequence[Verdict], columns: Sequence[dict[str, Any]], annotator: str
) -> list[dict[str, Any]]:
    """Rows of AlpacaEval's annotations.json: output_1 is the baseline's, output_2 the model's."""
    rows = []
    for match, verdict, more in zip(matches, verdicts, columns, strict=True):
        assert match.baseline is not None
        rows.append(
            {
                "instruction": "\n\n".join(match.contest.questions),
                "output_1": match.contest.baseline[-1],
                "generator_1": match.baseline.model,
                "output_2": match.contest.model[-1],
                "generator_2": match.model.model,
                "dataset": match.model.dataset or match.baseline.dataset,
                "index": match.number,
                "annotator": annotator,
                "preference": verdict.preference,
                "failure": verdict.failure,
                **more,
            }
        )
    return rows


def arena_rows(matches: Sequence[Match], verdicts: Sequence[Verdict], judge: str) -> list[dict[str, Any]]:
    """Rows of Arena-Hard's judgement files; none unless the judge was asked in both orders and in its notation."""
    if not all(len(verdict.labels) == 2 for verdict in verdicts) or not any(any(one.labels) for one in verdicts):
        return []
    rows = []
    for match, verdict in zip(matches, verdicts, strict=True):
        assert match.baseline is not None
        games = [
            {"score": label, "judgment": {"answer": text}}
            for label, text in zip(verdict.labels, verdict.raw, strict=True)
        ]
        rows.append(
            {
                "uid": match.model.key,
                "category": match.model.category or "hard_prompt",
                "judge": judge,
                "model": match.model.model,
                "baseline": match.baseline.model,
                "games": games,
            }
        )
    return rows


def grade_rows(prepared: Prepared, matches: Sequence[Match]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Grades of every turn in FastChat's form (-1 and the reason if there is none), and the cost."""
    assert prepared.endpoint is not None
    replies, spent = prepared.endpoint.ask_all(prepared.requests, "judge")
    rows = []
    for (number, turn, prompt), reply in zip(prepared.about, replies, strict=True):
        value, failure = read_grade(reply)
        key = matches[number].model.key
        rows.append(
            {
                "question_id": int(key) if key.isdecimal() else key,
                "model": matches[number].model.model,
                "judge": [prepared.settings.name, prompt.name],
                "judgment": reply.text,
                "score": -1 if value is None else value,
                "turn": turn,
                "failure": failure,
                "tstamp": time.time(),
            }
        )
    return rows, asdict(spent)


def score_rows(matches: Sequence[Match], scorer: Scorer) -> list[dict[str, Any]]:
    """The score of each answer with its question; null and the reason if there is none."""
    values = score_answers([_conversation(match.contest, match.contest.model) for match in matches], scorer)
    return [
        {
            "question": match.contest.questions[-1],
            "model": match.model.model,
            "score": None if math.isnan(value) else float(value),
            "failure": "no score of the answer" if math.isnan(value) else None,
        }
        for match, value in zip(matches, values, strict=True)
    ]


def mean_scores(rows: Sequence[Mapping[str, Any]], judge: str) -> dict[str, dict[str, Any]]:
    """The mean of `score_rows` with its standard error, under the model's name.

    Raises:
        UserError: no answer has a score.
    """
    values = [row["score"] for row in rows if row["score"] is not None]
    if not values:
        raise UserError(f"the judge '{judge}' gave a number to none of {len(rows)} answers")
    mean, error = mean_and_se(values)
    result = {"benchmark": judge, "score": mean, "standard_error": error, "n_total": len(values)}
    return {str(rows[0]["model"]): {**result, "n_failed": len(rows) - len(values), "warnings": []}}
