"""A folder that is gone, and a report that would replace that of a run."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sepo.report.command import _default_out

SRC = Path(__file__).parents[2] / "src"


@pytest.mark.parametrize("command", [["recipe", "--list"], ["run", "quickstart", "--dry-run"], ["score", "--help"]])
def test_a_command_in_a_folder_that_is_gone_says_so(tmp_path, command):
    gone = tmp_path / "gone"
    gone.mkdir()
    script = f"cd {gone} && rmdir {gone} && exec {sys.executable} -P -m sepo {' '.join(command)}"
    environment = {**os.environ, "PYTHONPATH": str(SRC)}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2
    assert "no longer exists" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_report_of_a_table_inside_a_run_has_a_name_of_its_own(tmp_path):
    run, table = tmp_path / "run", tmp_path / "run" / "scores"
    table.mkdir(parents=True)
    assert _default_out(None, table) == run / "report.html"
    (run / "manifest.json").write_text("{}")
    assert _default_out(None, table) == run / "report-scores.html"
    assert _default_out(None, table / "train") == table / "report-train.html"
    assert _default_out(run, None) == run / "report.html"
    shutil.rmtree(run)
