"""Engine "ray" on loopback nodes: the tables are those of one process, whatever nodes come and go. Needs the extra."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from sepo import engines, work
from sepo.engines.jobs import JobFolder
from sepo.errors import UserError
from toy_units import lines, make_job, tables, wait_for

HERE = Path(__file__).parents[1]
pytestmark = pytest.mark.nightly


@pytest.fixture
def cluster(monkeypatch):
    """A head without cores, to which nodes are added."""
    pytest.importorskip("ray", reason="needs the extra ray")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE.parent / "src"), str(HERE)]))
    for name, value in {"SEPO_KINDS": "toy_units", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    yield made
    made.shutdown()


def test_nodes_that_are_lost_and_join_give_the_tables_of_one_process(cluster, source, tmp_path, expected):
    out = tmp_path / "out"
    out.mkdir()
    (out / "hold-part-00005").touch()
    lost = cluster.add_node(num_cpus=1)
    done: list[object] = []

    def command() -> None:
        with engines.use(f"ray:{cluster.address}", out):
            done.append(work.do(make_job(source, out)))

    thread = threading.Thread(target=command)
    thread.start()
    wait_for(lambda: len(lines(out, "order")) == 5)
    assert len(lines(out, "opened")) == 1  # the model is loaded once a worker
    cluster.remove_node(lost, allow_graceful=False)
    cluster.add_node(num_cpus=1)
    wait_for(lambda: len(lines(out, "opened")) == 2)
    (out / "hold-part-00005").unlink()
    thread.join(120)
    assert done
    assert tables(out) == expected


def test_a_unit_that_kills_three_workers_is_named_and_the_same_command_does_the_rest(
    cluster, source, tmp_path, expected
):
    out = tmp_path / "out"
    out.mkdir()
    (out / "kill-part-00001").touch()
    cluster.add_node(num_cpus=2)
    with (
        pytest.raises(UserError, match=r"part-00001 of 'toy' took 3 workers down"),
        engines.use(f"ray:{cluster.address}", out),
    ):
        work.do(make_job(source, out))
    (out / "kill-part-00001").unlink()
    with engines.use(f"ray:{cluster.address}", out):
        counts = work.do(make_job(source, out))
    assert len(counts) == 6
    assert tables(out) == expected
    assert len(lines(out, "order")) == 6  # none twice


def test_what_the_cluster_finished_before_it_was_lost_is_not_done_again(source, tmp_path, expected):
    """The engines share their records: here the engine "files" goes on."""
    out = tmp_path / "out"
    job = make_job(source, out)
    from sepo.engines import on_ray

    folder = JobFolder.publish(out / ".units", job)
    for name in ("part-00000", "part-00003"):
        on_ray.do_unit(str(folder.path), name)
    with engines.use("files", out):
        work.do(job)
    assert tables(out) == expected
    assert len(lines(out, "order")) == 6


def test_without_the_extra_one_line_says_so(tmp_path):
    code = (
        "import sys; sys.modules['ray'] = None\n"
        "from pathlib import Path\n"
        "from sepo.engines.on_ray import OnRay\n"
        "from sepo.errors import UserError\n"
        "try:\n    OnRay('', Path('.'))\nexcept UserError as error:\n    print(error)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(HERE.parent / "src")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert "pip install 'sepo[ray]'" in done.stdout, done.stderr
