"""csv and tsv files, read strictly: every row has the cells of the header, and a row that has not is named."""

from __future__ import annotations

import contextlib
import csv
import io
from collections.abc import Collection, Iterator
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.csv

from sepo.errors import UserError
from sepo.processes import log_once

_DELIMITERS = ",;\t|"
_SAMPLE = 1 << 16  # bytes and rows by which the delimiter is chosen
_SAMPLE_ROWS = 100


class Delimited:
    """The header and rows of a csv or tsv file.

    Python's strict parser reads every row before Arrow does: Arrow takes text after a closing quote, and with it
    swallows rows.

    Args:
        data: the content, as UTF-8.
        path: the suffix decides between delimiters that fit alike, and errors name the file.
        names: column names that the header probably has.
    """

    def __init__(self, data: bytes, path: Path, names: Collection[str] = ()):
        if not data.strip():
            raise UserError(f"'{path}' is empty: expected a header line and rows")
        csv.field_size_limit(2**31 - 1)
        self._path = path
        first, _, rest = data.partition(b"\n")
        declared = first.rstrip(b"\r\n").lower()  # Excel's `sep=;` names the delimiter in a line of its own
        if declared.startswith(b"sep=") and len(declared) == 5:
            self._data, self.delimiter = rest, declared[4:].decode()
        else:
            self._data, self.delimiter = data, _delimiter(data, path, names)

    def rows(self) -> Iterator[list[str]]:
        """The header, then every row."""
        text = io.TextIOWrapper(io.BytesIO(self._data), encoding="utf-8", newline="")
        reader = csv.reader(text, delimiter=self.delimiter, strict=True)
        width, line = 0, 1
        while True:
            try:
                row = next(reader, None)
            except csv.Error as error:
                raise self._error(line, _problem(str(error))) from None
            if row is None:
                return
            if row and width and len(row) != width:
                raise self._error(line, f"it has {len(row)} cells, and the header has {width}")
            if row:  # not an empty line
                width = len(row)
                if reader.line_num > line and self._like_rows(row):
                    log_once(
                        f"  '{self._path}': the row in line {line} has a cell of several lines that look like rows of "
                        "their own; if a quote is missing there, they are lost"
                    )
                yield row
            line = reader.line_num + 1

    def _like_rows(self, row: list[str]) -> bool:
        """Whether every line of a row would be a row if its quotes were not there."""
        lines = self.delimiter.join(row).splitlines()
        return all(line.count(self.delimiter) == len(row) - 1 for line in lines)

    def _error(self, line: int, problem: str) -> UserError:
        kind = "tsv" if ".tsv" in self._path.name.lower() else "csv"
        return UserError(f"'{self._path}' is not a readable {kind} file (the row in line {line}: {problem})")

    def table(self, text_columns: Collection[str]) -> pa.Table:
        """The rows as a table; `text_columns` stay text, in other columns Arrow finds the types."""
        rows = self.rows()
        header = next(rows)
        if len(set(header)) < len(header):
            twice = next(name for name in header if header.count(name) > 1)
            raise UserError(f"'{self._path}' has two columns '{twice}': give each a name of its own")
        number = sum(1 for _ in rows)
        table = pyarrow.csv.read_csv(
            pa.BufferReader(self._data),
            # A row must fit into one block, and may be as long as the file.
            read_options=pyarrow.csv.ReadOptions(block_size=min(max(len(self._data) + 1, 1 << 20), (1 << 31) - 1)),
            parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True, delimiter=self.delimiter),
            convert_options=pyarrow.csv.ConvertOptions(
                column_types={name: pa.string() for name in text_columns}, strings_can_be_null=False
            ),
        )
        if table.num_rows != number or table.column_names != header:
            raise UserError(
                f"'{self._path}' is read as {number:,} rows by one parser and as {table.num_rows:,} by another: "
                "save it as json or parquet"
            )
        return table


def _problem(error: str) -> str:
    """A message of Python's csv module in plain words."""
    quotes = "write a quote inside a cell twice, and put the whole cell into quotes"
    if "unexpected end" in error:
        return f"a quote is opened and never closed; {quotes}"
    return f"text follows a closing quote; {quotes}" if "expected after" in error else error


def _delimiter(data: bytes, path: Path, names: Collection[str]) -> str:
    """The mark that cuts the first rows into equally many cells, with a header of known names and of most cells."""
    sample = data[:_SAMPLE].decode(errors="replace")
    default = "\t" if ".tsv" in path.name.lower() else ","

    def fit(mark: str) -> tuple[bool, bool, int, int, bool]:
        reader = csv.reader(io.StringIO(sample, newline=""), delimiter=mark, strict=True)
        rows: list[list[str]] = []
        with contextlib.suppress(csv.Error):  # `Delimited.rows` names the row
            rows += (row for row in islice(reader, _SAMPLE_ROWS) if row)
        if len(data) > _SAMPLE:
            rows = rows[:1] + rows[1:-1]  # the last row may be cut
        header = rows[0] if rows else []
        same = all(len(row) == len(header) for row in rows)
        return len(header) > 1, same, len(set(names) & set(header)), len(header), mark == default

    return max(_DELIMITERS, key=fit)
