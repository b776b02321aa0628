"""List columns as flat arrays: values of all rows one after the other, and the length of each row.

Tables hold one list a response. What works on many responses at once works on the flat values and the lengths.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

# The two responses of a pair, in the order of all that is indexed by side, and how a reward speaks for the label.
SIDES = ("chosen", "rejected")
SIGNED_SIDES = (("chosen", 1), ("rejected", -1))


def ragged(values: np.ndarray, lengths: np.ndarray) -> pa.ListArray:
    """Join a flat array and its segment lengths into a list column (no copy of the values).

    >>> ragged(np.array([1, 2, 3]), np.array([2, 1])).to_pylist()
    [[1, 2], [3]]
    """
    offsets = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=offsets[1:])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


def flat(column: pa.Array | pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Split a list column into its flat values and the segment lengths: the inverse of `ragged`.

    Returns:
        values `[sum of lengths]` and lengths `[rows]` (int64).
    """
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    lengths = np.diff(column.offsets.to_numpy()).astype(np.int64)
    return column.flatten().to_numpy(zero_copy_only=False), lengths


def segment_sums(values: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Sum a flat array by segment, in float64: `[sum of lengths]`, `[rows]` -> `[rows]`."""
    rows = np.repeat(np.arange(len(lengths)), lengths)
    return np.bincount(rows, weights=values.astype(np.float64), minlength=len(lengths))
