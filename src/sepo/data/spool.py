"""Tables larger than memory while they are made: rows in a file without a name, read back in any order.

The file is an Arrow file that is mapped into memory. It has no name, so nothing is left of it, however the process
ends.
"""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Iterator
from pathlib import Path
from weakref import WeakSet

import numpy as np
import pyarrow as pa


class Spool:
    """A table on disk: first `append`ed part by part, then read.

    Args:
        folder: where there is room; None: the system's folder for temporary files (TMPDIR).
    """

    def __init__(self, folder: Path | None, schema: pa.Schema):
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        self.schema = schema
        self._file = tempfile.TemporaryFile(prefix="sepo-", dir=folder)  # noqa: SIM115
        self._writer: pa.RecordBatchWriter | None = pa.ipc.new_file(self._file, schema)
        self._starts = [0]

    def __len__(self) -> int:
        """Number of rows."""
        return self._starts[-1]

    def append(self, table: pa.Table) -> None:
        """Add rows. After the first row was read, none can be added."""
        assert self._writer is not None
        for batch in table.cast(self.schema).combine_chunks().to_batches():
            self._writer.write_batch(batch)
            self._starts.append(len(self) + batch.num_rows)
        _release()  # of the files that these rows were made from

    def __iter__(self) -> Iterator[pa.Table]:
        """The rows in order, in parts as they were added."""
        for number in range(len(self._starts) - 1):
            yield pa.Table.from_batches([self._reader().get_batch(number)])
            _release()

    def table(self) -> pa.Table:
        """All rows, each read from the file when it is used."""
        return self._reader().read_all()

    def take(self, rows: np.ndarray) -> pa.Table:
        """Rows by number, in this order; memory grows with their number alone."""
        rows = np.asarray(rows, np.int64)
        numbers = np.searchsorted(self._starts, rows, side="right") - 1
        parts, places = [], []
        for number in np.unique(numbers).tolist():
            place = np.flatnonzero(numbers == number)
            batch = self._reader().get_batch(number)
            parts.append(batch.take(pa.array(rows[place] - self._starts[number])))
            places.append(place)
        table = pa.Table.from_batches(parts, self.schema).combine_chunks()
        order = np.argsort(np.concatenate([np.zeros(0, np.int64), *places]), kind="stable")
        if not np.array_equal(order, np.arange(len(order))):
            table = table.take(pa.array(order))
        _release()
        return table

    def _reader(self) -> pa.RecordBatchFileReader:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
            self._file.flush()
            pages = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
            self._file.close()
            self._batches = pa.ipc.open_file(pa.py_buffer(pages))
            _MAPPED.add(pages)
        return self._batches


def row_numbers(count: int) -> pa.ChunkedArray | np.ndarray:
    """0 to `count` - 1: int64. Many are on disk: they would take eight bytes a row of a large table."""
    if count <= _NUMBERS_AT_ONCE:
        return np.arange(count, dtype=np.int64)
    spool = Spool(None, pa.schema([("number", pa.int64())]))
    for start in range(0, count, _NUMBERS_AT_ONCE):
        spool.append(pa.table({"number": np.arange(start, min(start + _NUMBERS_AT_ONCE, count))}))
    return spool.table()["number"]


_NUMBERS_AT_ONCE = 100_000
# All mapped files, also those whose tables outlive their Spool.
_MAPPED: WeakSet[mmap.mmap] = WeakSet()


def _release() -> None:
    """Give the pages that were read back to the system; the next use reads them again, as a rule from its cache."""
    for pages in _MAPPED if hasattr(mmap, "MADV_DONTNEED") else ():
        pages.madvise(mmap.MADV_DONTNEED)
