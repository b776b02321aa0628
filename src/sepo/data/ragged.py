"""List columns as flat arrays: the concatenated values of all rows, and the length of each row.

Tables hold one list a response. Vectorised code works on the flat values and the lengths.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

# The two responses of a pair, and the sign with which a reward supports the label.
SIDES = ("chosen", "rejected")
SIGNED_SIDES = (("chosen", 1), ("rejected", -1))


# A list column of Arrow counts its values in 32 bits; a column with more of them has several chunks.
_MOST_VALUES = 2**31 - 1


def ragged(values: np.ndarray, lengths: np.ndarray) -> pa.ListArray | pa.ChunkedArray:
    """Make a list column of a flat array and its segment lengths, without copying the values.

    Beyond 2^31 - 1 values the column has several chunks.

    >>> ragged(np.array([1, 2, 3]), np.array([2, 1])).to_pylist()
    [[1, 2], [3]]
    """
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    if offsets[-1] <= _MOST_VALUES:
        return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(values))
    chunks, start = [], 0
    while start < len(lengths):
        stop = max(int(np.searchsorted(offsets, offsets[start] + _MOST_VALUES, side="right")) - 1, start + 1)
        part = (offsets[start : stop + 1] - offsets[start]).astype(np.int32)
        chunks.append(pa.ListArray.from_arrays(pa.array(part), pa.array(values[offsets[start] : offsets[stop]])))
        start = stop
    return pa.chunked_array(chunks)


def flat(column: pa.Array | pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Split a list column into its flat values and the segment lengths: the inverse of `ragged`.

    Returns:
        values `[sum of lengths]` and lengths `[rows]` (int64).
    """
    if isinstance(column, pa.ChunkedArray):
        if column.num_chunks > 1:  # joined here: one column of Arrow may not hold all values
            values, lengths = zip(*map(flat, column.chunks), strict=True)
            return np.concatenate(values), np.concatenate(lengths)
        column = column.chunk(0) if column.num_chunks else column.combine_chunks()
    lengths = np.diff(column.offsets.to_numpy()).astype(np.int64)
    return column.flatten().to_numpy(zero_copy_only=False), lengths


def read_lengths(table: pa.Table, side: str) -> np.ndarray:
    """Tokens that a model reads of each response: its own, and those between its assistant turns. `[rows]` int64."""
    columns = [f"{side}_ids", f"{side}_context_ids"]
    return np.sum([flat(table.column(name))[1] for name in columns if name in table.column_names], axis=0)


def as_read(table: pa.Table, side: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The tokens of the responses in the order in which a model reads them, with those between the assistant turns.

    Returns:
        ids `[tokens]`, their number in each row `[rows]`, and whether each is the assistant's `[tokens]` bool.
    """
    ids, lengths = flat(table.column(f"{side}_ids"))
    own = np.ones(len(ids), bool)
    if f"{side}_context_ids" not in table.column_names:
        return ids, lengths, own
    context, counts = flat(table.column(f"{side}_context_ids"))
    places = np.repeat(np.cumsum(lengths) - lengths, counts) + flat(table.column(f"{side}_context_at"))[0]
    return np.insert(ids, places, context), lengths + counts, np.insert(own, places, False)


class Ragged:
    """The rows of a list column as arrays, which are views of its buffer."""

    def __init__(self, column: pa.Array | pa.ChunkedArray):
        self._values, lengths = flat(column)
        self._starts = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths, out=self._starts[1:])

    @property
    def lengths(self) -> np.ndarray:
        """`[rows]` int64."""
        return np.diff(self._starts)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        row = range(len(self))[row]
        return self._values[self._starts[row] : self._starts[row + 1]]


def segment_sums(values: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Sum a flat array by segment, in float64: `[sum of lengths]`, `[rows]` -> `[rows]`."""
    rows = np.repeat(np.arange(len(lengths)), lengths)
    return np.bincount(rows, weights=values.astype(np.float64), minlength=len(lengths))
