"""Parquet tables on disk: one schema per kind, provenance in the metadata, atomic writes.

A table is a folder of shards `part-00000.parquet`, `part-00001.parquet`, ... with one row a pair.
A shard is written under a temporary name and renamed, so a reader never sees half a shard. The
schema metadata holds one JSON object under the key `sepo`: `format` (the kind of table), `version`
and the fingerprints of what the table was made from.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sepo.errors import UserError

FORMAT_VERSION = 1
_KEY = b"sepo"

_IDS = pa.list_(pa.int32())
_FLOATS = pa.list_(pa.float32())
_PAIR_FIELDS = [
    pa.field("pair_id", pa.int64()),
    pa.field("prompt_ids", _IDS),
    pa.field("chosen_ids", _IDS),
    pa.field("rejected_ids", _IDS),
]
SCHEMAS: dict[str, pa.Schema] = {
    "pairs": pa.schema(_PAIR_FIELDS),
    "logps": pa.schema(
        [pa.field("pair_id", pa.int64()), pa.field("chosen_logps", _FLOATS), pa.field("rejected_logps", _FLOATS)]
    ),
    "scores": pa.schema([*_PAIR_FIELDS, pa.field("chosen_rewards", _FLOATS), pa.field("rejected_rewards", _FLOATS)]),
    "selection": pa.schema(
        [
            *_PAIR_FIELDS,
            pa.field("chosen_positions", _IDS),
            pa.field("rejected_positions", _IDS),
            pa.field("chosen_weights", _FLOATS),
            pa.field("rejected_weights", _FLOATS),
        ]
    ),
}


def make_table(kind: str, columns: Mapping[str, object], provenance: Mapping[str, object] | None = None) -> pa.Table:
    """Build a table of one `kind` (a key of `SCHEMAS`) from columns, with its provenance attached.

    Raises:
        KeyError: a column of the schema is missing.
    """
    schema = SCHEMAS[kind]
    arrays = []
    for field in schema:
        column = columns[field.name]
        if not isinstance(column, pa.Array | pa.ChunkedArray):
            column = pa.array(column, type=field.type)
        arrays.append(column.cast(field.type))
    table = pa.Table.from_arrays(arrays, schema=schema)
    return with_provenance(table, kind, provenance or {})


def with_provenance(table: pa.Table, kind: str, provenance: Mapping[str, object]) -> pa.Table:
    """Return `table` with its format, version and provenance in the schema metadata."""
    payload = {"format": kind, "version": FORMAT_VERSION, **provenance}
    return table.replace_schema_metadata({_KEY: json.dumps(payload, sort_keys=True).encode()})


def provenance_of(schema_or_table: pa.Schema | pa.Table) -> dict:
    """Return the metadata object of a table: `format`, `version` and fingerprints (empty if it has none)."""
    schema = schema_or_table.schema if isinstance(schema_or_table, pa.Table) else schema_or_table
    raw = (schema.metadata or {}).get(_KEY)
    return json.loads(raw) if raw else {}


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


def shard_path(folder: Path, index: int) -> Path:
    return folder / f"part-{index:05d}.parquet"


def write_shard(folder: str | os.PathLike, index: int, table: pa.Table) -> Path:
    """Write one shard of a table folder atomically."""
    return write_parquet(shard_path(Path(folder), index), table)


def write_parquet(path: Path, table: pa.Table) -> Path:
    """Write a parquet file atomically."""
    with _replacing(path) as file:
        pq.write_table(table, file, compression="zstd")
    return path


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file in the same folder; it is flushed and takes the place of `path` if all went well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_table(folder: str | os.PathLike, table: pa.Table, rows_per_shard: int = 10_000) -> None:
    """Write a whole table as shards of `rows_per_shard` rows, replacing what the folder held."""
    folder = Path(folder)
    for stale in folder.glob("part-*.parquet"):
        stale.unlink()
    for index, start in enumerate(range(0, max(len(table), 1), rows_per_shard)):
        write_shard(folder, index, table.slice(start, rows_per_shard))


def table_paths(folder: str | os.PathLike, kind: str) -> list[Path]:
    """Return the shards of a table folder (or a single parquet file), in order.

    Raises:
        UserError: the folder is missing, holds no shard, or holds another kind or version of table.
    """
    path = Path(folder)
    if not path.exists():
        raise UserError(f"no {kind} table at '{path}': expected a folder of part-*.parquet files")
    paths = [path] if path.is_file() else sorted(path.glob("part-*.parquet"))
    if not paths:
        raise UserError(f"'{path}' holds no part-*.parquet file: expected a {kind} table")
    for shard in paths:
        _check_shard(shard, kind)
    return paths


def _check_shard(path: Path, kind: str) -> None:
    try:
        schema = pq.read_schema(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(
            f"'{path}' is not a readable parquet file ({error}); delete it and run the stage again"
        ) from None
    missing = [name for name in SCHEMAS[kind].names if name not in schema.names]
    if missing:
        raise UserError(f"'{path}' has no column '{missing[0]}': expected a {kind} table with {SCHEMAS[kind].names}")
    version = provenance_of(schema).get("version", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise UserError(f"'{path}' has format version {version}, this release reads {FORMAT_VERSION}; make it again")


def read_table(folder: str | os.PathLike, kind: str) -> pa.Table:
    """Read a whole table into memory (see `table_paths` for the errors)."""
    return pa.concat_tables([pq.read_table(path) for path in table_paths(folder, kind)])


def iter_tables(folder: str | os.PathLike, kind: str) -> Iterator[pa.Table]:
    """Read a table shard by shard, so that memory stays flat in the number of pairs."""
    for path in table_paths(folder, kind):
        yield pq.read_table(path)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    with _replacing(path) as file:
        file.write(content)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8."""
    write_bytes(path, text.encode())


def write_metrics(path: Path, metrics: Mapping[str, float]) -> None:
    """Write flat metrics as JSON, atomically; a figure that is undefined (NaN) becomes null."""
    defined = {name: None if value != value else value for name, value in metrics.items()}
    write_text(path, json.dumps(defined, indent=2) + "\n")
