"""A `datasets.Dataset` as a user has it -> a table: texts, or token ids with the weights of tokens and of pairs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from sepo import processes
from sepo.data.encoding import tokenize_pairs
from sepo.data.ragged import SIDES, flat, ragged, segment_sums
from sepo.data.tables import PAIR_WEIGHT, make_table
from sepo.errors import UserError, nearest

if TYPE_CHECKING:
    from sepo.training.trainer import PreferenceConfig

_IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
_MASKS = ("chosen_mask", "rejected_mask")
_ROWS_COMPARED = 20


def is_text(dataset: Any) -> bool:
    """Must a tokenizer read this dataset?"""
    return isinstance(dataset, datasets.Dataset) and not set(_IDS) <= set(dataset.column_names)


def table_of(
    what: str, data: datasets.Dataset, args: PreferenceConfig, tokenizer: Callable[[], PreTrainedTokenizerBase]
) -> pa.Table:
    """The pairs of a dataset, with the weights that its columns give.

    Args:
        what: name of the dataset, for messages.
        data: texts (prompt, chosen, rejected), or token ids (`prompt_ids`, `chosen_ids`, `rejected_ids`), which are
            taken as they are, with `chosen_weights` and `rejected_weights`: one weight a token, 0 for no target; and
            with `chosen_mask` and `rejected_mask`, 0 for tokens between assistant turns, which are only read. The
            column `args.weight_column` holds weights of pairs.
        tokenizer: gives the tokenizer; called for a dataset of text.

    Returns:
        A table of kind "selection" if tokens have weights, else of kind "pairs". Rows whose weights are null are left
        out, unless all are.
    """
    numbers = np.arange(len(data))
    if "pair_id" in data.column_names and len(set(ids := data["pair_id"][:])) == len(ids):
        numbers = np.asarray(ids)
    weights = _pair_weights(what, data, args.weight_column)
    table = _of_ids(what, data, numbers) if not is_text(data) else _tokenized(data, args, tokenizer())
    if weights is None:
        return table
    by_id = dict(zip(numbers.tolist(), weights.tolist(), strict=True))
    column = [by_id[pair_id] for pair_id in table.column("pair_id").to_pylist()]
    return table.append_column(PAIR_WEIGHT, pa.array(column, pa.float32()))


def _tokenized(data: datasets.Dataset, args: PreferenceConfig, tokenizer: PreTrainedTokenizerBase) -> pa.Table:
    table, report = tokenize_pairs(
        data,
        tokenizer,
        max_length=args.max_length,
        max_prompt_length=args.max_prompt_length,
        as_chat=args.as_chat,
        chat_template_kwargs=args.chat_template_kwargs,
    )
    processes.log(report.summary())
    return table


def _pair_weights(what: str, data: datasets.Dataset, name: str) -> np.ndarray | None:
    """`[rows]`, NaN for null; None without the column, which may be missing if the user did not name it."""
    if name not in data.column_names:
        if name == PAIR_WEIGHT:
            return None
        near = nearest(name, data.column_names)
        raise UserError(f"{what} has no column '{name}'{near}, which weight_column names")
    try:
        return _column(data, name).cast(pa.float64()).to_numpy(zero_copy_only=False)
    except (pa.ArrowException, TypeError):
        raise UserError(f"{what}: the column '{name}' holds no numbers: expected one weight a pair") from None


def _of_ids(what: str, data: datasets.Dataset, numbers: np.ndarray) -> pa.Table:
    columns: dict[str, Any] = {"pair_id": pa.array(numbers, pa.int64())}
    try:
        columns |= {name: _column(data, name).cast(pa.list_(pa.int32())) for name in _IDS}
        masks = {name: _column(data, name).cast(pa.list_(pa.int8())) for name in _MASKS if name in data.column_names}
        names = [f"{side}_weights" for side in SIDES if f"{side}_weights" in data.column_names]
        weights = {name: _column(data, name).cast(pa.list_(pa.float32())) for name in names}
    except (pa.ArrowException, TypeError) as error:
        raise UserError(f"{what}: columns of ids or weights hold no lists of numbers ({error})") from None
    table = make_table("pairs", columns)
    if any(column.null_count for column in table.columns):
        raise UserError(f"{what}: a row has no token ids: expected ids in {', '.join(_IDS)}")
    if masks:
        table, weights = _without_context(what, table, masks, weights)
    if len(weights) == 1:
        raise UserError(f"{what} has the column '{names[0]}' only: expected weights of both responses")
    weighted = [index for index in range(len(table)) if all(column[index].is_valid for column in weights.values())]
    if not weights or not weighted:
        return table
    if len(weighted) < len(table):
        processes.log(f"{what}: {len(table) - len(weighted):,} pairs without weights are left out")
    selection: dict[str, Any] = {name: table.column(name).take(weighted) for name in table.column_names}
    for side in SIDES:
        values, counts = flat(weights[f"{side}_weights"].take(weighted))
        _, lengths = flat(selection[f"{side}_ids"])
        if (bad := np.flatnonzero(counts != lengths)).size or not np.isfinite(values).all():
            where = f" ({counts[bad[0]]} for {lengths[bad[0]]} tokens)" if bad.size else ""
            raise UserError(f"{what}: {side}_weights must be one finite number for each of {side}_ids{where}")
        kept = values != 0
        rows = np.repeat(np.arange(len(counts)), counts)
        positions = np.arange(len(values)) - np.repeat(np.cumsum(counts) - counts, counts)
        targets = np.bincount(rows[kept], minlength=len(counts))
        selection[f"{side}_positions"] = ragged(positions[kept].astype(np.int32), targets)
        selection[f"{side}_weights"] = ragged(values[kept].astype(np.float32), targets)
    return make_table("selection", selection)


def _without_context(
    what: str, table: pa.Table, masks: dict[str, Any], weights: dict[str, Any]
) -> tuple[pa.Table, dict[str, Any]]:
    """Move the ids whose mask is 0, the turns between those of the assistant, to the context columns (`data.turns`)."""
    columns: dict[str, Any] = {name: table.column(name) for name in table.column_names}
    weights = dict(weights)
    for side in SIDES:
        ids, lengths = flat(columns[f"{side}_ids"])
        mask, counts = flat(masks[f"{side}_mask"]) if f"{side}_mask" in masks else (ids, lengths[:0])
        if not np.array_equal(counts, lengths) or not np.isin(mask, (0, 1)).all():
            raise UserError(f"{what}: expected {' and '.join(_MASKS)} of 0 and 1, one number for each id")
        own = mask == 1
        kept = segment_sums(own, lengths).astype(np.int64)
        rows = np.repeat(np.arange(len(lengths)), lengths)
        before = np.cumsum(own) - np.repeat(np.cumsum(kept) - kept, lengths)
        context = ~own & (before < kept[rows])  # nothing is predicted after the last token of the assistant
        places = np.bincount(rows[context], minlength=len(lengths))
        columns[f"{side}_ids"] = ragged(ids[own], kept)
        columns[f"{side}_context_ids"] = ragged(ids[context], places)
        columns[f"{side}_context_at"] = ragged(before[context].astype(np.int32), places)
        if weights:
            given = [row if row is None else np.array(row) for row in weights[f"{side}_weights"].to_pylist()]
            parts = zip(given, np.split(own, np.cumsum(lengths)[:-1]), strict=True)
            weights[f"{side}_weights"] = pa.chunked_array(
                [[row if row is None or len(row) != len(part) else row[part] for row, part in parts]],
                pa.list_(pa.float32()),
            )
    return make_table("pairs", columns), weights


def check_tokens(what: str, data: datasets.Dataset, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Raise a UserError if ids are stored with their tokens and the tokenizer has other tokens for them."""
    if tokenizer is None or is_text(data):
        return
    for side in SIDES:
        if f"{side}_tokens" not in data.column_names:
            continue
        for row in data.select(range(min(len(data), _ROWS_COMPARED))):
            if tokenizer.convert_ids_to_tokens(row[f"{side}_ids"]) != row[f"{side}_tokens"]:
                raise UserError(f"{what}: its token ids belong to another tokenizer than the model's")


def _column(data: datasets.Dataset, name: str) -> pa.ChunkedArray:
    return data.with_format("arrow").select_columns([name])[:].column(0)
