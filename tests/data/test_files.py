"""Files and folders of data as people have them: what is read, and what is named in one line."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import tempfile
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from properties import examples
from sepo import processes
from sepo.data import formats
from sepo.data.encoding import tokenize_pairs
from sepo.data.formats import read_rows
from sepo.data.loading import load_preferences, load_rows, source_fingerprint
from sepo.errors import UserError
from tiny_models import tiny_tokenizer

ROW = {"prompt": "Colour?", "chosen": "Blue.", "rejected": "Green."}
ROWS = [{name: f"{text} {number}" for name, text in ROW.items()} for number in range(3)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def write(path: Path, content: str | bytes = LINES) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def prompts(source: object, **options) -> list[str]:
    return list(load_preferences(source, **options)["prompt"])


def refused(source: object, **options) -> str:
    with pytest.raises(UserError) as caught:
        load_preferences(source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- csv ------------------------------------------------------------------------------------------------------------

# Text without the characters that no csv can hold apart (a lone surrogate), with all that have a meaning in one.
cells = st.text(st.sampled_from(list("ab \"',;\t|\n\r\0é—=")) | st.characters(codec="utf-8"), max_size=12)
tables = st.integers(2, 4).flatmap(
    lambda width: st.lists(st.lists(cells, min_size=width, max_size=width), min_size=1, max_size=6)
)


def as_csv(rows: list[list[str]], delimiter: str = ",", line_end: str = "\n", quoting: int = csv.QUOTE_MINIMAL) -> str:
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter, lineterminator=line_end, quoting=quoting).writerows(rows)
    return out.getvalue()


def names(width: int) -> list[str]:
    return ["prompt", "chosen", "rejected", "note"][:width]


@examples(400)
@given(
    rows=tables,
    delimiter=st.sampled_from(",;\t|"),
    line_end=st.sampled_from(["\n", "\r\n", "\r"]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
def test_every_cell_of_a_csv_is_read_as_it_was_written(rows, delimiter, line_end, quoting):
    header = names(len(rows[0]))
    # Python's writer leaves a lone line end of the other kind unquoted.
    text = as_csv([header], delimiter, line_end, quoting) + as_csv(rows, delimiter, line_end, csv.QUOTE_ALL)
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder) / "rows.csv", text)
        table = formats.read_file(path, header)
        values = read_rows(path)
    assert table.column_names == header
    assert [list(row.values()) for row in table.to_pylist()] == rows
    assert [list(row.values()) for row in values] == rows


@examples(600)
@given(
    rows=st.lists(st.lists(st.text(st.sampled_from(list('ab ",')), max_size=6), min_size=3, max_size=3), max_size=6),
    place=st.floats(0, 1),
    mutation=st.sampled_from(["drop", '"', ",", "\n", "x"]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
def test_a_damaged_csv_gives_every_row_of_a_strict_parser_or_one_line_that_names_the_row(
    rows, place, mutation, quoting
):
    header, text = as_csv([names(3)], quoting=quoting), as_csv([*rows, ["end"] * 3], quoting=quoting)
    at = min(int(place * len(text)), len(text) - 1)
    text = text[:at] + text[at + 1 :] if mutation == "drop" else text[:at] + mutation + text[at:]
    text = header + text
    with tempfile.TemporaryDirectory() as folder:
        path, read, message = write(Path(folder) / "rows.csv", text), None, ""
        try:
            read = [list(row.values()) for row in formats.read_file(path, names(3)).to_pylist()]
        except UserError as error:
            message = str(error)
    try:
        strict = [row for row in csv.reader(io.StringIO(text, newline=""), strict=True) if row]
    except csv.Error:
        strict = None
    if read is None:
        assert "\n" not in message
        assert "the row in line " in message
    else:
        assert read == strict[1:]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('prompt,chosen,rejected\nq1,yes 1,no 1\nq2,"yes 2,no 2\nq3,yes 3,no 3\n', 3),
        ('prompt,chosen,rejected\nq1,yes,no\nq2,"yes 2,no 2\nq3,yes 3,no 3\nq4,"yes" 4,no 4\nq5,yes 5,no 5\n', 3),
        ('prompt,chosen,rejected\nq1,"yes" she said,no\n', 2),
        ('prompt,chosen,rejected\n\nq1,"a\nb",no\nq2,yes\n', 5),
        ("prompt,chosen,rejected\nq1,yes,no,more\n", 2),
    ],
)
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_a_row_of_a_csv_that_cannot_be_read_is_named(tmp_path, text, line, suffix):
    text = text.replace(",", "\t") if suffix == ".tsv" else text
    path = write(tmp_path / f"rows{suffix}", text)
    assert f"the row in line {line}: " in refused(path)
    with pytest.raises(UserError, match=f"line {line}"):
        read_rows(path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("prompt,chosen,rejected\rq1,yes,no\rq2,yes,no\r", 2),
        ('prompt,chosen,rejected\r\n"q\0001",yes\0,no\r\n\r\n', 1),
        ('"prompt";"chosen";"rejected"\n"a;b";"yes, 1";"no"\n', 1),
        ("\ufeffsep=;\nprompt;chosen;rejected\nq;yes;no\n", 1),
        ("sep=\t\r\nprompt\tchosen\trejected\r\nq\tyes\tno\r\n", 1),
        ("prompt;chosen;rejected;a, b\nq, r;yes, 1;no;c\nq;yes;no;d, e, f\n", 2),
        ("prompt|chosen|rejected\nq, r|yes, 1|no\n", 1),
    ],
)
def test_csv_of_other_programs_is_read(tmp_path, text, expected):
    assert len(prompts(write(tmp_path / "rows.csv", text))) == expected


def test_a_cell_that_may_hold_rows_is_named(tmp_path, capfd):
    text = 'prompt,chosen,rejected\nq1,yes 1,no 1\nq2,"yes 2,no 2\nq3,yes 3",no 3\n'
    assert len(prompts(write(tmp_path / "rows.csv", text))) == 2
    assert "the row in line 3 has a cell of several lines that look like rows" in capfd.readouterr().err
    assert len(prompts(write(tmp_path / "fine.csv", 'prompt,chosen,rejected\n"q\n1","yes,\n\nyes",no\n'))) == 1
    assert capfd.readouterr().err == ""


# --- other kinds of files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rows.ndjson", "rows.jsonlines", "rows.NDJSON"])
def test_json_lines_are_read_under_all_their_names(tmp_path, name):
    path = write(tmp_path / "data" / name)
    assert prompts(path) == prompts(path.parent) == [row["prompt"] for row in ROWS]


def test_a_file_url_is_a_path(tmp_path):
    path = write(tmp_path / "my data" / "rows.jsonl")
    assert prompts(path.as_uri()) == prompts(path)
    assert source_fingerprint(path.as_uri()) == source_fingerprint(path)


COLUMNS = {name: [row[name] for row in ROWS] for name in ROW}


@pytest.mark.parametrize(
    "value",
    [
        COLUMNS,
        {name: dict(enumerate(column)) for name, column in COLUMNS.items()},
        dict(enumerate(ROWS)),
        {"columns": list(ROW), "index": [0, 1, 2], "data": [list(row.values()) for row in ROWS]},
        {name: [[{"role": "user", "content": text}] for text in column] for name, column in COLUMNS.items()},
    ],
)
@pytest.mark.parametrize("indent", [None, 1])
def test_json_by_columns_is_named(tmp_path, value, indent):
    assert "columns and not rows" in refused(write(tmp_path / "rows.json", json.dumps(value, indent=indent)))


def test_one_row_of_lists_is_a_row(tmp_path):
    said = lambda text: [{"role": "assistant", "content": text}]  # noqa: E731
    row = {"prompt": [{"role": "user", "content": "q"}], "chosen": said("a"), "rejected": said("b")}
    assert len(load_preferences(write(tmp_path / "row.json", json.dumps(row)))) == 1
    assert len(load_preferences(write(tmp_path / "row.jsonl", json.dumps(row)))) == 1


def binary(value: object) -> object:
    if isinstance(value, dict):
        return {name: text.encode() for name, text in value.items()}
    return [binary(item) for item in value] if isinstance(value, list) else value.encode()


@pytest.mark.parametrize("as_messages", [False, True])
def test_texts_that_a_parquet_file_holds_as_bytes_are_read(tmp_path, as_messages):
    def said(role: str, text: str):
        return [{"role": role, "content": text}] if as_messages else text

    row = {"prompt": said("user", "Größe?"), "chosen": said("assistant", "Blue."), "rejected": said("assistant", "no")}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "text.parquet")
    pq.write_table(pa.Table.from_pylist([{name: binary(v) for name, v in row.items()}]), tmp_path / "bytes.parquet")
    both = [tokenize_pairs(load_preferences(tmp_path / f"{kind}.parquet"), tiny_tokenizer(), progress=False)[0]
            for kind in ("text", "bytes")]  # fmt: skip
    assert both[0].to_pylist() == both[1].to_pylist()


def test_bytes_that_are_no_text_cost_one_row_and_other_columns_stay_bytes(tmp_path):
    rows = [{**binary(row), "image": b"\xff\xd8"} for row in ROWS]
    rows[1]["chosen"] = b"\xff\xfe\xff"
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    loaded = load_preferences(tmp_path / "a.parquet")
    assert loaded.features["image"].dtype == "binary"
    table, report = tokenize_pairs(loaded, tiny_tokenizer(), progress=False)
    assert (len(table), report.dropped) == (2, {"invalid Unicode": 1})


PAGES = [b"<!DOCTYPE html><html>", b"\n<html lang=en>", b"\xef\xbb\xbf<HTML>", b'<?xml version="1.0"?><Error>']


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".json", ".parquet", ".arrow", ".tsv", ".jsonl.gz"])
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        *[(page, "a web page") for page in PAGES],
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS"),
        (b"/annex/objects/SHA256E-s1--0\n", "git-annex"),
        (b"PK\x03\x04\x14\x00", "zip archive"),
    ],
)
def test_a_file_that_is_something_else_is_named_for_what_it_is(tmp_path, suffix, content, expected):
    assert expected in refused(write(tmp_path / f"rows{suffix}", content))


def test_a_parquet_file_under_another_name_is_named(tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.jsonl")
    assert "is a parquet file" in refused(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252"])
@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".json"])
def test_text_in_another_encoding_is_named_with_its_line(tmp_path, encoding, suffix):
    rows = [*ROWS, {**ROW, "chosen": "Größe"}]
    text = as_csv([list(ROW), *[list(row.values()) for row in rows]])
    if suffix != ".csv":
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    text = text if suffix != ".json" else "[\n" + text.replace("\n", ",\n") + "]"
    message = refused(write(tmp_path / f"rows{suffix}", text.encode(encoding)))
    assert "is not UTF-8" in message
    assert f"line {4 if suffix == '.jsonl' else 5}" in message
    assert "Latin-1" in message


def table_or_message(path: Path) -> pa.Table | str:
    try:
        return formats.read_file(path)
    except UserError as error:
        return str(error)


@examples(100)
@example(rows=[{"a": [0], "b": [0]}], at_once=1)
@given(
    rows=st.lists(
        st.dictionaries(
            st.sampled_from("abc"),
            st.none() | st.booleans() | st.integers(-5, 5) | st.floats(0, 1) | st.text(max_size=2)
            | st.lists(st.integers(0, 2), max_size=2) | st.just({"x": 1}) | st.just({"json": "{}"}),
            max_size=3,
        ),
        min_size=1, max_size=12,
    ),
    at_once=st.integers(1, 5),
)  # fmt: skip
def test_json_lines_read_in_parts_are_the_table_of_the_whole(rows, at_once):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        path = write(Path(folder) / "rows.jsonl", "\n".join(map(json.dumps, rows)))
        whole = table_or_message(path)
        patch.setattr(formats, "_LINES_AT_ONCE", at_once)
        assert table_or_message(path) == whole


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_a_compressed_file_that_ends_early_is_refused_wherever_it_ends(tmp_path, suffix):
    text = "\n".join(json.dumps(row) for row in ROWS).encode()
    pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}[suffix]
    whole = pack(text)
    path = tmp_path / f"rows.jsonl{suffix}"
    path.write_bytes(whole)
    assert formats.read_file(path).num_rows == len(ROWS)
    for size in range(1, len(whole)):
        path.write_bytes(whole[:size])
        assert "\n" not in refused(path), size


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


# --- folders --------------------------------------------------------------------------------------------------------


def many(start: int, number: int) -> list[dict]:
    return [{name: f"{text} {n}" for name, text in ROW.items()} for n in range(start, start + number)]


def lines(start: int, number: int) -> str:
    return "".join(json.dumps(row) + "\n" for row in many(start, number))


def mapped(dataset: datasets.Dataset, folder: Path) -> None:
    """What later calls leave beside the shards: a cache of rows, indices, and one under a name of the user's."""
    dataset = datasets.load_from_disk(str(folder))
    dataset.map(lambda row: {"n": 1}, load_from_cache_file=False)
    dataset.shuffle(seed=1)
    dataset.map(lambda row: {"m": 1}, cache_file_name=str(folder / "mine.arrow"))
    (folder / "mine.arrow.lock").touch()


@pytest.mark.parametrize("place", ["data/train", "train", "."])
def test_caches_beside_a_saved_dataset_are_no_data(tmp_path, place):
    rows = datasets.Dataset.from_list(many(0, 6))
    rows.save_to_disk(tmp_path / place)
    mapped(rows, tmp_path / place)
    if place != ".":
        datasets.Dataset.from_list(many(50, 2)).save_to_disk(tmp_path / place / ".." / "test")
    assert len(list((tmp_path / place).glob("*.arrow"))) > 2
    assert prompts(tmp_path) == [row["prompt"] for row in many(0, 6)]


def test_the_cache_of_a_dataset_without_its_listing_is_no_data(tmp_path):
    datasets.Dataset.from_list(many(0, 3)).save_to_disk(tmp_path / "saved")
    shard = next((tmp_path / "saved").glob("data-*.arrow")).read_bytes()
    write(tmp_path / "cache" / "json-train.arrow", shard)
    write(tmp_path / "cache" / "cache-0123456789abcdef.arrow", shard)
    write(tmp_path / "cache" / "cache-0123456789abcdef_00000_of_00002.arrow", shard)
    write(tmp_path / "cache" / "dataset_info.json", "{}")
    assert len(prompts(tmp_path / "cache")) == 3


CARD = "---\nlicense: mit\nconfigs:\n{}---\n# A dataset\n"
EN_FR = CARD.format(
    "- config_name: en\n  data_files: en/train.jsonl\n"
    "- config_name: fr\n  data_files:\n  - split: train\n    path: fr/tr*.jsonl\n"
    "  - split: test\n    path: fr/more/**\n"
)


@pytest.fixture
def clone(tmp_path) -> Path:
    write(tmp_path / "README.md", EN_FR)
    write(tmp_path / "en" / "train.jsonl", lines(0, 2))
    write(tmp_path / "fr" / "train.jsonl", lines(10, 3))
    write(tmp_path / "fr" / "old.jsonl", lines(20, 5))
    write(tmp_path / "fr" / "more" / "x.jsonl", lines(30, 1))
    return tmp_path


def test_a_clone_with_several_configurations_needs_one_and_reads_its_files_alone(clone):
    assert "set config_name to one of en, fr" in refused(clone)
    assert len(prompts(clone, config_name="en")) == 2
    assert len(prompts(clone, config_name="fr")) == 3
    assert prompts(clone, config_name="fr", split="test") == ["Colour? 30"]
    assert "unknown split 'dev'" in refused(clone, config_name="fr", split="dev")
    assert "did you mean 'en'" in refused(clone, config_name="enn")


@pytest.mark.parametrize(
    ("configs", "expected"),
    [
        ("- config_name: a\n  data_files: en/*.jsonl\n- config_name: b\n  data_files: fr/*\n  default: true\n", 8),
        ("- config_name: default\n  data_files: [en/train.jsonl]\n- config_name: b\n  data_files: fr/*\n", 2),
        ("- config_name: only\n  data_files: {train: [en/*, fr/train.jsonl], test: fr/old.jsonl}\n", 5),
        ("- config_name: only\n  data_dir: en\n", 2),
        ("- config_name: only\n  data_files: [en/*.jsonl, en/train.jsonl]\n", 2),
        ("- config_name: only\n  data_dir: fr\n  data_files: train.jsonl\n", 3),
        ("- config_name: only\n  data_files:\n  - split: train\n    path: [en/train.jsonl, fr/train.jsonl]\n", 5),
    ],
)
def test_the_configuration_that_a_clone_names_as_its_default_is_read(clone, configs, expected):
    for mark in ("", "\ufeff"):
        write(clone / "README.md", mark + CARD.format(configs))
        assert len(prompts(clone)) == expected


@pytest.mark.parametrize("path", ["../other.jsonl", "/etc/passwd", "hf://datasets/a/b.jsonl", "none/*.jsonl"])
def test_files_of_a_configuration_that_are_not_in_the_clone_are_named(clone, path):
    write(clone / "README.md", CARD.format(f"- config_name: only\n  data_files: {path}\n"))
    assert path in refused(clone)


@pytest.mark.parametrize("head", ["no head", "---\nconfigs: 5\n---\n", "---\n: [\n---\n", "---\nlicense: mit\n---\n"])
def test_other_readmes_change_nothing(tmp_path, head):
    write(tmp_path / "README.md", head)
    write(tmp_path / "train.jsonl")
    assert len(prompts(tmp_path)) == 3


@pytest.mark.parametrize("copy", ["train (1).jsonl", "train - Copy.jsonl", "train copy 2.jsonl", "Copy of train.jsonl",
                                  "train (1).csv"])  # fmt: skip
def test_a_second_copy_beside_a_file_is_refused_even_if_it_is_older(tmp_path, copy):
    write(tmp_path / "train.jsonl", lines(0, 3))
    text = as_csv([list(ROW), *[list(row.values()) for row in many(0, 2)]]) if copy.endswith("csv") else lines(0, 2)
    write(tmp_path / copy, text)
    assert "its copy" in refused(tmp_path)


def test_the_same_bytes_under_two_names_are_refused(tmp_path):
    write(tmp_path / "train" / "a.jsonl")
    write(tmp_path / "train" / "b.jsonl")
    assert "the same bytes" in refused(tmp_path)


def test_numbered_parts_are_no_copies(tmp_path):
    write(tmp_path / "train (1).jsonl", lines(0, 2))
    write(tmp_path / "train (2).jsonl", lines(2, 3))
    assert len(prompts(tmp_path)) == 5


def test_revisions_in_folders_are_not_added_up(tmp_path):
    first, second = "a" * 40, "b" * 40
    for number, name in enumerate((first, second)):
        write(tmp_path / "hub" / "snapshots" / name / "train.jsonl", lines(number, 2 + number))
    (tmp_path / "hub" / "blobs").mkdir()
    assert "several revisions" in refused(tmp_path / "hub")
    assert "several revisions" in refused(tmp_path / "hub" / "snapshots")
    write(tmp_path / "hub" / "refs" / "main", second)
    assert len(prompts(tmp_path / "hub")) == 3
    for name in ("v1", "v2.0"):
        write(tmp_path / "data" / name / "train.jsonl", lines(0, 1) + lines(len(name), 2))
    assert "several revisions (v1, v2.0)" in refused(tmp_path / "data")


def test_folders_that_are_read_as_one_dataset_and_files_that_are_passed_over_are_named(tmp_path, capfd):
    for number, name in enumerate(("harmless", "helpful")):
        write(tmp_path / name / "train.jsonl", lines(number * 10, 2))
    write(tmp_path / "train.zip", b"PK")
    write(tmp_path / "checkpoint-50" / "log.jsonl", "{}")
    assert len(prompts(tmp_path)) == 4
    said = capfd.readouterr().err
    assert "harmless, helpful are read as one dataset (split 'train')" in said
    assert "not read as data" in said
    assert "checkpoint-50/log.jsonl, train.zip" in said


@pytest.mark.parametrize("text", ['{"pairs": 3, "mean_length": 7}', '[{"split": "train"}, {"split": "test"}]'])
def test_a_file_without_a_column_of_the_others_is_no_data_and_is_named(tmp_path, capfd, text):
    write(tmp_path / "pairs.jsonl", lines(0, 3))
    write(tmp_path / "more.jsonl", lines(10, 2))
    write(tmp_path / "numbers.json", text)
    write(tmp_path / "empty.jsonl", "")
    assert len(prompts(tmp_path)) == 5
    said = capfd.readouterr().err
    assert said.count("numbers.json") == 1
    assert "empty" not in said


def test_parts_of_a_table_by_key_need_no_word(tmp_path, capfd):
    for year in (2023, 2024):
        write(tmp_path / f"year={year}" / "part-0.jsonl", lines(year, 2))
    assert len(prompts(tmp_path)) == 4
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", [".cache/a.jsonl", "_temporary/a.jsonl", "checkpoints/a.jsonl", "checkpoint-9/x.json",
                                  "__pycache__/a.json", "tokenizer.json", "trainer_state.json", ".a.jsonl.lock",
                                  "a.jsonl.lock", "__MACOSX/._a.jsonl"])  # fmt: skip
def test_files_of_other_programs_are_no_data(tmp_path, name):
    write(tmp_path / "train.jsonl")
    write(tmp_path / name, json.dumps({**ROW, "prompt": "never"}))
    assert "never" not in prompts(tmp_path)


def test_a_delta_table_is_refused(tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "part-0.parquet")
    write(tmp_path / "_delta_log" / "0.json", "{}")
    assert "Delta" in refused(tmp_path)


# --- columns that are not read --------------------------------------------------------------------------------------


def notes(loaded: datasets.Dataset) -> list[str]:
    return list(tokenize_pairs(loaded, tiny_tokenizer(), as_chat=True, progress=False)[1].notes)


LABELLED = {
    "distilabel-orca": {"system": "", "input": "Q one", "chosen": "Yes", "rejected": "No", "status": "unchanged"},
    "shp": {"history": "Q one", "human_ref_A": "Yes", "human_ref_B": "No", "labels": 1},
    "arena-55k": {"prompt": '["Q one"]', "response_a": '["Yes"]', "response_b": '["No"]', "winner_model_a": 1,
                  "winner_model_b": 0},
    "pku-saferlhf": {"prompt": "Q one", "response_0": "Yes", "response_1": "No", "better_response_id": 0,
                     "safer_response_id": 1},
    "helpsteer2-preference": {"prompt": "Q one", "response_1": "Yes", "response_2": "No", "preference_strength": -2},
    "helpsteer3": {"context": [{"role": "user", "content": "Q one"}], "response1": "Yes", "response2": "No",
                   "overall_preference": -2},
    "arena": {"winner": "model_a", **{f"conversation_{side}": [{"role": "user", "content": "Q one"},
              {"role": "assistant", "content": text}] for side, text in (("a", "Yes"), ("b", "No"))}},
    "unpaired": [{"prompt": "Q one", "completion": "Yes", "label": True},
                 {"prompt": "Q one", "completion": "No", "label": False}],
}  # fmt: skip


@pytest.mark.parametrize("preset", LABELLED)
def test_a_preset_leaves_no_advice_to_map_what_it_reads(preset):
    rows = LABELLED[preset]
    loaded = load_preferences(rows if isinstance(rows, list) else [rows], pairs_from=preset)
    table, report = tokenize_pairs(loaded, tiny_tokenizer(), as_chat=True, progress=False)
    assert len(table) == 1
    assert report.notes == {}
    assert tiny_tokenizer().decode(table["prompt_ids"][0].as_py()).count("Q one") <= 1


def test_context_that_a_preset_does_not_read_is_still_named():
    rows = [{**LABELLED["pku-saferlhf"], "system": "Be brief.", "images": ["x"]}]
    assert len(notes(load_preferences(rows, pairs_from="pku-saferlhf"))) == 2
    assert any("winner" in note for note in notes(load_preferences([{**ROW, "winner": "a"}])))


def test_a_column_that_counts_rows_to_another_split_is_named(tmp_path):
    row = LABELLED["helpsteer2-preference"]
    rows = [{**row, "prompt": f"Q {n}", "split": "validation" if n == 3 else "train"} for n in range(4)]
    write(tmp_path / "preference" / "preference.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write(tmp_path / "train.jsonl", json.dumps({"prompt": "Q", "response": "x", "helpfulness": 1}))
    loaded = load_preferences(tmp_path, pairs_from="helpsteer2-preference")
    _, report = tokenize_pairs(loaded, tiny_tokenizer(), as_chat=True, progress=False)
    assert [(number, "says 'validation'" in note) for note, number in report.notes.items()] == [(1, True)]
    assert notes(load_preferences([{**ROW, "split": "a"}, {**ROW, "prompt": "x", "split": "a"}])) == []


def test_rows_of_a_folder_with_any_columns_are_found_alike(clone):
    assert len(load_rows(clone, config_name="fr")) == 3


def test_missing_shards_are_counted_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(processes, "_logged", set())
    for number in (0, 2):
        (tmp_path / f"train-{number:05d}-of-00004.jsonl").write_text(json.dumps(ROW | {"prompt": f"q{number}"}) + "\n")
    assert len(load_preferences(str(tmp_path))) == 2
    assert f"'{tmp_path}' holds 2 of 4 shards of train-*-of-00004.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view(), pa.binary(1)])
def test_bytes_of_every_arrow_type_are_read_as_text(tmp_path, kind):
    columns = {"prompt": [b"p", b"q"], "chosen": [b"y", b"z"], "rejected": [b"n", b"m"]}
    pq.write_table(pa.table({name: pa.array(values, kind) for name, values in columns.items()}), tmp_path / "a.parquet")
    assert [row["chosen"] for row in load_preferences(tmp_path / "a.parquet")] == ["y", "z"]
