"""Train and held-out pairs by prompt, and nested random samples; both use hashes and do not depend on row order."""

from __future__ import annotations

import hashlib
import sqlite3
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
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


class PromptRows:
    """The prompts of a table that is added part by part, in a temporary database on disk.

    Memory does not grow with the table, with one exception: prompts of which some share their ids but not their key,
    and others their key but not their ids. Two prompts count as equal if their hashes of 64 bits are: wrong for one of
    a million prompts in 3e-8 of all tables.
    """

    _columns: tuple[str, ...] = ("ids", "keys")

    def __init__(self) -> None:
        # An empty name: SQLite keeps the database in a file without a name, in the system's folder for such files.
        self._database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        weakref.finalize(self, self._database.close)
        for setting in ("journal_mode = off", "temp_store = file"):
            self._query(f"PRAGMA {setting}")
        self._query(f"CREATE TABLE pairs (row INTEGER PRIMARY KEY, {', '.join(self._columns)})")
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def add(self, table: pa.Table) -> None:
        """Add the pairs of a part."""
        self._insert(zip(*self._values(table), strict=True))

    def labels(self) -> np.ndarray:
        """A label of each pair's prompt: `[pairs]` int64, equal where the prompts are."""
        return self._numbers(f"SELECT {self._label()} FROM pairs ORDER BY row", np.int64, len(self))

    def _values(self, table: pa.Table) -> list[list[int]]:
        return _prompt_hashes(table, _ids(table["prompt_ids"]))

    def _insert(self, rows: Iterable[tuple[int | None, ...]]) -> None:
        """Add rows of `_columns`."""
        self._length += self._fill("pairs", ((number, *row) for number, row in enumerate(rows, self._length)))

    def _fill(self, table: str, rows: Iterable[tuple[int | None, ...]]) -> int:
        """Add rows, whose first column is a number, to a table; returns how many."""
        columns = len(self._query(f"SELECT * FROM {table} LIMIT 0").description)
        self._query("BEGIN")
        added = self._database.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * columns)})", rows)
        self._query("COMMIT")
        return added.rowcount

    def _query(self, query: str, *values: int) -> sqlite3.Cursor:
        return self._database.execute(query, values)

    def _numbers(self, query: str, dtype: type[np.integer], count: int) -> np.ndarray:
        """The only column of a query with this many rows."""
        return np.fromiter((number for (number,) in self._query(query)), dtype, count)

    def _choose(self, rows: np.ndarray) -> str:
        """The name of a table of these rows alone."""
        self._query("DROP TABLE IF EXISTS chosen")
        self._query("CREATE TABLE chosen (row INTEGER PRIMARY KEY)")
        self._fill("chosen", ((int(row),) for row in rows))
        return "(chosen JOIN pairs USING (row))"

    def _label(self) -> str:
        """The expression that labels the prompt of a pair, in the table `pairs`."""
        for fine, coarse in (("ids", "keys"), ("keys", "ids")):
            divided = f"SELECT 1 FROM pairs GROUP BY {fine} HAVING min({coarse}) <> max({coarse}) LIMIT 1"
            if self._query(divided).fetchone() is None:
                return coarse
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        edges = self._query("SELECT DISTINCT ids, keys FROM pairs")
        ids, keys = np.array(edges.fetchall(), np.int64).T
        (ids, first), (keys, second) = (np.unique(values, return_inverse=True) for values in (ids, keys))
        number = len(ids) + len(keys)
        graph = coo_array((np.ones(len(first), bool), (first, second + len(ids))), shape=(number, number))
        labels = connected_components(graph, directed=False)[1]
        self._query("DROP TABLE IF EXISTS components")
        self._query("CREATE TABLE components (ids INTEGER PRIMARY KEY, label)")
        self._fill("components", zip(ids.tolist(), labels.tolist(), strict=False))
        return "(SELECT label FROM components WHERE components.ids = pairs.ids)"


class PairRows(PromptRows):
    """The pairs of a table that is added part by part: what a split needs to know, about 60 bytes a pair on disk.

    Args:
        seed: of the split.
    """

    # Hashes of prompt ids, prompt key and conversation, and the place of the prompt ids in a split.
    _columns = ("ids", "keys", "pair_id", "talk", "place")

    def __init__(self, seed: int = 0):
        check_number("seed", seed, whole=True)
        super().__init__()
        self.seed = seed

    @classmethod
    def of(cls, table: pa.Table, seed: int = 0) -> PairRows:
        """The rows of a table in memory."""
        rows = cls(seed)
        rows.add(table)
        return rows

    def _values(self, table: pa.Table) -> list[list[Any]]:
        prompts = _ids(table["prompt_ids"])
        has_talks = {CONVERSATION, PROMPT_KEY} <= set(table.column_names)
        talks = _text_hashes(b"", table[CONVERSATION]) if has_talks else [None] * len(table)
        # The databases of SQLite have signed numbers.
        places = [_order("held_out", self.seed, prompt)[0] - 2**63 for prompt in prompts]
        return [*_prompt_hashes(table, prompts), table["pair_id"].to_pylist(), talks, places]

    def select(self, rows: np.ndarray) -> PairRows:
        """Some of the rows, ascending."""
        found = PairRows(self.seed)
        found._insert(self._query(f"SELECT {', '.join(self._columns)} FROM {self._choose(rows)} ORDER BY row"))
        return found

    @property
    def pair_ids(self) -> np.ndarray:
        """`[pairs]` int64."""
        return self._numbers("SELECT pair_id FROM pairs ORDER BY row", np.int64, len(self))

    def rows_of(self, pair_ids: Iterable[int]) -> np.ndarray:
        """The rows with these `pair_id`s, in this order; an id without a row is left out."""
        self._query("CREATE INDEX IF NOT EXISTS by_pair_id ON pairs (pair_id)")
        found = (self._query("SELECT row FROM pairs WHERE pair_id = ?", pair_id).fetchone() for pair_id in pair_ids)
        return np.array([place[0] for place in found if place is not None], np.int64)

    def split(self, held_out: int | float, sample: float) -> tuple[np.ndarray, np.ndarray]:
        """The training rows and the held-out rows of `split_pairs`, ascending: int32."""
        target = _held_out_pairs(held_out, len(self))
        label = self._label()
        # Prompts by the first of their places; these are hashes of 64 bits, equal for two of a million in 3e-8 of all.
        self._query("DROP TABLE IF EXISTS prompts")
        self._query(
            "CREATE TABLE prompts AS SELECT label, count(*) AS size "
            f"FROM (SELECT {label} AS label, place FROM pairs) GROUP BY label ORDER BY min(place)"
        )
        prompts = self._query("SELECT count(*) FROM prompts").fetchone()[0]
        number = _prompts_for(target, (size for (size,) in self._query("SELECT size FROM prompts ORDER BY rowid")))
        if number >= prompts:
            raise UserError(
                f"cannot hold out {target} of {len(self)} pairs: they share {prompts} prompts (dialogues with one "
                "first user turn count as one), and at least one must stay for training; hold out fewer pairs"
            )
        pairs = self._query(f"SELECT coalesce(sum(size), 0) FROM prompts WHERE rowid <= {number}").fetchone()[0]
        train, held = (
            self._numbers(
                f"SELECT row FROM pairs WHERE {label} {within} (SELECT label FROM prompts WHERE rowid <= {number}) "
                "ORDER BY row",
                np.int32,
                count,
            )
            for within, count in (("NOT IN", len(self) - pairs), ("IN", pairs))
        )
        check_number("the sample fraction", sample, above=0, most=1)
        size = max(1, round(sample * len(train)))
        if size < len(train):
            train = train[sampled_rows(self.pair_ids[train], size, self.seed)]
        return train, held

    def near_duplicates(self) -> int:
        """Number of prompts that differ from an earlier one of the same `prompt_key` in the conversation."""
        if self._query("SELECT 1 FROM pairs WHERE talk IS NULL LIMIT 1").fetchone():
            return 0
        talks, keys = (
            self._query(f"SELECT count(*) FROM (SELECT 1 FROM pairs GROUP BY {name})").fetchone()[0]
            for name in ("talk", "keys")
        )
        return int(talks - keys)

    def grouped(self, rows: np.ndarray, at_once: int) -> Iterator[np.ndarray]:
        """Some rows, ascending, in the order of `group_by_prompt`, in parts of `at_once`."""
        first = f"SELECT row, min(row) OVER (PARTITION BY ids) AS first FROM {self._choose(rows)}"
        found = self._query(f"SELECT row FROM ({first}) ORDER BY first, row")
        while part := found.fetchmany(at_once):
            yield np.array(part, np.int64)[:, 0]


def _prompts_for(pairs: int, sizes: Iterable[int]) -> int:
    """How many prompts bring the number of their pairs closest to `pairs`; at least one for any pair.

    Args:
        sizes: pairs of each prompt.
    """
    number, total, distance = 0, 0, pairs
    for count, size in enumerate(sizes, 1):
        if total >= pairs:
            break
        total += size
        if abs(total - pairs) < distance:
            number, distance = count, abs(total - pairs)
    return number or int(pairs > 0)


def shared_prompts(first: tuple[PairRows, np.ndarray], second: tuple[PairRows, np.ndarray]) -> int:
    """Number of distinct prompts that occur in both selections of rows, which are ascending."""
    if not len(second[1]):
        return 0
    both = PromptRows()
    for rows, chosen in (first, second):
        both._insert(rows._query(f"SELECT ids, keys FROM {rows._choose(chosen)} ORDER BY row"))
    number = len(first[1])
    in_both = f"GROUP BY {both._label()} HAVING min(row) < {number} AND max(row) >= {number}"
    return int(both._query(f"SELECT count(*) FROM (SELECT 1 FROM pairs {in_both})").fetchone()[0])


def _prompt_hashes(table: pa.Table, prompts: Sequence[bytes]) -> list[list[int]]:
    """Hashes of each pair's prompt ids and of its prompt key; without a key, the ids twice."""
    ids = [_hash(b"ids" + prompt) for prompt in prompts]
    return [ids, _text_hashes(b"key", table[PROMPT_KEY]) if PROMPT_KEY in table.column_names else ids]


def _text_hashes(kind: bytes, texts: pa.ChunkedArray) -> list[int]:
    return [_hash(kind + text.encode("utf-8", "surrogatepass")) for text in texts.to_pylist()]


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)


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
    places = (half for pair_id in pair_ids for half in _order("sample", seed, str(pair_id).encode()))
    return np.sort(np.lexsort(np.fromiter(places, np.uint64).reshape(-1, 2).T[::-1])[:number])


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
