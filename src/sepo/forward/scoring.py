"""Score a dataset with a frozen model: the log-probability of every response token."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple, TypeVar, overload

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from sepo import processes
from sepo.credit.rewards import response_sums
from sepo.data.ragged import SIDES, Ragged, ragged
from sepo.data.tables import PAIR_WEIGHT, READ_COLUMNS, check_pairs_differ, make_table, provenance_of, require_table
from sepo.errors import check_number
from sepo.forward.logps import read_logps
from sepo.forward.packing import (
    CHOSEN,
    REJECTED,
    Ids,
    PackedBatch,
    Pair,
    fill_padded_rows,
    fill_rows,
    pack,
    pad,
    read_length,
)
from sepo.forward.prepare import prepare_model
from sepo.models.adapters import causal_lm
from sepo.models.limits import check_ids, check_lengths, model_limits
from sepo.models.sharding import is_sharded

# For each layout of `prepare_model`: how to divide pairs into batches, and how to lay out a batch. "unbatched" has one
# pair per batch, so that processes that wait for each other in each forward run equally many.
LAYOUTS: dict[str, tuple[Callable[[Sequence[Pair], int], list[list[Pair]]], Callable[[Sequence[Pair]], PackedBatch]]]
LAYOUTS = {
    "packed": (fill_rows, pack),
    "padded": (fill_padded_rows, pad),
    "unbatched": (lambda pairs, tokens_per_row: [[pair] for pair in pairs], partial(pad, unbatched=True)),
}
# In training; without gradients a row may be larger, since nothing is kept for a backward pass.
TOKENS_PER_ROW = {"cpu": 512, "cuda": 16384, "mps": 4096}


T = TypeVar("T")
U = TypeVar("U")


class NonFiniteError(RuntimeError):
    """A log-probability or a logit is not finite."""


class TablePairs(Sequence[Pair]):
    """The rows of a table as `Pair`s, created on access.

    Their ids are views of the table's buffers. As Python numbers they would take ten times the memory in every process,
    and the reference counts would make a DataLoader's workers copy them.

    Attributes:
        pair_ids: `[pairs]`.
        weights: `[pairs]`, of the pairs' losses; None where all are 1.
        columns: the other fields of `Pair` that the table has, by name; `columns["chosen_ids"].lengths` are token
            counts without creating a `Pair`.
    """

    def __init__(self, table: pa.Table):
        self.pair_ids = table.column("pair_id").to_numpy()
        self.weights = table.column(PAIR_WEIGHT).to_numpy() if PAIR_WEIGHT in table.column_names else None
        names = [name for name in Pair.__dataclass_fields__ if name != "pair_id" and name in table.column_names]
        self.columns = {name: Ragged(table.column(name)) for name in names}

    def __len__(self) -> int:
        return len(self.pair_ids)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with one of its responses; 0 for an empty table."""
        lengths = {name: column.lengths for name, column in self.columns.items() if name.endswith("_ids")}
        chosen, rejected = (lengths[f"{side}_ids"] + lengths.get(f"{side}_context_ids", 0) for side in SIDES)
        return int((lengths["prompt_ids"] + np.maximum(chosen, rejected)).max(initial=0))

    @overload
    def __getitem__(self, index: int) -> Pair: ...
    @overload
    def __getitem__(self, index: slice) -> list[Pair]: ...
    def __getitem__(self, index: int | slice) -> Pair | list[Pair]:
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        fields: dict[str, Any] = {name: column[index] for name, column in self.columns.items()}
        if self.weights is not None:
            fields["weight"] = float(self.weights[index])
        return Pair(int(self.pair_ids[index]), **fields)


def table_pairs(table: pa.Table) -> TablePairs:
    """The rows of a pairs, scores or selection table as `Pair`s, with a selection's positions and weights."""
    check_pairs_differ(table)
    return TablePairs(table)


def make_batches(pairs: Sequence[Pair], layout: str, tokens_per_row: int) -> list[PackedBatch]:
    """Lay out pairs as batches of at most `tokens_per_row` tokens each; a longer pair is its own batch.

    Args:
        layout: the result of `prepare_model`.
    """
    fill, lay_out = LAYOUTS[layout]
    return [lay_out(row) for row in fill(pairs, tokens_per_row)]


def tokens_per_row_for(device: torch.device | str, scoring: bool = False) -> int:
    """The fastest measured token budget of a row on a kind of device (docs/performance.md)."""
    kind = torch.device(device).type
    budget = TOKENS_PER_ROW.get(kind, 4096)
    return 8 * budget if scoring and kind == "cpu" else budget


class Types(NamedTuple):
    """The types in which a model reads pairs. Both sides of a log-ratio need the same: between float32 and bfloat16 the
    sum over a response differs by about a nat, as much as training moves it.

    Attributes:
        dtype: of the weights.
        quantization: of the weights; None without.
        autocast: dtype that autocast computes in; None without.
    """

    dtype: str = "float32"
    quantization: str | None = None
    autocast: str | None = None


def numerics(model: nn.Module) -> dict[str, str | None]:
    """The types (see `Types`) and the device that decide how a model's log-probabilities are rounded at present.

    Returns:
        `dtype` of the weights ("float32", "bfloat16 4bit"), kind of `device`, and `autocast`'s dtype, None without it.
    """
    lm = causal_lm(model)
    weight = next(lm.get_input_embeddings().parameters())
    kind = weight.device.type
    quantized = " 4bit" if getattr(lm, "is_quantized", False) else ""
    autocast = _name(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else None
    return {"dtype": _name(weight.dtype) + quantized, "device": kind, "autocast": autocast}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def read_like(logps: pa.Table, model: nn.Module) -> bool:
    """Whether stored log-probabilities have the `numerics` of `model`."""
    stored = provenance_of(logps)
    return all(stored.get(name) == value for name, value in numerics(model).items())


def require_readable(model: nn.Module, pairs: pa.Table) -> None:
    """Raise a UserError if a model has no embedding for an id of the pairs, or no position for a token."""
    lm = causal_lm(model)
    limits, name = model_limits(lm), lm.config.name_or_path or type(lm).__name__
    check_ids(pairs, name, limits)
    check_lengths(pairs, name, limits)


def summed_logps(
    model: nn.Module,
    prompts: Sequence[Ids],
    responses: Sequence[Ids],
    *,
    progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Summed log-probability of each response given its prompt under a model, `[responses]` in nats.

    Args:
        prompts, responses: token ids; one response per prompt.
        progress: as in `dataset_logps`.
    """
    return response_sums(dataset_logps(model, single_responses(prompts, responses), progress=progress), "logps")[0]


def single_responses(prompts: Sequence[Ids], responses: Sequence[Ids]) -> pa.Table:
    """A table of kind "pairs" whose chosen side is one response to each prompt."""
    return make_table(
        "pairs",
        {
            "pair_id": list(range(len(responses))),
            "prompt_ids": list(prompts),
            "chosen_ids": list(responses),
            # A pair needs a second side: the first token only, a branch that adds no token to read.
            "rejected_ids": [response[:1] for response in responses],
        },
    )


def dataset_logps(
    model: nn.Module,
    pairs: pa.Table,
    *,
    tokens_per_row: int | None = None,
    progress: Callable[[int], None] | None = None,
    over_processes: bool = False,
) -> pa.Table:
    """Log-probability of every response token of `pairs` under a frozen model.

    Args:
        model: a causal LM, on its device.
        pairs: a table with the columns of kind "pairs".
        tokens_per_row: token budget of a packed row; a default for the device if None.
        progress: called with the number of pairs finished since the last call.
        over_processes: divide the rows among the processes of the launch. All processes must call this, and all get the
            whole table. The rows are the same as in one process, so the numbers are too. Always on for a sharded model.

    Returns:
        a table of kind "logps", row for row with `pairs`; its provenance holds the model's `numerics`.

    Raises:
        NonFiniteError: a log-probability is NaN or infinite.
        UserError: the model cannot read an id or a length.
    """
    require_table("pairs", pairs, "pairs")
    if tokens_per_row is not None:
        check_number("tokens_per_row", tokens_per_row, whole=True, least=1)
    ((table,),) = logps_of_parts(
        model,
        [([pairs], over_processes or is_sharded(causal_lm(model)))],
        tokens_per_row=tokens_per_row,
        progress=progress,
    )
    return table


@torch.no_grad()
def logps_of_parts(
    model: nn.Module,
    parts: Iterable[tuple[Iterable[pa.Table], bool]],
    *,
    tokens_per_row: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Iterator[list[pa.Table]]:
    """`dataset_logps` of each table of each part, part by part. The next rows are laid out while the device computes.

    Args:
        parts: tables, and whether the processes of the launch divide their rows among them. A sharded model needs that
            they do.
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        for item, batch in _ahead(partial(_laid_out, device), _rows(model, parts, tokens_per_row)):
            if isinstance(item, _Part):
                yield item.tables(model)
                continue
            values = read_logps(model, batch.to(device)).float().cpu().numpy()
            if item.logps is None:
                continue
            if not np.isfinite(values).all():
                bad = np.unique(batch.segments.numpy()[~np.isfinite(values)] // 2)
                ids = [batch.pair_ids[index] for index in bad]
                raise NonFiniteError(f"log-probabilities of pair {ids[0]} (of {len(ids)} pairs) are not finite")
            item.logps.put(batch.pair_ids, values)
            if progress:
                progress(batch.num_pairs)
    finally:
        model.train(training)


class _Row(NamedTuple):
    """Pairs to read together, and where their log-probabilities go; `logps` is None for a row that keeps step only."""

    layout: str
    pairs: list[Pair]
    logps: _ResponseLogps | None


class _Part(NamedTuple):
    """The end of a part, whose rows come before it."""

    logps: list[_ResponseLogps]
    shared: bool

    def tables(self, model: nn.Module) -> list[pa.Table]:
        provenance = {name: value for name, value in numerics(model).items() if value is not None}
        return [logps.table(provenance, self.shared) for logps in self.logps]


def _rows(
    model: nn.Module, parts: Iterable[tuple[Iterable[pa.Table], bool]], tokens_per_row: int | None
) -> Iterator[_Row | _Part]:
    """The rows of this process, and after the rows of each part the part."""
    budget = tokens_per_row or tokens_per_row_for(next(model.parameters()).device, scoring=True)
    for tables, shared in parts:
        rows: list[_Row] = []
        part = _Part([], shared)
        for table in tables:
            require_readable(model, table)
            pairs = table_pairs(table.select([name for name in READ_COLUMNS if name in table.column_names]))
            part.logps.append(_ResponseLogps(pairs))
            layout = prepare_model(model, longest=pairs.longest, tokens_per_row=budget)
            rows += (_Row(layout, row, part.logps[-1]) for row in LAYOUTS[layout][0](pairs, budget))
        # By layout: the processes of a sharded model run the same forwards at the same time.
        for layout in dict.fromkeys(row.layout for row in rows):
            same = [row for row in rows if row.layout == layout]
            yield from _of_this_process(same, is_sharded(model)) if shared else same
        yield part


def _of_this_process(rows: list[_Row], in_step: bool) -> list[_Row]:
    """This process's share of rows; with `in_step` as many as any other's, the last one possibly a dummy."""
    number = processes.size()
    mine = rows[processes.rank() :: number]
    if in_step and len(mine) < -(-len(rows) // number):
        layout, pairs, _ = min(rows, key=lambda row: min(map(read_length, row.pairs)))
        mine.append(_Row(layout, [min(pairs, key=read_length)], None))
    return mine


def _laid_out(device: torch.device, item: _Row | _Part) -> tuple[_Row | _Part, Any]:
    """A row and its batch, in pinned memory for a GPU."""
    if isinstance(item, _Part):
        return item, None
    batch = LAYOUTS[item.layout][1](item.pairs)
    return item, batch.pin_memory() if device.type == "cuda" else batch


def _ahead(function: Callable[[T], U], items: Iterable[T]) -> Iterator[U]:
    """`function` of each item, computed in a thread for the next two items while the caller works."""
    with ThreadPoolExecutor(1) as thread:
        waiting: deque[Future[U]] = deque()
        for item in items:
            waiting.append(thread.submit(function, item))
            if len(waiting) > 2:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


class _ResponseLogps:
    """Log-probabilities of the response tokens of all pairs, filled batch by batch in any order.

    Attributes:
        lengths: `[pairs, 2]`, tokens of the chosen and the rejected response.
        values: of each side `[tokens]` float32, response after response in the order of the pairs.
    """

    def __init__(self, pairs: TablePairs):
        self.lengths = np.stack([pairs.columns[f"{side}_ids"].lengths for side in SIDES], axis=1)
        self._starts = np.zeros_like(self.lengths)
        np.cumsum(self.lengths[:-1], axis=0, out=self._starts[1:])
        self.values = [np.zeros(total, np.float32) for total in self.lengths.sum(0)]
        self._pair_ids = pairs.pair_ids
        self._index = {pair_id: index for index, pair_id in enumerate(pairs.pair_ids.tolist())}

    def put(self, pair_ids: Sequence[int], values: np.ndarray) -> None:
        """Store a batch's values: of each pair the chosen, then the rejected response."""
        at = 0
        for pair_id in pair_ids:
            index = self._index[pair_id]
            for side in (CHOSEN, REJECTED):
                size, start = self.lengths[index, side], self._starts[index, side]
                self.values[side][start : start + size] = values[at : at + size]
                at += size

    def table(self, provenance: Mapping[str, Any], shared: bool) -> pa.Table:
        """The table of kind "logps"; `shared`: the sum over the processes, each of which filled other pairs."""
        values = [processes.add_up(side) for side in self.values] if shared else self.values
        columns = {f"{name}_logps": ragged(values[side], self.lengths[:, side]) for side, name in enumerate(SIDES)}
        return make_table("logps", {"pair_id": self._pair_ids, **columns}, provenance)
