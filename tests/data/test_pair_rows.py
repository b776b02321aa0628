"""Splits of tables that are read part by part, against plain Python over the whole table."""

from __future__ import annotations

import hashlib

import datasets
import numpy as np
import pyarrow as pa
import pytest

from sepo.data.encoding import _repeats
from sepo.data.splits import PairRows, PromptHashes, group_by_prompt, prompt_numbers


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
    table, hashes = table_of(ids, keys), PromptHashes()
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


def test_groups_and_near_duplicates_of_parts_are_those_of_the_whole_table():
    ids, keys = (values.tolist() for values in KINDS["coarser keys"](np.random.default_rng(3)))
    table = table_of(ids, keys)
    rows = rows_in_parts(table)
    assert rows.grouped(np.arange(len(ids))).tolist() == group_by_prompt(table)["pair_id"].to_pylist()
    assert rows.near_duplicates() == len(set(ids)) - len(set(keys))
    some = np.arange(3, 150, 2)
    assert (
        rows.select(some).grouped(np.arange(len(some))).tolist() == np.searchsorted(some, rows.grouped(some)).tolist()
    )


@pytest.mark.parametrize(
    ("ids", "repeats"),
    [([], False), ([4], False), ([1, 2, 9], False), ([9, 2, 1], False), ([1, 2, 2], True), ([2, 1, 2], True),
     (["a", "b"], False), (["b", "a", "b"], True), ([None, None, 3], True), ([1, None], False)],
)  # fmt: skip
def test_ids_that_occur_twice_are_found_in_any_order(ids, repeats):
    kind = pa.string() if "a" in ids else pa.int64()
    assert _repeats(datasets.Dataset(pa.table({"pair_id": pa.array(ids, kind)}))) is repeats
