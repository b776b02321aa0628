"""Where preference data come from: a hub id, a folder or a file -> rows with our column names.

Local files are opened directly, not through a cache: a changed file is never served stale, and file and column names
may hold any character. Nothing is executed and no pickle is read. What a row means is the business of `rows.py`.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from sepo.data.formats import SUFFIXES, read_file
from sepo.errors import UserError, nearest, one_line
from sepo.files import file_digest

COLUMNS = ("prompt", "chosen", "rejected")
_KNOWN_SPLITS = frozenset({"train", "test", "validation", "valid", "val", "dev", "eval"})
ROWS_AT_ONCE = 1000  # rows read and tokenised at once: enough to keep the Rust tokenizer busy, little memory


def load_preferences(
    source: str | os.PathLike,
    *,
    split: str = "train",
    config_name: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> datasets.Dataset:
    """Load a preference dataset and give its columns the names `prompt`, `chosen` and `rejected`.

    Local files are read directly, not through a cache, so a changed file is never served stale and a file
    name may hold any character. CSV cells that hold message lists (as JSON, or as Python prints them) are
    parsed.

    Args:
        source: a file (parquet, json, jsonl, csv; json and csv also gzipped), a folder (`save_to_disk`, or
            data files named or foldered by split), or a dataset id on the Hugging Face Hub.
        split: a split's name, with an optional slice: `train`, `train_prefs`, `test[:500]`, `train[:10%]`.
            A file holds one split, `train`.
        config_name: the configuration of a hub dataset, or the sub-folder of a local one.
        columns: our name -> the dataset's, for example `{"prompt": "instruction", "chosen": "better"}`.
            A column that already has one of our names and is not mapped is kept as `source_<name>`.

    Returns:
        The dataset with `chosen`, `rejected`, `prompt` (unless the prompt is implicit), `pair_id` (int64,
        the row number in the split) and every other column as it was. A column of a JSON file whose values
        have mixed types holds structs `{"json": <the value as JSON>}`; `normalise_row` reads them.

    Raises:
        UserError: the source, split or a column is missing, or the data is empty or cannot be read.
    """
    _, slice_text = _parse_split(split)
    dataset = _load_whole_split(source, split, config_name, {*COLUMNS, *(columns or {}).values()})
    dataset = _rename_columns(dataset, columns or {}, str(source))
    dataset = dataset.add_column("pair_id", np.arange(len(dataset), dtype=np.int64))
    return _take_slice(dataset, split, _parse_split(split)[0]) if slice_text else dataset


def load_rows(source: str | os.PathLike, *, split: str = "train", config_name: str | None = None) -> datasets.Dataset:
    """Load a dataset of any columns from the same sources; see `load_preferences` for arguments and errors."""
    name, slice_text = _parse_split(split)
    dataset = _load_whole_split(source, split, config_name, set())
    return _take_slice(dataset, split, name) if slice_text else dataset


def source_fingerprint(source: str | os.PathLike) -> str:
    """Return 16 hex digits of the content of a file or folder of data; a hub dataset is known by its name alone."""
    path = Path(source).expanduser()
    try:
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else []
    except (OSError, ValueError):  # too long, or a null byte: not a path
        files = []
    if not files:
        return str(source)
    digest = hashlib.sha256()
    for file in files:
        name = "" if file == path else file.relative_to(path).as_posix()
        digest.update(f"{name}:{file_digest(file)}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]


def _load_whole_split(
    source: str | os.PathLike, split: str, config_name: str | None, text_columns: Collection[str]
) -> datasets.Dataset:
    name, _ = _parse_split(split)
    path = Path(source).expanduser()
    try:
        found = path.exists()
    except (OSError, ValueError):  # too long, or a null byte: not a path
        found = False
    if found and path.is_dir():
        dataset = _load_folder(path, name, config_name, text_columns)
    elif found:
        _check_single_split(path, name, config_name)
        dataset = _from_table(read_file(path, text_columns), path)
    else:
        dataset = _load_hub(str(source), name, config_name)
    if not len(dataset):
        raise UserError(f"'{source}' holds no row (split '{name}'): expected at least one")
    return dataset


def _parse_split(split: str) -> tuple[str, str]:
    match = re.fullmatch(r"([\w.-]+)(\[[^\[\]]*\])?", split)
    if match is None:
        raise UserError(f"'{split}' is not a split: expected a name with an optional slice, such as train[:500]")
    return match[1], match[2] or ""


def _take_slice(dataset: datasets.Dataset, split: str, name: str) -> datasets.Dataset:
    try:
        (part,) = datasets.ReadInstruction.from_spec(split).to_absolute({name: len(dataset)})
    except (ValueError, AssertionError) as error:
        raise UserError(
            f"split '{split}' cannot be taken ({one_line(error)}): '{name}' has {len(dataset)} rows; "
            f"expected a slice such as {name}[:500] or {name}[10%:20%]"
        ) from None
    start, stop = part.from_ or 0, len(dataset) if part.to is None else part.to
    if stop <= start:
        raise UserError(f"split '{split}' is empty: '{name}' has {len(dataset)} rows")
    return dataset.select(range(start, stop))


def _check_single_split(path: Path, split: str, config_name: str | None) -> None:
    if split != "train":
        raise UserError(f"unknown split '{split}': '{path}' holds one split, 'train'")
    if config_name is not None:
        raise UserError(f"'{path}' has no configurations, so '{config_name}' must be left out")


def _load_hub(source: str, split: str, config_name: str | None) -> datasets.Dataset:
    is_hub_id = re.fullmatch(r"\w[\w.-]{0,95}(/[\w.-]{1,96})?", source)
    if not is_hub_id or source.lower().endswith(SUFFIXES):
        near = nearest(Path(source).name, _listing(Path(source).expanduser().parent))
        raise UserError(f"no file or folder at '{source}'{near}: expected a dataset file, a folder or a hub id")
    try:
        return datasets.load_dataset(source, config_name, split=split)
    except Exception as error:  # whatever the hub client meets, the user needs one line
        raise UserError(
            f"'{source}' is no local file or folder, and could not be loaded from the Hugging Face Hub "
            f"({one_line(error)}); check the name, the split '{split}', the network and your access"
        ) from error


def _listing(folder: Path) -> list[str]:
    try:
        return [entry.name for entry in folder.iterdir()]
    except (OSError, ValueError):
        return []


def _load_folder(folder: Path, split: str, config_name: str | None, text_columns: Collection[str]) -> datasets.Dataset:
    if config_name is not None:
        if not (folder / config_name).is_dir():
            near = nearest(config_name, (entry.name for entry in folder.iterdir() if entry.is_dir()))
            raise UserError(f"'{folder}' has no configuration '{config_name}'{near}: expected a sub-folder")
        folder = folder / config_name
    try:
        if (folder / "dataset_dict.json").is_file():
            saved = datasets.DatasetDict.load_from_disk(os.fspath(folder))
            if split not in saved:
                raise UserError(_unknown_split(folder, split, saved))
            return saved[split]
        if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
            _check_single_split(folder, split, None)
            return datasets.Dataset.load_from_disk(os.fspath(folder))
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise UserError(f"'{folder}' is a saved dataset that cannot be read ({one_line(error)})") from error
    names = {path: _split_names(path.relative_to(folder)) for path in _data_files(folder)}
    if not names:
        raise UserError(f"folder '{folder}' holds no dataset: expected {', '.join(SUFFIXES[:4])} files")
    tables = [read_file(path, text_columns) for path in _files_of_split(folder, names, split)]
    try:
        table = pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise UserError(
            f"the files of split '{split}' in '{folder}' have columns of different types ({one_line(error)})"
        ) from None
    return _from_table(table, folder)


def _data_files(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.name.lower().endswith(SUFFIXES)
        and path.name not in ("dataset_info.json", "dataset_infos.json")
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    )


def _split_names(path: Path) -> list[str]:
    """The names a file may give its split by: its folders, and its own without number and suffix.

    >>> _split_names(Path("data/test-00000-of-00002.json.gz"))
    ['data', 'test']
    """
    stem = re.sub(r"(-\d+-of-\d+[^.]*)?\.(parquet|jsonl?|csv)(\.gz)?$", "", path.name, flags=re.IGNORECASE)
    return [*path.parts[:-1], stem]


def _files_of_split(folder: Path, names: Mapping[Path, list[str]], split: str) -> list[Path]:
    """Pick the files named after the split; all files are `train` if none is named after any split."""
    words = {name: set(re.split(r"[\W_]+", name.lower())) for found in names.values() for name in found}
    if not any(split in found for found in names.values()):
        like = [name for name in words if split in words[name]]
        if split == "train" and not any(_KNOWN_SPLITS & found for found in words.values()):
            return list(names)
        if len(like) != 1:
            raise UserError(_unknown_split(folder, split, sorted({found[-1] for found in names.values()})))
        split = like[0]  # the one file or folder with the word in its name: my_train_data.jsonl
    return [path for path, found in names.items() if split in found]


def _unknown_split(source: object, split: str, found: Iterable[str]) -> str:
    found = list(found)
    return f"unknown split '{split}'{nearest(split, found)}: '{source}' has {', '.join(found[:8])}"


def _from_table(table: pa.Table, source: Path) -> datasets.Dataset:
    for index, column in enumerate(table.schema):
        if pa.types.is_dictionary(column.type):  # pandas' categories
            table = table.set_column(index, column.name, table.column(index).cast(column.type.value_type))
    try:
        return datasets.Dataset(table.replace_schema_metadata(None))
    except (ValueError, TypeError, KeyError, NotImplementedError, pa.ArrowException) as error:
        raise UserError(f"'{source}' has a column of a type that cannot be used ({one_line(error)})") from error


def _rename_columns(dataset: datasets.Dataset, columns: Mapping[str, str], source: str) -> datasets.Dataset:
    for ours in columns:
        if ours not in COLUMNS:
            raise UserError(f"unknown column key '{ours}'{nearest(ours, COLUMNS)}: expected {', '.join(COLUMNS)}")
    found = list(dataset.column_names)
    wanted = {ours: columns.get(ours, ours) for ours in COLUMNS}
    if "prompt" not in columns and "prompt" not in found:
        del wanted["prompt"]  # implicit: chosen and rejected share it
    for ours, theirs in wanted.items():
        if theirs not in found:
            listed = ", ".join(f"'{name}'" for name in found[:20])
            raise UserError(
                f"'{source}' has no column '{theirs}'{nearest(theirs, found)}: found {listed}; "
                f"name the column that holds '{ours}' with `columns`"
            )
    if len(set(wanted.values())) < len(wanted):
        raise UserError(f"`columns` uses one column of '{source}' twice: {dict(columns)}; expected three columns")
    new_names = {theirs: ours for ours, theirs in wanted.items() if ours != theirs}
    taken = {*found, *COLUMNS, "pair_id"}
    for name in found:
        if (name in COLUMNS and name not in wanted.values()) or name == "pair_id":
            new_names[name] = next(
                option for n in range(len(taken) + 1) if (option := f"source_{name}" + "_" * n) not in taken
            )
            taken.add(new_names[name])
    return dataset.rename_columns(new_names) if new_names else dataset


def relevant_columns(dataset: datasets.Dataset) -> datasets.Dataset:
    for name in ("chosen", "rejected"):
        if name not in dataset.column_names:
            found = ", ".join(dataset.column_names)
            raise UserError(f"the dataset has no column '{name}'{nearest(name, dataset.column_names)}: found {found}")
    names = [name for name in (*COLUMNS, "pair_id") if name in dataset.column_names]
    return dataset.select_columns(names).with_format(None)


def read_rows(dataset: datasets.Dataset, start: int, stop: int) -> list[dict[str, Any] | None]:
    """Read rows as dicts; None for a row whose text is not UTF-8."""
    try:
        batch = dataset[start:stop]
    except UnicodeDecodeError:
        if stop - start == 1:
            return [None]
        middle = (start + stop) // 2
        return read_rows(dataset, start, middle) + read_rows(dataset, middle, stop)
    return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
