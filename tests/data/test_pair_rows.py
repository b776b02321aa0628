"""Splits of tables that are read part by part, against plain Python over the whole table."""

from __future__ import annotations

import hashlib
import sqlite3

import datasets
import numpy as np
import pyarrow as pa
import pytest

import spawn
from sepo.cli.failures import known_failure
from sepo.data.encoding import _repeats
from sepo.data.splits import PairRows, PromptRows, group_by_prompt, prompt_numbers


def table_of(ids: list[int], keys: list[int]) -> pa.Table:
    rows = len(ids)
    return pa.table(
        {
            "pair_id": pa.array(range(rows), pa.int64()),
            "prompt_ids": pa.array([[1, number] for number in ids], pa.list_(pa.int32())),
            "conversation": [f"talk {number}" for number in ids],
            "prompt_key": [f"key {number}" for number in keys],
        }
    )


# A prompt has several keys, a key has several prompts, both (truncation makes prompts equal), or neither.
KINDS = {
    "equal": lambda draw: (ids := draw.integers(0, 30, 200), ids),
    "coarser keys": lambda draw: (ids := draw.integers(0, 60, 200), ids // 3),
    "finer keys": lambda draw: (ids := draw.integers(0, 20, 200), ids * 3 + draw.integers(0, 3, 200)),
    "mixed": lambda draw: (draw.integers(0, 90, 200), draw.integers(0, 90, 200)),
    "empty": lambda draw: (np.zeros(0, int), np.zeros(0, int)),
}


def rows_in_parts(table: pa.Table, seed: int = 5) -> PairRows:
    rows = PairRows(seed)
    for start in range(0, len(table), 64):
        rows.add(table.slice(start, 64))
    return rows


@pytest.mark.parametrize("kind", KINDS)
def test_labels_of_parts_are_those_of_the_whole_table(kind):
    ids, keys = (values.tolist() for values in KINDS[kind](np.random.default_rng(1)))
    table, hashes = table_of(ids, keys), PromptRows()
    for start in range(0, len(table), 64):
        hashes.add(table.slice(start, 64))
    _, expected = np.unique(prompt_numbers(table), return_inverse=True)
    labels = hashes.labels()
    assert np.array_equal(labels[:, None] == labels, expected[:, None] == expected)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "empty"])
@pytest.mark.parametrize("held_out", [0, 1, 37, 0.5])
def test_a_split_takes_whole_prompts_in_the_order_of_a_hash(kind, held_out):
    ids, keys = (values.tolist() for values in KINDS[kind](np.random.default_rng(2)))
    table = table_of(ids, keys)
    numbers = prompt_numbers(table)
    places = [hashlib.sha256(b"held_out:5:" + np.array([1, i], "<i4").tobytes()).digest() for i in ids]
    order = list(dict.fromkeys(numbers[row] for row in sorted(range(len(ids)), key=places.__getitem__)))
    sizes = np.cumsum([0, *(np.sum(numbers == number) for number in order)])
    wanted = round(held_out * len(ids)) if isinstance(held_out, float) else held_out
    taken = int(np.argmin(np.abs(sizes - wanted))) or int(wanted > 0)
    if taken >= len(order):
        pytest.skip("one prompt joins nearly all pairs")
    expected = np.isin(numbers, order[:taken])
    train, held = rows_in_parts(table).split(held_out, 1.0)
    assert held.tolist() == np.flatnonzero(expected).tolist()
    assert train.tolist() == np.flatnonzero(~expected).tolist()


def grouped(rows: PairRows, some: np.ndarray) -> np.ndarray:
    parts = list(rows.grouped(some, 64))
    assert {len(part) for part in parts[:-1]} <= {64}
    return np.concatenate(parts)


def test_groups_and_near_duplicates_of_parts_are_those_of_the_whole_table():
    ids, keys = (values.tolist() for values in KINDS["coarser keys"](np.random.default_rng(3)))
    table = table_of(ids, keys)
    rows = rows_in_parts(table)
    assert grouped(rows, np.arange(len(ids))).tolist() == group_by_prompt(table)["pair_id"].to_pylist()
    assert rows.near_duplicates() == len(set(ids)) - len(set(keys))
    some = np.arange(3, 150, 2)
    places = np.searchsorted(some, grouped(rows, some))
    assert grouped(rows.select(some), np.arange(len(some))).tolist() == places.tolist()


def test_the_rows_with_some_pair_ids_come_in_the_order_of_the_ids():
    table = table_of([0] * 5, [0] * 5).set_column(0, "pair_id", pa.array([7, 3, 10**9, 4, 10**10]))
    assert rows_in_parts(table).rows_of([4, 8, 10**10, 7]).tolist() == [3, 4, 0]


def test_a_full_disk_ends_in_one_line():
    rows = rows_in_parts(table_of([0] * 5, [0] * 5))
    rows._query("PRAGMA max_page_count = 3")
    numbers = list(range(1000))
    with pytest.raises(sqlite3.OperationalError) as error:
        rows.add(table_of(numbers, numbers))
    assert str(known_failure(error.value)).startswith(
        "the disk is full (that of temporary files: TMPDIR): free some space"
    )


LIMITED = """
import resource, signal
from sepo.cli.failures import known_failure
from sepo.data.splits import PromptRows

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
rows = PromptRows()
unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (0, unlimited[1]))
try:
    rows._insert((number, number) for number in range(200_000))
except Exception as error:
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    print(known_failure(error))
"""


def test_a_temporary_file_that_may_not_grow_ends_in_one_line():
    """As with a quota; SQLite calls it an error of the disk."""
    found = spawn.run(["-c", LIMITED])
    assert found.stdout.startswith("the disk of temporary files (TMPDIR) cannot be written"), found


MEMORY = """
import resource
import numpy as np
import pyarrow as pa
from sepo.data.splits import PairRows

def peak(number):
    rows = PairRows()
    for start in range(0, number, 1000):
        ids = np.arange(start, start + 1000)
        prompts = pa.ListArray.from_arrays(np.arange(1001, dtype=np.int32), pa.array(ids, pa.int32()))
        names = pa.array(ids.astype(str))
        rows.add(pa.table({"pair_id": ids, "prompt_ids": prompts, "conversation": names, "prompt_key": names}))
    train, _ = rows.split(0.1, 1.0)
    for part in rows.grouped(train, 1000):
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

before = peak(80_000)
print((peak(200_000) - before) / 120_000)
"""


@pytest.mark.nightly
def test_a_pair_takes_a_few_bytes_of_memory():
    """Hashes and their sorted copies are on disk; in memory are row numbers, and which rows are trained on."""
    assert float(spawn.run(["-c", MEMORY]).stdout) < 30


@pytest.mark.parametrize(
    ("ids", "repeats"),
    [([], False), ([4], False), ([1, 2, 9], False), ([9, 2, 1], False), ([1, 2, 2], True), ([2, 1, 2], True),
     (["a", "b"], False), (["b", "a", "b"], True), ([None, None, 3], True), ([1, None], False)],
)  # fmt: skip
def test_ids_that_occur_twice_are_found_in_any_order(ids, repeats):
    kind = pa.string() if "a" in ids else pa.int64()
    assert _repeats(datasets.Dataset(pa.table({"pair_id": pa.array(ids, kind)}))) is repeats
