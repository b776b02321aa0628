"""What a command imports, how threads wait, and how a process ends: each in an interpreter of its own."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch

from report_fixtures import score_table, word_tokenizer
from sepo.cli import main
from sepo.data.loading import load_preferences
from sepo.data.tables import read_table, write_table

SOURCE = Path(__file__).parents[2] / "src"
HEAVY = ("torch", "transformers", "peft", "accelerate", "datasets", "trl")


def python(code: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    """Run a few lines of Python in a fresh interpreter with the given variables set, or unset where they are empty."""
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), **variables}
    environment = {name: value for name, value in environment.items() if value != ""}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False, env=environment
    )


@pytest.fixture(scope="module")
def tables(tmp_path_factory) -> Path:
    """A folder with two score tables of the same pairs."""
    folder = tmp_path_factory.mktemp("tables")
    tokenizer = word_tokenizer()
    for name in ("scores", "other"):
        write_table(folder / name, score_table(tokenizer), rows_per_shard=4)
    return folder


# --- imports --------------------------------------------------------------------------------------------------------

IMPORTED = f"""
import sys
from sepo.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as stop:
    code = stop.code
print("imported:", *(name for name in {HEAVY} if name in sys.modules), file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.parametrize(
    "command",
    [
        "--help",
        "--version",
        "run --help",
        "recipe",
        "recipe --list",
        "recipe --schema",
        "recipe quickstart",
        "run nowhere.yaml",
        "run quickstart oracle.betta=1",
        "select --table {0}/scores --out {1}/selection",
        "select --table {0}/scores --out {1}/selection rule_chosen=dataset rule_rejected=random credit=soft",
        "select --table {0}/scores --table {0}/other --combine min --out {1}/selection",
        "select --table {0}/nowhere --out {1}/selection",
        "winrate {0}/nowhere.json",
        "report --table {0}/scores --out {1}/report.html --figures {1}/figures",
    ],
)
@pytest.mark.daily(4)
def test_what_needs_no_model_imports_no_library_of_models(command, tables, tmp_path):
    done = python(IMPORTED, *command.format(tables, tmp_path).split())
    assert done.returncode == (2 if "nowhere" in command or "betta" in command else 0), done.stderr
    assert done.stderr.splitlines()[-1].split() == ["imported:"]


# --- the end of the process -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_interpreter_that_read_or_wrote_a_table_ends_well(tables, tmp_path, nightly_run):
    turns = 40 if nightly_run else 4  # the abort that it looks for came 1 to 3 times in 100
    code = (
        "import sys; from sepo.data.tables import read_table, write_table\n"
        "write_table(sys.argv[2], read_table(sys.argv[1], 'scores'))"
    )
    ends = [python(code, str(tables / "scores"), str(tmp_path / str(turn))).returncode for turn in range(turns)]
    assert ends == [0] * turns


def test_arrow_is_never_given_a_file_of_python(tables, tmp_path, monkeypatch):
    """Its threads may still hold one when the interpreter ends, which aborts the process now and then."""
    seen: dict[str, list[bool]] = {}

    def watched(function):
        def call(*arguments, **keywords):
            for value in (*arguments, *keywords.values()):
                if isinstance(value, io.IOBase | pa.NativeFile):
                    native = isinstance(value, pa.NativeFile) and not isinstance(value, pa.PythonFile)
                    seen.setdefault(function.__name__, []).append(native)
            return function(*arguments, **keywords)

        return call

    for name in ("read_table", "read_schema", "read_metadata", "write_table"):
        monkeypatch.setattr(pq, name, watched(getattr(pq, name)))
    for name in ("open_file", "open_stream", "new_file", "new_stream"):
        monkeypatch.setattr(pa.ipc, name, watched(getattr(pa.ipc, name)))
    monkeypatch.setattr(pa.csv, "read_csv", watched(pa.csv.read_csv))
    assert main(["select", "--table", str(tables / "scores"), "--out", str(tmp_path / "selection")]) == 0
    assert main(["report", "--table", str(tables / "scores"), "--out", str(tmp_path / "report.html")]) == 0
    assert len(read_table(tmp_path / "selection", "selection")) == 6
    rows = pa.table({"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]})
    pq.write_table(rows, pa.OSFile(os.fsencode(tmp_path / "rows.parquet"), "wb"))
    (tmp_path / "rows.csv").write_text("prompt,chosen,rejected\na,b,c\n")
    with pa.OSFile(os.fsencode(tmp_path / "rows.arrow"), "wb") as file, pa.ipc.new_file(file, rows.schema) as writer:
        writer.write_table(rows)
    for name in ("rows.parquet", "rows.csv", "rows.arrow"):
        assert load_preferences(tmp_path / name)["chosen"][:] == ["b"]
    assert seen.keys() >= {"read_table", "write_table", "read_schema", "read_csv", "open_file"}
    assert all(map(all, seen.values())), seen


# --- threads --------------------------------------------------------------------------------------------------------

UNSET = {"OMP_WAIT_POLICY": "", "GOMP_SPINCOUNT": "", "KMP_BLOCKTIME": ""}


def spins(code: str, **variables: str) -> int:
    """How often the threads of PyTorch's OpenMP library look for work before they sleep, as it says when it starts."""
    lines = python(code, **{"OMP_DISPLAY_ENV": "VERBOSE", **UNSET, **variables}).stderr.splitlines()
    found = [line.split("=")[1].strip(" '") for line in lines if "GOMP_SPINCOUNT" in line]
    if not found:
        pytest.skip("PyTorch's OpenMP library is not GNU's")
    return int(found[0])


# The library alone reads its settings when it is loaded, as with PyTorch, whose import takes seconds.
OPENMP = next((Path(torch.__file__).parent / "lib").glob("libgomp*"), None)
LOAD = f"import ctypes; ctypes.CDLL({str(OPENMP)!r})"


@pytest.mark.slow
@pytest.mark.parametrize(
    "code",
    [
        pytest.param(f"import sepo; {LOAD}", id="sepo, then the library"),
        "from sepo.training.objectives import sepo",
        pytest.param("import sepo, torch", marks=pytest.mark.nightly),
        pytest.param(
            "from sepo.cli import main; main(['oracle', '--reference', 'x', '--data', 'x.csv', '--out', 'x'])",
            marks=pytest.mark.nightly,
        ),
    ],
)
@pytest.mark.daily(1)
def test_threads_that_wait_leave_their_core_to_others(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert spins(code) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "variables"),
    [
        pytest.param(f"import sepo; {LOAD}", {"OMP_WAIT_POLICY": "ACTIVE"}, id="policy"),
        pytest.param(f"import sepo; {LOAD}", {"GOMP_SPINCOUNT": "7"}, id="count"),
        pytest.param(f"{LOAD}; import sepo", {}, id="the library, then sepo"),  # it has started already
        pytest.param("import torch, sepo", {}, marks=pytest.mark.nightly),
    ],
)
def test_who_chose_how_threads_wait_keeps_it(code, variables):
    assert spins(code, **variables) > 0


@pytest.mark.parametrize("name", UNSET)
def test_a_setting_of_the_users_own_is_left_alone(name):
    code = f"import os, sepo; print(os.environ.get('OMP_WAIT_POLICY'), os.environ['{name}'])"
    policy = "7" if name == "OMP_WAIT_POLICY" else "None"
    assert python(code, **{**UNSET, name: "7"}).stdout.split() == [policy, "7"]
