"""The folder of sampled pairs: ordinary preference data, a record of how they were made, and a data card.

data/train.parquet (or .jsonl)    the pairs
pairs.json                        counts, lengths, and how the pairs were made
README.md                         the data card
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from sepo.data.tables import write_parquet
from sepo.errors import UserError
from sepo.files import write_json, write_text
from sepo.hub.card import CARD, may_write, pairs_card
from sepo.report.edges import length_caution
from sepo.sampling.pairs import Made, length_figures, length_line

RECORD = "pairs.json"
RULES = {
    "best-worst": "Of each prompt, the best whole answer is chosen and the worst answer is rejected.",
    "best-random": "Of each prompt, the best whole answer is chosen, and a random answer below it is rejected.",
    "all": "Every whole answer is chosen over every answer to its prompt with a lower score.",
    "strong-weak": "An answer of the strong model is chosen over an answer of the weak one; nothing was judged.",
}


class NoPairs(UserError):
    """Answers of which no pair can be made."""


def write_pairs_folder(
    out: Path,
    made: Made,
    table: pa.Table | None,
    made_with: Mapping[str, Any],
    *,
    rule: str,
    name: str,
    form: Literal["parquet", "jsonl"] = "parquet",
) -> dict[str, Any]:
    """Write pairs with their card.

    Args:
        table: the responses, for what score and length have in common; None where there are no scores.
        made_with: model, judge and settings, for the card.
        rule: a key of `RULES`.
        name: of the data in the card.

    Returns:
        the counts and figures (`pairs.length_figures`), and `caution`, a sentence where length explains the score.

    Raises:
        NoPairs: there is no pair.
    """
    if not made.pairs:
        raise NoPairs(f"no pair can be made: {'; '.join(made.lines())}")
    figures = length_figures(made.pairs, table)
    caution = length_caution({**figures, "prompts": made.counts["prompts"]})
    file = f"data/train.{form}"
    if form == "jsonl":
        write_text(out / file, "".join(json.dumps(pair) + "\n" for pair in made.pairs))
    else:
        write_parquet(out / file, pa.Table.from_pylist(list(made.pairs)))
    results = {**made.counts, **figures, "caution": caution}
    write_json(out / RECORD, {"rule": rule, "made_with": dict(made_with), **results})
    if may_write(out / CARD):
        length = [length_line(figures), *([caution] if caution else [])]
        write_text(out / CARD, pairs_card(name, RULES[rule], _in_words(made_with), made.lines(), length, file))
    return results


def lines_of(made: Made, results: Mapping[str, Any]) -> list[str]:
    """What a command prints about the pairs."""
    lines = [*made.lines(), length_line(results)]
    return [*lines, f"WARNING: {results['caution']}"] if results.get("caution") else lines


def _in_words(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by a name in words; empty ones are left out."""
    words: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{str(key).replace('_', ' ')}"
        if isinstance(value, Mapping):
            words |= _in_words(value, f"{name}, ")
        elif isinstance(value, Sequence) and not isinstance(value, str):
            words[name] = ", ".join(map(str, value))
        elif value is not None and value != "":
            words[name] = value
    return words
