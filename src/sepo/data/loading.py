"""Sources of preference data: a hub id, a folder, a file or rows in memory -> rows with our column names.

Local files are opened directly, not through a cache, so changes are always seen and file and column names may hold any
character. No code is executed and no pickle is read. `rows.py` interprets the rows.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from datasets.fingerprint import generate_random_fingerprint

from sepo.data.folders import KNOWN_SPLITS, check_no_config, check_single_split, read_folder
from sepo.data.formats import SUFFIXES, read_file, table_of
from sepo.data.messages import DropRow, read_cell
from sepo.data.rows import (
    DROP_COLUMN,
    EXTRA_COLUMNS,
    READ_COLUMNS,
    ROWS_AT_ONCE,
    DataReport,
    holds_prompt,
)
from sepo.data.spool import row_numbers
from sepo.errors import UserError, nearest, one_line, wrong_type
from sepo.files import expand_home, file_digest
from sepo.recipe.settings import PairsFrom

COLUMNS = ("prompt", "chosen", "rejected")


def load_preferences(
    source: str | os.PathLike | Any,
    *,
    split: str = "train",
    config_name: str | None = None,
    columns: Mapping[str, str] | None = None,
    pairs_from: str | PairsFrom | None = None,
) -> datasets.Dataset:
    """Load a preference dataset and rename its columns to `prompt`, `chosen` and `rejected`.

    Local files are read directly, not through a cache, so changes are always seen and a file name may hold any
    character.

    Args:
        source: a file (parquet, json, jsonl, csv, tsv, arrow; text files also compressed), a folder (from
            `save_to_disk`, or data files in folders or with names that tell the split), a dataset id of the Hugging
            Face Hub, or rows in memory (a `Dataset`, an Arrow table, a pandas data frame, a list of dicts).
        split: name of a split, with an optional slice: `train`, `train_prefs`, `test[:500]`, `train[:10%]`. A file has
            one split, `train`.
        config_name: configuration of a hub dataset, or sub-folder of a local dataset.
        columns: our name -> name in the dataset, for example `{"prompt": "instruction", "chosen": "better"}`. An
            unmapped column that already has one of our names becomes `source_<name>`. Further names: `system`, `input`
            (text after the prompt), `history` and `tools`.
        pairs_from: make pairs from labels, scores or ranks: the name of a preset (`pairing.PRESETS`) or a description.

    Returns:
        The dataset with `chosen`, `rejected`, `prompt` (unless the prompt is implicit), `pair_id` (int64, the row
        number in the split) and all other columns unchanged. A JSON column with values of mixed types holds structs
        `{"json": <the value as JSON>}`, which `normalise_row` reads.

    Raises:
        UserError: the source, the split or a column is missing, or the data is empty or unreadable.
    """
    preset = None
    if pairs_from is not None:
        from sepo.data.pairing import make_pairs, preset_of

        preset = preset_of(pairs_from)
    columns = {} if columns is None else columns
    if not isinstance(columns, Mapping) or not all(isinstance(name, str) for pair in columns.items() for name in pair):
        raise wrong_type("columns", columns, "our names -> names in the dataset, such as {'prompt': 'instruction'}")
    wanted = {**({} if preset is None else preset.columns), **columns}
    _, slice_text = _parse_split(split)
    name = "the dataset" if not isinstance(source, str | os.PathLike) else str(source)
    dataset = _load_whole_split(
        source, split, config_name, {*COLUMNS, *wanted.values()}, None if preset is None else preset.data_dir
    )
    if preset is not None and preset.pairs_from is not None:
        prompt = wanted.pop("prompt", "prompt" if "prompt" in dataset.column_names else preset.pairs_from.group_by)
        if replaced := {"chosen", "rejected"} & wanted.keys():
            raise UserError(
                f"`columns` maps {' and '.join(sorted(replaced))}, but pairs_from makes them: leave them out"
            )
        dataset = make_pairs(dataset, preset.pairs_from, prompt)
    dataset = _rename_columns(dataset, wanted, name)
    _check_prompt_is_named(dataset, name)
    # Else the column is pickled for a fingerprint, which names cached results.
    fingerprint = generate_random_fingerprint()
    dataset = dataset.add_column("pair_id", row_numbers(len(dataset)), new_fingerprint=fingerprint)
    return _take_slice(dataset, split, _parse_split(split)[0]) if slice_text else dataset


def load_rows(source: str | os.PathLike, *, split: str = "train", config_name: str | None = None) -> datasets.Dataset:
    """Load a dataset with any columns; sources, arguments and errors as in `load_preferences`."""
    name, slice_text = _parse_split(split)
    dataset = _load_whole_split(source, split, config_name, set())
    return _take_slice(dataset, split, name) if slice_text else dataset


def source_fingerprint(source: str | os.PathLike) -> str:
    """Return 16 hex digits of the content of a file or folder; the name of a hub dataset."""
    path = Path(expand_home(source, "the data"))
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
    source: str | os.PathLike | Any,
    split: str,
    config_name: str | None,
    text_columns: Collection[str],
    data_dir: str | None = None,
) -> datasets.Dataset:
    name, _ = _parse_split(split)
    if not isinstance(config_name, str | None):
        raise wrong_type("config_name", config_name, "a name or None")
    if not isinstance(source, str | os.PathLike):
        return _in_memory(source)
    source = expand_home(source, "the data")
    path = Path(source)
    try:
        exists = path.exists()
    except (OSError, ValueError):  # too long, or a null byte: not a path
        exists = False
    if exists and path.is_dir():
        rows = read_folder(path, name, config_name, text_columns, data_dir)
        dataset = rows if isinstance(rows, datasets.Dataset) else _from_table(rows, path)
    elif exists:
        check_single_split(path, name)
        check_no_config(path, config_name)
        dataset = _from_table(read_file(path, text_columns), path)
    else:
        dataset = _load_hub(source, name, config_name, data_dir)
    if not len(dataset):
        raise UserError(f"'{source}' holds no row (split '{name}'): expected at least one")
    return dataset


def _in_memory(source: Any) -> datasets.Dataset:
    """The dataset of rows in memory."""
    if isinstance(source, datasets.DatasetDict):
        raise UserError(f"expected one split of the dataset, such as dataset['train']; it has {', '.join(source)}")
    if isinstance(source, datasets.Dataset):
        dataset = source
    elif isinstance(source, pa.Table):
        dataset = _from_table(source, "the table")
    elif type(source).__module__.startswith("pandas"):
        try:
            dataset = _from_table(pa.Table.from_pandas(source, preserve_index=False), "the data frame")
        except (pa.ArrowException, TypeError, ValueError):
            dataset = _from_table(table_of(source.to_dict("records")), "the data frame")
    elif isinstance(source, list) and all(isinstance(row, Mapping) for row in source):
        dataset = _from_table(table_of([dict(row) for row in source]), "the list")
    else:
        raise UserError(
            f"a {type(source).__name__} is no dataset: expected a path, a hub id, a Dataset, an Arrow table, a data "
            "frame or a list of rows"
        )
    if not len(dataset):
        raise UserError("the dataset holds no row: expected at least one")
    return dataset


def _parse_split(split: str) -> tuple[str, str]:
    if not isinstance(split, str):
        raise wrong_type("split", split, "a name, such as 'train' or 'test[:500]'")
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


def _load_hub(source: str, split: str, config_name: str | None, data_dir: str | None) -> datasets.Dataset:
    is_hub_id = re.fullmatch(r"\w[\w.-]{0,95}(/[\w.-]{1,96})?", source)
    if not is_hub_id or source.lower().endswith(SUFFIXES):
        near = nearest(Path(source).name, _listing(Path(source).parent))
        where = "" if Path(source).is_absolute() else f" (looked for in '{Path.cwd()}')"
        raise UserError(f"no file or folder at '{source}'{where}{near}: expected a dataset file, a folder or a hub id")
    try:
        return datasets.load_dataset(source, config_name, data_dir=data_dir, split=split)
    except Exception as error:  # the hub client raises many classes of errors
        raise UserError(
            f"'{source}' is no local file or folder, and could not be loaded from the Hugging Face Hub "
            f"({one_line(error)}); check the name, the split '{split}', the network and your access"
        ) from error


def _listing(folder: Path) -> list[str]:
    try:
        return [entry.name for entry in folder.iterdir()]
    except (OSError, ValueError):
        return []


def _from_table(table: pa.Table, source: Path | str) -> datasets.Dataset:
    for index, column in enumerate(table.schema):
        if pa.types.is_dictionary(column.type):  # pandas' categories
            table = table.set_column(index, column.name, table.column(index).cast(column.type.value_type))
    try:
        # Else the whole table is pickled for a fingerprint, which names cached results: tables in memory have none.
        return datasets.Dataset(table.replace_schema_metadata(None), fingerprint=generate_random_fingerprint())
    except (ValueError, TypeError, KeyError, NotImplementedError, pa.ArrowException) as error:
        raise UserError(f"'{source}' has a column of a type that cannot be used ({one_line(error)})") from error


def _rename_columns(dataset: datasets.Dataset, columns: Mapping[str, str], source: str) -> datasets.Dataset:
    known = (*COLUMNS, *EXTRA_COLUMNS)
    for ours in columns:
        if ours not in known:
            raise UserError(f"unknown column key '{ours}'{nearest(ours, known)}: expected {', '.join(known)}")
    existing = list(dataset.column_names)
    wanted = {ours: columns.get(ours, ours) for ours in COLUMNS}
    if "prompt" not in columns and "prompt" not in existing:
        del wanted["prompt"]  # implicit: the common beginning of chosen and rejected
    wanted |= {EXTRA_COLUMNS[ours]: theirs for ours, theirs in columns.items() if ours in EXTRA_COLUMNS}
    for ours, theirs in wanted.items():
        if theirs not in existing:
            listed = ", ".join(f"'{name}'" for name in existing[:20])
            hint = _suggestion(existing) or f"; name the column that holds '{ours}' with `columns`"
            raise UserError(f"'{source}' has no column '{theirs}'{nearest(theirs, existing)}: found {listed}{hint}")
    if len(set(wanted.values())) < len(wanted):
        raise UserError(f"`columns` uses one column of '{source}' twice: {dict(columns)}; expected different columns")
    new_names = {theirs: ours for ours, theirs in wanted.items() if ours != theirs}
    ours_alone = {*COLUMNS, "pair_id", *EXTRA_COLUMNS.values()} - {"tools"}
    taken = {*existing, *COLUMNS, "pair_id", *EXTRA_COLUMNS.values()}
    for name in existing:
        if name in ours_alone and name not in wanted.values():
            new_names[name] = next(
                option for n in range(len(taken) + 1) if (option := f"source_{name}" + "_" * n) not in taken
            )
            taken.add(new_names[name])
    if "tools" in wanted and "tools" in existing and wanted["tools"] != "tools":
        new_names["tools"] = "source_tools"
    return dataset.rename_columns(new_names) if new_names else dataset


# Names of columns that hold the question where no column is called prompt.
_QUESTIONS = frozenset(
    (
        *("question", "questions", "question_text", "query", "queries", "instruction", "instructions", "request"),
        *("input", "inputs", "user_input", "user_prompt", "user_message", "problem", "post"),
        *("prompts", "prompt_text", "prompt_str", "context", "history"),
        *("conversation", "conversations", "messages", "dialogue", "dialog"),
    )
)


def _check_prompt_is_named(dataset: datasets.Dataset, source: str) -> None:
    """Refuse responses without a prompt column beside a column that holds their question.

    Otherwise the common first words of the responses would be the prompt. Responses that repeat the question, or that
    are whole conversations, hold their prompt themselves. A column of another name than a question's counts where the
    responses share few words.
    """
    if "prompt" in dataset.column_names:
        return
    known = {*_QUESTIONS, "prompt"}
    names = [name for name in dataset.column_names if not name.lower().startswith(("chosen", "rejected"))]
    names.sort(key=lambda name: name.lower() not in known)
    rows = [row for row in read_rows(dataset, 0, min(len(dataset), _LOOKED_AT)) if row is not None]
    for name in names:
        asked = [
            repr(row[name])
            for row in rows
            if _is_question_of(row[name], row["chosen"], row["rejected"])
            and (name.lower() in known or _is_text_beside(row[name], row["chosen"], row["rejected"]))
        ]
        # A column with few values is a label, such as a subset.
        if 2 * len(asked) > len(rows) and 10 * len(set(asked)) >= len(rows):
            listed = ", ".join(f"'{column}'" for column in dataset.column_names[:20])
            hint = _suggestion(dataset.column_names) or f"; name it with `columns`: {{prompt: {name}}}"
            raise UserError(
                f"'{source}' has no column 'prompt', but '{name}' seems to hold the question: found {listed}{hint}; "
                "leave the column out if chosen and rejected begin with their prompt"
            )


_LOOKED_AT = 100  # rows


def _is_question_of(value: Any, chosen: Any, rejected: Any) -> bool:
    """Does a value hold a question, and do two responses not repeat it?"""
    if holds_prompt(chosen) or holds_prompt(rejected):
        return False
    if isinstance(value, str):
        return bool(value.strip()) and not (value.strip() in str(chosen) and value.strip() in str(rejected))
    return isinstance(value, list | dict) and bool(value)


def _is_text_beside(value: Any, chosen: Any, rejected: Any) -> bool:
    """Is a value messages, or a text of several words, beside two responses whose common beginning is hardly a
    prompt?
    """
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        return False
    shared = chosen[: next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)]
    is_long = len(value.split()) > 1 if isinstance(value, str) else _are_messages(value)
    return is_long and len(shared.split()) < _FEWEST_WORDS


def _are_messages(value: Any) -> bool:
    try:
        return bool(read_cell(value))
    except DropRow:
        return False


_FEWEST_WORDS = 4  # of a prompt that both responses begin with
# Columns that influence which response is better, but are read only if the user maps them.
_CONTEXT = {
    "system": "map it with columns: {{system: {0}}}",
    "system_prompt": "map it with columns: {{system: {0}}}",
    "input": "map it with columns: {{input: {0}}}",
    "history": "map it with columns: {{history: {0}}}",
    **dict.fromkeys(
        ("images", "image", "audio", "audios", "video", "videos", "documents"), "models here read text only"
    ),
}
# Columns that may tell which response is better.
_LABELS = dict.fromkeys(
    (
        *("better_response_id", "safer_response_id", "preference_strength", "overall_preference", "preference"),
        *("winner", "winner_model_a", "labels", "label", "rank", "ranks"),
    ),
    "if it tells which response is better, data.pairs_from makes pairs from it",
)


def note_unread_columns(dataset: datasets.Dataset, report: DataReport) -> None:
    """Note the non-empty columns with well-known names that are not read, and their number of rows."""
    # Where pairs were made of labels or scores, the labels that are left are not the ones that the user chose.
    informative = _CONTEXT if DROP_COLUMN in dataset.column_names else {**_CONTEXT, **_LABELS}
    for name in [name for name in dataset.column_names if name in informative]:
        values = dataset.with_format("arrow").select_columns([name])
        filled = sum(_filled(batch.column(0)) for batch in values.iter(ROWS_AT_ONCE))
        if filled:
            advice = informative[name].format(name)
            report.note(f"the column '{name}' holds something and is not read; {advice}", filled)
    _note_splits(dataset, report)


def _note_splits(dataset: datasets.Dataset, report: DataReport) -> None:
    """Note the rows that a column `split` counts to another split than most."""
    for name in ("split", "source_split"):
        if name not in dataset.column_names or dataset.features[name].dtype not in ("string", "large_string"):
            continue
        counts = Counter(value for value in dataset[name] if value)
        if len(counts) < 2 or not any(value.lower() in KNOWN_SPLITS for value in counts):
            continue
        for value, number in counts.most_common()[1:]:
            report.note(
                f"the column '{name}' says '{value}', and all rows are read as one split: to keep them apart, save the "
                "rows of each split in a file of their own",
                number,
            )


def _filled(column: pa.ChunkedArray) -> int:
    """Number of values that are neither null nor an empty text or list."""
    type_ = column.type
    if pa.types.is_string(type_) or pa.types.is_large_string(type_):
        lengths = pc.utf8_length(pc.utf8_trim_whitespace(column))
    elif pa.types.is_list(type_) or pa.types.is_large_list(type_):
        lengths = pc.list_value_length(column)
    else:
        return len(column) - column.null_count
    return pc.sum(pc.greater(lengths, 0)).as_py() or 0


def require_dataset(what: str, value: object) -> datasets.Dataset:
    """Return the argument `what` if it is a dataset.

    Raises:
        UserError: it is not; the message names the argument.
    """
    if isinstance(value, datasets.DatasetDict):
        raise UserError(f"{what} is a DatasetDict: expected one of its splits, {', '.join(map(str, value))}")
    if isinstance(value, datasets.IterableDataset):
        raise UserError(f"{what} is a stream: expected a Dataset, so load it without streaming")
    if not isinstance(value, datasets.Dataset):
        raise wrong_type(what, value, "a datasets.Dataset (load_preferences reads files, lists and data frames)")
    return value


def _suggestion(columns: list[str]) -> str:
    from sepo.data.pairing import suggestion

    return suggestion(columns)


def relevant_columns(dataset: datasets.Dataset) -> datasets.Dataset:
    """Select the columns that `normalise_row` reads."""
    for name in ("chosen", "rejected"):
        if name not in dataset.column_names:
            found = ", ".join(dataset.column_names)
            hint = _suggestion(dataset.column_names)
            raise UserError(
                f"the dataset has no column '{name}'{nearest(name, dataset.column_names)}: found {found}{hint}"
            )
    return dataset.select_columns([name for name in READ_COLUMNS if name in dataset.column_names]).with_format(None)


def read_rows(dataset: datasets.Dataset, start: int, stop: int) -> list[dict[str, Any] | None]:
    """Read rows as dicts; a row with text that is not UTF-8 is None."""
    try:
        batch = dataset[start:stop]
    except UnicodeDecodeError:
        if stop - start == 1:
            return [None]
        middle = (start + stop) // 2
        return read_rows(dataset, start, middle) + read_rows(dataset, middle, stop)
    return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
