"""Files of rows: parquet, json, jsonl and csv (json and csv also gzipped) -> Arrow tables.

Files are opened here and read in memory: a path given to a library would be searched for globs, URIs and partitions.
"""

from __future__ import annotations

import ast
import gzip
import json
import zlib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from sepo.errors import UserError, one_line

SUFFIXES = (".parquet", ".json", ".jsonl", ".csv", ".json.gz", ".jsonl.gz", ".csv.gz")


def read_file(path: Path, text_columns: Collection[str]) -> pa.Table:
    suffix = next((s for s in SUFFIXES if path.name.lower().endswith(s)), None)
    if suffix is None:
        raise UserError(f"'{path}' is not a dataset file: expected {', '.join(SUFFIXES)}")
    opener: Callable[..., Any] = gzip.open if suffix.endswith(".gz") else open
    try:
        # Open the file ourselves: a path would be searched for globs, URIs and partition folders.
        with opener(path, "rb") as file:
            if suffix == ".parquet":
                return pq.read_table(file)
            return _read_csv(file, path, text_columns) if ".csv" in suffix else _read_json(file, path)
    except (OSError, EOFError, UnicodeDecodeError, MemoryError, zlib.error, pa.ArrowException) as error:
        raise UserError(f"'{path}' is not a readable {suffix[1:]} file ({one_line(error)})") from error


def _read_csv(file: BinaryIO, path: Path, text_columns: Collection[str]) -> pa.Table:
    """Read a csv; in the text columns a cell "NA", "null" or "42" is that text, not a value."""
    content = file.read()
    if not content.strip():
        raise UserError(f"'{path}' is empty: expected a header line and rows")
    table = pyarrow.csv.read_csv(
        pa.BufferReader(content),
        # A block must hold a row whole, and a row may be as long as the file.
        read_options=pyarrow.csv.ReadOptions(block_size=min(max(len(content) + 1, 1 << 20), (1 << 31) - 1)),
        parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types={name: pa.string() for name in text_columns}, strings_can_be_null=False
        ),
    )
    for index, name in enumerate(table.column_names):
        if name in text_columns:
            table = table.set_column(index, name, _parse_csv_messages(table.column(index)))
    return table


def _parse_csv_messages(column: pa.ChunkedArray) -> pa.ChunkedArray | pa.Array:
    """Turn text cells that hold message lists into lists; the other cells of the column stay text."""
    if not any(isinstance(_message_list(cell), list) for cell in column.slice(0, 100).to_pylist()):
        return column
    return _column([_message_list(cell) for cell in column.to_pylist()])


def _message_list(cell: str | None) -> str | list | None:
    """Return the message list that a csv cell holds, or the cell itself.

    >>> _message_list("[{'role': 'user', 'content': 'Hi'}]")
    [{'role': 'user', 'content': 'Hi'}]
    """
    text = cell.strip() if cell else ""
    if not (text.startswith("[") and text.endswith("]")):
        return cell
    parsers: tuple[Callable[[str], Any], ...] = (json.loads, ast.literal_eval)  # neither runs code
    for parse in parsers:
        try:
            value = parse(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        if isinstance(value, list) and value and all(isinstance(message, dict) for message in value):
            return value
    return cell


def _read_json(file: BinaryIO, path: Path) -> pa.Table:
    """Read a list of objects, or one object a line. Rows that are no object become rows of nulls."""
    rows: list[Any] = []
    start = file.read(1 << 16).decode("utf-8", errors="ignore").removeprefix("\ufeff").lstrip()
    file.seek(0)
    if start.startswith("["):
        rows = _parse_json(file.read(), f"'{path}'")
    else:
        for number, line in enumerate(file, 1):
            if line.strip(b"\xef\xbb\xbf \t\r\n"):
                rows.append(_parse_json(line, f"line {number} of '{path}'"))
    rows = [row if isinstance(row, dict) else {} for row in rows]
    names = list(dict.fromkeys(name for row in rows for name in row))
    if rows and not names:
        raise UserError(f"'{path}' holds no object: expected a list of objects, or one object a line")
    return pa.table({_safe_name(name): _column([row.get(name) for row in rows]) for name in names})


def _parse_json(text: bytes, where: str) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{where} is not JSON ({one_line(error)}): expected a list of objects, or one object a line"
        ) from error


def _safe_name(name: str) -> str:
    return name.encode("utf-8", errors="replace").decode()


def _column(values: list) -> pa.Array:
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
