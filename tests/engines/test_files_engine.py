"""Engine "files": workers that come, hang and die; the tables are those of one process, to the byte."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sepo import engines, processes, work
from sepo.engines import files, jobs
from sepo.engines.files import FOLDER, Files, Worker, serve
from sepo.engines.jobs import Heart, JobFolder, Watch
from sepo.errors import DoneElsewhere, UserError
from toy_units import lines, make_job, make_source, tables, wait_for

FORK = multiprocessing.get_context("fork")
BEAT, PATIENCE = 0.05, 0.6
STARTED: list[multiprocessing.Process] = []


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(Files, "beat", BEAT)
    monkeypatch.setattr(Files, "patience", PATIENCE)
    monkeypatch.setattr(files, "POLL", 0.02)
    monkeypatch.setattr(Worker, "first_unit", staticmethod(lambda: 0))
    STARTED.clear()
    yield
    end(*STARTED)


def drive(source: Path, out: Path, **changes: object) -> dict[str, work.Counts]:
    with engines.use("files", out):
        return work.do(make_job(source, out, **changes))


def start(function: Callable, *arguments: object) -> multiprocessing.Process:
    process = FORK.Process(target=function, args=arguments, daemon=True)
    process.start()
    STARTED.append(process)
    return process


def start_worker(out: Path) -> multiprocessing.Process:
    return start(lambda: serve(out, 60.0, "cpu", BEAT, PATIENCE))


def end(*started: multiprocessing.Process) -> None:
    for process in started:
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        process.join()


def test_one_process_gives_the_tables_of_local_and_leaves_no_files(source, tmp_path, expected):
    shown: list[float] = []
    with engines.use("files", tmp_path / "out"), processes.alone_in(tmp_path / "out"):
        counts = work.do(make_job(source, tmp_path / "out"), shown.append)
    assert tables(tmp_path / "out") == expected
    assert sorted(found["index"] for found in counts.values()) == list(range(6))
    assert sum(shown) == 30
    assert len(lines(tmp_path / "out", "opened")) == 1
    left = [path for path in (tmp_path / "out" / FOLDER).rglob("*") if path.is_file()]
    assert [path.name for path in left] == ["closed.json"]


def test_a_worker_that_joins_gets_work_and_loads_its_model_once(source, tmp_path, expected):
    out = tmp_path / "out"
    out.mkdir()
    (out / "hold-part-00000").touch()
    driver = start(drive, source, out)
    wait_for(lambda: len(lines(out, "opened")) == 1)  # the driver hangs at some unit, or is on its way there
    worker = start_worker(out)
    wait_for(lambda: len(lines(out, "order")) == 5)
    (out / "hold-part-00000").unlink()
    driver.join(20)
    assert driver.exitcode == 0
    end(worker)
    assert tables(out) == expected
    assert len(lines(out, "opened")) == 2
    assert len({line.split()[0] for line in lines(out, "order")}) == 2


def test_the_units_of_a_killed_worker_that_nobody_replaces_are_done(source, tmp_path, expected):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("hold-part-00004", "hold-part-00005"):
        (out / name).touch()
    driver, worker = start(drive, source, out), start_worker(out)
    wait_for(lambda: len(lines(out, "order")) == 4)  # each of the two hangs at one unit
    end(worker)
    for name in ("hold-part-00004", "hold-part-00005"):
        (out / name).unlink()
    driver.join(20)
    assert driver.exitcode == 0
    assert tables(out) == expected


def test_after_all_are_killed_the_same_command_does_what_is_missing(source, tmp_path, expected):
    out = tmp_path / "out"
    out.mkdir()
    (out / "hold-part-00002").touch()
    driver, worker = start(drive, source, out), start_worker(out)
    wait_for(lambda: len(list((out / FOLDER).glob("*/done/*.json"))) == 5)
    end(driver, worker)
    written = {path.name: path.stat().st_mtime_ns for path in out.glob("part-*.parquet")}
    (out / "hold-part-00002").unlink()
    drive(source, out)
    assert tables(out) == expected
    assert all((out / name).stat().st_mtime_ns == when for name, when in written.items())
    assert len(lines(out, "order")) == 6


def test_a_unit_that_kills_three_workers_is_named_and_the_others_are_done(source, tmp_path, expected):
    out = tmp_path / "out"
    out.mkdir()
    (out / "kill-part-00001").touch()
    folder = JobFolder.publish(out / FOLDER, make_job(source, out))
    workers = []
    for _ in range(3):
        workers.append(start_worker(out))
        wait_for(lambda: not workers[-1].is_alive())
        assert workers[-1].exitcode == -signal.SIGKILL
    with pytest.raises(UserError, match=r"part-00001 of 'toy' took 3 workers down .*; 1 of 6 units remain"):
        drive(source, out)
    assert len(tables(out)) == 5
    assert folder.ended()
    # The same command, when the cause is gone, gives the unit all its attempts again.
    (out / "kill-part-00001").unlink()
    drive(source, out)
    assert tables(out) == expected


def test_shards_of_another_oracle_are_not_taken_for_these(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "fail-part-00005").touch()
    with pytest.raises(OSError, match="No space"):
        drive(source, out, oracle="A")
    assert tables(out)
    (out / "fail-part-00005").unlink()
    drive(source, out, oracle="B", add=2)
    work.do(make_job(source, tmp_path / "local", oracle="B", add=2))
    assert tables(out) == tables(tmp_path / "local")


def test_a_worker_that_was_slow_writes_nothing_over_a_later_job(source, tmp_path):
    """It claimed a unit of oracle A, hung, and goes on when the folder holds the results of oracle B."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "hold-part-00000").touch()
    JobFolder.publish(out / FOLDER, make_job(source, out, oracle="A"))
    slow = start_worker(out)
    wait_for(lambda: lines(out, "opened"))
    job = make_job(source, tmp_path / "local", oracle="B")
    work.do(job)
    folder = JobFolder.publish(out / FOLDER, make_job(source, out, oracle="B"))
    (out / "hold-part-00000").unlink()
    wait_for(lambda: len(folder.done()) == 6)  # the slow worker went on with the later job
    end(slow)
    assert tables(out) == tables(tmp_path / "local")


def test_two_jobs_share_a_folder_and_its_workers(source, tmp_path, expected):
    queue = tmp_path / "queue"

    def command(out: Path) -> None:
        with engines.use(f"files:{queue}", out):
            work.do(make_job(source, out))

    queue.mkdir()
    started = [start_worker(queue), start(command, tmp_path / "one"), start(command, tmp_path / "two")]
    for driver in started[1:]:
        driver.join(20)
        assert driver.exitcode == 0
    end(started[0])
    assert tables(tmp_path / "one") == tables(tmp_path / "two") == expected


def test_a_unit_that_fails_in_a_worker_goes_to_another_at_once(source, tmp_path, expected):
    out = tmp_path / "out"
    out.mkdir()
    (out / "once-fail-part-00002").touch()
    JobFolder.publish(out / FOLDER, make_job(source, out))
    failing = start(lambda: _ends_with(OSError, lambda: serve(out, 60.0, "cpu", BEAT, PATIENCE)))
    failing.join(20)
    assert failing.exitcode == 0
    started = time.monotonic()
    drive(source, out)
    assert time.monotonic() - started < PATIENCE
    assert tables(out) == expected


def _ends_with(kind: type[BaseException], function: Callable[[], object]) -> None:
    try:
        function()
    except kind:
        os._exit(0)
    os._exit(1)


def test_a_worker_that_is_interrupted_gives_its_units_back(source, tmp_path, expected):
    out = tmp_path / "out"
    out.mkdir()
    for index in range(6):
        (out / f"hold-part-0000{index}").touch()
    JobFolder.publish(out / FOLDER, make_job(source, out))
    worker = start(lambda: _ends_with(KeyboardInterrupt, lambda: serve(out, 60.0, "cpu", BEAT, PATIENCE)))
    wait_for(lambda: lines(out, "opened"))
    time.sleep(0.05)
    os.kill(worker.pid, signal.SIGINT)
    worker.join(20)
    assert worker.exitcode == 0
    assert not list((out / FOLDER).glob("*/claims/*"))


@pytest.mark.parametrize("hours", [-1, 1])
@pytest.mark.daily(1)
def test_clocks_that_differ_by_an_hour_do_not_matter(tmp_path, monkeypatch, hours):
    """A living worker is not taken for dead, nor a dead one for alive, whatever the times of its file say."""
    shift = 3600 * hours
    with Heart(tmp_path, BEAT) as heart:
        stop = threading.Event()

        def other_clock() -> None:
            while not stop.wait(BEAT / 4):
                now = time.clock_gettime(time.CLOCK_REALTIME) + shift
                os.utime(tmp_path / "workers" / heart.name, (now, now))

        clock = threading.Thread(target=other_clock)
        clock.start()
        monkeypatch.setattr(time, "time", lambda: time.clock_gettime(time.CLOCK_REALTIME) + shift)
        watch = Watch(tmp_path, PATIENCE / 2)
        deadline = time.monotonic() + 1.5 * PATIENCE
        while time.monotonic() < deadline:
            assert not watch.is_dead(heart.name)
            time.sleep(0.01)
        heart._stop.set()  # it dies; its file stays, with a time in the future
        wait_for(lambda: watch.is_dead(heart.name), 5 * PATIENCE)
        stop.set()
        clock.join()


def test_the_same_command_given_again_helps_and_ends_with_the_first(source, tmp_path, expected):
    """Several processes with one command: one drives, the others do units and end when it has finished."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "hold-part-00003").touch()

    def command() -> None:
        try:
            with engines.use("files", out), processes.alone_in(out):
                work.do(make_job(source, out))
        except DoneElsewhere:
            os._exit(7)
        os._exit(0)

    started = [start(command) for _ in range(3)]
    wait_for(lambda: len(lines(out, "order")) == 5)
    (out / "hold-part-00003").unlink()
    for process in started:
        process.join(20)
    assert sorted(process.exitcode for process in started) == [0, 7, 7]
    assert tables(out) == expected


def test_when_the_first_dies_another_takes_its_place(source, tmp_path, expected):
    out = tmp_path / "out"
    out.mkdir()
    (out / "hold-part-00004").touch()
    (out / "hold-part-00005").touch()

    def command() -> None:
        try:
            with engines.use("files", out), processes.alone_in(out):
                (out / "driver").write_text(str(os.getpid()))
                work.do(make_job(source, out))
        except DoneElsewhere:
            os._exit(7)
        os._exit(0)

    first = start(command)
    wait_for(lambda: lines(out, "opened"))
    second = start(command)
    wait_for(lambda: len(lines(out, "order")) == 4)
    end(first)
    (out / "hold-part-00004").unlink()
    (out / "hold-part-00005").unlink()
    second.join(20)
    assert second.exitcode == 0
    assert (out / "driver").read_text() == str(second.pid)
    assert tables(out) == expected


def test_a_full_disk_on_one_node_ends_its_worker_alone(source, tmp_path, expected):
    """The node's own disk (a small tmpfs) takes neither results nor notes; another node does its units."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "none", str(disk)]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs needs root")
    out = tmp_path / "out"
    try:
        with pytest.raises(OSError, match="No space"):
            (disk / "filler").write_bytes(bytes(2**20))
        JobFolder.publish(out / FOLDER, make_job(source, out))

        def full() -> None:
            import toy_units

            def write(*_: object) -> None:
                (disk / "cache").write_bytes(b"x" * 8192)

            toy_units.write_shard = write
            try:
                serve(out, 60.0, "cpu", BEAT, PATIENCE)
            except OSError as error:
                os._exit(0 if error.errno == errno.ENOSPC else 1)
            os._exit(1)

        node = start(full)
        node.join(20)
        assert node.exitcode == 0
        drive(source, out)
        assert tables(out) == expected
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_worker_without_work_ends_with_the_reason_after_a_job_was_ended(source, tmp_path):
    """But not for a job that was ended before the worker came, nor at once: the command may be given again."""
    out = tmp_path / "out"
    JobFolder.publish(out / FOLDER, make_job(source, out)).end("part-00002 took three workers down")
    assert serve(out, 0.1, "cpu", BEAT, 0.01) == 0
    folder = JobFolder.publish(out / FOLDER, make_job(source, out, oracle="B"))
    threading.Timer(0.2, lambda: folder.end("part-00004 took three workers down")).start()
    started = time.monotonic()
    with pytest.raises(UserError, match="part-00004 took three workers down"):
        serve(out, 60.0, "cuda", BEAT, PATIENCE)
    assert PATIENCE < time.monotonic() - started < 20


def test_a_job_of_another_package_is_not_imported(source, tmp_path):
    job = make_job(source, tmp_path / "out")
    folder = JobFolder.publish(tmp_path / FOLDER, job)
    value = json.loads((folder.path / "job.json").read_text()) | {"kind": "os:system"}
    (folder.path / "job.json").write_text(json.dumps(value))
    with pytest.raises(UserError, match="none of this package"):
        serve(tmp_path, 0.0, "cpu", BEAT, PATIENCE)


def test_a_worker_without_the_device_of_a_job_leaves_it_to_others(source, tmp_path):
    job = work.Job.from_json(make_job(source, tmp_path / "out").to_json() | {"device": "cuda"})
    JobFolder.publish(tmp_path / FOLDER, job)
    assert serve(tmp_path, 0.0, "cpu", BEAT, PATIENCE) == 0


def test_damaged_files_of_a_job_are_no_job(tmp_path):
    for name, text in (("a", "{"), ("b", "[]"), ("c", '{"kind": "x"}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "job.json").write_text(text)
    assert jobs.open_jobs(tmp_path) == []


def test_unknown_engines_and_launches_are_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="did you mean 'files'"), engines.use("flies", tmp_path):
        pass
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name, passes in (("files", False), ("ray", True)):
        with pytest.raises(UserError, match="start one process"), engines.use(name, tmp_path, passes):
            pass


def test_a_job_that_is_asked_for_again_by_a_later_command_is_not_done_again(source, tmp_path, expected):
    """A command that was killed after a job finished: the records stay until a command ends well."""
    out = tmp_path / "out"
    for _ in range(2):
        drive(source, out)
    assert tables(out) == expected
    assert len(lines(out, "order")) == 6
    (out / "part-00002.parquet").unlink()
    drive(source, out)
    assert tables(out) == expected
    assert len(lines(out, "order")) == 7


def test_a_unit_that_a_living_worker_forgot_is_done_by_another(source, tmp_path, expected):
    """Its job was ended while it worked at the unit, and was taken up again."""
    out = tmp_path / "out"
    folder = JobFolder.publish(out / FOLDER, make_job(source, out))
    with Heart(out / FOLDER, BEAT) as heart:
        assert folder.claim("part-00002", 1, heart.name)
        heart.held = {"part-00003": 1}
        assert folder.claim("part-00003", 1, heart.name)
        driver = start(drive, source, out)
        wait_for(lambda: len(folder.done()) == 5)
        time.sleep(2 * PATIENCE)  # the unit that it names stays its own
        assert not folder.is_done("part-00003")
        heart.held = {}
        driver.join(20)
    assert driver.exitcode == 0
    assert tables(out) == expected


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(4))
def test_commands_killed_and_started_at_random_lose_nothing(tmp_path, seed):
    """Four processes with one command of two jobs, of which some are killed all the time for three seconds."""
    draw, source, out = random.Random(seed), make_source(tmp_path / "source", 40), tmp_path / "out"
    work.do(make_job(source, tmp_path / "local"))
    work.do(make_job(source, tmp_path / "second", oracle="B", add=3))

    def command() -> None:
        try:
            with engines.use("files", out), processes.alone_in(out):
                work.do(make_job(source, out))
                work.do(make_job(source, out / "second", oracle="B", add=3))
        except DoneElsewhere:
            os._exit(7)
        except UserError:  # three kills at one unit
            os._exit(2)
        os._exit(0)

    began = time.monotonic()
    while not any(process.exitcode in (0, 7) for process in STARTED):
        assert time.monotonic() - began < 60
        alive = [process for process in STARTED if process.is_alive()]
        if len(alive) < 4:
            start(command)
        elif draw.random() < 0.2 and time.monotonic() - began < 3:
            end(draw.choice(alive))
        time.sleep(draw.random() / 10)
    for process in STARTED:
        process.join(30)
    assert {process.exitcode for process in STARTED} <= {0, 2, 7, -signal.SIGKILL}
    assert tables(out) == tables(tmp_path / "local")
    assert tables(out / "second") == tables(tmp_path / "second")
