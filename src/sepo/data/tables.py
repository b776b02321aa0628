"""Parquet tables on disk: one schema per kind, provenance in the metadata, atomic writes.

A table is a folder of shards `part-00000.parquet`, `part-00001.parquet`, ... with one row a pair. A shard is written
under a temporary name and renamed, so a reader never sees an incomplete shard. The schema metadata holds one JSON
object under the key `sepo`: `format` (the kind of table), `version` and the fingerprints of the table's sources.

Every table is checked when it is read. Each shard stores its number, the number of shards and a digest of its rows. The
columns must be consistent: one reward a token, positions inside their response, finite numbers. A table that fails
raises a UserError. The checks take about as long as reading.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sepo.data.conversation import CONVERSATION, PROMPT_KEY
from sepo.data.ragged import flat
from sepo.errors import UserError, nearest, one_line, wrong_type
from sepo.files import expand_home, replacing

FORMAT_VERSION = 1
_KEY = b"sepo"
_SHARDS = "part-*.parquet"
# Commands that write a table of a kind with --out.
_WRITTEN_BY = {"scores": "`sepo score`", "selection": "`sepo select`"}
# The most common column names of preference data.
_PREFERENCES = frozenset({"chosen", "rejected", "prompt", "messages"})
# Provenance of one shard on disk, not of the table's sources.
_SHARD_KEYS = ("shard", "shards", "digest")
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
# The tokens between the assistant turns of a response, and the number of response tokens before each (`data.turns`).
CONTEXT_COLUMNS = ("chosen_context_ids", "chosen_context_at", "rejected_context_ids", "rejected_context_at")
SEVERAL_TURNS = "several_turns"  # recorded in the provenance of a table with these columns
PLAIN_TEXT = "plain_text"  # recorded for texts that stay texts, though the tokenizer has a chat template
CONTEXT_FIELDS = [pa.field(name, _IDS) for name in CONTEXT_COLUMNS]
# Optional columns. Tables of earlier releases and of other tools have no conversation.
_TALK_FIELDS = [pa.field(CONVERSATION, pa.string()), pa.field(PROMPT_KEY, pa.string()), *CONTEXT_FIELDS]
# The columns of pairs that a model reads.
READ_COLUMNS = (*SCHEMAS["pairs"].names, *CONTEXT_COLUMNS)
# Weight of each pair's loss (`selection.pair_confidence`).
PAIR_WEIGHT = "pair_weight"
_OPTIONAL = {
    "pairs": _TALK_FIELDS,
    "scores": _TALK_FIELDS,
    "selection": [*_TALK_FIELDS, pa.field(PAIR_WEIGHT, pa.float32())],
}


def make_table(kind: str, columns: Mapping[str, object], provenance: Mapping[str, object] | None = None) -> pa.Table:
    """Build a table of one `kind` (a key of `SCHEMAS`) from columns, with its provenance attached.

    Raises:
        KeyError: a column of the schema is missing.
    """
    schema = pa.schema([*SCHEMAS[kind], *(field for field in _OPTIONAL.get(kind, []) if field.name in columns)])
    arrays = []
    for field in schema:
        column = columns[field.name]
        if not isinstance(column, pa.Array | pa.ChunkedArray):
            column = pa.array(column, type=field.type)
        arrays.append(column.cast(field.type))
    table = pa.Table.from_arrays(arrays, schema=schema)
    return with_provenance(table, kind, provenance or {})


def require_table(what: str, value: object, *kinds: str) -> pa.Table:
    """Return the argument `what` if it is a table with the columns of one of `kinds`.

    Raises:
        UserError: it is not; the message names the argument.
    """
    wanted = f"a table of kind {' or '.join(kinds)}"
    if not isinstance(value, pa.Table):
        raise wrong_type(what, value, f"{wanted}, in memory (read_table reads a table from a folder)")
    names = set(value.column_names)
    if not any(names >= set(SCHEMAS[kind].names) for kind in kinds):
        kind = provenance_of(value).get("format")
        found = f"a table of kind {kind}" if isinstance(kind, str) and kind in SCHEMAS else "a table with the columns "
        shown = "" if found[-1] != " " else one_line(", ".join(value.column_names), 100)
        raise UserError(f"{what} is {found}{shown}: expected {wanted}")
    return value


def require_both_sides(table: pa.Table, what: str) -> None:
    """Raise a UserError for a table of answers, whose rejected side means nothing (`sepo.rewards`)."""
    if provenance_of(table).get("answers"):
        raise UserError(
            f"{what} holds the scores of answers, not of preference pairs: `sepo report --table` shows them"
        )


def with_provenance(table: pa.Table, kind: str, provenance: Mapping[str, object]) -> pa.Table:
    """Return `table` with its format, version and provenance in the schema metadata.

    `provenance` may be that of another table, whose format and version are replaced.
    """
    payload = {**provenance, "format": kind, "version": FORMAT_VERSION}
    text = json.dumps(payload, sort_keys=True, default=np.generic.item)  # settings may be numbers of numpy
    return table.replace_schema_metadata({_KEY: text.encode()})


def provenance_of(schema_or_table: pa.Schema | pa.Table) -> dict:
    """Return the provenance of a table: `format`, `version` and fingerprints; empty without metadata."""
    schema = schema_or_table.schema if isinstance(schema_or_table, pa.Table) else schema_or_table
    raw = (schema.metadata or {}).get(_KEY)
    value = json.loads(raw) if raw else {}
    if not isinstance(value, dict):
        raise ValueError(f"its provenance is a JSON {type(value).__name__}, expected an object")
    return value


def swap_sides(table: pa.Table) -> pa.Table:
    """Swap chosen and rejected."""
    other = {"chosen": "rejected", "rejected": "chosen"}

    def column(name: str) -> pa.ChunkedArray:
        side, _, rest = name.partition("_")
        return table.column(f"{other[side]}_{rest}" if side in other else name)

    columns = [column(name) for name in table.column_names]
    return pa.Table.from_arrays(columns, names=table.column_names).replace_schema_metadata(table.schema.metadata)


def table_digest(table: pa.Table) -> str:
    """Fingerprint of the rows of a table, independent of chunks and provenance."""
    digest = hashlib.sha256()
    for name in sorted(table.column_names):
        digest.update(name.encode("utf-8", "surrogatepass"))
        column = table.column(name).combine_chunks()
        if pa.types.is_list(column.type):
            digest.update(column.value_lengths().fill_null(-1).to_numpy(zero_copy_only=False).tobytes())
            column = column.flatten()
        digest.update(str(column.type).encode())
        if column.null_count == 0 and (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
            digest.update(column.to_numpy(zero_copy_only=False).tobytes())
        else:
            digest.update(json.dumps(column.to_pylist(), default=str).encode())
    return digest.hexdigest()[:16]


def shard_path(folder: Path, index: int) -> Path:
    return folder / f"part-{index:05d}.parquet"


def write_shard(folder: str | os.PathLike, index: int, table: pa.Table, shards: int = 1) -> Path:
    """Write shard `index` of a table of `shards` shards, atomically, with the digest that `read_shard` checks."""
    provenance = {**provenance_of(table), "shard": index, "shards": shards}
    provenance["digest"] = _shard_digest(table, provenance)
    metadata = {_KEY: json.dumps(provenance, sort_keys=True).encode()}
    return write_parquet(
        shard_path(Path(expand_home(folder, "the folder")), index), table.replace_schema_metadata(metadata)
    )


def _shard_digest(table: pa.Table, provenance: Mapping[str, Any]) -> str:
    """Digest of the rows and the provenance, except the digest itself."""
    rest = {key: value for key, value in provenance.items() if key != "digest"}
    text = table_digest(table) + json.dumps(rest, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_parquet(path: Path, table: pa.Table) -> Path:
    """Write a parquet file atomically."""
    with replacing(path) as temporary, arrow_file(temporary, "wb") as file:
        pq.write_table(table, file, compression="zstd")
    return path


def arrow_file(path: str | os.PathLike, mode: str = "rb") -> pa.OSFile:
    """Open a file for Arrow.

    A Python file object may still be held by Arrow's threads at interpreter exit, which sometimes aborts the process.
    A file name could be interpreted as a URI or a glob.
    """
    return pa.OSFile(os.fsencode(path), mode)


def write_table(folder: str | os.PathLike, table: pa.Table, rows_per_shard: int = 10_000) -> None:
    """Write a table as shards of `rows_per_shard` rows, replacing the shards in the folder."""
    folder = Path(expand_home(folder, "the folder"))
    clear_shards(folder)
    starts = range(0, max(len(table), 1), rows_per_shard)
    for index, start in enumerate(starts):
        write_shard(folder, index, table.slice(start, rows_per_shard), len(starts))


def clear_shards(folder: Path) -> None:
    """Remove the shards of an earlier table; errors as in `check_shards_are_ours`."""
    check_shards_are_ours(folder)
    for stale in folder.glob(_SHARDS):
        stale.unlink()


def check_shards_are_ours(folder: Path) -> None:
    """Raise a UserError if a folder holds parquet files with names of shards that this package did not write.

    Spark and others name their parts alike; a table in the folder would replace them.
    """
    for path in sorted(folder.glob(_SHARDS)):
        try:
            ours = _KEY in (read_schema(path).metadata or {})
        except (OSError, pa.ArrowException):  # damaged
            ours = _is_shard(path)
        if not ours:
            raise UserError(f"'{folder}' holds {path.name}, which sepo did not write: choose a new folder")


def table_paths(folder: str | os.PathLike, kind: str) -> list[Path]:
    """Return the shards of a table folder (or a single parquet file) in order, without reading rows.

    Raises:
        UserError: the folder is missing, lacks a shard, holds another kind or version of table or shards of different
            tables, or is no table.
    """
    if kind not in SCHEMAS:
        raise UserError(f"no kind of table is '{kind}'{nearest(str(kind), SCHEMAS)}: expected {', '.join(SCHEMAS)}")
    path = Path(expand_home(folder, f"the {kind} table"))
    if not path.exists():
        raise UserError(f"no {kind} table at '{path}': expected a folder of part-*.parquet files")
    if path.is_file():
        _read_provenance(path, kind)
        return [path]
    paths = sorted(path.glob(_SHARDS))
    if not paths:
        raise _no_table(path, kind, _what_a_folder_is(path, kind))
    first: dict[str, Any] = {}
    for index, shard in enumerate(paths):
        provenance = _read_provenance(shard, kind)
        number, shards = provenance.get("shard", index), provenance.get("shards", len(paths))
        if number != index or shards != len(paths):
            raise UserError(
                f"'{path}' holds {len(paths)} of {shards} shards ('{shard.name}' is number {number}): "
                "the stage that writes it was interrupted, run it again"
            )
        sources = {key: value for key, value in provenance.items() if key not in (*_SHARD_KEYS, "pairs")}
        first = first if index else sources
        if sources != first:
            differ = sorted(key for key in {*first, *sources} if first.get(key) != sources.get(key))
            raise UserError(
                f"'{shard}' belongs to another table than '{paths[0].name}' (its {differ[0]} differs): "
                "run the stage that writes it again"
            )
    return paths


def _no_table(path: Path, kind: str, reason: str) -> UserError:
    writer = _WRITTEN_BY.get(kind, "`sepo score` or `sepo run`")
    return UserError(f"'{path}' is no {kind} table: {reason}; expected a folder of part-*.parquet that {writer} wrote")


def _what_a_folder_is(folder: Path, kind: str) -> str:
    """Describe a folder without part-*.parquet files that a user passed as a table."""
    inside = sorted({path.parent for path in folder.glob("*/part-*.parquet")})
    if (folder / kind).is_dir() or inside:
        return f"the table is in '{folder / kind if (folder / kind).is_dir() else inside[0]}'"
    if (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file():
        return "it is a model"
    files = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    if any(name.lower().endswith(_DATA_FILES) for name in files):
        return f"it holds {files[0]}, probably preference data, which go to --data"
    return "it holds no part-*.parquet file"


_DATA_FILES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".gz", ".zst")


def _is_shard(path: Path) -> bool:
    return re.fullmatch(r"part-\d{5}\.parquet", path.name) is not None


def read_schema(path: Path) -> pa.Schema:
    """Read the schema of a parquet file."""
    with arrow_file(path) as file:
        return pq.read_schema(file)


def number_of_rows(path: Path) -> int:
    """Number of rows of a parquet file, from its footer."""
    with arrow_file(path) as file:
        return pq.read_metadata(file).num_rows


def _read_provenance(path: Path, kind: str) -> dict[str, Any]:
    """Check columns and version of one file of a table; return its provenance."""
    try:
        schema = read_schema(path)
        provenance = provenance_of(schema)
    except Exception as error:  # a damaged file may raise any exception
        raise _unreadable(path, kind, error) from None
    missing = [name for name in SCHEMAS[kind].names if name not in schema.names]
    if missing:
        made_as = provenance.get("format")
        if isinstance(made_as, str) and made_as in SCHEMAS and made_as != kind:
            raise _no_table(path, kind, f"it is a {made_as} table")
        names = one_line(", ".join(schema.names), 100)
        if _PREFERENCES & set(schema.names):
            raise _no_table(path, kind, f"its columns ({names}) are those of preference data, which go to --data")
        raise _no_table(path, kind, f"it has no column '{missing[0]}', only {names or 'none'}")
    version = provenance.get("version", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise UserError(f"'{path}' has format version {version}, this release reads {FORMAT_VERSION}; make it again")
    end_ids = provenance.get("end_ids", [])
    if not isinstance(end_ids, list) or not all(type(i) is int and 0 <= i < 2**31 for i in end_ids):
        raise UserError(f"'{path}': its end_ids are {one_line(end_ids, 60)}, expected a list of token ids")
    return provenance


def _unreadable(path: Path, kind: str, error: Exception) -> UserError:
    if _is_shard(path):
        return UserError(
            f"'{path}' is not a readable parquet file ({one_line(error, 200)}): run the stage that wrote it again"
        )
    if path.name.lower().endswith(_DATA_FILES) and path.suffix.lower() != ".parquet":
        return _no_table(path, kind, "it is probably preference data, which go to --data")
    return _no_table(path, kind, f"it is not a readable parquet file ({one_line(error, 100)})")


def read_shard(path: Path, kind: str) -> pa.Table:
    """Read one file of a table and check columns, version, digest and the consistency of the rows.

    Raises:
        UserError: a check fails.
    """
    provenance = _read_provenance(path, kind)
    try:
        with arrow_file(path) as file:
            table = pq.read_table(file)
    except Exception as error:  # a damaged file may raise any exception
        raise _unreadable(path, kind, error) from None
    if "digest" in provenance and provenance["digest"] != _shard_digest(table, provenance):
        raise UserError(f"'{path}' was altered since it was written (its checksum differs): run the stage again")
    for field in [*SCHEMAS[kind], *(field for field in _OPTIONAL.get(kind, []) if field.name in table.column_names)]:
        table = _cast_column(table, field, path, kind)
    _check_rows(table, kind, path)
    metadata = {key: value for key, value in provenance.items() if key not in _SHARD_KEYS}
    return table.replace_schema_metadata({_KEY: json.dumps(metadata, sort_keys=True).encode()} if metadata else None)


def shard_problem(path: Path, kind: str, expected: Mapping[str, Any]) -> str | None:
    """Why a stored shard cannot be reused; None if it is whole and has the expected provenance."""
    problem = _provenance_problem(path, expected)
    if problem is None:
        try:
            read_shard(path, kind)
        except (UserError, OSError) as error:
            return f"is damaged ({one_line(error, 200)})"
    return problem


def shard_digest(path: Path, expected: Mapping[str, Any]) -> str | None:
    """The recorded digest of a stored shard with the expected provenance, from its footer; None if there is none."""
    problem = _provenance_problem(path, expected)
    return None if problem else str(provenance_of(read_schema(path)).get("digest"))


def _provenance_problem(path: Path, expected: Mapping[str, Any]) -> str | None:
    if not path.is_file():
        return "is missing"
    try:
        provenance = provenance_of(read_schema(path))
    except (OSError, ValueError, pa.ArrowException) as error:
        return f"is damaged ({one_line(error, 200)})"
    for key, value in {"version": FORMAT_VERSION, **expected}.items():
        if provenance.get(key) != value:
            return f"was made with another {key}"
    return None


def _cast_column(table: pa.Table, field: pa.Field, path: Path, kind: str) -> pa.Table:
    """Cast a column to the type of the schema (tables from other tools often hold int64 and double)."""
    if table.schema.names.count(field.name) > 1:
        raise UserError(f"'{path}' has two columns '{field.name}': expected one; make the table again")
    index = table.schema.get_field_index(field.name)
    column = table.column(index)
    if column.null_count or (pa.types.is_nested(column.type) and _has_null_items(column)):
        raise UserError(f"'{path}': the column '{field.name}' holds nulls; expected a value in every row")
    if column.type == field.type:
        return table
    try:
        return table.set_column(index, field, column.cast(field.type))
    except (pa.ArrowException, ValueError) as error:
        raise UserError(
            f"'{path}': the column '{field.name}' is {column.type}, a {kind} table has {field.type} "
            f"({one_line(error, 120)}); make the table again"
        ) from None


def _has_null_items(column: pa.ChunkedArray) -> bool:
    return any(hasattr(chunk, "flatten") and _flattened(chunk).null_count > 0 for chunk in column.chunks)


def _flattened(chunk: pa.Array) -> pa.Array:
    values = chunk.flatten()
    return pa.nulls(0) if isinstance(values, list) else values  # a struct flattens to its fields; the cast rejects it


def _check_rows(table: pa.Table, kind: str, path: Path) -> None:
    """Check that the columns of a table are consistent; vectorised."""
    check_pairs_differ(table, f"'{path}'")
    pair_ids = table.column("pair_id").to_numpy()

    def refuse(bad: np.ndarray, counts: np.ndarray | None, text: str, *numbers: np.ndarray) -> None:
        """Raise for the first bad row, or for the row of the first bad item if `counts` holds the items of each row."""
        if bad.any():
            item = int(np.argmax(bad))
            row = item if counts is None else int(np.searchsorted(np.cumsum(counts), item, side="right"))
            problem = text.format(*(values[item] for values in numbers))
            raise UserError(f"'{path}', pair {pair_ids[row]}: {problem}; make the table again")

    if kind == "selection" and PAIR_WEIGHT in table.column_names:
        weights = table.column(PAIR_WEIGHT).to_numpy()
        refuse(~(np.isfinite(weights) & (weights >= 0)), None, "its pair_weight is {}, expected 0 or more", weights)
    columns = {name: flat(table.column(name)) for name in SCHEMAS[kind].names if name != "pair_id"}
    for name, (values, counts) in columns.items():
        a_number = f"a {name.replace('_', ' ').removesuffix('s')} is {{}}"
        if name.endswith("_ids"):
            refuse(counts == 0, None, f"{name} is empty, expected at least one token")
            refuse(values < 0, counts, a_number, values)
        elif values.dtype.kind == "f":
            refuse(~np.isfinite(values), counts, a_number, values)
    context = [name for name in CONTEXT_COLUMNS if name in table.column_names]
    if context and len(context) < len(CONTEXT_COLUMNS):
        raise UserError(f"'{path}' has only {', '.join(context)} of {', '.join(CONTEXT_COLUMNS)}; make the table again")
    for side in ("chosen", "rejected"):
        for values_name, items_name, items in (("rewards", "ids", "tokens"), ("weights", "positions", "key tokens")):
            if f"{side}_{values_name}" in columns:
                got, wanted = columns[f"{side}_{values_name}"][1], columns[f"{side}_{items_name}"][1]
                refuse(got != wanted, None, f"{{}} {side} {values_name} for {{}} {items}", got, wanted)
        if context:
            _check_context(table, side, columns[f"{side}_ids"][1], refuse)
        if f"{side}_positions" in columns:
            positions, counts = columns[f"{side}_positions"]
            beyond = (positions < 0) | (positions >= np.repeat(columns[f"{side}_ids"][1], counts))
            refuse(beyond, counts, f"key token {{}} lies beyond the {side} response", positions)
            row = np.repeat(np.arange(len(counts)), counts)
            unordered = np.zeros(len(positions), bool)
            unordered[1:] = (positions[1:] <= positions[:-1]) & (row[1:] == row[:-1])
            refuse(unordered, counts, f"the {side} key tokens are not in ascending order")


def _check_context(table: pa.Table, side: str, lengths: np.ndarray, refuse: Callable[..., None]) -> None:
    """Check the tokens between the assistant turns of a side, whose responses have `lengths` tokens."""
    ids, numbers = flat(table.column(f"{side}_context_ids"))
    at, counts = flat(table.column(f"{side}_context_at"))
    refuse(numbers != counts, None, f"{{}} places for {{}} {side} context tokens", counts, numbers)
    refuse(ids < 0, numbers, f"a {side} context id is {{}}", ids)
    row = np.repeat(np.arange(len(counts)), counts)
    wrong = (at < 0) | (at >= np.repeat(lengths, counts))
    wrong[1:] |= (at[1:] < at[:-1]) & (row[1:] == row[:-1])
    refuse(wrong, counts, f"a {side} context token has the place {{}}, expected ascending places in the response", at)


def check_pairs_differ(table: pa.Table, name: str = "the table") -> None:
    """Raise a UserError if a `pair_id` occurs twice: it is the key of log-probabilities and rewards."""
    values, counts = np.unique(table.column("pair_id").to_numpy(), return_counts=True)
    if len(values) < len(table):
        raise UserError(f"{name} holds pair {values[counts > 1][0]} twice: expected every pair_id once; make it again")


def read_table(folder: str | os.PathLike, kind: str) -> pa.Table:
    """Read a whole table into memory; errors as in `table_paths` and `read_shard`."""
    tables = list(iter_tables(folder, kind))
    try:
        table = pa.concat_tables(tables)
    except pa.ArrowException as error:
        raise UserError(f"the shards of '{folder}' have different columns ({one_line(error, 200)})") from None
    if len(tables) > 1:
        check_pairs_differ(table, f"'{folder}', in two shards,")
    return table


def iter_tables(folder: str | os.PathLike, kind: str) -> Iterator[pa.Table]:
    """Read a table shard by shard, so that memory does not grow with the number of pairs."""
    for path in table_paths(folder, kind):
        yield read_shard(path, kind)
