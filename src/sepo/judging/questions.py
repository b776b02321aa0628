"""Questions and answers of AlpacaEval, MT-Bench, Arena-Hard and of plain files, in each benchmark's own form.

None of them ships with this package: a question file is given by path, or found in an installed package or on the hub
at run time (`find_questions`). What is written is what the benchmark's own tools read.
"""

from __future__ import annotations

import importlib.util
import json
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sepo.errors import UserError
from sepo.files import digest
from sepo.judging.judgements import SUFFIXES, read_rows

BENCHMARKS = ("alpaca_eval", "mt_bench", "arena_hard")
# Sampling temperature of MT-Bench by category (FastChat's `temperature_config`); 0.7 for any other.
TEMPERATURES = {
    "writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0, "stem": 0.1,
    "humanities": 0.1, "arena-hard-200": 0.0,
}  # fmt: skip
# Where a benchmark's questions are when no file is named: inside a package, and on the hub.
_IN_PACKAGES = {"mt_bench": ("fastchat", "llm_judge/data/mt_bench/question.jsonl")}
_ON_HUB = {
    "alpaca_eval": ("tatsu-lab/alpaca_eval", "alpaca_eval.json"),
    "mt_bench": ("HuggingFaceH4/mt_bench_prompts", "raw/question.jsonl"),
    "arena_hard": ("lmarena-ai/arena-hard-auto", "data/arena-hard-v2.0/question.jsonl"),
}


class Question(NamedTuple):
    """One prompt of a file.

    Attributes:
        key: what tells it apart: question_id, uid, or the instruction itself.
        turns: of the user; most have one.
        category: of the benchmark; empty if it has none.
        row: as it stands in the file.
    """

    key: str
    turns: tuple[str, ...]
    category: str
    row: Mapping[str, Any]


class Answer(NamedTuple):
    """A model's answer to a question, a text for each turn (None where it is missing)."""

    key: str
    turns: tuple[str, ...]
    answers: tuple[str | None, ...]
    model: str
    category: str = ""
    dataset: str = ""


def find_questions(name: str) -> tuple[Path, str]:
    """The file that `--prompts` means and which benchmark it is of ("" for a plain one).

    A name of `BENCHMARKS` is looked for in an installed package, then on the hub; anything else is a path.

    Raises:
        UserError: there is none.
    """
    if name not in BENCHMARKS:
        path = Path(name)
        if not path.is_file():
            raise UserError(
                f"no prompts at '{name}': expected a file of {', '.join(SUFFIXES)}, or one of {', '.join(BENCHMARKS)}"
            )
        return path, ""
    if (place := _IN_PACKAGES.get(name)) is not None:
        spec = importlib.util.find_spec(place[0])
        for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
            if (path := Path(folder, place[1])).is_file():
                return path, name
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository, file = _ON_HUB[name]
    try:
        return Path(hf_hub_download(repository, file, repo_type="dataset")), name
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"the questions of {name} cannot be had from the hub ({type(error).__name__}): download {file} of the "
            f"dataset {repository} and give its path as --prompts"
        ) from None


def read_questions(path: Path, benchmark: str = "") -> tuple[list[Question], str]:
    """Questions of a file, and the benchmark whose form they have ("" for plain prompts).

    Known are AlpacaEval (`instruction`), MT-Bench and Arena-Hard v0.1 (`question_id`, `turns`), Arena-Hard v2 (`uid`,
    `prompt`), and plain rows with `prompt`, a text or a list of messages whose user turns are asked one after another.

    Raises:
        UserError: a row has none of these, or two rows one key.
    """
    questions = []
    found = benchmark
    for number, row in enumerate(read_rows(path), 1):
        where = f"'{path}' row {number}"
        if isinstance(row.get("turns"), list):
            turns = tuple(turn.get("content") if isinstance(turn, Mapping) else turn for turn in row["turns"])
            key = str(row.get("question_id", number))
            arena = any(isinstance(turn, Mapping) for turn in row["turns"]) or "cluster" in row
            found = found or ("arena_hard" if arena else "mt_bench")
        elif "uid" in row and isinstance(row.get("prompt"), str):
            turns, key, found = (row["prompt"],), str(row["uid"]), found or "arena_hard"
        elif isinstance(row.get("instruction"), str):
            turns, key, found = (row["instruction"],), row["instruction"], found or "alpaca_eval"
        elif isinstance(row.get("prompt"), str):
            turns, key = (row["prompt"],), row["prompt"]
        elif isinstance(row.get("prompt"), list):
            users = [m for m in row["prompt"] if isinstance(m, Mapping) and m.get("role") == "user"]
            turns = tuple(message.get("content") for message in users)
            key = json.dumps(turns)
        else:
            raise UserError(f"{where} holds no prompt: expected instruction, prompt or turns")
        texts = tuple(turn for turn in turns if isinstance(turn, str) and turn.strip())
        if not texts or len(texts) < len(turns):
            raise UserError(f"{where} has an empty turn: expected texts")
        questions.append(Question(key, texts, str(row.get("category") or ""), row))
    keys = [question.key for question in questions]
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise UserError(f"'{path}' asks {twice[:60]!r} twice: expected each question once")
    return questions, found


def temperature_of(question: Question, benchmark: str, given: float | None) -> float:
    """The temperature that a question is answered at: as given, else as its benchmark has it.

    AlpacaEval 0.7, MT-Bench by category, Arena-Hard 0, others 1.
    """
    if given is not None:
        return given
    if benchmark == "mt_bench":
        return TEMPERATURES.get(question.category, 0.7)
    return {"alpaca_eval": 0.7, "arena_hard": 0.0}.get(benchmark, 1.0)


def answer_row(
    question: Question, answers: Sequence[str], tokens: Sequence[int], model: str, benchmark: str
) -> dict[str, Any]:
    """An answer in the benchmark's own form; `tokens` is the length of each of its turns."""
    stamp = time.time()
    if benchmark == "mt_bench" or (benchmark == "arena_hard" and "uid" not in question.row):
        as_mapping = benchmark == "arena_hard"
        turns: list[Any] = [{"content": text} if as_mapping else text for text in answers]
        row = {
            "question_id": question.row.get("question_id", question.key),
            "answer_id": digest([model, question.key, list(answers)]),
            "model_id": model,
            "choices": [{"index": 0, "turns": turns}],
            "tstamp": stamp,
        }
        return {**row, "conv_metadata": style_counts(answers[-1], tokens[-1])} if as_mapping else row
    if benchmark == "arena_hard":
        messages = [
            {"role": "user", "content": question.turns[0]},
            {"role": "assistant", "content": {"answer": answers[0]}},
        ]
        return {
            "uid": question.row["uid"],
            "ans_id": digest([model, question.key, list(answers)]),
            "model": model,
            "messages": messages,
            "tstamp": stamp,
            "metadata": style_counts(answers[0], tokens[0]),
        }
    if benchmark == "alpaca_eval":
        return {
            "instruction": question.turns[0],
            "output": answers[0],
            "generator": model,
            "dataset": question.row.get("dataset", ""),
        }
    conversation = [
        {"role": role, "content": text}
        for turn, answer in zip(question.turns, answers, strict=True)
        for role, text in (("user", turn), ("assistant", answer))
    ]
    return {"prompt": question.row["prompt"], "output": answers[-1], "generator": model, "messages": conversation}


def style_counts(text: str, tokens: int) -> dict[str, Any]:
    """Arena-Hard's `metadata` of an answer: its tokens, and headers, list items and bold passages outside code blocks.

    The tokens are those of the model's own tokenizer, where Arena-Hard counts GPT-4o's.
    """
    plain = re.sub(r"```([^`]*)```", "``````", text)

    def count(pattern: str) -> int:
        return len(re.findall(pattern, plain, re.MULTILINE))

    return {
        "token_len": tokens,
        "header_count": {f"h{level}": count(rf"^#{{{level}}}\s") for level in range(1, 7)},
        "list_count": {"ordered": count(r"^\s*\d+\.\s"), "unordered": count(r"^\s*[-*+]\s")},
        "bold_count": {"**": count(r"\*\*[^*\n]+\*\*"), "__": count(r"__[^_\n]+__")},
    }


def read_answers(path: Path) -> list[Answer]:
    """Answers of a model, of whichever benchmark: AlpacaEval's model_outputs.json, MT-Bench's or Arena-Hard's
    jsonl, or plain rows of prompt and output.

    An answer that is missing or no text is None, to be counted.

    Raises:
        UserError: no row has a known form, or two rows answer one question.
    """
    answers = []
    for number, row in enumerate(read_rows(path), 1):
        if (answer := _answer_of(row, path.stem)) is None:
            raise UserError(f"'{path}' row {number} is no answer: expected output, choices or messages")
        answers.append(answer)
    keys = [answer.key for answer in answers]
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise UserError(f"'{path}' answers {twice[:60]!r} twice: expected one answer to each question")
    return answers


def _answer_of(row: Mapping[str, Any], name: str) -> Answer | None:
    model = next((str(row[key]) for key in ("generator", "model_id", "model") if row.get(key)), name)
    category, dataset = str(row.get("category") or ""), str(row.get("dataset") or "")
    if isinstance(row.get("choices"), list) and row["choices"]:
        choice = row["choices"][0]
        turns = choice.get("turns") if isinstance(choice, Mapping) else None
        texts = [turn.get("content") if isinstance(turn, Mapping) else turn for turn in turns or [None]]
        return Answer(str(row.get("question_id", "")), (), tuple(map(_text_or_none, texts)), model, category)
    if "uid" in row and isinstance(row.get("messages"), list):
        said = [m.get("content") for m in row["messages"] if isinstance(m, Mapping) and m.get("role") == "assistant"]
        asked = [m.get("content") for m in row["messages"] if isinstance(m, Mapping) and m.get("role") == "user"]
        texts = [text.get("answer") if isinstance(text, Mapping) else text for text in said] or [None]
        users = tuple(text for text in asked if isinstance(text, str))
        return Answer(str(row["uid"]), users, tuple(map(_text_or_none, texts)), model, category)
    if "output" not in row:
        return None
    prompt = row.get("instruction", row.get("prompt"))
    if isinstance(row.get("messages"), list) and isinstance(prompt, list):
        asked = [m.get("content") for m in prompt if isinstance(m, Mapping) and m.get("role") == "user"]
        users = tuple(text for text in asked if isinstance(text, str))
        said = [m.get("content") for m in row["messages"] if isinstance(m, Mapping) and m.get("role") == "assistant"]
        return Answer(json.dumps(users), users, tuple(map(_text_or_none, said)), model, category, dataset)
    if not isinstance(prompt, str):
        return None
    return Answer(prompt, (prompt,), (_text_or_none(row["output"]),), model, category, dataset)


def _text_or_none(value: Any) -> str | None:
    return value if isinstance(value, str) else None
