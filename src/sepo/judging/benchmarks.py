"""A benchmark in a run: answers of the policy and of its start in the benchmark's own format, and verdicts on them.

It runs the same functions as `sepo generate` and `sepo judge`, for one model after the other.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sepo.errors import UserError
from sepo.files import write_json
from sepo.judging.answering import (
    FINISHED,
    AnswerLog,
    answer_all,
    claim_folder,
    is_open,
    is_whole,
    transformers_engine,
    write_answers,
)
from sepo.judging.in_run import log_spent, rate_of
from sepo.judging.judge import annotation_rows, judge_pairs, match_answers, prepare_judge
from sepo.judging.questions import BENCHMARKS, Question, find_questions, read_answers, read_questions
from sepo.models.tokenizer import load_tokenizer
from sepo.models.weights import load_model
from sepo.processes import log
from sepo.recipe.settings import JudgeSettings, Recipe

ROLES = ("base", "policy")


def questions_of(name: str, file: str, limit: int | None = None) -> tuple[list[Question], str]:
    """The questions of an entry of `eval.benchmarks`, and the benchmark whose format they have.

    Args:
        name: of the entry; the name of a benchmark defines the format.
        file: path, or a name that `sepo generate --prompts` takes.

    Raises:
        UserError: there is no such file, a row is no question, or the format does not allow its turns.
    """
    path, known = find_questions(file)
    questions, benchmark = read_questions(path, known or (name if name in BENCHMARKS else ""))
    if benchmark == "alpaca_eval" and any(len(question.turns) > 1 for question in questions):
        raise UserError(f"'{path}' has questions of several turns, which AlpacaEval's format does not allow")
    return questions[:limit], benchmark


def answer_benchmark(
    recipe: Recipe,
    questions: list[Question],
    benchmark: str,
    models: Mapping[str, str],
    out: Path,
    key: Mapping[str, Any],
) -> dict[str, float]:
    """Answer questions with both models. After an interruption the answers so far are reused.

    Args:
        models: a folder for each of `ROLES`.
        out: the answers of each role are in a subfolder of that name.
        key: cache key of the answers; unfinished answers with another key are removed.

    Returns:
        `questions`, and for each role `tokens/ROLE`, the mean length of its answers over all turns, and
        `no_answer/ROLE`, the number of questions without an answer.
    """
    settings, tokenizer = recipe.eval, load_tokenizer(models["policy"])
    results: dict[str, float] = {"questions": float(len(questions))}
    for role in ROLES:
        folder = out / role
        try:
            claim_folder(folder, key)
        except UserError:
            shutil.rmtree(folder)
            claim_folder(folder, key)
        finished = AnswerLog.read(folder / FINISHED)
        if any(is_open(question, finished) for question in questions):
            engine = transformers_engine(
                load_model(models[role], device=recipe.device, dtype=recipe.dtype),
                tokenizer,
                max_new_tokens=settings.benchmark_max_new_tokens,
                seed=recipe.seed,
                batch_size=settings.batch_size,
                options=recipe.data.chat_template_kwargs,
            )
            answer_all(questions, benchmark, finished, engine, None)
            del engine  # frees the model before the next one is loaded
        write_answers(folder, questions, benchmark, finished, role)
        results[f"tokens/{role}"] = float(np.mean([turn.tokens for turn in finished.turns.values()]))
        results[f"no_answer/{role}"] = float(sum(not is_whole(question, finished) for question in questions))
        if number := int(results[f"no_answer/{role}"]):
            log(f"benchmark: {role} has no answer to {number} of {len(questions)} questions: they are not judged")
    return results


def judge_benchmark(
    questions: list[Question], answers: Path, judge: JudgeSettings, out: Path, device: str = "auto"
) -> dict[str, float]:
    """Compare the answers of both models.

    Args:
        answers: folder of `answer_benchmark`.
        out: file for the annotations, which `sepo winrate` reads.

    Returns:
        `win_rate` of the policy in [0, 1] with its `_se`, `length_controlled`, `judged`, `failed`, `unanswered`.
    """
    logs = [AnswerLog.read(answers / role / FINISHED) for role in ROLES]
    unanswered = sum(not all(is_whole(question, turns) for turns in logs) for question in questions)
    if unanswered == len(questions):
        write_json(out, [])
        return {"judged": 0.0, "failed": float(unanswered)}
    read = {role: read_answers(_file_of(answers / role)) for role in ROLES}
    matches, _ = match_answers(read["policy"], read["base"], questions)
    contests = [match.contest for match in matches]
    prepared = prepare_judge(judge, contests)
    verdicts, columns, spent = judge_pairs(prepared, contests, device)
    without_reply = log_spent(prepared, spent)
    rows = annotation_rows(matches, verdicts, columns, judge.name)
    write_json(out, rows, indent=1)
    metrics = rate_of(rows, [match.number for match in matches]) | without_reply
    return metrics | {"failed": metrics["failed"] + unanswered}


def _file_of(folder: Path) -> Path:
    """The file written by `write_answers`."""
    return next(path for pattern in ("model_outputs.json", "model_answer/*.jsonl") for path in folder.glob(pattern))
