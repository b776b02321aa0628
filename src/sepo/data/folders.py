"""A folder of data files -> the rows of one split: which files are data, and which of them belong to the split.

A saved dataset lists its own files; a clone of a hub dataset lists them in the head of its README.md; in other folders
the names of files and folders tell the split.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import yaml

from sepo.data.formats import EXPECTED, SUFFIXES, read_file
from sepo.errors import UserError, nearest, one_line
from sepo.files import file_digest
from sepo.processes import log_once

KNOWN_SPLITS = frozenset({"train", "test", "validation", "valid", "val", "dev", "eval"})


def read_folder(
    folder: Path, split: str, config_name: str | None, text_columns: Collection[str], data_dir: str | None = None
) -> pa.Table | datasets.Dataset:
    """The rows of a split.

    Args:
        config_name: a configuration of the README.md, or a sub-folder.
        text_columns: as in `read_file`.
        data_dir: sub-folder of a clone that is read without `config_name`, if it exists.

    Raises:
        UserError: the split or the configuration is missing, or the data cannot be read.
    """
    folder = _revision(folder)
    if config_name is None and (saved := _saved(folder, split)) is not None:
        return saved
    files = None
    if config_name is None and data_dir is not None and (folder / data_dir).is_dir():
        folder = folder / data_dir
    else:
        folder, files = _configuration(folder, split, config_name)
        if files is None and config_name is not None and (saved := _saved(folder, split)) is not None:
            return saved
    if files is None:
        names = {path: _split_names(path.relative_to(folder)) for path in _data_files(folder)}
        if not names:
            raise UserError(f"folder '{folder}' holds no dataset: expected {EXPECTED}")
        files = _files_of_split(folder, names, split)
        _note_folders(folder, files, split)
    _check_no_copies(files)
    _note_missing_shards(files)
    size = sum(path.stat().st_size for path in files)
    tables = _alike(folder, {path: read_file(path, text_columns, size) for path in files})
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise UserError(
            f"the files of split '{split}' in '{folder}' have columns of different types ({one_line(error)})"
        ) from None


def _alike(folder: Path, tables: Mapping[Path, pa.Table]) -> list[pa.Table]:
    """The tables without those that have no column of the largest one, such as statistics beside the data; these are
    named in one line.
    """
    largest = max(tables.values(), key=len)
    known = set(largest.column_names)
    others = [path for path, table in tables.items() if table.num_columns and not known & set(table.column_names)]
    if others:
        names = ", ".join(path.relative_to(folder).as_posix() for path in others[:5])
        log_once(f"  not read as data in '{folder}', because no column is that of the other files: {names}")
        return [table for path, table in tables.items() if path not in others]
    return list(tables.values())


# --- which folder and which files -----------------------------------------------------------------------------------


def _revision(folder: Path) -> Path:
    """The current revision in a cache of the hub, which may hold several; other folders as they are."""
    snapshots = folder / "snapshots"
    if not snapshots.is_dir() or not (folder / "blobs").is_dir():
        return folder
    revisions = {path.name: path for path in sorted(snapshots.iterdir()) if path.is_dir()}
    current = folder / "refs" / "main"
    name = current.read_text(encoding="utf-8").strip() if current.is_file() else ""
    if name not in revisions and len(revisions) != 1:
        raise UserError(f"'{folder}' holds several revisions: give one as the source, such as '{snapshots}/REVISION'")
    return revisions.get(name) or next(iter(revisions.values()))


def _saved(folder: Path, split: str) -> datasets.Dataset | None:
    """A dataset of `save_to_disk`; None for other folders."""
    try:
        if (folder / "dataset_dict.json").is_file():
            splits = datasets.DatasetDict.load_from_disk(os.fspath(folder))
            if split not in splits:
                raise UserError(_unknown_split(folder, split, splits))
            return splits[split]
        if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
            check_single_split(folder, split)
            return datasets.Dataset.load_from_disk(os.fspath(folder))
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise UserError(f"'{folder}' is a saved dataset that cannot be read ({one_line(error)})") from error
    return None


def check_single_split(source: Path, split: str) -> None:
    """Refuse another split than `train` of a source that has no splits."""
    if split != "train":
        raise UserError(f"unknown split '{split}': '{source}' holds one split, 'train'")


def check_no_config(source: Path, config_name: str | None) -> None:
    if config_name is not None:
        raise UserError(f"'{source}' has no configurations, so '{config_name}' must be left out")


def _configuration(folder: Path, split: str, config_name: str | None) -> tuple[Path, list[Path] | None]:
    """The folder of a configuration, and its files of the split if README.md lists them."""
    configs = {str(config["config_name"]): config for config in _listed_configs(folder)}
    if config_name is None:
        default = [name for name, config in configs.items() if config.get("default") is True or name == "default"]
        if len(configs) > 1 and not default:
            raise UserError(
                f"'{folder}' has several configurations: set config_name to one of {', '.join(list(configs)[:20])}"
            )
        config_name = next(iter(default or configs), None)
    if (config := configs.get(config_name or "")) is None:
        if config_name is None:
            return folder, None
        if not (folder / config_name).is_dir():
            names = [*configs, *(entry.name for entry in folder.iterdir() if entry.is_dir())]
            near = nearest(config_name, names)
            raise UserError(
                f"'{folder}' has no configuration '{config_name}'{near}: expected one of README.md, or a sub-folder"
            )
        return folder / config_name, None
    if data_dir := config.get("data_dir"):
        folder = _inside(folder, str(data_dir))
    if config.get("data_files") is None:
        return folder, None
    splits = _patterns(config["data_files"])
    if split not in splits:
        raise UserError(_unknown_split(f"{folder}, {config_name}", split, splits))
    return folder, list(dict.fromkeys(path for pattern in splits[split] for path in _matching(folder, pattern)))


def _listed_configs(folder: Path) -> list[Mapping[str, Any]]:
    """The configurations in the head of README.md; none if there is no such list."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8-sig")
        head = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
        values = yaml.safe_load(head[1]) if head else None
    except (OSError, ValueError, yaml.YAMLError):
        return []
    configs = values.get("configs") if isinstance(values, Mapping) else None
    configs = configs if isinstance(configs, list) else []
    return [config for config in configs if isinstance(config, Mapping) and "config_name" in config]


def _patterns(data_files: Any) -> dict[str, list[str]]:
    """`data_files` of a configuration as patterns by split."""
    texts = [data_files] if isinstance(data_files, str) else data_files
    if isinstance(texts, Mapping):
        texts = [{"split": split, "path": path} for split, path in texts.items()]
    splits: dict[str, list[str]] = {}
    for item in texts if isinstance(texts, list) else []:
        split, path = (item.get("split", "train"), item.get("path")) if isinstance(item, Mapping) else ("train", item)
        splits.setdefault(str(split), []).extend(map(str, path if isinstance(path, list) else [path]))
    return splits


def _inside(folder: Path, path: str) -> Path:
    if "://" in path or os.path.isabs(path) or ".." in Path(path).parts:
        raise UserError(
            f"README.md of '{folder}' lists '{path}', which is not in the folder: give the place of that file as the "
            "source"
        )
    return folder / path


def _matching(folder: Path, pattern: str) -> list[Path]:
    exact = _inside(folder, pattern)
    if exact.is_file():
        return [exact]
    # In Python's patterns a last `**` means folders alone.
    paths = exact.rglob("*") if exact.is_dir() else folder.glob(re.sub(r"\*\*$", "**/*", pattern))
    files = sorted(path for path in paths if path.name.lower().endswith(SUFFIXES) and path.is_file())
    if not files:
        raise UserError(f"README.md of '{folder}' lists '{pattern}', but there is no such data file: fetch it")
    return files


# --- folders without a list of their files --------------------------------------------------------------------------

# Files beside data that hold no data: metadata of `datasets`, DVC, hubs and programs, and what a model folder holds.
_NO_DATA = frozenset(
    f"{name}.json"
    for name in (
        *("dataset_info", "dataset_infos", "dataset_dict", "metadata", "state", "config", "info", "package", "schema"),
        *("tokenizer", "tokenizer_config", "special_tokens_map", "added_tokens", "vocab", "generation_config"),
        *("adapter_config", "preprocessor_config", "processor_config", "chat_template", "trainer_state"),
        *("model.safetensors.index", "pytorch_model.bin.index", "all_results", "train_results", "eval_results"),
    )
)
# Folders of caches, checkpoints and notebooks, and the files of a table's history.
_NO_DATA_FOLDER = re.compile(r"\.|_|checkpoints?(-\d+)?$|cache$", re.IGNORECASE)
_CACHE_FILE = re.compile(r"cache-[0-9a-f]{8,}.*\.arrow$")
# Files that look like data and cannot be read.
_UNREAD = re.compile(
    r"\.(zip|xlsx?|ods|tar|tgz|7z|rar|pkl|pickle|db|sqlite|orc|avro|(parquet|tar|arrow|jsonl?|csv)\.\w{2,4})$"
)


def _data_files(folder: Path) -> list[Path]:
    """The data files under a folder. Files that look like data and are passed over are named in one line."""
    listed: dict[Path, set[str] | None] = {}
    files, passed = [], []
    for path in sorted(folder.rglob("*")):
        name, relative = path.name.lower(), path.relative_to(folder)
        readable = name.endswith(SUFFIXES) and not name.startswith(".")
        if name in _NO_DATA or not (readable or _UNREAD.search(name)) or not path.is_file():
            continue
        if path.parent not in listed:
            listed[path.parent] = _own_files(path.parent)
        own = listed[path.parent]
        skipped = any(_NO_DATA_FOLDER.match(part) for part in relative.parts[:-1])
        if readable and not skipped and (path.name in own if own is not None else not _CACHE_FILE.match(name)):
            files.append(path)
        elif not any(part.startswith(".") for part in relative.parts):
            passed.append(relative.as_posix())
    if (folder / "_delta_log").is_dir():
        raise UserError(f"'{folder}' is a Delta table, whose files hold earlier versions too: export it as parquet")
    if passed and files:
        more = f" and {len(passed) - 5} more" if len(passed) > 5 else ""
        log_once(f"  not read as data in '{folder}': {', '.join(passed[:5])}{more}")
    return files


def _own_files(folder: Path) -> set[str] | None:
    """The files that a saved dataset lists as its own; None for other folders."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return {str(file["filename"]) for file in state["_data_files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None


_SUFFIX = re.compile("(" + "|".join(map(re.escape, sorted(SUFFIXES, key=len, reverse=True))) + ")$", re.IGNORECASE)
_COPY = re.compile(r"( \(\d+\)| ?[-_ ] ?(copy|kopie|copie)( \(?\d+\)?)?)$|^copy of ", re.IGNORECASE)


def _check_no_copies(files: Iterable[Path]) -> None:
    """Refuse files that probably hold the same rows, which would count twice: one name in two formats, a second copy of
    a browser or a desktop, or the same bytes.
    """
    first: dict[Path, Path] = {}
    sizes: dict[int, list[Path]] = {}
    # A file without a copy's mark comes first; "part (1)" and "part (2)" alone are no copies.
    for path in sorted(files, key=lambda path: (_COPY.search(_stem(path)) is not None, path)):
        plain = path.with_name(_stem(path))
        original = path.with_name(_COPY.sub("", _stem(path)))
        if (earlier := first.setdefault(plain, path)) is not path:
            raise _copies(earlier, path, "have one name in two formats")
        if (earlier := first.get(original, path)) is not path:
            raise _copies(earlier, path, "seem to be a file and its copy")
        sizes.setdefault(path.stat().st_size, []).append(path)
    for alike in sizes.values():
        by_content: dict[str, Path] = {}
        for path in alike if len(alike) > 1 else []:
            if (earlier := by_content.setdefault(file_digest(path), path)) is not path:
                raise _copies(earlier, path, "hold the same bytes")


_SHARD = re.compile(r"(.*?)(\d+)-of-(\d+)(.*)")


def _note_missing_shards(files: Iterable[Path]) -> None:
    """Name a table in one line of whose counted shards (`train-00000-of-00002`) some are missing."""
    tables: dict[tuple[Path, str, str, str], list[int]] = {}
    for path in files:
        if match := _SHARD.fullmatch(path.name):
            tables.setdefault((path.parent, match[1], match[3], match[4]), []).append(int(match[2]))
    for (parent, start, number, end), found in tables.items():
        if len(found) < int(number):
            log_once(f"  '{parent}' holds {len(found)} of {int(number)} shards of {start}*-of-{number}{end}")


def _copies(first: Path, second: Path, why: str) -> UserError:
    name = second.name if second.parent == first.parent else str(second)
    return UserError(
        f"'{first}' and '{name}' {why} and would be read as two parts: remove one, or give the path of one file as "
        "the source"
    )


def _stem(path: Path) -> str:
    return _SUFFIX.sub("", path.name)


def _split_names(path: Path) -> list[str]:
    """Names that may tell the split of a file: its folders, and its name without number, suffix and mark of a copy.

    >>> _split_names(Path("data/test-00000-of-00002.json.gz"))
    ['data', 'test']
    """
    return [*path.parts[:-1], re.sub(r"-\d+-of-\d+[^.]*$", "", _COPY.sub("", _stem(path)))]


def _files_of_split(folder: Path, names: Mapping[Path, list[str]], split: str) -> list[Path]:
    """The files named after the split; all files belong to `train` if no file is named after a split."""
    words = {name: set(re.split(r"[\W_]+", name.lower())) for parts in names.values() for name in parts}
    if not any(split in parts for parts in names.values()):
        similar = [name for name in words if split in words[name]]
        if split == "train" and not any(KNOWN_SPLITS & name_words for name_words in words.values()):
            return list(names)
        if len(similar) != 1:
            raise UserError(_unknown_split(folder, split, sorted({parts[-1] for parts in names.values()})))
        split = similar[0]  # the only file or folder with the word in its name: my_train_data.jsonl
    return [path for path, parts in names.items() if split in parts]


# Names of revisions: v2, 1.0.3, a commit.
_REVISION = re.compile(r"v\d[\d._-]*|\d+(\.\d+)+|[0-9a-f]{40}|rev(ision)?[-_ ]?\w+", re.IGNORECASE)


def _note_folders(folder: Path, files: Sequence[Path], split: str) -> None:
    """Name the folders in one line if files of one name in several folders are read as one dataset; refuse revisions,
    which hold the same rows.
    """
    by_name: dict[str, list[Path]] = {}
    for path in files:
        by_name.setdefault(path.name, []).append(path)
    several = max(by_name.values(), key=len)
    parts = [path.relative_to(folder).parent for path in several]
    if len(parts) < 2 or all("=" in part.name for part in parts):  # year=2024: parts of one table
        return
    shown = ", ".join(part.as_posix() for part in parts[:8]) + (", ..." if len(parts) > 8 else "")
    if sum(any(_REVISION.fullmatch(name) for name in part.parts) for part in parts) > 1:
        raise UserError(f"'{folder}' holds several revisions ({shown}): give the folder of one as the source")
    log_once(f"  '{folder}': {shown} are read as one dataset (split '{split}'); config_name reads one of them")


def _unknown_split(source: object, split: str, known: Iterable[str]) -> str:
    known = list(known)
    return f"unknown split '{split}'{nearest(split, known)}: '{source}' has {', '.join(known[:8])}"
