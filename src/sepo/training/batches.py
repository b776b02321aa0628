"""Pairs in batches: their dataset, their order, and the packed rows of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from sepo.credit.rewards import response_sums, target_sums
from sepo.data.ragged import SIDES, SIGNED_SIDES, flat, ragged, segment_sums
from sepo.data.tables import PAIR_WEIGHT, READ_COLUMNS, make_table, provenance_of
from sepo.errors import UserError
from sepo.forward.packing import Pair, read_length
from sepo.forward.scoring import make_batches, table_pairs

NO_PAIR = -1


def pairs_seen(step: int, pairs: int, batch_size: int) -> int:
    """Pairs that a training has seen after `step` updates. The last update of an epoch has the remaining pairs.

    >>> [pairs_seen(step, pairs=17, batch_size=8) for step in range(6)]
    [0, 8, 16, 17, 25, 33]
    """
    epochs, rest = divmod(step, -(-pairs // batch_size))
    return epochs * pairs + min(rest * batch_size, pairs)


def require_every_reward(what: str, table: pa.Table, objective: str) -> None:
    """Raise a UserError unless the weights of a selection table are the rewards of every response token."""
    whole = "chosen_positions" in table.column_names and all(
        np.array_equal(flat(table.column(f"{side}_positions"))[1], flat(table.column(f"{side}_ids"))[1])
        for side in SIDES
    )
    if not whole or provenance_of(table).get("credit", "reward") != "reward":
        raise UserError(
            f"{what}: {objective} reads the reward of every response token: select with k_chosen=1 k_rejected=1 "
            "include_end=true credit=reward"
        )


def require_means(what: str, table: pa.Table) -> None:
    """Raise a UserError if the weights of a response do not have a positive sum, which a weighted mean needs."""
    for side in SIDES if "chosen_weights" in table.column_names else ():
        bad = np.flatnonzero(segment_sums(*flat(table.column(f"{side}_weights"))) <= 0)
        if bad.size:
            raise UserError(
                f"{what}: the {side} weights of pair {table.column('pair_id')[int(bad[0])]} (of {bad.size:,} pairs) "
                "sum to 0 or less, and sepo needs a weighted mean; use tis_dpo, which takes sums, or weights above 0"
            )


def require_pair_weights(what: str, table: pa.Table) -> None:
    """Raise a UserError if the table has pair weights and one is negative or not finite, or all are 0."""
    if PAIR_WEIGHT not in table.column_names:
        return
    weights = table.column(PAIR_WEIGHT).to_numpy()
    bad = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))
    if bad.size:
        raise UserError(
            f"{what}: the pair_weight of pair {table.column('pair_id')[int(bad[0])]} (of {bad.size:,} pairs) is "
            f"{weights[bad[0]]}, expected 0 or more"
        )
    if not weights.any():
        raise UserError(
            f"{what}: every pair_weight is 0, so there is nothing to learn; with select.confidence the oracle "
            "contradicts every label: check its accuracy, or leave confidence at 0"
        )


def whole_responses(table: pa.Table) -> pa.Table:
    """The pairs of a table and their pair weights, if any, without the selection of tokens."""
    return table.select([name for name in table.column_names if name in (*READ_COLUMNS, PAIR_WEIGHT)])


def reweighted(table: pa.Table, new_weights: Callable[[np.ndarray, int], np.ndarray]) -> pa.Table:
    """A selection table with the weights `new_weights(weights, sign)`; `sign` is 1 for chosen, -1 for rejected."""
    columns: dict[str, Any] = {name: table.column(name) for name in table.column_names}
    for side, sign in SIGNED_SIDES:
        weights, counts = flat(table.column(f"{side}_weights"))
        columns[f"{side}_weights"] = ragged(new_weights(weights, sign).astype(np.float32), counts)
    return make_table("selection", columns)


def with_baselines(table: pa.Table, reference_logps: pa.Table, beta: float, matched: bool = False) -> pa.Table:
    """A table in which every response token is a target whose weight is its baseline, in nats.

    The baseline of a token of a "pairs" table is log ref. In a "selection" table whose weights are rewards s it is
    log ref + s / beta, the log-probability at which WSPO's loss is 0.

    Args:
        matched: cut both responses of a pair to the length of the shorter one.
    """
    columns: dict[str, Any] = {name: table.column(name) for name in table.column_names}
    shorter = np.minimum(*(flat(reference_logps.column(f"{side}_logps"))[1] for side in SIDES))
    for side in SIDES:
        baselines, lengths = flat(reference_logps.column(f"{side}_logps"))
        if f"{side}_weights" in table.column_names:
            baselines = baselines + flat(table.column(f"{side}_weights"))[0].astype(np.float64) / beta
        positions = np.arange(len(baselines)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        if matched:
            kept = positions < np.repeat(shorter, lengths)
            baselines, positions, lengths = baselines[kept], positions[kept], shorter
        columns[f"{side}_positions"] = ragged(positions.astype(np.int32), lengths)
        columns[f"{side}_weights"] = ragged(baselines.astype(np.float32), lengths)
    return make_table("selection", columns)


class PairDataset(torch.utils.data.Dataset):
    """Pairs, each with the (weighted) sums of its targets' reference log-probabilities; None without a reference.

    Args:
        table: a pairs or selection table.
        reference_logps: a logps table with the same rows.
        baselines: the weights of `table` are baselines (`with_baselines`), so the reference's sums are unweighted and
            over all tokens.
    """

    def __init__(self, table: pa.Table, reference_logps: pa.Table | None = None, baselines: bool = False):
        self.pairs = table_pairs(table)
        self.reference: np.ndarray | None = None  # [pairs, 2]
        if reference_logps is not None:
            if reference_logps.column("pair_id").to_pylist() != table.column("pair_id").to_pylist():
                raise UserError("the reference log-probabilities belong to other pairs: compute them again")
            sums = response_sums(reference_logps, "logps") if baselines else target_sums(table, reference_logps)
            self.reference = np.stack(sums, 1)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Pair, tuple[float, float] | None] | None:
        if index == NO_PAIR:
            return None
        return self.pairs[index], tuple(self.reference[index].tolist()) if self.reference is not None else None

    @cached_property
    def shortest(self) -> int:
        """Index of the pair with the fewest tokens to read."""
        return min(range(len(self)), key=lambda index: read_length(self.pairs[index]))


class PairSampler(torch.utils.data.Sampler[int]):
    """The order of the pairs. It depends on seed and epoch alone, so a resume or more processes do not change it.

    `NO_PAIR` pads the order to a multiple of the batch over all processes. So every process gets the same number of
    batches, no pair comes twice, and an update has the same pairs for any number of processes.
    """

    def __init__(self, pairs: int, multiple: int, seed: int | None, epoch: Callable[[], int] = lambda: 0):
        self.pairs, self.missing, self.seed, self.epoch = pairs, -pairs % multiple, seed, epoch

    def __iter__(self):
        order = torch.arange(self.pairs)
        if self.seed is not None:
            # The same order as that of Trainer's own sampler.
            order = torch.randperm(self.pairs, generator=torch.Generator().manual_seed(self.seed + self.epoch()))
        yield from order.tolist()
        yield from [NO_PAIR] * self.missing

    def __len__(self) -> int:
        return self.pairs + self.missing


@dataclass
class PairCollator:
    """Turn items of a `PairDataset` into packed batches of at most `tokens_per_row` tokens each.

    Returns a dict: `batches`, a list of `PackedBatch`; `references`, for each batch `[2, pairs]` float32 sums of
    reference log-probabilities (chosen, rejected), or None without a reference; `num_pairs`.
    """

    layout: str
    tokens_per_row: int

    def __call__(self, batch: Sequence[tuple[Pair, tuple[float, float] | None] | None]) -> dict[str, Any]:
        items = [item for item in batch if item is not None]
        batches = make_batches([pair for pair, _ in items], self.layout, self.tokens_per_row)
        sums = {pair.pair_id: reference for pair, reference in items}
        references = [
            None
            if items[0][1] is None
            else torch.tensor([sums[pair_id] for pair_id in batch.pair_ids], dtype=torch.float32).T
            for batch in batches
        ]
        return {"batches": batches, "references": references, "num_pairs": len(items)}
