"""Questions and answers of AlpacaEval, MT-Bench, Arena-Hard and of plain files, in each benchmark's own format.

No questions ship with this package: their file is named by a path, or found in an installed package or on the hub at
run time (`find_questions`). The benchmarks' own tools can read the answers.
"""

from __future__ import annotations

import importlib.util
import json
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sepo.data.formats import EXPECTED
from sepo.data.messages import NOT_TEXT, DropRow, Message, check_text, read_cell
from sepo.data.rows import EXTRA_COLUMNS, TextPair, with_columns
from sepo.errors import UserError
from sepo.files import digest
from sepo.judging.judgements import read_rows

BENCHMARKS = ("alpaca_eval", "mt_bench", "arena_hard")
# MT-Bench's sampling temperature by category (FastChat's `temperature_config`); 0.7 for any other category.
TEMPERATURES = {
    "writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0, "stem": 0.1,
    "humanities": 0.1, "arena-hard-200": 0.0,
}  # fmt: skip
# Sources of a benchmark's questions if no file is named: a package, and the hub.
_IN_PACKAGES = {"mt_bench": ("fastchat", "llm_judge/data/mt_bench/question.jsonl")}
_ON_HUB = {
    "alpaca_eval": ("tatsu-lab/alpaca_eval", "alpaca_eval.json"),
    "mt_bench": ("HuggingFaceH4/mt_bench_prompts", "raw/question.jsonl"),
    "arena_hard": ("lmarena-ai/arena-hard-auto", "data/arena-hard-v2.0/question.jsonl"),
}


class Question(NamedTuple):
    """One prompt of a file.

    Attributes:
        key: identifies the question: question_id, uid, or the instruction itself.
        turns: of the user, to be answered one after the other; most questions have one.
        category: of the benchmark; empty without one.
        row: the row of the file.
        context: given messages before the turns: a system turn, earlier turns with their answers.
    """

    key: str
    turns: tuple[str, ...]
    category: str
    row: Mapping[str, Any]
    context: tuple[Message, ...] = ()


class Answer(NamedTuple):
    """A model's answer to a question: a text for each turn (None for a missing one)."""

    key: str
    turns: tuple[str, ...]
    answers: tuple[str | None, ...]
    model: str
    category: str = ""
    dataset: str = ""
    context: tuple[Message, ...] = ()


def find_questions(name: str) -> tuple[Path, str]:
    """The file named by `--prompts`, and its benchmark ("" for a plain file).

    A name of `BENCHMARKS` is searched in an installed package, then on the hub; anything else is a path.

    Raises:
        UserError: there is no such file.
    """
    if name not in BENCHMARKS:
        path = Path(name)
        if not path.is_file():
            raise UserError(f"no prompts at '{name}': expected {EXPECTED}, or one of {', '.join(BENCHMARKS)}")
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
            f"the questions of {name} cannot be downloaded ({type(error).__name__}): get {file} of the dataset "
            f"{repository} and give its path as --prompts"
        ) from None


def read_questions(path: Path, benchmark: str = "") -> tuple[list[Question], str]:
    """Questions of a file, and the benchmark whose format they have ("" for plain prompts).

    Known formats are AlpacaEval (`instruction`), MT-Bench and Arena-Hard v0.1 (`question_id`, `turns`), Arena-Hard v2
    (`uid`, `prompt`), and plain rows with `prompt`, `messages` or `conversations`: a text, or messages. Messages up to
    the last one that is not the user's are sent as they are; the user's turns after it are asked one after the other.
    The columns `system`, `system_prompt`, `history` and `input` belong to the prompt, as in preference data.

    Raises:
        UserError: a row has another format, ends with an answer or has tools; or two rows have the same key.
    """
    questions = []
    for number, row in enumerate(read_rows(path), 1):
        question, own_benchmark = read_question(path, row, number)
        benchmark = benchmark or own_benchmark
        questions.append(question)
    if twice := _repeated(questions):
        raise UserError(f"'{path}' asks {twice[:60]!r} twice: expected each question once")
    return questions, benchmark


def read_question(path: Path, row: Mapping[str, Any], number: int) -> tuple[Question, str]:
    """The question in row `number` of a file, and the benchmark whose format the row has. Raises UserError."""
    try:
        if unread := next((name for name in NOT_TEXT if row.get(name)), None):
            raise DropRow("not text", f"'{unread}'")
        asked = _asked(row, number)
        for text in _texts(asked[2]) if asked is not None else ():
            check_text(text)
    except DropRow as drop:
        reason = f"{drop.reason} {drop.detail}".rstrip()
        raise UserError(f"'{path}' row {number} holds a prompt that cannot be asked: {reason}") from None
    if asked is None:
        raise UserError(f"'{path}' row {number} holds no prompt: expected instruction, prompt, messages or turns")
    key, context, turns, benchmark = asked
    texts = _texts(turns)
    if not texts or len(texts) < len(turns) or not all(text.strip() for text in texts):
        raise UserError(f"'{path}' row {number} has an empty turn: expected texts")
    return Question(key, texts, str(row.get("category") or ""), row, tuple(context)), benchmark


def _asked(row: Mapping[str, Any], number: int) -> tuple[str, Sequence[Message], list[Any], str] | None:
    """The key, the given messages, the turns and the benchmark of a row of questions; None for another format."""
    if isinstance(row.get("turns"), list):
        turns = [turn.get("content") if isinstance(turn, Mapping) else turn for turn in row["turns"]]
        arena = any(isinstance(turn, Mapping) for turn in row["turns"]) or "cluster" in row
        return str(row.get("question_id", number)), (), turns, "arena_hard" if arena else "mt_bench"
    if "uid" in row and isinstance(row.get("prompt"), str):
        return str(row["uid"]), (), [row["prompt"]], "arena_hard"
    if (conversation := _conversation(row)) is None:
        return None
    return *conversation, "alpaca_eval" if isinstance(row.get("instruction"), str) else ""


_PROMPTS = ("prompt", "messages", "conversation", "conversations")


def _conversation(row: Mapping[str, Any]) -> tuple[str, list[Message], list[str]] | None:
    """The key, the given messages and the user's turns of a row of AlpacaEval or of plain prompts.

    Raises:
        DropRow: the messages cannot be read, or do not end with the user's turn.
    """
    if isinstance(row.get("instruction"), str):
        cell: str | list[Message] | None = row["instruction"]
    else:
        given = (row[name] for name in _PROMPTS if isinstance(row.get(name), str | list | Mapping) and row[name] != "")
        cell = read_cell(next(given, None))
    if cell is None:
        return None
    messages = [{"role": "user", "content": cell}] if isinstance(cell, str) else list(cell)
    if not messages:
        return None
    columns = {
        EXTRA_COLUMNS["system"]: row.get("system", row.get("system_prompt")),
        **{EXTRA_COLUMNS[name]: row.get(name) for name in ("input", "history")},
        "tools": row.get("tools") or getattr(cell, "tools", None),
    }
    pair = with_columns(TextPair(messages, "", ""), columns)
    if pair.tools or any("tool_calls" in message or message["role"] == "tool" for message in pair.messages):
        raise DropRow("tools", "questions are asked without tools")
    messages = list(pair.messages)
    at = max((i for i, message in enumerate(messages, 1) if message["role"] != "user"), default=0)
    context, turns = messages[:at], [message["content"] for message in messages[at:]]
    if not turns:
        raise DropRow(f"it ends with a turn of the {context[-1]['role']}: expected the user's turn last")
    if context:
        return json.dumps([*context, *turns]), context, turns
    return turns[0] if isinstance(cell, str) else json.dumps(turns), context, turns


def _contents(messages: Sequence[Any], role: str) -> list[Any]:
    """The contents of the messages of one role."""
    return [one.get("content") for one in messages if isinstance(one, Mapping) and one.get("role") == role]


def _texts(values: Sequence[Any]) -> tuple[str, ...]:
    return tuple(value for value in values if isinstance(value, str))


def _repeated(rows: Sequence[Question] | Sequence[Answer]) -> str | None:
    """The first key that two rows have."""
    seen: set[str] = set()
    for row in rows:
        if row.key in seen:
            return row.key
        seen.add(row.key)
    return None


def temperature_of(question: Question, benchmark: str, given: float | None) -> float:
    """The sampling temperature of a question: the given one, else its benchmark's.

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
    """The row of an answer in the benchmark's format; `tokens` is the length of each of its turns."""
    row = question.row
    answer_id = digest([model, question.key, list(answers)])
    if benchmark == "arena_hard" and "uid" in row:
        messages = _messages(question.turns[:1], [{"answer": answers[0]}])
        head = {"uid": row["uid"], "ans_id": answer_id, "model": model, "messages": messages}
        return {**head, "tstamp": time.time(), "metadata": style_counts(answers[0], tokens[0])}
    if benchmark in ("mt_bench", "arena_hard"):
        turns = [{"content": text} for text in answers] if benchmark == "arena_hard" else list(answers)
        head = {"question_id": row.get("question_id", question.key), "answer_id": answer_id, "model_id": model}
        answer = {**head, "choices": [{"index": 0, "turns": turns}], "tstamp": time.time()}
        if benchmark == "arena_hard":
            answer["conv_metadata"] = style_counts(answers[-1], tokens[-1])
        return answer
    if benchmark == "alpaca_eval":
        head = {"instruction": question.turns[0], "output": answers[0], "generator": model}
        given = {"history": list(question.context)} if question.context else {}
        return {**head, **given, "dataset": row.get("dataset", "")}
    asked = [*question.context, *({"role": "user", "content": text} for text in question.turns)]
    prompt = question.turns[0] if question.key == question.turns[0] else asked
    messages = [*question.context, *_messages(question.turns, answers)]
    return {"prompt": prompt, "output": answers[-1], "generator": model, "messages": messages}


def _messages(turns: Sequence[str], answers: Sequence[Any]) -> list[dict[str, Any]]:
    return [
        {"role": role, "content": content}
        for pair in zip(turns, answers, strict=True)
        for role, content in zip(("user", "assistant"), pair, strict=True)
    ]


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
    """Answers of a model in any benchmark's format: AlpacaEval's model_outputs.json, MT-Bench's or Arena-Hard's jsonl,
    or plain rows of prompt and output.

    A missing answer, or one that is no text, is None; callers count these.

    Raises:
        UserError: a row has another format, or two rows answer the same question.
    """
    answers = []
    for number, row in enumerate(read_rows(path), 1):
        try:
            answer = _answer_of(row, path.stem)
        except DropRow as drop:
            raise UserError(f"'{path}' row {number} holds a prompt that cannot be read: {drop.reason}") from None
        if answer is None:
            raise UserError(f"'{path}' row {number} is no answer: expected output, choices or messages")
        answers.append(answer)
    if twice := _repeated(answers):
        raise UserError(f"'{path}' answers {twice[:60]!r} twice: expected one answer to each question")
    return answers


def _answer_of(row: Mapping[str, Any], file: str) -> Answer | None:
    """The answer in a row; None for a row of another format. `file` is the model's name if the row has none."""
    if isinstance(row.get("choices"), list) and row["choices"]:
        key, texts = _fastchat_answer(row)
        answer = Answer(key, (), tuple(texts), "")
    elif "uid" in row and isinstance(row.get("messages"), list):
        answer = _arena_answer(row)
    elif "output" in row and (conversation := _conversation(row)) is not None:
        key, context, turns = conversation
        whole = isinstance(row.get("messages"), list) and isinstance(row.get("prompt"), list)
        given = sum(message["role"] == "assistant" for message in context)
        texts = _contents(row["messages"], "assistant")[given:] if whole else [row["output"]]
        answer = Answer(key, tuple(turns), tuple(texts), "", context=tuple(context))
    else:
        return None
    model = next((str(row[name]) for name in ("generator", "model_id", "model") if row.get(name)), file)
    category, dataset = str(row.get("category") or ""), str(row.get("dataset") or "") if "output" in row else ""
    known = tuple(text if isinstance(text, str) else None for text in answer.answers)
    return answer._replace(answers=known, model=model, category=category, dataset=dataset)


def _fastchat_answer(row: Mapping[str, Any]) -> tuple[str, list[Any]]:
    """Key and answers of a row of MT-Bench or Arena-Hard v0.1, which does not repeat its questions."""
    choice = row["choices"][0]
    turns = choice.get("turns") if isinstance(choice, Mapping) else None
    texts = [turn.get("content") if isinstance(turn, Mapping) else turn for turn in turns or [None]]
    return str(row.get("question_id", "")), texts


def _arena_answer(row: Mapping[str, Any]) -> Answer:
    """The answer in a row of Arena-Hard v2."""
    answers = _contents(row["messages"], "assistant")
    texts = [answer.get("answer") if isinstance(answer, Mapping) else answer for answer in answers]
    return Answer(str(row["uid"]), _texts(_contents(row["messages"], "user")), tuple(texts or [None]), "")
