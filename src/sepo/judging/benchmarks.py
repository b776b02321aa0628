"""A benchmark's questions in a run: answers of the policy and of its start in the benchmark's own form, and verdicts.

The same parts as `sepo generate` and `sepo judge`, one after the other for both models.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerBase

from sepo.errors import UserError
from sepo.files import write_json
from sepo.judging import answering, in_run
from sepo.judging import judge as compare
from sepo.judging.questions import BENCHMARKS, Question, find_questions, read_answers, read_questions
from sepo.recipe.settings import JudgeSettings

ROLES = ("base", "policy")


def questions_of(name: str, file: str, limit: int | None = None) -> tuple[list[Question], str]:
    """The questions that `eval.benchmarks` names, and the benchmark whose form they have.

    Args:
        name: as the recipe calls it; that of a benchmark says which form the rows have.
        file: path, or a name that `sepo generate --prompts` takes.

    Raises:
        UserError: there is no such file, a row is no question, or the form cannot hold it.
    """
    path, known = find_questions(file)
    questions, benchmark = read_questions(path, known or (name if name in BENCHMARKS else ""))
    if benchmark == "alpaca_eval" and any(len(question.turns) > 1 for question in questions):
        raise UserError(f"'{path}' has questions of several turns, which AlpacaEval's form cannot hold")
    return questions[:limit], benchmark


def answer_benchmark(
    questions: list[Question],
    benchmark: str,
    models: Mapping[str, str],
    load: Callable[[str], nn.Module],
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    settings: Mapping[str, Any],
    *,
    max_new_tokens: int,
    seed: int,
    batch_size: int | None = None,
    options: Mapping[str, Any] = {},
) -> dict[str, float]:
    """Answer questions with both models; interrupted, it goes on where it stopped.

    Args:
        models: a folder for each of `ROLES`.
        load: a folder -> the model on its device.
        out: folder; the answers of each role lie in a folder of that name.
        settings: what answers depend on; unfinished ones of others are removed.

    Returns:
        `questions`, and for each role `tokens/ROLE`, the mean length of its answers over all turns.
    """
    results: dict[str, float] = {"questions": float(len(questions))}
    for role in ROLES:
        folder = out / role
        try:
            answering.settle(folder, settings)
        except UserError:
            shutil.rmtree(folder)
            answering.settle(folder, settings)
        finished = answering.AnswerLog.read(folder / answering.FINISHED)
        if not all(answering.is_whole(question, finished) for question in questions):
            engine = answering.transformers_engine(
                load(models[role]), tokenizer, max_new_tokens=max_new_tokens, seed=seed, batch_size=batch_size,
                options=options,
            )  # fmt: skip
            answering.answer_all(questions, benchmark, finished, engine, None)
            del engine  # one model is in memory at a time
        answering.write_answers(folder, questions, benchmark, finished, role)
        results[f"tokens/{role}"] = float(np.mean([turn.tokens for turn in finished.turns.values()]))
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
    read = {role: read_answers(_file_of(answers / role)) for role in ROLES}
    matches, _ = compare.match(read["policy"], read["base"], questions)
    contests = [one.contest for one in matches]
    prepared = compare.prepare(judge, contests)
    verdicts, extra, spent = compare.judge_pairs(prepared, contests, device)
    lacking = in_run.log_spent(prepared, spent)
    rows = compare.annotation_rows(matches, verdicts, extra, judge.name)
    write_json(out, rows, indent=1)
    return in_run.rate_of(rows, [one.number for one in matches]) | lacking


def _file_of(folder: Path) -> Path:
    """The file of answers that `write_answers` wrote."""
    return next(path for pattern in ("model_outputs.json", "model_answer/*.jsonl") for path in folder.glob(pattern))
