"""Data files -> Arrow tables: parquet, json, jsonl, csv, tsv and Arrow files, the text ones compressed or not.

Files are opened here and read in memory: a path given to a library would be searched for globs, URIs and partitions.
What a cell means is the business of `rows.py`.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from sepo.errors import UserError, one_line

_TEXT = (".json", ".jsonl", ".csv", ".tsv")
_BINARY = (".parquet", ".arrow", ".feather")
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
SUFFIXES = (*_BINARY, *_TEXT, *(text + packed for packed in _COMPRESSED for text in _TEXT))
EXPECTED = "a .parquet, .json, .jsonl, .csv, .tsv or .arrow file, the text ones also as .gz, .zst, .bz2 or .xz"
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
# What compressed files begin with, whatever their names.
_UNPACK: tuple[tuple[bytes, Callable[[bytes], bytes]], ...] = (
    (b"\x1f\x8b", gzip.decompress),
    (b"\x28\xb5\x2f\xfd", lambda data: pa.CompressedInputStream(pa.BufferReader(data), "zstd").read()),
    (b"BZh", bz2.decompress),
    (b"\xfd7zXZ\x00", lzma.decompress),
)
_DELIMITERS = ",;\t|"


def read_file(path: Path, text_columns: Collection[str]) -> pa.Table:
    """Read a data file whole.

    Args:
        path: the file; its name says the format, its first bytes whether it is compressed.
        text_columns: columns of a csv in which a cell "NA", "null" or "42" is that text, not a value.

    Raises:
        UserError: it is no such file, cannot be read, or is a pointer of Git LFS.
    """
    suffix = next((s for s in SUFFIXES if path.name.lower().endswith(s)), None)
    if suffix is None:
        raise UserError(f"'{path}' is not a dataset file: expected {EXPECTED}")
    try:
        data = path.read_bytes()
        if data.startswith(_LFS_POINTER):
            raise UserError(
                f"'{path}' is a pointer of Git LFS, not the file itself: fetch it with `git lfs pull` in its repository"
            )
        unpack = next((unpack for start, unpack in _UNPACK if data.startswith(start)), None)
        if unpack is None and suffix.endswith(_COMPRESSED):
            raise UserError(f"'{path}' is not a readable {suffix[1:]} file (it is not compressed)")
        data = data if unpack is None else unpack(data)
        if suffix == ".parquet":
            return pq.read_table(pa.BufferReader(data))
        if suffix in _BINARY:
            return _read_arrow(data)
        data = _as_utf8(data)
        return _read_csv(data, path, text_columns) if "sv" in suffix else _read_json(data, path)
    except (OSError, EOFError, UnicodeDecodeError, MemoryError, zlib.error, lzma.LZMAError, pa.ArrowException) as error:
        raise UserError(f"'{path}' is not a readable {suffix[1:]} file ({one_line(error)})") from error


def _as_utf8(data: bytes) -> bytes:
    """The same text as UTF-8: spreadsheets write UTF-16."""
    for mark, encoding in ((b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16")):
        if data.startswith(mark):
            return data.decode(encoding).encode()
    return data.removeprefix(b"\xef\xbb\xbf")


def _read_arrow(data: bytes) -> pa.Table:
    reader = pa.BufferReader(data)
    if data.startswith(b"ARROW1"):
        return pa.ipc.open_file(reader).read_all()
    return pa.ipc.open_stream(reader).read_all()


def _read_csv(data: bytes, path: Path, text_columns: Collection[str]) -> pa.Table:
    if not data.strip():
        raise UserError(f"'{path}' is empty: expected a header line and rows")
    return pyarrow.csv.read_csv(
        pa.BufferReader(data),
        # A block must hold a row whole, and a row may be as long as the file.
        read_options=pyarrow.csv.ReadOptions(block_size=min(max(len(data) + 1, 1 << 20), (1 << 31) - 1)),
        parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True, delimiter=_delimiter(data)),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types={name: pa.string() for name in text_columns}, strings_can_be_null=False
        ),
    )


def _delimiter(data: bytes) -> str:
    """What separates the names in the header: a comma, or what a spreadsheet may have put in its place."""
    header = next(csv.reader(io.StringIO(data[: 1 << 16].decode(errors="replace"))), [])
    if len(header) > 1:
        return ","
    line = header[0] if header else ""
    counts = {mark: line.count(mark) for mark in _DELIMITERS[1:]}
    best = max(counts, key=lambda mark: counts[mark])
    return best if counts[best] else ","


def _read_json(data: bytes, path: Path) -> pa.Table:
    """Read a list of objects, or one object a line. Rows that are no object become rows of nulls."""
    rows: list[Any] = []
    if data.lstrip().startswith(b"["):
        rows = _parse_json(data, f"'{path}'")
    elif (whole := _one_object(data)) is not None:
        return _of_wrapped_rows(whole)
    else:
        for number, line in enumerate(data.split(b"\n"), 1):
            if line.strip(b"\xef\xbb\xbf \t\r\n"):
                rows.append(_parse_json(line, f"line {number} of '{path}'"))
    table = table_of([row if isinstance(row, dict) else {} for row in rows])
    if rows and not table.num_columns:
        raise UserError(f"'{path}' holds no object: expected a list of objects, or one object a line")
    return table


def _one_object(data: bytes) -> dict[str, Any] | None:
    """The object that fills the file, if it is one over several lines; None otherwise."""
    if not data.lstrip().startswith(b"{"):
        return None
    first = data.lstrip().split(b"\n", 1)[0]
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        pass
    else:
        return None  # one object a line
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _of_wrapped_rows(value: dict[str, Any]) -> pa.Table:
    """The rows of a file that holds them in one object, under a name (`data`); or the object as a row."""
    lists = {key: item for key, item in value.items() if isinstance(item, list)}
    if len(lists) == 1:
        (rows,) = lists.values()
        if all(isinstance(row, dict) for row in rows):
            return table_of(rows)
    return table_of([value])


def _parse_json(text: bytes, where: str) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{where} is not JSON ({one_line(error)}): expected a list of objects, or one object a line"
        ) from error


def table_of(rows: list[dict[str, Any]]) -> pa.Table:
    """A table of rows, whatever they hold; see `column_of`."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return pa.table({_safe_name(name): column_of([row.get(name) for row in rows]) for name in names})


def _safe_name(name: str) -> str:
    return name.encode("utf-8", errors="replace").decode()


def column_of(values: list) -> pa.Array:
    """Make a column; values that have no common Arrow type are wrapped as structs `{"json": text}`."""
    try:
        column = pa.array(values)
        if not _has_empty_struct(column.type):
            return column
    except (pa.ArrowException, ValueError, TypeError, OverflowError):
        pass
    return pa.array([None if value is None else {"json": json.dumps(value)} for value in values])


def _has_empty_struct(type_: pa.DataType) -> bool:
    """An Arrow struct without fields cannot be written to parquet, so such a column is wrapped too."""
    if pa.types.is_struct(type_):
        return type_.num_fields == 0 or any(_has_empty_struct(child.type) for child in type_)
    return pa.types.is_list(type_) and _has_empty_struct(type_.value_type)
