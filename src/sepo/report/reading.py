"""Everything the report reads from disk: score table, selection, log-probabilities, answers and the run's records."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sepo.data import tables
from sepo.data.conversation import CONVERSATION, PROMPT_KEY
from sepo.data.fingerprints import check_table_tokenizer
from sepo.data.previews import common_starts
from sepo.data.ragged import SIDES, flat, segment_sums
from sepo.data.splits import PromptRows
from sepo.errors import UserError, named_error
from sepo.evaluate.accuracy import won
from sepo.evaluate.statistics import numbered
from sepo.files import expand_home
from sepo.recipe.reading import load_recipe
from sepo.report.summary import summarise, training_curves

MODELS = ("reference", "oracle", "policy")
# Most characters of prompts and answers in a page: about a megabyte of its file.
BUDGET = 3_000_000
_TEXTS = ("prompt", "base", "policy")
_NUMBERS = (
    "base_gold", "policy_gold", "preference", "base_score", "policy_score", "policy_kl", "base_tokens", "policy_tokens",
)  # fmt: skip
_FACET_VALUES = 40
_FIGURE_COLUMNS = {"prompt_ids", PROMPT_KEY, *(f"{side}_rewards" for side in SIDES)}
# Most pairs behind the figures: sorting the tokens of a million pairs would take 30 GB, those of 20,000 take 0.5 GB.
FIGURE_PAIRS = 20_000
_PARTS = 50


@dataclass(frozen=True)
class Scores:
    """A score table read for the report.

    Attributes:
        rows: the pairs to show.
        rewards: for each side, the rewards and lengths of the pairs behind the figures: all pairs of the table, or
            `FIGURE_PAIRS` that are evenly spaced.
        prompts: the prompt number of these pairs.
        provenance: the metadata of the table.
        totals: of *all* pairs: `pairs`, `tokens`, `accuracy` and `chosen_longer` (`summary.summarise`).
    """

    rows: pa.Table
    rewards: dict[str, tuple[np.ndarray, np.ndarray]]
    prompts: np.ndarray
    provenance: dict
    totals: dict[str, float] = field(default_factory=dict)

    def summary(self) -> dict:
        """`summary.summarise` of the table; counts and shares are of all its pairs, figures perhaps of a sample."""
        summary = summarise(self.rewards, self.prompts)
        return {**summary, "figure_pairs": summary["pairs"], **self.totals}


def read_scores(path: Path, max_pairs: int, figure_pairs: int = FIGURE_PAIRS) -> Scores:
    """Read a score table: all columns of at most `max_pairs` evenly spaced pairs, the rewards of `figure_pairs`.

    One shard is in memory at a time, so a table of any size can be read.

    Raises:
        UserError: the table is missing, empty, or holds rewards that are not finite or not aligned with the tokens.
    """
    paths = tables.table_paths(path, "scores")
    total = sum(tables.number_of_rows(shard) for shard in paths)
    if total == 0:
        raise UserError(f"'{path}' holds no pair: expected a score table with at least one row")
    picked, of_figures = (
        np.unique(np.linspace(0, total - 1, min(most, total)).round().astype(np.int64))
        for most in (max_pairs, figure_pairs)
    )
    shown: list[pa.Table] = []
    rewards: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {side: [] for side in SIDES}
    prompts = PromptRows()
    right = longer = tokens = 0.0
    start = 0
    for shard in paths:
        table = tables.read_shard(shard, "scores")
        sides = [flat(table[f"{side}_rewards"]) for side in shown_sides(table)]
        if len(sides) > 1:
            chosen, rejected = (segment_sums(*side) for side in sides)
            right += float(won(chosen, rejected).sum())
            longer += float((sides[0][1] > sides[1][1]).sum())
        tokens += sum(len(values) for values, _ in sides)
        shown_rows, figure_rows = (
            pa.array(rows[(rows >= start) & (rows < start + len(table))] - start) for rows in (picked, of_figures)
        )
        if len(shown_rows) or not shown:
            shown.append(table.take(shown_rows))
        if len(shown) == _PARTS:  # a table of a few rows takes 14 kB
            shown = [pa.concat_tables(shown).combine_chunks()]
        figures = table.select([name for name in table.column_names if name in _FIGURE_COLUMNS]).take(figure_rows)
        prompts.add(figures)
        for side in shown_sides(table):
            rewards[side].append(flat(figures[f"{side}_rewards"]))
        start += len(table)
    if not tokens:
        raise UserError(f"'{path}' holds no response token: expected responses of at least one token")
    return Scores(
        rows=pa.concat_tables(shown),
        rewards={side: _joined(rewards[side]) for side in shown_sides(shown[0])},
        prompts=numbered(prompts.labels())[0],
        provenance=tables.provenance_of(shown[0]),
        totals={"pairs": total, "tokens": int(tokens), "accuracy": right / total, "chosen_longer": longer / total},
    )


def _joined(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Values and lengths of all parts."""
    values, lengths = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return values, lengths


def shown_sides(table: pa.Table) -> tuple[str, ...]:
    """The sides that mean something: only "chosen" in a table of answers, which are no pairs."""
    return SIDES[:1] if tables.provenance_of(table).get("answers") else SIDES


def check_tokenizer(tokenizer: str | os.PathLike | object, rows: pa.Table, table: str) -> None:
    """Raise a UserError for a given tokenizer that did not make the table, where it is whole enough to tell."""
    name = "the given tokenizer"
    if isinstance(tokenizer, str | os.PathLike):
        name = str(expand_home(tokenizer, "the tokenizer"))
        if not Path(name, "tokenizer_config.json").is_file():  # the vocabulary alone
            return
        from sepo.models.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(name)
    if hasattr(tokenizer, "unk_token_id"):
        check_table_tokenizer(rows, tokenizer, table, name)


def _by_token(
    path: Path,
    kind: str,
    rows: pa.Table,
    fill: float,
    place: Callable[[np.ndarray, pa.Table, int, str, slice], None],
) -> dict[str, np.ndarray]:
    """Align a table with the tokens of `rows` by `pair_id`: `[tokens]` float32 for each side.

    `place(out, table, row, side, segment)` writes row `row` of `table` into `out[segment]`. Tokens of pairs that the
    table lacks keep `fill`.
    """
    where = {pair_id: i for i, pair_id in enumerate(rows["pair_id"].to_pylist())}
    lengths = {side: flat(rows[f"{side}_ids"])[1] for side in SIDES}
    starts = {side: np.cumsum(counts) - counts for side, counts in lengths.items()}
    out = {side: np.full(int(counts.sum()), fill, dtype=np.float32) for side, counts in lengths.items()}
    for table in tables.iter_tables(path, kind):
        for row, pair_id in enumerate(table["pair_id"].to_pylist()):
            if (i := where.get(pair_id)) is not None:
                for side in SIDES:
                    segment = slice(starts[side][i], starts[side][i] + lengths[side][i])
                    place(out[side], table, row, side, segment)
    return out


def read_selection(path: Path, rows: pa.Table) -> dict[str, np.ndarray]:
    """Read the weight of every token of `rows` by side, 0 for tokens that are no key tokens.

    Raises:
        UserError: the selection does not fit the pairs.
    """

    def place(out: np.ndarray, table: pa.Table, row: int, side: str, segment: slice) -> None:
        positions = np.asarray(table[f"{side}_positions"][row].as_py(), dtype=np.int64)
        if len(positions) and positions.max() >= segment.stop - segment.start:
            raise UserError(
                f"'{path}', pair {table['pair_id'][row]}: key token {positions.max()} lies beyond the {side} "
                "response; expected a selection made from this score table"
            )
        out[segment.start + positions] = table[f"{side}_weights"][row].as_py()

    return _by_token(path, "selection", rows, 0.0, place)


def selection_settings(selection: Path | None) -> dict:
    """The provenance of a selection table; empty without a table."""
    if selection is None:
        return {}
    return tables.provenance_of(tables.read_schema(tables.table_paths(selection, "selection")[0]))


def read_logps(path: Path, rows: pa.Table) -> dict[str, np.ndarray]:
    """Read the log-probability of every token of `rows` by side, NaN where the table has none."""

    def place(out: np.ndarray, table: pa.Table, row: int, side: str, segment: slice) -> None:
        values = table[f"{side}_logps"][row].as_py()
        if len(values) == segment.stop - segment.start:
            out[segment] = values

    return _by_token(path, "logps", rows, np.nan, place)


def facets(rows: pa.Table) -> dict[str, dict]:
    """Columns beyond the schema with few distinct words, such as `subset`; the page filters by them."""
    found = {}
    for name in rows.column_names:
        column = rows[name]
        if name in (*tables.SCHEMAS["scores"].names, CONVERSATION, PROMPT_KEY):
            continue
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type) or pa.types.is_boolean(column.type):
            labels = ["" if value is None else str(value) for value in column.to_pylist()]
            values = sorted(set(labels))
            if 2 <= len(values) <= _FACET_VALUES:
                found[name] = {"values": values, "codes": [values.index(label) for label in labels]}
    return found


def rows_of(path: Path, pair_ids: pa.ChunkedArray) -> pa.Table:
    """The rows of a score table for some pairs, in the order of `pair_ids`.

    Raises:
        UserError: the table lacks a pair.
    """
    wanted = {pair_id: place for place, pair_id in enumerate(pair_ids.to_pylist())}
    parts, places = [], []
    for table in tables.iter_tables(path, "scores"):
        ids = table["pair_id"].to_pylist()
        rows = [row for row, pair_id in enumerate(ids) if pair_id in wanted]
        parts.append(table.take(pa.array(rows, type=pa.int64())))
        places += [wanted[ids[row]] for row in rows]
    if len(places) < len(wanted):
        raise UserError(f"'{path}' lacks {len(wanted) - len(places)} of the pairs to show: run its stage again")
    return pa.concat_tables(parts).take(pa.array(np.argsort(places), type=pa.int64()))


# --- the run's records ------------------------------------------------------------------------------------------------


def _read_json(path: Path) -> object | None:
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}' is not readable JSON ({error}): run the command that wrote it again") from None


def _stages(run: Path) -> dict:
    """The stages in a run's manifest; empty without a manifest."""
    manifest = _read_json(run / "manifest.json")
    stages = manifest.get("stages") if isinstance(manifest, dict) else None
    return stages if isinstance(stages, dict) else {}


def read_training(run: Path) -> list[dict]:
    """Read the training curves of a run: one entry for each model that the run trained."""
    curves = []
    # Runs with several oracles have folders oracle-N; folders without a stage are left over from an earlier recipe.
    more = sorted(stage for stage in _stages(run) if stage.startswith("oracle-"))
    for model in ("reference", "oracle", *more, "policy"):
        state = _read_json(run / model / "trainer_state.json")
        history = state.get("log_history") if isinstance(state, dict) else None
        if charts := training_curves(history or []):
            curves.append({"model": model, "charts": charts})
    return curves


def find_tokenizer(run: Path, models: Sequence[str] = MODELS) -> Path | None:
    """The first model folder of a run that holds a tokenizer."""
    return next((run / model for model in models if (run / model / "tokenizer.json").exists()), None)


def has_transfer(run: Path) -> bool:
    """Whether the run transferred its token rewards to a policy with another tokenizer."""
    return "transfer" in _stages(run) and (run / "transfer" / "scores").is_dir()


def read_documents(run: Path | None, provenance: Mapping) -> dict:
    """The run's recipe, manifest, metrics and training curves, and the provenance of the score table."""
    documents: dict = {"table": provenance}
    if run is not None:
        recipe = run / "recipe.yaml"
        documents["recipe"] = recipe.read_text(encoding="utf-8", errors="replace") if recipe.exists() else None
        documents["manifest"] = _read_json(run / "manifest.json")
        documents["metrics"] = _read_json(run / "metrics.json")
        documents["training"] = read_training(run)
    return documents


# --- answers before and after training --------------------------------------------------------------------------------


def answer_settings(run: Path) -> dict[str, float]:
    """Temperature and most tokens of the answers of a run; empty without a readable recipe."""
    try:
        settings = load_recipe(run / "recipe.yaml").eval
    except UserError:
        return {}
    return {"temperature": settings.temperature, "limit": settings.max_new_tokens}


def read_answers(path: Path, budget: int = BUDGET) -> dict[str, Any] | None:
    """Read what both models answered to the held-out prompts, and how the answers were judged.

    Args:
        path: `eval/generations.parquet`.
        budget: most characters to return; a longer file is thinned to evenly spaced rows, at least one.

    Returns:
        `total`, the rows of the file, and for the rows returned: `prompt` (without the start and end that all prompts
        share), `base` and `policy` as texts, and where the run has them `base_gold`, `policy_gold`, `preference` (in
        [1, 2], above 1.5 the policy is preferred), `base_score`, `policy_score`, `policy_kl` and the numbers of
        tokens, null where a row has no value. None without a file or without a row.

    Raises:
        UserError: the file is no table of answers.
    """
    if not path.is_file():
        return None
    try:
        with tables.arrow_file(path) as file:
            table = pq.read_table(file)
        texts = {name: [str(text or "") for text in table[name].to_pylist()] for name in _TEXTS}
    except (KeyError, OSError, pa.ArrowException) as error:
        raise UserError(f"'{path}' is no table of answers ({named_error(error)}): run the evaluation again") from None
    if not len(table):
        return None
    lengths = np.sum([[len(text) for text in column] for column in texts.values()], axis=0)
    number = len(table) if lengths.sum() <= budget else max(1, int(len(table) * budget / lengths.sum()))
    shown = np.unique(np.linspace(0, len(table) - 1, number).round().astype(int))
    while len(shown) > 1 and lengths[shown].sum() > budget:  # the picked rows may be longer than the mean
        shown = shown[:-1]
    answers: dict[str, Any] = {"total": len(table)}
    asked = table["question"].to_pylist() if "question" in table.column_names else _without_template(texts["prompt"])
    texts["prompt"] = asked
    for name in _TEXTS:
        answers[name] = [texts[name][i] for i in shown]
    for name in _NUMBERS:
        if name in table.column_names:
            values = table[name].to_pylist()
            answers[name] = [_finite(values[i]) for i in shown]
    return answers


def _without_template(prompts: list[str]) -> list[str]:
    """Prompts of an earlier release without the start and end that most of them share (the chat template's text)."""
    rows = [[ord(c) for c in prompt] for prompt in prompts]

    def is_boundary(character: int) -> bool:
        return chr(character) in "\n<>[]|"

    starts = common_starts(rows, is_boundary)
    ends = common_starts([row[::-1] for row in rows], is_boundary)
    return [
        prompt[start : len(prompt) - end].strip() if start + end < len(prompt) else prompt
        for prompt, start, end in zip(prompts, starts, ends, strict=True)
    ]


def _finite(value: Any) -> float | None:
    return round(float(value), 5) if isinstance(value, int | float) and math.isfinite(value) else None
