"""List columns as flat arrays, also where a column has more values than one array of Arrow counts."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from properties import examples
from sepo.data import ragged as module
from sepo.data.ragged import Ragged, flat, ragged


@examples(200)
@given(
    rows=st.lists(st.lists(st.integers(-9, 9), max_size=5), max_size=12),
    most=st.integers(5, 20),
    cut=st.integers(0, 12),
)
def test_any_column_is_its_values_and_lengths_whatever_its_chunks(rows, most, cut):
    values = np.array([value for row in rows for value in row], dtype=np.int32)
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_MOST_VALUES", most)
        column = ragged(values, lengths)
    assert column.to_pylist() == rows
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    assert all(len(chunk.flatten()) <= most for chunk in chunks)
    for same in (column, pa.chunked_array([column]) if len(chunks) == 1 else column):
        again, sizes = flat(same)
        assert (again.tolist(), sizes.tolist()) == (values.tolist(), lengths.tolist())
        assert [row.tolist() for row in map(Ragged(same).__getitem__, range(len(rows)))] == rows
    part = column.slice(cut)
    assert flat(part)[0].tolist() == [value for row in rows[cut:] for value in row]


@pytest.mark.nightly  # two gigabytes; the property above splits columns at a small size
def test_a_column_beyond_32_bits_is_split_and_not_wrapped():
    lengths = np.array([2**30, 2**30, 5])
    values = np.lib.stride_tricks.as_strided(np.zeros(1, np.int8), (int(lengths.sum()),), (0,))
    column = ragged(values, lengths)
    assert [len(chunk) for chunk in column.chunks] == [1, 2]
    assert [len(row) for row in column] == lengths.tolist()
