"""Several processes: any number of pairs, the losses of one process, the same everywhere."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fsdp_on_cpu
from many_processes import run

HERE = Path(__file__).parents[1]
SIZES = (3, 17, 20, 24)
pytestmark = pytest.mark.slow


def launch(number, folder, objective, sizes, **variables):
    """Train on each size in `number` processes; returns the results by size."""
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent / "src")]), "OMP_NUM_THREADS": "1",
        **variables,
    }  # fmt: skip
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(number)]
    command = [*start, str(HERE / "many_processes.py"), str(folder), objective, ",".join(map(str, sizes))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return json.loads(line.removeprefix("RESULT "))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return {objective: run(folder / objective, objective, list(SIZES)) for objective in ("dpo", "simpo")}


@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp2"])
def test_any_number_of_pairs_trains_evaluates_and_saves_as_in_one_process(tmp_path, alone, number, sharded):
    """3 pairs on 3 processes, 17 and 20 on 2: nobody waits for a process without a pair."""
    objective = "simpo" if sharded else "dpo"
    results = launch(number, tmp_path, objective, SIZES, **(fsdp_on_cpu.ENVIRONMENT if sharded else {}))
    assert results.keys() == alone[objective].keys()
    for size, one in alone[objective].items():
        assert results[size]["losses"] == pytest.approx(one["losses"], abs=2e-5), f"{size} pairs"
        assert results[size]["eval"] == pytest.approx(one["eval"], abs=2e-5), f"{size} pairs"
        assert results[size]["wrapper"].startswith("FSDP" if sharded else "DistributedDataParallel")
        assert results[size]["reduced_every_row"] or not sharded
        assert results[size]["weights"] == pytest.approx(one["weights"], rel=1e-5), f"{size} pairs"
