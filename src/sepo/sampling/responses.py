"""The responses table: one row a prompt, with its sampled answers, their scores, ends, tokens and temperatures.

    prompt          string          the prompt in words
    conversation    string          its messages as JSON (`sepo.data.conversation`)
    plain           bool            the prompt is a plain text without a chat template
    answers         list<string>    the texts, without thinking; "" for none
    scores          list<float64>   higher is better; null without a score
    finish_reasons  list<string>    stop, length (cut off), unknown, or none (no answer)
    tokens          list<int32>     lengths
    temperatures    list<float64>   of sampling
    answer_ids      list<list<int32>>    token ids of a local model's answers; empty lists for a server
    answer_logps    list<list<float32>>  their log-probabilities at temperature 1, nats
    seed            int64           of sampling

`data.pairs_from: {responses: answers, score: scores}` reads it as it is; `sepo pairs` makes better pairs of it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from sepo.data.conversation import conversation_text
from sepo.data.formats import read_file
from sepo.data.tables import provenance_of, with_provenance, write_parquet
from sepo.errors import UserError, one_line
from sepo.files import append_line, grown_lines
from sepo.sampling.prompts import Prompt

RESPONSES, SAMPLED, SCORED, RECORD = "responses.parquet", "sampled.jsonl", "scored.jsonl", "sampling.json"
STOP, CUT, UNKNOWN, NONE = "stop", "length", "unknown", "none"
SCHEMA = pa.schema(
    [
        pa.field("prompt", pa.string()),
        pa.field("conversation", pa.string()),
        pa.field("plain", pa.bool_()),
        pa.field("answers", pa.list_(pa.string())),
        pa.field("scores", pa.list_(pa.float64())),
        pa.field("finish_reasons", pa.list_(pa.string())),
        pa.field("tokens", pa.list_(pa.int32())),
        pa.field("temperatures", pa.list_(pa.float64())),
        pa.field("answer_ids", pa.list_(pa.list_(pa.int32()))),
        pa.field("answer_logps", pa.list_(pa.list_(pa.float32()))),
        pa.field("seed", pa.int64()),
    ]
)


class Answers(NamedTuple):
    """The answers to one prompt: texts, ends, lengths, token ids and log-probabilities, one entry an answer."""

    texts: list[str]
    ends: list[str]
    tokens: list[int]
    ids: list[list[int]]
    logps: list[list[float]]


class Grown:
    """A file of values by prompt that grows by batches of prompts: a killed command loses the batch in flight.

    Args:
        path: the file; one with another key is replaced.
        key: digest of everything that the values depend on beside the prompt.
    """

    def __init__(self, path: Path, key: str):
        self.path, self.key = path, key
        rows = grown_lines(path)
        self._begun = bool(rows) and rows[0] == {"key": key}
        if not self._begun:
            path.unlink(missing_ok=True)
        self.values: dict[str, Any] = {name: value for batch in rows[1:] for name, value in batch.items()}
        self.values = self.values if self._begun else {}

    def add(self, batch: Mapping[str, Any]) -> None:
        """Append the values of some prompts; they are on the disk when this returns."""
        if not self._begun:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            append_line(self.path, {"key": self.key})
            self._begun = True
        append_line(self.path, dict(batch))
        self.values |= batch

    def forget(self, wanted: Callable[[Any], bool]) -> None:
        """Leave out these values until `add` replaces them."""
        self.values = {name: value for name, value in self.values.items() if not wanted(value)}


def responses_table(
    prompts: Sequence[Prompt],
    answers: Sequence[Answers],
    scores: Sequence[Sequence[float | None]] | None,
    *,
    temperatures: Sequence[float],
    seed: int,
    made_with: Mapping[str, Any],
) -> pa.Table:
    """The table of some prompts; `scores` None leaves all answers without a score, `made_with` is its provenance."""
    count = len(prompts)
    columns: dict[str, list[Any]] = {
        "prompt": [prompt.words for prompt in prompts],
        "conversation": [conversation_text(prompt.messages) for prompt in prompts],
        "plain": [prompt.plain for prompt in prompts],
        "answers": [one.texts for one in answers],
        "scores": [[None] * len(one.texts) for one in answers] if scores is None else [list(row) for row in scores],
        "finish_reasons": [one.ends for one in answers],
        "tokens": [one.tokens for one in answers],
        "temperatures": [list(temperatures)] * count,
        "answer_ids": [one.ids for one in answers],
        "answer_logps": [one.logps for one in answers],
        "seed": [seed] * count,
    }
    table = pa.table([pa.array(columns[field.name], field.type) for field in SCHEMA], schema=SCHEMA)
    return with_provenance(table, "responses", made_with)


def write_responses(path: Path, table: pa.Table) -> Path:
    """Write a responses table; `path` is the file."""
    return write_parquet(path, table)


def read_responses(place: Path) -> pa.Table:
    """A responses table, from its file or the folder of `sepo sample`.

    Raises:
        UserError: there is none, a column is missing or of another type, or two rows answer one prompt.
    """
    path = place / RESPONSES if place.is_dir() else place
    if not path.is_file():
        raise UserError(f"no responses at '{place}': expected {RESPONSES}, or the folder that `sepo sample` wrote")
    table = read_file(path)
    missing = [name for name in SCHEMA.names if name not in table.column_names]
    if missing:
        raise UserError(f"'{path}' is no responses table: it has no column '{missing[0]}'")
    try:
        table = table.select(SCHEMA.names).cast(SCHEMA.with_metadata(table.schema.metadata))
    except pa.ArrowException as error:
        raise UserError(f"'{path}' is no responses table: {str(error).splitlines()[0][:150]}") from None
    conversations = table.column("conversation")
    if pc.count_distinct(conversations).as_py() < len(table):
        counts = Counter(conversations.to_pylist())
        prompt = next(row["prompt"] for row in rows_of(table) if counts[row["conversation"]] > 1)
        raise UserError(f"'{path}' answers the prompt {one_line(repr(prompt), 60)} in several rows: expected one")
    return table


def made_with(table: pa.Table) -> dict[str, Any]:
    """How the answers of a table were made: model, judge, settings; empty for a table of unknown origin."""
    value = provenance_of(table).get("made_with")
    return value if isinstance(value, dict) else {}


def rows_of(table: pa.Table) -> Iterable[dict[str, Any]]:
    """The rows, in batches of 1,000, without the token ids."""
    names = [name for name in table.column_names if not name.startswith("answer_")]
    for batch in table.select(names).to_batches(1000):
        yield from batch.to_pylist()


def messages_of(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The messages of a row's conversation."""
    return json.loads(row["conversation"])["messages"]


def counts_of(table: pa.Table) -> dict[str, int]:
    """Prompts, answers, and answers that were cut off, are empty, or have no score."""
    ends = [end for row in table.column("finish_reasons").to_pylist() for end in row]
    scores = [score for row in table.column("scores").to_pylist() for score in row]
    return {
        "prompts": len(table),
        "answers": len(ends),
        "cut": ends.count(CUT),
        "no_answer": ends.count(NONE),
        "no_score": scores.count(None) - ends.count(NONE),
        "tokens": sum(sum(row) for row in table.column("tokens").to_pylist()),
    }
