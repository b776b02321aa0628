"""Passes as units for groups of processes: a command, launches that help it, and processes that die.

    python tests/sharded_units.py FOLDER CASE

FOLDER has a model and a table of pairs in shards, for the pass into FOLDER/CASE. Cases: "alone", a command of one
process with a launch of two workers; "launch", a command in a launch of two; "killed", one of two launches of workers
loses a process in its first unit. Each process that opens the model adds a line to FOLDER/opened: its rank and the
share of the weights that it has.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from faults import fork, free_port, wait_for
from sepo import engines, processes
from sepo.cli import main
from sepo.engines import files
from sepo.forward.scoring import Types
from sepo.models.sharding import own_part
from sepo.stages import logps
from sepo.stages.logps import Passes

files.POLL = 0.05
files.Files.beat = files.BEAT = 0.1
files.Files.patience = files.PATIENCE = 1.5


def watch(folder: Path) -> None:
    """Note the share of the weights of each process that opens the model."""
    opens = Passes.__init__

    def watched(self, settings) -> None:
        opens(self, settings)
        whole, own = (sum(part(p).numel() for p in self.model.parameters()) for part in (lambda p: p, own_part))
        with open(folder / "opened", "a") as file:
            file.write(f"{processes.rank()} {own / whole}\n")

    Passes.__init__ = watched


def die_in_a_unit(folder: Path) -> None:
    """The second process of a launch dies where it should read the first unit."""
    called = Passes.__call__

    def dies(self, units, progress):
        if processes.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return called(self, units, progress)

    Passes.__call__ = dies


def score(folder: Path, case: str) -> int:
    """The command."""
    processes.join("cpu")
    with engines.use("files@2", folder / case, passes=True), processes.alone_in(folder / case):
        logps.logps_pass(
            str(folder / "model"), folder / "pairs", folder / case / "logps", device="cpu", types=Types("float32")
        )
    processes.leave()
    return 0


def work(folder: Path, case: str) -> int:
    return main(["work", str(folder / case), "--wait", "60"])


def start(number: int, *steps: Callable[[], object]) -> list[int]:
    """Fork the processes of a launch, which do some steps; the last one returns the exit code."""
    port = free_port()

    def process(rank: int) -> int:
        if number > 1:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(number))
            os.environ.update(LOCAL_WORLD_SIZE=str(number), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        return [step() for step in steps][-1]

    return [fork(lambda rank=rank: process(rank)) for rank in range(number)]


if __name__ == "__main__":
    place, case = Path(sys.argv[1]), sys.argv[2]
    watch(place)
    command, helps = (lambda: score(place, case)), (lambda: work(place, case))
    if case == "launch":
        codes = wait_for(start(2, command))
    elif case == "alone":
        codes = wait_for([*start(1, command), *start(2, helps)])
    else:
        lost = wait_for(start(2, lambda: die_in_a_unit(place), command))
        assert lost[1] == -signal.SIGKILL
        assert lost[0] != 0
        codes = wait_for([*start(1, command), *start(2, helps)])
    sys.exit(any(codes) and f"exit codes {codes}")
