"""The small run of scripts/golden_run.py gives what it gave when the record was made: nothing moves unseen.

On a kind of machine that the record knows, to the last bit; elsewhere within what another order of sums changes.
A change on purpose: `python scripts/golden_run.py --out DIR --record "why"`.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

import spawn
from sepo.credit.rewards import response_sums
from sepo.data.tables import read_table

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))
from compare_commits import differences  # noqa: E402

RECORD = json.loads((Path(__file__).parent / "golden.json").read_text())
INTEGERS = ("pair_id", "_ids", "_positions")


@pytest.fixture(scope="module")
def run(made_once):
    def fill(out):
        done = spawn.run([SCRIPTS / "golden_run.py", "--out", out])
        assert done.returncode == 0, done.stderr[-3000:]
        (out / "printed.json").write_text(done.stdout)

    folder = made_once("golden", fill)
    return {**json.loads((folder / "printed.json").read_text()), "folder": folder / "run"}


def test_the_golden_run_gives_the_recorded_bits_on_a_machine_of_a_known_kind(run):
    if run["machine"] not in RECORD["machines"]:
        pytest.skip(f"no record for {run['machine']}: held within rounding by the next test")
    found = {name: value for name, value in run.items() if name != "folder"}
    assert differences(RECORD["machines"][run["machine"]], found) == []


def test_the_golden_run_gives_the_recorded_numbers_within_rounding_on_any_machine(run):
    record = next(iter(RECORD["machines"].values()))
    assert run["tables"].keys() == record["tables"].keys()
    for name, table in record["tables"].items():
        got = run["tables"][name]
        assert got["rows"] == table["rows"]
        assert got["columns"].keys() == table["columns"].keys()
        for column, wanted in table["columns"].items():
            if column.endswith(INTEGERS) and name != "eval/generations.parquet":
                assert got["columns"][column]["digest"] == wanted["digest"], f"{name}: {column}"
            elif "sum" in wanted and name != "eval/generations.parquet":
                assert got["columns"][column]["sum"] == pytest.approx(wanted["sum"], rel=1e-3, abs=2e-2)
    assert run["losses"].keys() == record["losses"].keys()
    for name, losses in record["losses"].items():
        assert run["losses"][name] == pytest.approx(losses, abs=2e-4), name
    assert run["losses"]["oracle"][0] == pytest.approx(math.log(2), abs=rounding_of_the_first_loss(run["folder"]))


def rounding_of_the_first_loss(folder):
    """How far rounding can move DPO's loss at a margin of 0: half of beta times that of four float32 sums.

    Policy and reference read the same tokens in rows of other lengths, so each sum is right to half a unit in its last
    place: 1.5e-5 nats for sums of 128 to 256 nats.
    """
    beta = 0.1
    logps = read_table(folder / "logps" / "reference", "logps")
    largest = max(np.abs(total).max() for total in response_sums(logps, "logps"))
    return float(beta / 2 * 4 * np.spacing(np.float32(largest)) / 2)
