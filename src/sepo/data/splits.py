"""Train and held-out pairs by prompt, and nested random samples; both use hashes and do not depend on row order."""

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

    Prompts are sorted by a hash of the seed and their token ids. The first prompts are held out, as many as bring the
    number of pairs closest to `held_out`. The result depends only on table and seed. When the table grows, existing
    prompts keep their order. Rows keep their order, too.

    Args:
        table: pairs, or any table with `pair_id` and `prompt_ids`.
        held_out: number of pairs (int), or a share of the pairs in [0, 1) (float).
        sample: share of the remaining pairs to train on, in (0, 1].
        seed: seed of the hash.

    Returns:
        The training pairs and the held-out pairs.

    Raises:
        UserError: a number is out of range, or there are too few prompts for both sides.
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
            "least one must stay for training; hold out fewer pairs"
        )
    held = set(prompts[:number])
    mask = np.array([key in held for key in keys], dtype=bool)
    settings = {"held_out": held_out, "sample": sample, "seed": seed}
    train = sample_pairs(table.filter(pa.array(~mask)), sample, seed=seed)
    return _with_split(train, "train", settings), _with_split(table.filter(pa.array(mask)), "held_out", settings)


def sample_prompts(table: pa.Table, limit: int, after: int = 0) -> list[list[int]]:
    """Token ids of `limit` distinct prompts, sampled by hash, in the order of the table.

    Args:
        after: skip the first `after` prompts of the sample, which `sample_prompts(table, after)` returns.
    """
    prompts = list(dict.fromkeys(_prompt_keys(table)))
    drawn = set(sorted(prompts, key=lambda key: _order("sample", 0, key))[after : after + limit])
    return [np.frombuffer(key, "<i4").tolist() for key in prompts if key in drawn]


def shared_prompts(table: pa.Table, other: pa.Table) -> int:
    """Number of distinct prompts that occur in both tables."""
    return len(set(_prompt_keys(table)) & set(_prompt_keys(other)))


def group_by_prompt(table: pa.Table) -> pa.Table:
    """Move the pairs of each prompt together, prompts in the order of their first pairs."""
    first: dict[bytes, int] = {}
    order = np.argsort([first.setdefault(key, len(first)) for key in _prompt_keys(table)], kind="stable")
    return table.take(pa.array(order, type=pa.int64()))


def prompt_numbers(prompt_ids: pa.Array | pa.ChunkedArray | Sequence[Sequence[int]]) -> np.ndarray:
    """Number the distinct prompts of pairs, for clustered standard errors: `[pairs]` int64 from 0.

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
    kind = provenance.get("format", "pairs")
    return with_provenance(table, kind, {**provenance, "split": {"side": side, **settings}})


def sample_pairs(table: pa.Table, fraction: float, *, seed: int = 0) -> pa.Table:
    """Return a random share of the pairs, in the order of the table, to train an oracle on part of the data.

    Pairs are sampled by a hash of the seed and their `pair_id`, so a larger sample contains the smaller ones.

    Args:
        table: any table with `pair_id`.
        fraction: share in (0, 1]; at least one pair is returned.
        seed: seed of the hash.

    Raises:
        UserError: `fraction` is not in (0, 1].
    """
    check_number("the sample fraction", fraction, above=0, most=1)
    table = require_table("table", table, *SCHEMAS)
    check_number("seed", seed, whole=True)
    return take_pairs(table, max(1, round(fraction * len(table))), seed=seed)


def take_pairs(table: pa.Table, number: int, *, seed: int = 0) -> pa.Table:
    """Return `number` pairs, or all if there are fewer, sampled as in `sample_pairs`."""
    number = min(len(table), number)
    ids = table.column("pair_id").to_pylist()
    order = sorted(range(len(ids)), key=lambda row: (_order("sample", seed, str(ids[row]).encode()), row))
    return table.take(pa.array(sorted(order[:number]), type=pa.int64()))


def _order(purpose: str, seed: int, key: bytes) -> bytes:
    """A hash to sort by, the same on every platform and release."""
    return hashlib.sha256(f"{purpose}:{seed}:".encode() + key).digest()
