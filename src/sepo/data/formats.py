"""Data files -> Arrow tables or rows: parquet, json, jsonl, csv, tsv and Arrow files; text files may be compressed.

Files are opened here and parsed from memory: libraries interpret a path as a glob, a URI or a partition. `rows.py`
interprets the cells.
"""

from __future__ import annotations

import bz2
import contextlib
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Collection, Iterator
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
# The first bytes of compressed files; file names are not trusted.
_UNPACK: tuple[tuple[bytes, Callable[[bytes], bytes]], ...] = (
    (b"\x1f\x8b", gzip.decompress),
    (b"\x28\xb5\x2f\xfd", lambda data: pa.CompressedInputStream(pa.BufferReader(data), "zstd").read()),
    (b"BZh", bz2.decompress),
    (b"\xfd7zXZ\x00", lzma.decompress),
)
_DELIMITERS = ",;\t|"


def read_file(path: Path, text_columns: Collection[str] = ()) -> pa.Table:
    """Read a data file into a table.

    Args:
        path: the suffix tells the format, the first bytes the compression.
        text_columns: columns of a csv that stay text, even cells such as "NA", "null" or "42".

    Raises:
        UserError: the file has another suffix, cannot be read, or is a pointer of Git LFS.
    """
    suffix = _suffix(path)
    with _readable(path, suffix):
        data = _content(path, suffix)
        if suffix == ".parquet":
            return pq.read_table(pa.BufferReader(data))
        if suffix in _BINARY:
            return _read_arrow(data)
        if "sv" in suffix:
            return _read_csv(data, path, text_columns)
        return _json_table(_json_rows(data, path), path)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read a data file into rows whose values are as in the file: JSON values of JSON, texts of a csv.

    A JSON row that is not an object becomes an empty row.

    Raises:
        UserError: as `read_file`.
    """
    suffix = _suffix(path)
    if suffix in _BINARY:
        return read_file(path).to_pylist()
    with _readable(path, suffix):
        data = _content(path, suffix)
        if "sv" in suffix:
            csv.field_size_limit(2**31 - 1)
            reader = csv.DictReader(io.StringIO(data.decode(), newline=""), delimiter=_delimiter(data))
            return [{name: cell for name, cell in row.items() if name is not None} for row in reader]
        return [row if isinstance(row, dict) else {} for row in _json_rows(data, path)]


def file_content(path: Path) -> tuple[str, bytes]:
    """The format of a file (its suffix without a compression) and its content, decompressed; text as UTF-8.

    Raises:
        UserError: as `read_file`.
    """
    suffix = _suffix(path)
    with _readable(path, suffix):
        return suffix.removesuffix(next((packed for packed in _COMPRESSED if suffix.endswith(packed)), "")), _content(
            path, suffix
        )


def _suffix(path: Path) -> str:
    suffix = next((s for s in SUFFIXES if path.name.lower().endswith(s)), None)
    if suffix is None:
        raise UserError(f"'{path}' is not a dataset file: expected {EXPECTED}")
    return suffix


@contextlib.contextmanager
def _readable(path: Path, suffix: str) -> Iterator[None]:
    """Turn errors of the libraries into a UserError."""
    errors = (OSError, EOFError, UnicodeDecodeError, MemoryError, zlib.error, lzma.LZMAError, csv.Error)
    try:
        yield
    except (*errors, pa.ArrowException) as error:
        raise UserError(f"'{path}' is not a readable {suffix[1:]} file ({one_line(error)})") from error


def _content(path: Path, suffix: str) -> bytes:
    """The content of a file, decompressed; text as UTF-8."""
    data = path.read_bytes()
    if data.startswith(_LFS_POINTER):
        raise UserError(f"'{path}' is a pointer of Git LFS: fetch the file with `git lfs pull` in its repository")
    unpack = next((unpack for start, unpack in _UNPACK if data.startswith(start)), None)
    if unpack is None and suffix.endswith(_COMPRESSED):
        raise UserError(f"'{path}' is not a readable {suffix[1:]} file (it is not compressed)")
    data = data if unpack is None else unpack(data)
    return data if suffix in _BINARY else _as_utf8(data)


def _as_utf8(data: bytes) -> bytes:
    """Convert UTF-16, which spreadsheets write, to UTF-8; remove the byte-order mark."""
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
        # A row must fit into one block, and may be as long as the file.
        read_options=pyarrow.csv.ReadOptions(block_size=min(max(len(data) + 1, 1 << 20), (1 << 31) - 1)),
        parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True, delimiter=_delimiter(data)),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types={name: pa.string() for name in text_columns}, strings_can_be_null=False
        ),
    )


def _delimiter(data: bytes) -> str:
    """The separator of the names in the header: a comma, or a mark that spreadsheets use instead."""
    header = next(csv.reader(io.StringIO(data[: 1 << 16].decode(errors="replace"))), [])
    if len(header) > 1:
        return ","
    line = header[0] if header else ""
    counts = {mark: line.count(mark) for mark in _DELIMITERS[1:]}
    best = max(counts, key=lambda mark: counts[mark])
    return best if counts[best] else ","


def _json_rows(data: bytes, path: Path) -> list[Any]:
    """The values of a JSON list, of one object a line, or of a file with one object (see `_wrapped_rows`)."""
    if data.lstrip().startswith(b"["):
        return _parse_json(data, f"'{path}'")
    if (value := _one_object(data)) is not None:
        return _wrapped_rows(value)
    return [
        _parse_json(line, f"line {number} of '{path}'")
        for number, line in enumerate(data.split(b"\n"), 1)
        if line.strip(b"\xef\xbb\xbf \t\r\n")
    ]


def _json_table(rows: list[Any], path: Path) -> pa.Table:
    """A table of JSON rows; a row that is not an object becomes a row of nulls."""
    table = table_of([row if isinstance(row, dict) else {} for row in rows])
    if rows and not table.num_columns:
        raise UserError(f"'{path}' holds no object: expected a list of objects, or one object a line")
    return table


def _one_object(data: bytes) -> dict[str, Any] | None:
    """The JSON object that fills the file over several lines; None for other files."""
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


def _wrapped_rows(value: dict[str, Any]) -> list[Any]:
    """The rows of an object with one list of objects (such as `data`); otherwise the object as the only row."""
    lists = [item for item in value.values() if isinstance(item, list)]
    if len(lists) == 1 and all(isinstance(row, dict) for row in lists[0]):
        return lists[0]
    return [value]


def _parse_json(text: bytes, where: str) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{where} is not JSON ({one_line(error)}): expected a list of objects, or one object a line"
        ) from error


def table_of(rows: list[dict[str, Any]]) -> pa.Table:
    """A table of rows with values of any type; see `column_of`."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return pa.table({_safe_name(name): column_of([row.get(name) for row in rows]) for name in names})


def _safe_name(name: str) -> str:
    return name.encode("utf-8", errors="replace").decode()


def column_of(values: list) -> pa.Array:
    """Make a column; values without a common Arrow type are wrapped as structs `{"json": text}`."""
    try:
        column = pa.array(values)
        if not _has_empty_struct(column.type):
            return column
    except (pa.ArrowException, ValueError, TypeError, OverflowError):
        pass
    return pa.array([None if value is None else {"json": json.dumps(value)} for value in values])


def _has_empty_struct(type_: pa.DataType) -> bool:
    """Does a type contain a struct without fields? Parquet cannot hold it, so such a column is wrapped too."""
    if pa.types.is_struct(type_):
        return type_.num_fields == 0 or any(_has_empty_struct(child.type) for child in type_)
    return pa.types.is_list(type_) and _has_empty_struct(type_.value_type)
