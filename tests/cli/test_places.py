"""Where a command reads and writes: places that cannot be written to, that are in use, or that hold something else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from report_fixtures import score_table, word_tokenizer
from sepo import processes
from sepo.cli import main
from sepo.data.tables import read_table, write_table
from sepo.errors import UserError
from sepo.files import check_writable
from tiny_models import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a score table, a model, preference data in many forms, and a recipe and a grid without models."""
    folder = tmp_path_factory.mktemp("place")
    write_table(folder / "scores", score_table(word_tokenizer()))
    write_table(folder / "run" / "scores", score_table(word_tokenizer()))
    (folder / "run" / "manifest.json").write_text("{}")
    tiny_model("llama").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 3
    for name in ("few.jsonl", "data/train.jsonl"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "few.csv").write_text("prompt,chosen,rejected\na,b,c\n")
    (folder / "parts").mkdir()
    for name in ("few.parquet", "parts/part-00000.parquet"):
        pq.write_table(pa.Table.from_pylist(rows), folder / name)
    pq.write_table(pa.table({"text": ["a"]}), folder / "texts.parquet")
    (folder / "thesis.docx").write_bytes(b"PK\x03\x04 years of work")
    (folder / "empty").mkdir()
    settings = {"reference": {"model": "nowhere/model"}, "data": {"source": "nowhere.jsonl"}}
    (folder / "recipe.yaml").write_text(json.dumps(settings))
    (folder / "grid.yaml").write_text(json.dumps({"set": settings, "variants": {"a": {}}}))
    return folder


def refused(capsys, *words: str) -> str:
    """Give a command that must be refused; returns its one line."""
    capsys.readouterr()
    assert main(words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert "delete it" not in line
    return line


# --- outputs --------------------------------------------------------------------------------------------------------

MODEL = ["--reference", "nowhere/model", "--data", "nowhere.jsonl"]
WRITING = {
    "oracle": ["oracle", *MODEL],
    "score": ["score", "--oracle", "nowhere/model", *MODEL],
    "select": ["select", "--table", "nowhere"],
    "train": ["train", "--policy", "nowhere/model", "--selection", "nowhere"],
    "eval": ["eval", "--policy", "nowhere/model", "--base", "nowhere/model", "--data", "nowhere.jsonl"],
    "transfer": ["transfer", "--table", "nowhere", "--data", "nowhere.jsonl", "--tokenizer", "nowhere/model"],
    "analyse": ["analyse", "--table", "nowhere"],
    "report": ["report", "--table", "nowhere"],
}


def bad_places(folder: Path) -> list[str]:
    """Places in which nothing can be made, also by root."""
    (folder / "file").write_text("mine")
    places = [str(folder / "file" / "out"), str(folder / "file" / "a" / "b")]
    places += ["/proc/sepo/out"] if Path("/proc/self").is_dir() else []
    if os.getuid():
        (folder / "closed").mkdir(mode=0o500)
        places.append(str(folder / "closed" / "out"))
    return places


@pytest.mark.parametrize("command", WRITING)
def test_a_place_that_cannot_be_written_to_is_bad_input_before_anything_is_read(command, tmp_path, capsys):
    for out in bad_places(tmp_path):
        line = refused(capsys, *WRITING[command], "--out", out)
        assert "cannot write to" in line
        assert "nowhere" not in line


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
@pytest.mark.parametrize(
    ("command", "setting"), [("run", "output_dir"), ("compare", "output_dir"), ("compare", "work_dir")]
)
@pytest.mark.daily(3)
def test_so_is_a_run_folder(command, setting, dry, place, tmp_path, capsys):
    for out in bad_places(tmp_path):
        if command == "run":
            words = ["run", str(place / "recipe.yaml"), f"output_dir={out}"]
        else:
            grid = json.loads((place / "grid.yaml").read_text()) | {"output_dir": str(tmp_path / "out"), setting: out}
            (tmp_path / "grid.yaml").write_text(json.dumps(grid))
            words = ["compare", str(tmp_path / "grid.yaml")]
        line = refused(capsys, *words, *dry)
        assert "cannot write to" in line
        assert "set output_dir" in line


def test_a_report_is_a_file_and_figures_go_into_a_folder(place, tmp_path, capsys):
    table = ["report", "--table", str(place / "scores")]
    assert "is a folder: --out names the HTML file" in refused(capsys, *table, "--out", str(tmp_path))
    assert "the report is an HTML file" in refused(capsys, *table, "--out", str(tmp_path / "report.pdf"))
    bad = bad_places(tmp_path)[0]
    out = tmp_path / "report.html"
    assert "cannot write to" in refused(capsys, *table, "--out", str(out), "--figures", bad)
    assert not out.exists()


def test_looking_whether_a_place_can_be_written_to_leaves_nothing_there(tmp_path):
    check_writable(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_no_bad_input(tmp_path, monkeypatch):
    def full(**options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.raises(OSError, match="No space left"):
        check_writable(tmp_path)


@pytest.mark.parametrize("command", sorted(WRITING.keys() - {"analyse", "report"}))  # those write single files
def test_a_second_command_into_the_same_folder_is_refused(command, tmp_path, capsys):
    out = tmp_path / "out"
    with processes.alone_in(out):
        line = refused(capsys, *WRITING[command], "--out", str(out))
    assert line == f"sepo: '{out}' is in use by another process: wait for it, or choose another --out"


def test_a_command_in_another_process_is_noticed(place, tmp_path, capsys):
    out = tmp_path / "out"
    code = (
        "import sys; from pathlib import Path; from sepo.processes import alone_in\n"
        "with alone_in(Path(sys.argv[1])): print('in', flush=True); sys.stdin.readline()"
    )
    source = str(Path(processes.__file__).parents[1])
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    select = ["select", "--table", str(place / "scores"), "--out", str(out)]
    with subprocess.Popen(
        [sys.executable, "-c", code, str(out)], env={**os.environ, "PYTHONPATH": source}, **pipes
    ) as other:
        assert other.stdout.readline() == "in\n"
        assert "in use by another process" in refused(capsys, *select)
        other.communicate("\n")
    assert main(select) == 0
    assert main(select) == 0  # a lock that is left behind keeps nobody out


@pytest.mark.parametrize("command", sorted(WRITING))
def test_a_refused_command_leaves_no_folder_behind(command, tmp_path, capsys):
    refused(capsys, *WRITING[command], "--out", str(tmp_path / "new" / "out"))
    assert not (tmp_path / "new" / "out").exists()


@pytest.mark.parametrize("command", ["oracle", "train"])
def test_a_folder_of_other_things_is_refused_and_left_as_it_is(command, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert "is not a model folder" in refused(capsys, *WRITING[command], "--out", str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("command", ["score", "select", "transfer"])
def test_tables_from_elsewhere_are_refused_and_left_as_they_are(command, place, tmp_path, capsys):
    """Spark, for one, names its parts as shards are named here."""
    shutil.copytree(place / "parts", tmp_path / "mine")
    before = (tmp_path / "mine" / "part-00000.parquet").read_bytes()
    line = refused(capsys, *WRITING[command], "--out", str(tmp_path / "mine"))
    assert (
        line == f"sepo: '{tmp_path / 'mine'}' holds part-00000.parquet, which sepo did not write: choose a new folder"
    )
    with pytest.raises(UserError, match="which sepo did not write"):
        write_table(tmp_path / "mine", read_table(place / "scores", "scores"))
    assert (tmp_path / "mine" / "part-00000.parquet").read_bytes() == before


@pytest.mark.parametrize("command", ["oracle", "train"])
def test_a_model_from_elsewhere_is_refused_and_left_as_it_is(command, place, tmp_path, capsys):
    shutil.copytree(place / "model", tmp_path / "mine")
    # Transformers' Trainer leaves a file of the name of our record.
    (tmp_path / "mine" / "trainer_state.json").write_text('{"log_history": []}')
    before = {path.name: path.read_bytes() for path in (tmp_path / "mine").iterdir()}
    assert "holds a model that was not trained here" in refused(
        capsys, *WRITING[command], "--out", str(tmp_path / "mine")
    )
    assert {path.name: path.read_bytes() for path in (tmp_path / "mine").iterdir()} == before


# --- inputs ---------------------------------------------------------------------------------------------------------

# What somebody may give for a table, and what they are told.
NO_TABLES = {
    "few.jsonl": "it is probably preference data, which go to --data",
    "few.csv": "it is probably preference data, which go to --data",
    "few.parquet": "its columns (prompt, chosen, rejected) are those of preference data, which go to --data",
    "parts": "its columns (prompt, chosen, rejected) are those of preference data, which go to --data",
    "data": "it holds train.jsonl, probably preference data, which go to --data",
    "texts.parquet": "it has no column 'pair_id', only text",
    "model": "it is a model",
    "thesis.docx": "it is not a readable parquet file",
    "empty": "it holds no part-*.parquet file",
    "run": "the table is in '{}/run/scores'",
}
READING = {
    "select --table": (["select", "--out", "{1}"], "scores", "`sepo score`"),
    "report --table": (["report", "--out", "{1}/r.html"], "scores", "`sepo score`"),
    "analyse --table": (["analyse", "--out", "{1}"], "scores", "`sepo score`"),
    "train --selection": (["train", "--policy", "{0}/model", "--out", "{1}"], "selection", "`sepo select`"),
    "analyse --reference-logps": (["analyse", "--table", "{0}/scores", "--out", "{1}"], "logps", "`sepo score` or"),
}


@pytest.mark.parametrize("given", NO_TABLES)
@pytest.mark.parametrize("option", READING)
@pytest.mark.daily(16)
def test_what_is_no_table_is_named_for_what_it_is(option, given, place, tmp_path, capsys):
    words, kind, writer = READING[option]
    words = [word.format(place, tmp_path / "out") for word in words]
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    line = refused(capsys, *words, option.split()[1], str(place / given))
    assert line.startswith(f"sepo: '{place / given}")
    assert f" is no {kind} table: " in line
    assert NO_TABLES[given].format(place) in line
    assert f"expected a folder of part-*.parquet that {writer}" in line
    assert {path: path.stat().st_mtime_ns for path in place.rglob("*")} == before


def test_a_table_of_another_kind_is_named(place, tmp_path, capsys):
    words = ["train", "--policy", str(place / "model"), "--out", str(tmp_path / "out"), "--selection"]
    assert "is no selection table: it is a scores table; expected" in refused(capsys, *words, str(place / "scores"))


def test_a_damaged_shard_is_to_be_made_again_and_never_to_be_deleted(place, tmp_path, capsys):
    write_table(tmp_path / "scores", read_table(place / "scores", "scores"))
    path = tmp_path / "scores" / "part-00000.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    line = refused(capsys, "select", "--table", str(tmp_path / "scores"), "--out", str(tmp_path / "out"))
    assert line.endswith("run the stage that wrote it again")
    with pytest.raises(UserError, match="not a readable parquet file"):
        read_table(tmp_path / "scores", "scores")
