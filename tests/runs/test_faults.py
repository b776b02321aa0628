"""A short run of the fault suite (`make faults` is the whole), and launchers that start every process themselves."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import spawn
from report_fixtures import score_table, word_tokenizer
from sepo import processes
from sepo.data.tables import read_table, write_table
from sepo.errors import UserError

HERE = Path(__file__).parents[1]


def python(*arguments, **variables):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent / "src")]), **variables}
    return spawn.run(arguments, timeout=600, env=environment)


def faults(*options, **numbers):
    """Inject faults (`tests/faults.py`), none of which may lose anything; returns their number."""
    numbers = {"kills": 0, "in_turn": 0, "fills": 0, "ranks": 0, "nodes": 0, "seed": 1} | numbers
    options += tuple(f"--{name.replace('_', '-')}={number}" for name, number in numbers.items())
    done = python(str(HERE / "faults.py"), *options)
    assert done.returncode == 0, done.stdout + done.stderr
    number, lost = map(int, re.search(r"(\d+) faults, (\d+) with a loss", done.stdout).groups())
    assert lost == 0
    return number


def test_a_run_that_is_killed_interrupted_and_out_of_disk_and_a_lost_process_lose_nothing():
    """Also: machines that do not share the run folder."""
    assert faults("--interrupts", in_turn=4, ranks=1, nodes=1) == 8


@pytest.mark.nightly
def test_more_faults_each_in_a_run_of_its_own_lose_nothing():
    """Kills at two moments, and a process lost under FSDP2."""
    assert faults("--interrupts", kills=4, fills=2, ranks=2, in_turn=9) >= 21


@pytest.mark.nightly
def test_a_run_interrupted_in_each_stage_says_what_is_kept_and_ends_as_if_undisturbed():
    assert faults() == 12


@pytest.mark.nightly
def test_two_machines_restart_what_died_and_go_on_with_another_number():
    """Also: machines that do not share the run folder are refused before a stage starts."""
    assert faults("--interrupts", nodes=2) == 3


def test_a_restart_in_which_processes_would_not_meet_is_refused(monkeypatch):
    """The variables that `torchrun --nproc-per-node 2 --max-restarts 1` sets."""
    for name, value in {
        "WORLD_SIZE": "2",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_MAX_RESTARTS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        processes.join("cpu")


LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "sepo"],
    "accelerate": ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
                   "--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1",
                   "--main_process_port", "0", "-m", "sepo.cli"],
}  # fmt: skip


# `torchrun --nproc-per-node 2 -m sepo`, whose processes are forked from its agent, which has imported everything.
FORKING = """
import sys
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from sepo.cli import main

def work(arguments):
    if code := main(arguments):
        sys.exit(code)

config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=2, run_id="none", rdzv_backend="c10d",
                      rdzv_endpoint="localhost:0", max_restarts=0, monitor_interval=0.1, start_method="fork")
try:
    elastic_launch(config, work)(sys.argv[1:])
except ChildFailedError:
    sys.exit(1)
"""


# The launchers themselves start each process from nothing, 4 seconds of a core: they are for the nightly run.
LAUNCHES = [
    pytest.param(["-c", FORKING], id="forked"),
    *(pytest.param(words, id=name, marks=pytest.mark.nightly) for name, words in LAUNCHERS.items()),
]


@pytest.mark.parametrize("launch", LAUNCHES)
def test_a_launch_starts_the_command_and_the_main_process_alone_writes(launch, tmp_path):
    write_table(tmp_path / "scores", score_table(word_tokenizer()))
    good = python(*launch, "select", "--table", str(tmp_path / "scores"), "--out", str(tmp_path / "out"))
    assert good.returncode == 0, good.stderr
    assert good.stdout.count("selection: ") == 1
    assert len(read_table(tmp_path / "out", "selection")) == 6


@pytest.mark.parametrize("launch", LAUNCHES)
def test_a_failure_of_the_main_process_ends_the_others_with_its_reason(launch, tmp_path):
    bad = python(*launch, "select", "--table", str(tmp_path / "none"), "--out", str(tmp_path / "out"))
    assert bad.returncode != 0
    assert sum(line.startswith("sepo: no scores table at") for line in bad.stderr.splitlines()) == 1


@pytest.mark.nightly
def test_the_processes_of_a_launch_that_failed_end_by_themselves(tmp_path):
    """Threads of a group over TCP that is left to the end of the interpreter abort the process, one time in five."""
    command = [
        sys.executable,
        "-m",
        "sepo",
        "select",
        "--table",
        str(tmp_path / "none"),
        "--out",
        str(tmp_path / "out"),
    ]
    path = str(HERE.parent / "src")
    for _ in range(8):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        meet = {"PYTHONPATH": path, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        launch = [
            subprocess.Popen(
                command, stderr=subprocess.PIPE, env={**os.environ, **meet, "RANK": rank, "LOCAL_RANK": rank}
            )
            for rank in ("0", "1")
        ]
        said = [process.communicate()[1].decode() for process in launch]
        assert [process.returncode for process in launch] == [2, 1], said
