"""A short run of the fault suite (`make faults` is the whole), and launchers that start every process themselves."""

import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def python(*arguments, **variables):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent / "src")]), **variables}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, env=environment)


def test_killed_runs_full_disks_and_lost_processes_lose_nothing():
    done = python(str(HERE / "faults.py"), "--kills", "3", "--fills", "1", "--ranks", "1", "--seed", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    faults, lost = map(int, re.search(r"(\d+) faults, (\d+) with a loss", done.stdout).groups())
    assert faults >= 6
    assert lost == 0
