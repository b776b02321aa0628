"""Data files -> Arrow tables or rows: parquet, json, jsonl, csv, tsv and Arrow files; text files may be compressed.

Files are opened here and parsed from memory: libraries interpret a path as a glob, a URI or a partition. `rows.py`
interprets the cells.
"""

from __future__ import annotations

import bz2
import codecs
import contextlib
import csv
import gzip
import io
import json
import lzma
import os
import zlib
from collections.abc import Callable, Collection, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sepo.data.spool import Spool
from sepo.errors import UserError, one_line

_LINES = (".jsonl", ".ndjson", ".jsonlines")
_TEXT = (".json", *_LINES, ".csv", ".tsv")
_BINARY = (".parquet", ".pq", ".arrow", ".feather")
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
SUFFIXES = (*_BINARY, *_TEXT, *(text + packed for packed in _COMPRESSED for text in _TEXT))
EXPECTED = "a .parquet, .json, .jsonl (.ndjson), .csv, .tsv or .arrow file; text also as .gz, .zst, .bz2 or .xz"
# The first bytes of files that stand in the place of data, and what to do about them.
_IN_PLACE: tuple[tuple[tuple[bytes, ...], str], ...] = (
    (
        (b"version https://git-lfs.github.com/spec/",),
        "is a pointer of Git LFS: fetch the file with `git lfs pull` in its repository",
    ),
    (
        (b"/annex/objects/", b"../.git/annex/", b".git/annex/"),
        "is a pointer of git-annex: fetch the file with `git annex get` in its repository",
    ),
    (
        (b"<!doctype html", b"<html", b"<head", b"<?xml", b"<error"),
        "is a web page and not the file: open the address of the download in a browser (it may ask for a login, or the "
        "link has expired), and download the file again",
    ),
    ((b"pk\x03\x04",), "is a zip archive or a spreadsheet: unpack it, or export it as csv"),
)
# The first bytes of compressed files; file names are not trusted.
_UNPACK: tuple[tuple[bytes, Callable[[bytes], bytes]], ...] = (
    (b"\x1f\x8b", gzip.decompress),
    (b"\x28\xb5\x2f\xfd", lambda data: pa.CompressedInputStream(pa.BufferReader(data), "zstd").read()),
    (b"BZh", bz2.decompress),
    (b"\xfd7zXZ\x00", lzma.decompress),
)
_LINES_AT_ONCE = 10_000
# Bytes of parquet files, and rows of one, above which the rows stay on disk.
LARGE, MANY_ROWS = 1 << 20, 10_000


def read_file(path: Path, text_columns: Collection[str] = (), size: int | None = None) -> pa.Table:
    """Read a data file into a table. The rows of a large parquet file stay on disk (`_table_on_disk`).

    Args:
        path: the suffix tells the format, the first bytes the compression.
        text_columns: columns of a csv that stay text, even cells such as "NA", "null" or "42".
        size: bytes of all files of the dataset; None: of this file.

    Raises:
        UserError: the file has another suffix, cannot be read, or is a pointer of Git LFS.
    """
    suffix = _suffix(path)
    with _readable(path, suffix):
        if suffix in (".parquet", ".pq"):
            table = _table_on_disk(path, path.stat().st_size if size is None else size)
            if table is not None:
                return table
        data = _content(path, suffix)
        if suffix in (".parquet", ".pq"):
            return _with_texts(pq.read_table(pa.BufferReader(data)), text_columns)
        if suffix in _BINARY:
            return _with_texts(_read_arrow(data), text_columns)
        if "sv" in suffix:
            from sepo.data.delimited import Delimited

            return Delimited(data, path, text_columns).table(text_columns)
        return _json_table(data, path)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read a data file into rows whose values are as in the file: JSON values of JSON, texts of a csv.

    A JSON row that is not an object becomes an empty row. JSON that was saved by columns is read too.

    Raises:
        UserError: as `read_file`, or the file holds one object that is no table.
    """
    suffix = _suffix(path)
    if suffix in _BINARY:
        return read_file(path).to_pylist()
    with _readable(path, suffix):
        data = _content(path, suffix)
        if "sv" in suffix:
            from sepo.data.delimited import Delimited

            header, *rows = Delimited(data, path).rows()
            return [dict(zip(header, row, strict=True)) for row in rows]
        values = _whole_json(data, path)
        values = list(_json_lines(data, path)) if values is None else values
    listed = suffix.startswith(_LINES) or _first_line(data).startswith(b"[")
    if not listed and len(values) == 1 and isinstance(values[0], dict):
        values = _rows_of_columns(values[0], path)
    return [row if isinstance(row, dict) else {} for row in values]


def _rows_of_columns(value: dict[str, Any], path: Path) -> list[Any]:
    """The rows of a table that pandas or datasets wrote by column."""
    if "columns" in value and isinstance(value.get("data"), list):
        return [dict(zip(value["columns"], row, strict=False)) for row in value["data"]]
    columns = list(value.values())
    if columns and all(isinstance(column, dict) and column.keys() == columns[0].keys() for column in columns):
        return [{name: column[key] for name, column in value.items()} for key in columns[0]]
    if columns and all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
        return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]
    raise UserError(f"'{path}' holds one object: expected a list of rows, or one object a line")


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
    start = data[:1024].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for beginnings, what in _IN_PLACE:
        if start.startswith(beginnings):
            raise UserError(f"'{path}' {what}")
    unpack = next((unpack for start, unpack in _UNPACK if data.startswith(start)), None)
    if unpack is None and suffix.endswith(_COMPRESSED):
        raise UserError(f"'{path}' is not a readable {suffix[1:]} file (it is not compressed)")
    try:
        data = data if unpack is None else unpack(data)
    except ValueError as error:  # bz2, of a file that ends early
        raise EOFError(str(error)) from error
    if suffix in _BINARY:
        return data
    for mark, kind in ((b"PAR1", "parquet"), (b"ARROW1", "arrow")):
        if data.startswith(mark):
            raise UserError(f"'{path}' is a {kind} file: end its name in .{kind}")
    return _as_utf8(data, path)


def _as_utf8(data: bytes, path: Path) -> bytes:
    """Convert UTF-16, which spreadsheets write, to UTF-8; remove the byte-order mark."""
    for mark, encoding in ((b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16")):
        if data.startswith(mark):
            return data.decode(encoding).encode()
    data = data.removeprefix(b"\xef\xbb\xbf")
    decoder = codecs.getincrementaldecoder("utf-8")()
    done = 0
    try:
        for done in range(0, len(data), 1 << 20):
            decoder.decode(data[done : done + (1 << 20)], final=done + (1 << 20) >= len(data))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, done + error.start) + 1
        raise UserError(
            f"'{path}' is not UTF-8 (line {line}): it may be Latin-1 or Windows-1252; convert it, for example with "
            "`iconv -f windows-1252 -t utf-8`"
        ) from None
    return data


def _read_arrow(data: bytes) -> pa.Table:
    reader = pa.BufferReader(data)
    if data.startswith(b"ARROW1"):
        return pa.ipc.open_file(reader).read_all()
    return pa.ipc.open_stream(reader).read_all()


def _table_on_disk(path: Path, size: int) -> pa.Table | None:
    """The rows of a parquet file, decoded part by part into a file without a name (`spool.py`).

    None for small and for other files, and for those with columns of bytes, which only the whole column tells from
    texts, or of categories, whose values may differ from part to part.
    """
    with open(path, "rb") as file:
        if file.read(4) != b"PAR1":
            return None
    with pa.OSFile(os.fsencode(path)) as source, pq.ParquetFile(source) as file:
        schema = file.schema_arrow
        if size <= LARGE and file.metadata.num_rows <= MANY_ROWS:
            return None
        if any(_text_type(field.type) != field.type or "dictionary<" in str(field.type) for field in schema):
            return None
        spool = Spool(None, schema)
        for batch in file.iter_batches(batch_size=_LINES_AT_ONCE):
            spool.append(pa.Table.from_batches([batch]))
    return spool.table()


def _with_texts(table: pa.Table, text_columns: Collection[str]) -> pa.Table:
    """Read bytes that are UTF-8 as text: Spark and older writers leave out the mark that tells texts from bytes.

    A row of `text_columns` that is not UTF-8 is dropped and counted later.
    """
    for index, field in enumerate(table.schema):
        if (text := _text_type(field.type)) == field.type:
            continue
        options = pc.CastOptions(text, allow_invalid_utf8=field.name in text_columns)
        with contextlib.suppress(pa.ArrowException):  # pictures, for example
            table = table.set_column(index, field.name, pc.cast(table.column(index), options=options))
    return table


def _text_type(type_: pa.DataType) -> pa.DataType:
    """The type with texts in the place of bytes."""
    if pa.types.is_binary(type_) or pa.types.is_fixed_size_binary(type_) or pa.types.is_binary_view(type_):
        return pa.string()
    if pa.types.is_large_binary(type_):
        return pa.large_string()
    if pa.types.is_list(type_):
        return pa.list_(_text_type(type_.value_type))
    if pa.types.is_struct(type_):
        return pa.struct([field.with_type(_text_type(field.type)) for field in type_])
    return type_


def _json_rows(data: bytes, path: Path) -> list[Any]:
    """The values of a JSON list, of one object a line, or of a file with one object (see `_wrapped_rows`)."""
    if (rows := _whole_json(data, path)) is None:
        rows = list(_json_lines(data, path))
    _require_rows(rows, path)
    return rows


def _whole_json(data: bytes, path: Path) -> list[Any] | None:
    """The values of a file that is one JSON value; None if it has one value a line."""
    if _first_line(data).startswith(b"["):
        return _parse_json(data, f"'{path}'")
    value = _one_object(data)
    return None if value is None else _wrapped_rows(value)


def _json_lines(data: bytes, path: Path) -> Iterator[Any]:
    for number, line in enumerate(io.BytesIO(data), 1):
        if line.strip(b"\xef\xbb\xbf \t\r\n"):
            yield _parse_json(line, f"line {number} of '{path}'")


def _require_rows(rows: list[Any], path: Path) -> None:
    """Refuse a table that was saved by columns (pandas' `to_json`, `json.dump` of a dict of lists)."""
    if len(rows) != 1 or not isinstance(rows[0], dict) or len(rows[0]) < 2:
        return
    values = list(rows[0].values())
    lists = all(isinstance(value, list) and not any(isinstance(item, dict) for item in value) for value in values)
    by_column = lists and (len({len(value) for value in values}) == 1 or {"columns", "data"} <= rows[0].keys())
    by_index = all(isinstance(value, dict) and value.keys() == values[0].keys() for value in values) and any(
        names and all(str(name).isdigit() for name in names) for names in (rows[0], values[0])
    )
    if by_column or by_index:
        raise UserError(
            f"'{path}' holds columns and not rows: save it as one object a row, with pandas as "
            "to_json(path, orient='records', lines=True)"
        )


def _json_table(data: bytes, path: Path) -> pa.Table:
    """A table of JSON rows; a row that is not an object becomes a row of nulls."""
    rows = _whole_json(data, path)
    if rows is None and (table := _lines_table(data, path)) is not None:
        return table
    rows = _json_rows(data, path) if rows is None else rows
    _require_rows(rows, path)
    table = table_of([row if isinstance(row, dict) else {} for row in rows])
    if rows and not table.num_columns:
        raise UserError(f"'{path}' holds no object: expected a list of objects, or one object a line")
    return table


def _lines_table(data: bytes, path: Path) -> pa.Table | None:
    """A table of JSON lines, with the Python values of some lines at a time in memory.

    None if the file is short, or if the types of a column differ from part to part: they are found from all rows then.
    """
    lines, number = _json_lines(data, path), 0
    tables: list[pa.Table] = []
    while rows := list(islice(lines, _LINES_AT_ONCE)):
        if not tables and len(rows) < _LINES_AT_ONCE:
            return None
        number += len(rows)
        tables.append(table_of([row if isinstance(row, dict) else {} for row in rows]))
    types: dict[str, pa.DataType] = {}
    for field in (field for table in tables for field in table.schema if not pa.types.is_null(field.type)):
        if types.setdefault(field.name, field.type) != field.type or field.type == _WRAPPED:
            return None
    if number < 2:  # one object alone may be a table saved by columns
        return None
    table = pa.concat_tables(tables, promote_options="default")
    return table if table.num_rows == number else None


def _first_line(data: bytes) -> bytes:
    """The first line with text, without a copy of the whole."""
    return next((line.strip() for line in io.BytesIO(data) if line.strip()), b"")


def _one_object(data: bytes) -> dict[str, Any] | None:
    """The JSON object that fills the file over several lines; None for other files."""
    if not (first := _first_line(data)).startswith(b"{"):
        return None
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


_WRAPPED = pa.struct({"json": pa.string()})


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
