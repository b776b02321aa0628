"""Train and held-out pairs by prompt, and nested random samples; both use hashes and do not depend on row order."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from sepo.data.conversation import CONVERSATION, PROMPT_KEY
from sepo.data.ragged import flat
from sepo.data.tables import SCHEMAS, provenance_of, require_table, with_provenance
from sepo.errors import UserError, check_number


def split_pairs(
    table: pa.Table, *, held_out: int | float, sample: float = 1.0, seed: int = 0
) -> tuple[pa.Table, pa.Table]:
    """Split a table of pairs by prompt, so that no held-out prompt occurs in training.

    Pairs with one `prompt_key` or with the same token ids have one prompt (`prompt_numbers`). Prompts are sorted by a
    hash of the seed and their token ids. The first ones are held out, as many as bring the number of pairs closest to
    `held_out`. The result depends only on table and seed. When the table grows, existing prompts keep their order. Rows
    keep their order, too.

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
    train, held = PairRows.of(table, seed).split(held_out, sample)

    def part(side: str, rows: np.ndarray) -> pa.Table:
        mask = np.zeros(len(table), bool)
        mask[rows] = True
        return _with_split(table.filter(pa.array(mask)), side, held_out=held_out, sample=sample, seed=seed)

    return part("train", train), part("held_out", held)


def prompt_rows(table: pa.Table, limit: int, after: int = 0) -> pa.Table:
    """One row of each of `limit` distinct prompts, sampled by hash, in the order of the table.

    Args:
        after: skip the first `after` prompts of the sample, which `prompt_rows(table, after)` returns.
    """
    places = sorted(_first_places(table, prompt_numbers(table).tolist(), "sample", 0).values())
    return table.take(pa.array(sorted(row for _, row in places[after : after + limit]), type=pa.int64()))


def sample_prompts(table: pa.Table, limit: int) -> list[list[int]]:
    """Token ids of the prompts of `prompt_rows`."""
    return prompt_rows(table, limit).column("prompt_ids").to_pylist()


def group_by_prompt(table: pa.Table) -> pa.Table:
    """Move the pairs with the same prompt ids together, prompts in the order of their first pairs."""
    first: dict[bytes, int] = {}
    order = np.argsort([first.setdefault(ids, len(first)) for ids in _ids(table["prompt_ids"])], kind="stable")
    return table.take(pa.array(order, type=pa.int64()))


def prompt_numbers(columns: pa.Table | Mapping[str, Any]) -> np.ndarray:
    """Number the distinct prompts of pairs, for splits and clustered standard errors: `[pairs]` int64 from 0.

    Two pairs have one prompt if their `prompt_key` is equal, or if their `prompt_ids` are: truncation makes different
    prompts equal. Tables without `prompt_key` have the ids alone.

    >>> prompt_numbers({"prompt_ids": [[5, 6], [7], [5, 6]]}).tolist()
    [0, 1, 0]
    >>> prompt_numbers({"prompt_ids": [[5, 6], [7], [8]], "prompt_key": ["a", "b", "a"]}).tolist()
    [0, 1, 0]
    """
    prompts = _ids(columns["prompt_ids"])
    names = columns.column_names if isinstance(columns, pa.Table) else columns
    keys: Any = columns[PROMPT_KEY] if PROMPT_KEY in names else prompts
    keys = keys.to_pylist() if isinstance(keys, pa.Array | pa.ChunkedArray) else keys
    parent: dict[bytes | str, bytes | str] = {}

    def root(node: bytes | str) -> bytes | str:
        while parent.setdefault(node, node) != node:
            parent[node] = node = parent[parent[node]]
        return node

    for ids, key in zip(prompts, keys, strict=True):
        parent[root(ids)] = root(key)
    numbers: dict[bytes | str, int] = {}
    return np.array([numbers.setdefault(root(ids), len(numbers)) for ids in prompts], dtype=np.int64)


class PromptHashes:
    """The prompts of a table that is read shard by shard, as in `prompt_numbers`: 16 bytes a pair are kept.

    The labels are right unless two of the prompts have one hash of 64 bits: 3e-8 likely for a million prompts.
    """

    def __init__(self) -> None:
        self._hashes: list[np.ndarray] = []

    def add(self, table: pa.Table) -> None:
        """Add the pairs of a shard."""
        self._hashes.append(np.array(_prompt_hashes(table, _ids(table["prompt_ids"])), np.uint64))

    def labels(self) -> np.ndarray:
        """A label of each pair's prompt: `[pairs]`, equal where the prompts are."""
        return _labels(*np.concatenate([np.zeros((2, 0), np.uint64), *self._hashes], axis=1))


def _labels(ids: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """A label from 0 of each pair's prompt, from hashes of its ids and of its key `[pairs]`."""
    ids, keys = _numbered(ids), _numbered(keys)
    for fine, coarse in ((ids, keys), (keys, ids)):
        if np.array_equal(_last(fine, coarse)[fine], coarse):  # all prompts of one `fine` have one `coarse`
            return coarse
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    shape = int(ids.max()) + 1, int(keys.max()) + 1
    edges = coo_array((np.ones(len(ids), bool), (ids, keys + shape[0])), shape=(sum(shape), sum(shape)))
    return connected_components(edges, directed=False)[1][ids]


def _numbered(values: np.ndarray) -> np.ndarray:
    """Number the distinct values from 0, in ascending order: 25 bytes a value at most, where `np.unique` takes 41."""
    order = np.argsort(values)
    ascending = values[order]
    new = np.concatenate([[False], ascending[1:] != ascending[:-1]])[: len(values)]
    del ascending
    numbers = np.empty(len(values), np.int32)
    numbers[order] = np.cumsum(new, dtype=np.int32)
    return numbers


def _last(groups: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The last value of each group, which are numbered from 0 without a gap: `[groups]`."""
    found = np.zeros(int(groups.max(initial=-1)) + 1, values.dtype)
    found[groups] = values
    return found


def _first_rows(groups: np.ndarray) -> np.ndarray:
    """The first row of each group: `[groups]` int32."""
    return len(groups) - 1 - _last(groups[::-1], np.arange(len(groups), dtype=np.int32))


class PairRows:
    """The rows of a table of pairs that is added part by part: what a split needs to know, 40 bytes a pair.

    Two texts or prompts count as equal if their hashes of 64 bits are: wrong for one of a million prompts in 3e-8 of
    all tables.

    Args:
        seed: of the split.
    """

    def __init__(self, seed: int = 0):
        check_number("seed", seed, whole=True)
        self.seed = seed
        self._parts: dict[str, list[np.ndarray]] = {
            "pair_ids": [np.zeros(0, np.int64)],
            # hashes of prompt ids, prompt key and conversation, and the place of the prompt ids in a split
            **{name: [np.zeros(0, np.uint64)] for name in ("ids", "keys", "talks", "places")},
        }
        self._has_talks = True

    @classmethod
    def of(cls, table: pa.Table, seed: int = 0) -> PairRows:
        """The rows of a table in memory."""
        rows = cls(seed)
        rows.add(table)
        return rows

    def add(self, table: pa.Table) -> None:
        """Add rows."""
        prompts = _ids(table["prompt_ids"])
        ids, keys = _prompt_hashes(table, prompts)
        self._has_talks &= {CONVERSATION, PROMPT_KEY} <= set(table.column_names)
        places = [_order("held_out", self.seed, prompt)[0] for prompt in prompts]
        self._parts["pair_ids"].append(table["pair_id"].to_numpy().copy())
        hashes = {"ids": ids, "keys": keys, "places": places}
        if self._has_talks:
            hashes["talks"] = _text_hashes(b"", table[CONVERSATION])
        for name, values in hashes.items():
            self._parts[name].append(np.array(values, np.uint64))

    def select(self, rows: np.ndarray) -> PairRows:
        """Some of the rows."""
        found = PairRows(self.seed)
        names = [name for name in self._parts if name != "talks" or self._has_talks]
        found._parts |= {name: [self._column(name)[rows]] for name in names}
        found._has_talks = self._has_talks
        return found

    def __len__(self) -> int:
        return sum(map(len, self._parts["pair_ids"]))

    @property
    def pair_ids(self) -> np.ndarray:
        """`[pairs]` int64."""
        return self._column("pair_ids")

    def _column(self, name: str) -> np.ndarray:
        parts = self._parts[name]
        if len(parts) > 1:
            self._parts[name] = parts = [np.concatenate(parts)]
        return parts[0]

    def prompt_hashes(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Hashes of the prompt ids and of the prompt key of some rows."""
        return self._column("ids")[rows], self._column("keys")[rows]

    def split(self, held_out: int | float, sample: float) -> tuple[np.ndarray, np.ndarray]:
        """The training rows and the held-out rows of `split_pairs`, ascending."""
        target = _held_out_pairs(held_out, len(self))
        labels = _labels(self._column("ids"), self._column("keys"))
        # Prompts by the first of their places; these are hashes of 64 bits, equal for two of a million in 3e-8 of all.
        by_place = np.argsort(_first_rows(labels[np.argsort(self._column("places"), kind="stable")]))
        counts = np.bincount(labels, minlength=len(by_place))[by_place]
        totals = np.concatenate([[0], np.cumsum(counts)])
        number = int(np.argmin(np.abs(totals - target)))
        if target and number == 0:
            number = 1
        if number >= len(counts):
            raise UserError(
                f"cannot hold out {target} of {len(self)} pairs: they share {len(counts)} prompts (dialogues with one "
                "first user turn count as one), and at least one must stay for training; hold out fewer pairs"
            )
        is_held = np.zeros(len(counts), bool)
        is_held[by_place[:number]] = True
        held = is_held[labels]
        train = np.flatnonzero(~held)
        check_number("the sample fraction", sample, above=0, most=1)
        size = max(1, round(sample * len(train)))
        if size < len(train):
            train = train[sampled_rows(self.pair_ids[train], size, self.seed)]
        return train, np.flatnonzero(held)

    def near_duplicates(self) -> int:
        """Number of prompts that differ from an earlier one of the same `prompt_key` in the conversation."""
        return _distinct(self._column("talks")) - _distinct(self._column("keys")) if self._has_talks else 0

    def grouped(self, rows: np.ndarray) -> np.ndarray:
        """Some rows in the order of `group_by_prompt`."""
        groups = _numbered(self._column("ids")[rows])
        return rows[np.argsort(_first_rows(groups)[groups], kind="stable")]


def _distinct(values: np.ndarray) -> int:
    """Number of distinct values."""
    ascending = np.sort(values)
    return int(np.count_nonzero(ascending[1:] != ascending[:-1])) + bool(len(values))


def shared_prompts(first: tuple[PairRows, np.ndarray], second: tuple[PairRows, np.ndarray]) -> int:
    """Number of distinct prompts that occur in both selections of rows."""
    if not len(second[1]):
        return 0
    hashes = [rows.prompt_hashes(chosen) for rows, chosen in (first, second)]
    labels = _labels(*map(np.concatenate, zip(*hashes, strict=True)))
    number = len(first[1])
    return len(np.intersect1d(labels[:number], labels[number:]))


def _prompt_hashes(table: pa.Table, prompts: Sequence[bytes]) -> list[list[int]]:
    """Hashes of each pair's prompt ids and of its prompt key; without a key, the ids twice."""
    ids = [_hash(b"ids" + prompt) for prompt in prompts]
    return [ids, _text_hashes(b"key", table[PROMPT_KEY]) if PROMPT_KEY in table.column_names else ids]


def _text_hashes(kind: bytes, texts: pa.ChunkedArray) -> list[int]:
    return [_hash(kind + text.encode("utf-8", "surrogatepass")) for text in texts.to_pylist()]


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _first_places(
    table: pa.Table, numbers: Sequence[int], purpose: str, seed: int
) -> dict[int, tuple[tuple[int, int], int]]:
    """For each prompt the lowest hash of its ids and the first row with these ids."""
    places: dict[int, tuple[tuple[int, int], int]] = {}
    seen: set[bytes] = set()
    for row, (ids, number) in enumerate(zip(_ids(table["prompt_ids"]), numbers, strict=True)):
        if ids not in seen:
            seen.add(ids)
            place = (_order(purpose, seed, ids), row)
            places[number] = min(places.get(number, place), place)
    return places


def _ids(prompt_ids: pa.Array | pa.ChunkedArray | Sequence[Sequence[int]]) -> list[bytes]:
    """The ids of each prompt as bytes."""
    if not isinstance(prompt_ids, pa.Array | pa.ChunkedArray):
        prompt_ids = pa.array(list(prompt_ids), type=pa.list_(pa.int32()))
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


def split_provenance(side: str, *, held_out: int | float, sample: float, seed: int) -> dict[str, Any]:
    """What a table records about its part of a split."""
    return {"split": {"side": side, "held_out": held_out, "sample": sample, "seed": seed}}


def _with_split(table: pa.Table, side: str, **settings: Any) -> pa.Table:
    provenance = provenance_of(table)
    kind = provenance.get("format", "pairs")
    return with_provenance(table, kind, {**provenance, **split_provenance(side, **settings)})


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
    return table.take(pa.array(sampled_rows(table.column("pair_id").to_numpy(), number, seed)))


def sampled_rows(pair_ids: np.ndarray, number: int, seed: int) -> np.ndarray:
    """The rows of `take_pairs`, ascending, for the `pair_id`s of a table."""
    if number >= len(pair_ids):
        return np.arange(len(pair_ids))
    places = np.array([_order("sample", seed, str(pair_id).encode()) for pair_id in pair_ids.tolist()], np.uint64)
    return np.sort(np.lexsort(places.reshape(-1, 2).T[::-1])[:number])


def share_rows(pair_ids: np.ndarray, groups: np.ndarray, weights: Sequence[float], *, seed: int = 0) -> np.ndarray:
    """The largest part of a table in which the pairs of each group have the share of its weight: rows, ascending.

    No pair is repeated, so the group with the fewest pairs for its weight keeps all of them. Pairs are sampled as in
    `sample_pairs`.

    Args:
        pair_ids, groups: `[pairs]`, the id of each pair, and its group from 0.
        weights: of each group.
    """
    counts = np.bincount(groups, minlength=len(weights))
    scale = (counts / np.asarray(weights)).min()
    kept = []
    for group, weight in enumerate(weights):
        rows = np.flatnonzero(groups == group)
        kept.append(rows[sampled_rows(pair_ids[rows], max(1, round(weight * scale)), seed)])
    return np.sort(np.concatenate(kept))


def _order(purpose: str, seed: int, key: bytes) -> tuple[int, int]:
    """A hash of 128 bits to sort by, the same on every platform and release."""
    digest = hashlib.sha256(f"{purpose}:{seed}:".encode() + key).digest()
    return int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:16], "big")
