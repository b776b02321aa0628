"""Answers that are no preference pairs -> token ids: a prompt with one response or several, or whole conversations.

Rows are read as strictly as preference data: by the same chat template, with the same reasons for a dropped row. An
answer is stored as the chosen side of a pair. The table format asks for a second side: it is the answer's first token,
with reward 0, and the provenance `answers` tells readers to ignore it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa

from sepo.data.conversation import CONVERSATION, PROMPT_KEY, conversation_text, prompt_key
from sepo.data.encoding import Encoder, end_ids_of, make_encoder, truncate_pair
from sepo.data.fingerprints import short_digest, tokenizer_fingerprint
from sepo.data.loading import read_rows
from sepo.data.messages import DropRow, Messages, read_cell
from sepo.data.rows import EXTRA_COLUMNS, ROWS_AT_ONCE, DataReport, holds_prompt, normalise_row
from sepo.data.tables import make_table, table_digest, with_provenance
from sepo.errors import UserError, nearest

# Mark in the provenance of a table whose rejected side means nothing.
ANSWERS = "answers"
PROMPTS = ("prompt", "instruction", "question")
RESPONSES = ("response", "responses", "completion", "completions", "answer", "answers", "output", "outputs")
CONVERSATIONS = ("messages", "conversation", "conversations")
_KEYS = ("prompt", "response", "messages", *EXTRA_COLUMNS)


class AnswerColumns(NamedTuple):
    """The columns of a dataset that hold answers.

    Attributes:
        prompt, response: names of two columns; None where `messages` holds both.
        messages: name of the column with whole conversations.
        others: our name of a further column -> its name in the dataset.
    """

    prompt: str | None
    response: str | None
    messages: str | None
    others: Mapping[str, str]


def answer_columns(names: Sequence[str], given: Mapping[str, str]) -> AnswerColumns | None:
    """Find the columns of answers; None if there are none.

    Args:
        names: the columns of the dataset.
        given: our name (prompt, response, messages, system, input, history, tools) -> name in the dataset.

    Raises:
        UserError: a given name is unknown, or several columns may hold the response.
    """
    for ours, theirs in given.items():
        if ours not in _KEYS:
            raise UserError(f"unknown column key '{ours}'{nearest(ours, _KEYS)}: expected {', '.join(_KEYS)}")
        if theirs not in names:
            raise UserError(f"there is no column '{theirs}'{nearest(theirs, names)}: found {', '.join(names)}")

    def column(ours: str, usual: Sequence[str]) -> str | None:
        if ours in given:
            return given[ours]
        there = [name for name in usual if name in names]
        if len(there) > 1:
            raise UserError(
                f"the columns {' and '.join(there)} may hold the {ours}: name one with --column {ours}=NAME"
            )
        return there[0] if there else None

    response, talk = column("response", RESPONSES), None
    prompt = column("prompt", PROMPTS)
    if response is None:
        talk, prompt = column("messages", CONVERSATIONS), None
        if talk is None:
            return None
    elif prompt is None:
        raise UserError(
            f"the column '{response}' holds responses, but no column holds their prompt: found {', '.join(names)}; "
            "name it with --column prompt=NAME"
        )
    return AnswerColumns(prompt, response, talk, {ours: given[ours] for ours in EXTRA_COLUMNS if ours in given})


def answer_rows(dataset: datasets.Dataset, columns: AnswerColumns) -> Iterator[dict[str, Any]]:
    """One row an answer: `prompt` and `chosen` as `normalise_row` reads them, `row`, and its number `answer` there."""
    for start in range(0, len(dataset), ROWS_AT_ONCE):
        for number, row in enumerate(read_rows(dataset, start, min(start + ROWS_AT_ONCE, len(dataset))), start):
            yield from _answers_of(number, row, columns)


def _answers_of(number: int, row: Mapping[str, Any] | None, columns: AnswerColumns) -> Iterator[dict[str, Any]]:
    if row is None:
        yield {"row": number, "answer": 0, "chosen": None}
        return
    common = {EXTRA_COLUMNS[ours]: row[theirs] for ours, theirs in columns.others.items()}
    if "tools" in row:
        common.setdefault("tools", row["tools"])
    if columns.messages is not None:
        yield {**common, "row": number, "answer": 0, "chosen": row[columns.messages]}
        return
    value = row[str(columns.response)]
    several = isinstance(value, list) and bool(value) and not all(isinstance(item, Mapping) for item in value)
    for answer, response in enumerate(value if several else [value]):
        yield {**common, "row": number, "answer": answer, "prompt": row[str(columns.prompt)], "chosen": response}


def tokenize_answers(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    *,
    max_length: int | None = None,
    as_chat: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[pa.Table, DataReport]:
    """Turn answers into a table of kind "pairs" whose chosen side is the answer.

    Args:
        rows: from `answer_rows`; `pair_id` is the number of the row.
        tokenizer: a fast Transformers tokenizer.
        max_length: most tokens of a prompt with its answer, cut as in `tokenize_pairs`; None: nothing is cut.
        as_chat: wrap plain-text prompts as one user turn.
        chat_template_kwargs: keywords for the chat template.

    Returns:
        the table, with the columns `row` and `answer`, and the report of dropped rows.
    """
    encoder = make_encoder(tokenizer, dict(chat_template_kwargs or {}))
    if as_chat and encoder.writer is None:
        raise UserError("`as_chat` needs a chat template, but the tokenizer has none: use an instruct model")
    report = DataReport(rows=len(rows))
    kept: list[dict[str, Any]] = []
    for start in range(0, len(rows), ROWS_AT_ONCE):
        kept += _encoded(encoder, start, rows[start : start + ROWS_AT_ONCE], as_chat, report)
    if max_length is not None:
        _truncate(kept, max_length, report)
    report.kept = len(kept)
    names = ("pair_id", "prompt_ids", "chosen_ids", CONVERSATION, PROMPT_KEY)
    columns: dict[str, Any] = {name: [row[name] for row in kept] for name in names}
    columns["rejected_ids"] = [row["chosen_ids"][:1] for row in kept]
    table = make_table("pairs", columns)
    for name in ("row", "answer"):
        table = table.append_column(name, pa.array([row[name] for row in kept], pa.int64()))
    provenance: dict[str, Any] = {
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "chat_template": short_digest(str(tokenizer.chat_template or "")),
        "dataset": table_digest(table),
        "max_length": max_length,
        "as_chat": as_chat,
        "end_ids": end_ids_of(encoder),
        ANSWERS: True,
    }
    if chat_template_kwargs:
        provenance["chat_template_kwargs"] = dict(chat_template_kwargs)
    return with_provenance(table, "pairs", provenance), report


def _encoded(
    encoder: Encoder, start: int, rows: Sequence[Mapping[str, Any]], as_chat: bool, report: DataReport
) -> list[dict[str, Any]]:
    """The rows that can be read, as token ids."""
    items = []
    for index, row in enumerate(rows, start):
        try:
            pair = normalise_row(_as_pair(row), as_chat=as_chat)
            notes = list(pair.notes)
            items.append((index, row, pair, encoder.item(pair, notes)))
            for note in notes:
                report.note(note)
        except DropRow as drop:
            report.drop(drop.reason, index, drop.detail)
    texts = [text for *_, item in items for text in (item.prompt, item.prompt + item.chosen)]
    ids = encoder.encode(texts) if texts else []
    kept = []
    for (index, row, pair, item), prompt, joint in zip(items, ids[::2], ids[1::2], strict=True):
        try:
            prompt_ids, response_ids, _ = encoder.ids_of(item, prompt, joint, joint)
        except DropRow as drop:
            report.drop(drop.reason, index, drop.detail)
            continue
        kept.append(
            {
                "pair_id": index, "row": row["row"], "answer": row["answer"],
                "prompt_ids": prompt_ids, "chosen_ids": response_ids, "kept_head": encoder.kept_head(prompt_ids),
                CONVERSATION: conversation_text(pair.messages, pair.tools), PROMPT_KEY: prompt_key(pair.messages),
            }
        )  # fmt: skip
    return kept


def _as_pair(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with a second response, the first one and a full stop, so that `normalise_row` reads it."""
    response = read_cell(row["chosen"])
    if response is None:
        raise DropRow("missing value")
    prompt = row.get("prompt")
    if isinstance(response, Messages):
        if not response:
            raise DropRow("no response")
        other: Any = [*response[:-1], {**response[-1], "content": f"{response[-1]['content']}."}]
        return {**row, "chosen": response, "rejected": other}
    if prompt is None and not holds_prompt(response):
        raise DropRow("missing value")
    return {**row, "chosen": response, "rejected": f"{response}."}


def _truncate(rows: list[dict[str, Any]], max_length: int, report: DataReport) -> None:
    """Cut answers that are too long, with their prompt alike in all answers to it."""
    longest: dict[tuple[int, ...], int] = {}
    for row in rows:
        key = tuple(row["prompt_ids"])
        longest[key] = max(longest.get(key, 0), len(row["chosen_ids"]))
    for row in rows:
        prompt, response = row["prompt_ids"], row["chosen_ids"]
        size = longest[tuple(prompt)]
        if len(prompt) + size <= max_length:
            continue
        cut, answer, _ = truncate_pair(
            prompt, response, response[:1], max_length=max_length, keep=row["kept_head"], longest_response=size
        )
        report.truncated_prompts += len(cut) < len(prompt)
        report.truncated_responses += len(answer) < len(response)
        row.update(prompt_ids=cut, chosen_ids=answer)


def only_answers(scores: pa.Table) -> pa.Table:
    """Set the rewards of the side that means nothing to 0."""
    index = scores.column_names.index("rejected_rewards")
    zeros = pa.array([np.zeros(1, np.float32)] * len(scores), pa.list_(pa.float32()))
    return scores.set_column(index, "rejected_rewards", zeros)
