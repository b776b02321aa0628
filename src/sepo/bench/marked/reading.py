"""Values of the tokens of marked answers: the oracle's rewards, and what needs no oracle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sepo.bench.marked.measures import Reading
from sepo.bench.marked.texts import Marked
from sepo.data.ragged import flat
from sepo.data.tables import provenance_of
from sepo.rewards.answers import tokenize_answers
from sepo.rewards.function import token_offsets
from sepo.rewards.passes import Models, kept_logps


def read_answers(
    models: Models,
    answers: Sequence[Marked],
    work: Path,
    *,
    as_chat: bool = False,
    max_length: int = 2048,
    device: str = "auto",
) -> tuple[list[Reading | None], dict[str, int]]:
    """The values of each answer, and counts of what could not be read. An interrupted call continues from `work`.

    Values are lower where a mistake is expected: `oracle`, the token reward s; `surprisal`, the reference's
    log-probability; `early` and `late`, the place in the answer.
    """
    rows = [
        {"row": index, "answer": 0, "prompt": item.prompt, "chosen": item.answer} for index, item in enumerate(answers)
    ]
    table, report = tokenize_answers(rows, models.tokenizer, as_chat=as_chat)
    lengths = flat(table.column("prompt_ids"))[1] + flat(table.column("chosen_ids"))[1]
    short = np.flatnonzero(lengths <= max_length)
    long = len(table) - len(short)
    table = table.take(short)
    readings: list[Reading | None] = [None] * len(answers)
    changed = 0
    if len(table):
        stored = kept_logps(models, table, work, device)
        logps = [flat(one.column("chosen_logps"))[0].astype(np.float64) for one in stored]
        ids, sizes = flat(table.column("chosen_ids"))
        given = [answers[row] for row in table.column("row").to_pylist()]
        texts = [item.answer for item in given]
        offsets = token_offsets(ids, sizes, models.tokenizer, provenance_of(table)["end_ids"], texts)
        stops = np.cumsum(sizes)
        for row, text, places, stop, size in zip(
            table.column("row").to_pylist(), texts, offsets, stops, sizes, strict=True
        ):
            if places is None:
                changed += 1
                continue
            part = slice(stop - size, stop)
            values = {
                "oracle": logps[0][part] - logps[1][part],
                "surprisal": logps[1][part],
                "early": np.arange(size, dtype=np.float64),
                "late": -np.arange(size, dtype=np.float64),
            }
            readings[row] = Reading(_characters(text)[np.array(places, np.int64).reshape(-1, 2)], values)
    return readings, {"too_long": long, "dropped": sum(report.dropped.values()), "changed": changed}


def _characters(text: str) -> np.ndarray:
    """The number of the character at each byte of a text's UTF-8, and at its end, `[bytes + 1]`."""
    widths = [len(character.encode()) for character in text]
    return np.append(np.repeat(np.arange(len(text)), widths), len(text))
