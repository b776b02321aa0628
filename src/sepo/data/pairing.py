"""Labels, scores and rankings of public preference datasets -> pairs of chosen and rejected.

`PairsFrom` (the recipe's `data.pairs_from`) describes four forms: two responses with a label or a score for the better
one; one column with a list of responses and their scores or ranks; several rows with the same prompt and a score each;
two conversations as lists of turns. A row without a pair stays in the table with the reason in `rows.DROP_COLUMN`, so
that it is counted with the other drops. `PRESETS` holds the descriptions of public datasets by name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa

from sepo.data.formats import column_of
from sepo.data.messages import DropRow, Messages, cell_of, read_cell
from sepo.data.rows import DROP_COLUMN, ROWS_AT_ONCE
from sepo.errors import UserError, nearest, wrong_type
from sepo.recipe.settings import PairsFrom


@dataclass(frozen=True)
class Preset:
    """Settings for a public dataset.

    Attributes:
        dataset: name on the hub.
        pairs_from: description of labels, scores or ranks; None: the dataset has the columns chosen and rejected.
        columns: as `data.columns`.
        known_by: columns by which `suggestion` recognises the dataset; empty: never suggested.
        data_dir: folder of the dataset's repository that holds these columns.
    """

    dataset: str
    pairs_from: PairsFrom | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    known_by: tuple[str, ...] = ()
    data_dir: str | None = None


PRESETS: dict[str, Preset] = {
    "ultrafeedback": Preset(
        "openbmb/UltraFeedback",
        # The mean of the four aspects; `overall_score` has known errors (10 for a critique of 1).
        PairsFrom(responses="completions", text="response", score="fine-grained_score"),
        {"prompt": "instruction"},
        ("instruction", "completions"),
    ),
    "pku-saferlhf": Preset(
        "PKU-Alignment/PKU-SafeRLHF",
        PairsFrom(responses=["response_0", "response_1"], label="better_response_id", first=[0], second=[1]),
        known_by=("response_0", "response_1", "better_response_id"),
    ),
    "pku-saferlhf-safer": Preset(
        "PKU-Alignment/PKU-SafeRLHF, by harmlessness",
        PairsFrom(responses=["response_0", "response_1"], label="safer_response_id", first=[0], second=[1]),
    ),
    "helpsteer2": Preset(
        "nvidia/HelpSteer2",
        PairsFrom(responses="response", group_by="prompt", score="helpfulness"),
        known_by=("prompt", "response", "helpfulness", "verbosity"),
    ),
    "helpsteer2-preference": Preset(
        "nvidia/HelpSteer2, data_dir preference",
        PairsFrom(responses=["response_1", "response_2"], score="preference_strength"),
        known_by=("response_1", "response_2", "preference_strength"),
        data_dir="preference",
    ),
    "helpsteer3": Preset(
        "nvidia/HelpSteer3",
        PairsFrom(responses=["response1", "response2"], score="overall_preference"),
        {"prompt": "context"},
        ("context", "response1", "response2", "overall_preference"),
    ),
    "nectar": Preset(
        "berkeley-nest/Nectar",
        PairsFrom(responses="answers", text="answer", score="rank", lower_is_better=True),
        known_by=("prompt", "answers", "good_natured"),
    ),
    "shp": Preset(
        "stanfordnlp/SHP",
        PairsFrom(responses=["human_ref_A", "human_ref_B"], label="labels", first=[1], second=[0]),
        {"prompt": "history"},
        ("history", "human_ref_A", "human_ref_B", "labels"),
    ),
    "arena-55k": Preset(
        "lmarena-ai/arena-human-preference-55k",
        PairsFrom(responses=["response_a", "response_b"], score=["winner_model_a", "winner_model_b"], turns=True),
        known_by=("response_a", "response_b", "winner_model_a", "winner_model_b"),
    ),
    "arena": Preset(
        "lmsys/chatbot_arena_conversations (33k), lmarena-ai/arena-human-preference-140k",
        PairsFrom(
            responses=["conversation_a", "conversation_b"], label="winner", first=["model_a"], second=["model_b"]
        ),
        known_by=("conversation_a", "conversation_b", "winner"),
    ),
    "orca-dpo-pairs": Preset(
        "Intel/orca_dpo_pairs",
        columns={"system": "system", "prompt": "question"},
        known_by=("system", "question", "chosen", "rejected"),
    ),
    "distilabel-orca": Preset(
        "argilla/distilabel-intel-orca-dpo-pairs",
        # In rows marked "swapped", chosen and rejected are already in the right order.
        PairsFrom(responses=["chosen", "rejected"], label="status", first=["unchanged", "swapped"], second=[]),
        {"system": "system", "prompt": "input"},
        ("system", "input", "chosen", "rejected", "status"),
    ),
    "distilabel": Preset(
        "datasets of distilabel's UltraFeedback task",
        PairsFrom(responses="generations", score="ratings"),
        {"prompt": "instruction"},
        ("instruction", "generations", "ratings"),
    ),
    "unpaired": Preset(
        "data for KTO: a good and a bad response to one prompt, if it has both",
        PairsFrom(responses="completion", group_by="prompt", score="label"),
        known_by=("prompt", "completion", "label"),
    ),
}
_TIES = {"tie", "tie (bothbad)", "tie (both bad)", "both_bad", "bothbad", "both bad", "both_good", "none", "same"}


def preset_of(pairs_from: str | PairsFrom | None) -> Preset:
    """The preset of a name, or a preset from a description.

    Raises:
        UserError: there is no preset with this name.
    """
    if not isinstance(pairs_from, str | PairsFrom | None):
        raise wrong_type("pairs_from", pairs_from, "the name of a preset, or a sepo.recipe.settings.PairsFrom")
    if not isinstance(pairs_from, str):
        return Preset("", pairs_from)
    if pairs_from not in PRESETS:
        raise UserError(
            f"unknown pairs_from '{pairs_from}'{nearest(pairs_from, PRESETS)}: expected {', '.join(PRESETS)}, or a "
            "description (docs/data.md)"
        )
    return PRESETS[pairs_from]


def suggestion(columns: Sequence[str]) -> str:
    """A hint at the preset whose columns a dataset has; empty if no preset matches."""
    matches = {name: p for name, p in PRESETS.items() if p.known_by and set(p.known_by) <= set(columns)}
    if not matches:
        return ""
    name = max(matches, key=lambda name: len(matches[name].known_by))
    return f"; these look like the columns of {PRESETS[name].dataset}: set pairs_from: {name}"


def make_pairs(dataset: datasets.Dataset, how: PairsFrom, prompt: str | None) -> datasets.Dataset:
    """Turn a dataset with labels, scores or ranks into one with `prompt`, `chosen` and `rejected`.

    Args:
        dataset: rows as stored.
        how: meaning of the columns.
        prompt: name of the prompt column; None: the responses contain the prompt (conversations).

    Returns:
        `prompt` (if there is one), `chosen`, `rejected` and `drop_reason` (null, or the reason why the row gives no
        pair). All columns that this function does not read, too, if each row of the source makes one row.

    Raises:
        UserError: a column is missing.
    """
    _check_columns(dataset, how, prompt)
    names = ["prompt", "chosen", "rejected", DROP_COLUMN] if prompt else ["chosen", "rejected", DROP_COLUMN]
    rows = _grouped(dataset, how, prompt or "") if how.group_by else _single(dataset, how, prompt)
    columns: dict[str, list] = {name: [] for name in names}
    for row in rows:
        for name in names:
            columns[name].append(row.get(name))
    pairs = datasets.Dataset(pa.table({name: column_of(values) for name, values in columns.items()}))
    if len(pairs) == len(dataset) and not how.group_by:
        read = {*names, *_columns_read(how, prompt)}
        kept = [name for name in dataset.column_names if name not in read]
        return datasets.concatenate_datasets([dataset.select_columns(kept), pairs], axis=1) if kept else pairs
    return pairs


def _columns_read(how: PairsFrom, prompt: str | None) -> list[str]:
    responses = [how.responses] if isinstance(how.responses, str) else how.responses
    scores = [how.score] if isinstance(how.score, str) else how.score or []
    in_items = isinstance(how.responses, str) and not how.group_by and how.text is not None
    names = [*responses, *([] if in_items else scores), how.label, how.group_by, prompt]
    return [name for name in names if name is not None]


def _check_columns(dataset: datasets.Dataset, how: PairsFrom, prompt: str | None) -> None:
    for name in _columns_read(how, prompt):
        if name not in dataset.column_names:
            found = ", ".join(f"'{column}'" for column in dataset.column_names[:20])
            raise UserError(
                f"pairs_from names the column '{name}'{nearest(name, dataset.column_names)}, which the dataset does "
                f"not have: found {found}"
            )


def _read(dataset: datasets.Dataset, names: Sequence[str | None]) -> Iterator[dict[str, Any]]:
    dataset = dataset.select_columns([name for name in dict.fromkeys(names) if name is not None]).with_format(None)
    for start in range(0, len(dataset), ROWS_AT_ONCE):
        batch = dataset[start : start + ROWS_AT_ONCE]
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, map(cell_of, values), strict=True))


def _single(dataset: datasets.Dataset, how: PairsFrom, prompt: str | None) -> Iterator[dict[str, Any]]:
    """Pairs from rows that each hold all responses to a prompt."""
    responses = [how.responses] if isinstance(how.responses, str) else how.responses
    scores = [how.score] if isinstance(how.score, str) else how.score or []
    names = [*responses, *(name for name in scores if name in dataset.column_names), how.label, prompt]
    for row in _read(dataset, names):
        given = {"prompt": row.get(prompt)} if prompt else {}
        try:
            pairs = list(_pairs_of_two(row, how) if len(responses) == 2 else _pairs_of_list(row, how))
        except DropRow as drop:
            yield {**given, DROP_COLUMN: f"{drop.reason}: {drop.detail}" if drop.detail else drop.reason}
            continue
        for chosen, rejected in pairs:
            if how.turns:
                yield _in_turns(given.get("prompt"), chosen, rejected)
            else:
                yield {**given, "chosen": chosen, "rejected": rejected}


def _pairs_of_two(row: Mapping[str, Any], how: PairsFrom) -> Iterator[tuple[Any, Any]]:
    first, second = (row[name] for name in how.responses)
    if how.label is not None:
        first_is_better = _by_label(row[how.label], how)
    elif isinstance(how.score, str):  # a negative score means that the first is better
        score = _number(row[how.score])
        first_is_better = _better(-score, 0.0, how)
    else:
        assert how.score is not None
        first_is_better = _better(_number(row[how.score[0]]), _number(row[how.score[1]]), how)
    yield (first, second) if first_is_better else (second, first)


def _by_label(label: Any, how: PairsFrom) -> bool:
    if label is None:
        raise DropRow("missing value")
    spelling = _spelling(label)
    if spelling in map(_spelling, how.first):
        return True
    if spelling in map(_spelling, how.second):
        return False
    if spelling in _TIES or spelling in map(_spelling, how.ties):
        raise DropRow("tie")
    raise DropRow("unknown label", f"'{str(label)[:40]}'")


def _spelling(value: Any) -> str:
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip().lower()


def _number(value: Any) -> float:
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise DropRow("unknown label", f"'{value[:40]}'") from None
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        raise DropRow("missing value")
    if not isinstance(value, int | float):
        raise DropRow("wrong type")
    return float(value)


def _better(first: float, second: float, how: PairsFrom) -> bool:
    if first == second:
        raise DropRow("tie")
    return (first > second) != how.lower_is_better


def _pairs_of_list(row: Mapping[str, Any], how: PairsFrom) -> Iterator[tuple[Any, Any]]:
    assert isinstance(how.responses, str)
    assert isinstance(how.score, str)
    items = row[how.responses]
    if isinstance(items, str):
        items = _json_list(items)
    if not isinstance(items, list):
        raise DropRow("missing value" if items is None else "wrong type")
    if how.text is None:
        scores = row[how.score]
        scores = _json_list(scores) if isinstance(scores, str) else scores
        if not isinstance(scores, list) or len(scores) != len(items):
            raise DropRow("missing value" if scores is None else "wrong type")
        scored = list(zip(scores, items, strict=True))
    else:
        if not all(isinstance(item, Mapping) for item in items):
            raise DropRow("wrong type")
        scored = [(item.get(how.score), item.get(how.text)) for item in items]
    yield from _ranked(scored, how)


def _ranked(scored: Sequence[tuple[Any, Any]], how: PairsFrom) -> Iterator[tuple[Any, Any]]:
    """Pairs of scored responses: the best with the worst, or all pairs with different scores."""
    usable = []
    for score, response in scored:
        if _is_missing(response) or _is_missing(score):
            continue
        number = _number(score)
        usable.append((-number if how.lower_is_better else number, response))
    if len(usable) < 2:
        raise DropRow("one response")
    try:
        pairs = pick_pairs([Ranked(*item) for item in usable], _PICKS[how.pick])
    except LookupError:
        raise DropRow("tie") from None
    for chosen, rejected in pairs:
        yield chosen.response, rejected.response


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))  # pandas writes NaN


class Ranked(NamedTuple):
    """A response with its score; higher is better. `whole`: it may be chosen."""

    score: float
    response: Any
    whole: bool = True


_PICKS = {"extremes": "best-worst", "all": "all"}


def pick_pairs(
    ranked: Sequence[Ranked], pick: str, min_gap: float = 0.0, draw: np.random.Generator | None = None
) -> list[tuple[Ranked, Ranked]]:
    """Pairs of a chosen and a rejected response to one prompt.

    Args:
        pick: "best-worst", "best-random" (rejected: a random one of those below the best), or "all".
        min_gap: the smallest difference of their scores. Equal scores give no pair.
        draw: for "best-random".

    Raises:
        LookupError: no pair; its argument is why: "one_answer", "no_whole_answer", "tie", or "gap" (no whole response
            is that far above another).

    >>> pick_pairs([Ranked(1, "x"), Ranked(3, "y"), Ranked(2, "z")], "best-worst")
    [(Ranked(score=3, response='y', whole=True), Ranked(score=1, response='x', whole=True))]
    """
    if len(ranked) < 2:
        raise LookupError("one_answer")
    if not any(one.whole for one in ranked):
        raise LookupError("no_whole_answer")
    ranked = sorted(ranked, key=lambda one: -one.score)  # stable: ties keep their order
    if ranked[0].score == ranked[-1].score:
        raise LookupError("tie")
    pairs = [
        (chosen, rejected)
        for chosen, rejected in combinations(ranked, 2)
        if chosen.whole and chosen.score > rejected.score and chosen.score - rejected.score >= min_gap
    ]
    if not pairs:
        raise LookupError("gap")
    if pick == "all":
        return pairs
    below = [pair for pair in pairs if pair[0] is pairs[0][0]]
    if pick == "best-worst" or draw is None:
        return below[-1:]
    return [below[int(draw.integers(len(below)))]]


def _grouped(dataset: datasets.Dataset, how: PairsFrom, prompt: str) -> Iterator[dict[str, Any]]:
    """Pairs from several rows with one prompt, in the order of their first rows."""
    assert isinstance(how.responses, str)
    assert isinstance(how.score, str)
    assert how.group_by is not None
    groups: dict[str, list[tuple[Any, Any]]] = {}
    prompts: dict[str, Any] = {}
    for row in _read(dataset, [how.group_by, how.responses, how.score, prompt or None]):
        key = json.dumps(row[how.group_by], sort_keys=True, default=str)
        prompts.setdefault(key, row[prompt or how.group_by])
        groups.setdefault(key, []).append((row[how.score], row[how.responses]))
    for key, scored in groups.items():
        given = {"prompt": prompts[key]}
        try:
            for chosen, rejected in _ranked(scored, how):
                yield {**given, "chosen": chosen, "rejected": rejected}
        except DropRow as drop:
            yield {**given, DROP_COLUMN: f"{drop.reason}: {drop.detail}" if drop.detail else drop.reason}


def _in_turns(prompt: Any, chosen: Any, rejected: Any) -> dict[str, Any]:
    """Two conversations from lists of turns: the user's, and those of both responses."""
    try:
        questions, *sides = (_turns(value) for value in (prompt, chosen, rejected))
    except DropRow as drop:
        return {DROP_COLUMN: drop.reason}
    row: dict[str, Any] = {}
    for name, answers in zip(("chosen", "rejected"), sides, strict=True):
        if len(answers) != len(questions):
            return {DROP_COLUMN: "no response"}
        row[name] = [
            {"role": role, "content": text}
            for turn in zip(questions, answers, strict=True)
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
    return row


def _turns(value: Any) -> list[str]:
    value = _json_list(value) if isinstance(value, str) else value
    if not isinstance(value, list) or not value:
        raise DropRow("wrong type")
    if not all(isinstance(text, str) for text in value):
        raise DropRow("missing value")
    return value


def _json_list(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        cell = read_cell(text)
        return cell if isinstance(cell, Messages) else [text]
