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
        return _labels(np.concatenate([np.zeros((2, 0), np.uint64), *self._hashes], axis=1))


def _labels(hashes: np.ndarray) -> np.ndarray:
    """A label of each pair's prompt, from hashes of its ids and of its key `[2, pairs]`."""
    if not hashes.size:
        return np.zeros(0, np.int64)
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    nodes, places = np.unique(hashes, return_inverse=True)
    ids, keys = places.reshape(hashes.shape)
    edges = coo_array((np.ones(len(ids), np.int8), (ids, keys)), shape=(len(nodes), len(nodes)))
    return connected_components(edges, directed=False)[1][ids]


class PairRows:
    """The rows of a table of pairs that is added part by part: what a split needs to know, 48 bytes a pair.

    Two texts or prompts count as equal if their hashes of 64 bits are: wrong for one of a million prompts in 3e-8 of
    all tables.

    Args:
        seed: of the split.
    """

    def __init__(self, seed: int = 0):
        check_number("seed", seed, whole=True)
        self.seed = seed
        self._pair_ids: list[np.ndarray] = []
        self._hashes: list[np.ndarray] = []  # of prompt ids, prompt key and conversation
        self._places: list[np.ndarray] = []
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
        of_prompts = _prompt_hashes(table, prompts)
        self._has_talks &= {CONVERSATION, PROMPT_KEY} <= set(table.column_names)
        hashes = [*of_prompts, _text_hashes(b"", table[CONVERSATION]) if self._has_talks else of_prompts[0]]
        self._pair_ids.append(table["pair_id"].to_numpy())
        self._hashes.append(np.array(hashes, np.uint64))
        places = [_order("held_out", self.seed, ids) for ids in prompts]
        self._places.append(np.array(places, np.uint64).reshape(-1, 2))

    def select(self, rows: np.ndarray) -> PairRows:
        """Some of the rows."""
        found = PairRows(self.seed)
        found._pair_ids, found._hashes = [self.pair_ids[rows]], [self.hashes[:, rows]]
        found._places, found._has_talks = [self._all_places[rows]], self._has_talks
        return found

    def __len__(self) -> int:
        return sum(map(len, self._pair_ids))

    @property
    def pair_ids(self) -> np.ndarray:
        """`[pairs]` int64."""
        return np.concatenate([np.zeros(0, np.int64), *self._pair_ids])

    @property
    def hashes(self) -> np.ndarray:
        """Hashes of each pair's prompt ids, prompt key and conversation: `[3, pairs]`."""
        return np.concatenate([np.zeros((3, 0), np.uint64), *self._hashes], axis=1)

    @property
    def _all_places(self) -> np.ndarray:
        return np.concatenate([np.zeros((0, 2), np.uint64), *self._places])

    def split(self, held_out: int | float, sample: float) -> tuple[np.ndarray, np.ndarray]:
        """The training rows and the held-out rows of `split_pairs`, ascending."""
        target = _held_out_pairs(held_out, len(self))
        labels = _labels(self.hashes[:2])
        order = labels[_sorted_by(self._all_places)]
        _, first, counts = np.unique(order, return_index=True, return_counts=True)
        by_place = np.argsort(first)
        totals = np.concatenate([[0], np.cumsum(counts[by_place])])
        number = int(np.argmin(np.abs(totals - target)))
        if target and number == 0:
            number = 1
        if number >= len(counts):
            raise UserError(
                f"cannot hold out {target} of {len(self)} pairs: they share {len(counts)} prompts (dialogues with one "
                "first user turn count as one), and at least one must stay for training; hold out fewer pairs"
            )
        held = np.isin(labels, order[np.sort(first)[:number]])
        train = np.flatnonzero(~held)
        check_number("the sample fraction", sample, above=0, most=1)
        size = max(1, round(sample * len(train)))
        return train[sampled_rows(self.pair_ids[train], size, self.seed)], np.flatnonzero(held)

    def near_duplicates(self) -> int:
        """Number of prompts that differ from an earlier one of the same `prompt_key` in the conversation."""
        _, keys, talks = self.hashes
        return len(np.unique(talks)) - len(np.unique(keys)) if self._has_talks else 0

    def grouped(self, rows: np.ndarray) -> np.ndarray:
        """Some rows in the order of `group_by_prompt`."""
        _, first, inverse = np.unique(self.hashes[0][rows], return_index=True, return_inverse=True)
        return rows[np.argsort(first[inverse], kind="stable")]


def shared_prompts(first: tuple[PairRows, np.ndarray], second: tuple[PairRows, np.ndarray]) -> int:
    """Number of distinct prompts that occur in both selections of rows."""
    hashes = [rows.hashes[:2, chosen] for rows, chosen in (first, second)]
    labels = _labels(np.concatenate(hashes, axis=1))
    number = hashes[0].shape[1]
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
    order = np.array([_order("sample", seed, str(one).encode()) for one in pair_ids.tolist()], np.uint64)
    return np.sort(_sorted_by(order.reshape(-1, 2))[:number])


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


def _sorted_by(hashes: np.ndarray) -> np.ndarray:
    """The rows sorted by their hashes `[rows, 2]`, then by number."""
    return np.lexsort((hashes[:, 1], hashes[:, 0]))
