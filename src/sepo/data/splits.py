"""Train and held-out pairs by prompt, and nested random shares: all by hashes, so that nothing depends on order."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from sepo.data.ragged import flat
from sepo.data.tables import SCHEMAS, provenance_of, require_table, with_provenance
from sepo.errors import UserError, check_number


def split_pairs(
    table: pa.Table, *, held_out: int | float, sample: float = 1.0, seed: int = 0
) -> tuple[pa.Table, pa.Table]:
    """Split a table of pairs by prompt, so that no held-out prompt occurs in training.

    Prompts are ordered by a hash of the seed and their token ids, and held out in that order until the
    number of pairs is as near to `held_out` as whole prompts allow. The result depends on nothing but table
    and seed, and a prompt keeps its place in the order when the table grows. Rows keep their order.

    Args:
        table: pairs, or any table with `pair_id` and `prompt_ids`.
        held_out: number of pairs (int), or their share in [0, 1) (float).
        sample: share of the remaining pairs to train on, in (0, 1].
        seed: another seed, another split.

    Returns:
        The training pairs and the held-out pairs.

    Raises:
        UserError: a number out of range, or too few prompts for both sides.
    """
    table = require_table("table", table, "pairs")
    check_number("seed", seed, whole=True)
    target = _held_out_pairs(held_out, len(table))
    keys = _prompt_keys(table)
    counts: dict[bytes, int] = {}
    for key in keys:
        counts[key] = counts.get(key, 0) + 1
    prompts = sorted(counts, key=lambda key: _order("held_out", seed, key))
    totals = np.cumsum([0] + [counts[key] for key in prompts])
    number = int(np.argmin(np.abs(totals - target)))
    if target and number == 0:
        number = 1
    if number >= len(prompts):
        raise UserError(
            f"cannot hold out {target} of {len(table)} pairs: they share {len(prompts)} prompts, and at "
            "least one must stay for training; hold out fewer"
        )
    held = set(prompts[:number])
    mask = np.array([key in held for key in keys], dtype=bool)
    settings = {"held_out": held_out, "sample": sample, "seed": seed}
    train = sample_pairs(table.filter(pa.array(~mask)), sample, seed=seed)
    return _with_split(train, "train", settings), _with_split(table.filter(pa.array(mask)), "held_out", settings)


def sample_prompts(table: pa.Table, limit: int, after: int = 0) -> list[list[int]]:
    """Token ids of `limit` distinct prompts, drawn by a hash of them, in the order of the table.

    Args:
        after: of those that follow the first so many drawn: none that `sample_prompts(table, after)` returns.
    """
    prompts = list(dict.fromkeys(_prompt_keys(table)))
    drawn = set(sorted(prompts, key=lambda key: _order("sample", 0, key))[after : after + limit])
    return [np.frombuffer(key, "<i4").tolist() for key in prompts if key in drawn]


def shared_prompts(table: pa.Table, other: pa.Table) -> int:
    """Number of distinct prompts that occur in both tables."""
    return len(set(_prompt_keys(table)) & set(_prompt_keys(other)))


def group_by_prompt(table: pa.Table) -> pa.Table:
    """Bring the pairs of each prompt together, prompts in the order of their first pair; else the order stays."""
    first: dict[bytes, int] = {}
    order = np.argsort([first.setdefault(key, len(first)) for key in _prompt_keys(table)], kind="stable")
    return table.take(pa.array(order, type=pa.int64()))


def prompt_numbers(prompt_ids: pa.Array | pa.ChunkedArray | Sequence[Sequence[int]]) -> np.ndarray:
    """A number for each pair's prompt, `[pairs]` int64 from 0, equal where the token ids are: what errors cluster by.

    >>> prompt_numbers([[5, 6], [7], [5, 6]]).tolist()
    [0, 1, 0]
    """
    if not isinstance(prompt_ids, pa.Array | pa.ChunkedArray):
        prompt_ids = pa.array(list(prompt_ids), type=pa.list_(pa.int32()))
    numbers: dict[bytes, int] = {}
    return np.array([numbers.setdefault(key, len(numbers)) for key in _keys(prompt_ids)], dtype=np.int64)


def _prompt_keys(table: pa.Table) -> list[bytes]:
    return _keys(table.column("prompt_ids"))


def _keys(prompt_ids: pa.Array | pa.ChunkedArray) -> list[bytes]:
    values, lengths = flat(prompt_ids)
    ends = np.cumsum([0, *lengths])
    values = values.astype("<i4")
    return [values[start:stop].tobytes() for start, stop in pairwise(ends)]


def _held_out_pairs(held_out: int | float, rows: int) -> int:
    if isinstance(held_out, bool) or not isinstance(held_out, int | float) or not held_out >= 0:
        raise UserError(f"held_out is {held_out!r}: expected a number of pairs, or a share in [0, 1)")
    if isinstance(held_out, float):
        if held_out >= 1:
            raise UserError(f"held_out is {held_out}: expected a share in [0, 1), or a whole number of pairs")
        return round(held_out * rows)
    if held_out >= rows:
        raise UserError(f"held_out is {held_out}, but there are {rows} pairs: hold out fewer")
    return held_out


def _with_split(table: pa.Table, side: str, settings: Mapping[str, Any]) -> pa.Table:
    provenance = provenance_of(table)
    provenance.pop("version", None)
    kind = provenance.pop("format", "pairs")
    return with_provenance(table, kind, {**provenance, "split": {"side": side, **settings}})


def sample_pairs(table: pa.Table, fraction: float, *, seed: int = 0) -> pa.Table:
    """Return a random share of the pairs, in the table's order: what an oracle on part of the data is
    trained on.

    Pairs are picked by a hash of the seed and their `pair_id`, so a smaller share is a part of a larger one.

    Args:
        table: any table with `pair_id`.
        fraction: share in (0, 1]; at least one pair is returned.
        seed: another seed, another sample.

    Raises:
        UserError: `fraction` is not in (0, 1].
    """
    if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction <= 1:
        raise UserError(f"the sample fraction is {fraction!r}: expected a number in (0, 1]")
    table = require_table("table", table, *SCHEMAS)
    check_number("seed", seed, whole=True)
    return take_pairs(table, max(1, round(fraction * len(table))), seed=seed)


def take_pairs(table: pa.Table, number: int, *, seed: int = 0) -> pa.Table:
    """Return so many pairs, or all there are, drawn as `sample_pairs` does."""
    number = min(len(table), number)
    ids = table.column("pair_id").to_pylist()
    order = sorted(range(len(ids)), key=lambda row: (_order("sample", seed, str(ids[row]).encode()), row))
    return table.take(pa.array(sorted(order[:number]), type=pa.int64()))


def _order(purpose: str, seed: int, key: bytes) -> bytes:
    """A hash to sort by: random in effect, and the same on every platform and release."""
    return hashlib.sha256(f"{purpose}:{seed}:".encode() + key).digest()
