"""Engine "files": any number of processes that see one folder do the units, by claims in files (`jobs`).

There is no head node. The command itself is a worker. So are `sepo work FOLDER`, on any machine and at any time, and
the same command given once more: it finds the output folder taken and works for the process that holds it. When that
process dies, one of the others takes its place.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from sepo import processes
from sepo.engines.groups import Together, is_shared, open_kind
from sepo.engines.jobs import BEAT, PATIENCE, Heart, JobFolder, Watch, claims, open_jobs, reasons_of_ends
from sepo.errors import DoneElsewhere, UserError, one_line
from sepo.files import expand_home, write_json
from sepo.processes import log, log_once
from sepo.work import Counts, Job, Kind, Progress

# Seconds between two looks at the folder of a process that has nothing to do, and of one that counts results.
POLL = 1.0
FOLDER, CLOSED = ".units", "closed.json"


class Worker:
    """A process that does units of the jobs of a folder.

    Attributes:
        folder: of the jobs.
        name: in the files of claims.
    """

    def __init__(self, folder: Path, beat: float = BEAT, patience: float = PATIENCE):
        self.folder = folder
        self._watch, self._heart = Watch(folder, patience), Heart(folder, beat)
        self.name = self._heart.name
        self.start = self.first_unit()
        self._kind: Kind | Together | None = None
        self._job: str | None = None

    @staticmethod
    def first_unit() -> int:
        """Where this worker starts to look for units: elsewhere than others, so that they seldom ask for the same."""
        return int.from_bytes(os.urandom(4), "big")

    def __enter__(self) -> Worker:
        self._heart.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._heart.__exit__()

    def turn(self, folder: JobFolder, progress: Progress = lambda done: None) -> int:
        """Do units of a job until none is to be had; returns their number.

        Raises:
            Exception: that of a unit. The unit is marked as failed, for others to try.
        """
        held: dict[str, int] = {}
        self._heart.held = held
        source = claims(folder, self.name, self._watch, held, self.start)
        number = 0
        try:
            first = next(source, None)
            if first is None:
                return 0
            kind = self._open(folder.job)
        except BaseException:
            _release(folder, held)
            raise
        try:
            for unit, write in kind(itertools.chain([first], source), progress):
                recorded = folder.is_done(unit.name)
                if not recorded and folder.is_open():
                    recorded = folder.finish(unit, _written(write))
                attempt = held.pop(unit.name)
                if not recorded:  # of a job that was ended: whoever takes it up again finds the unit free
                    _release(folder, {unit.name: attempt})
                number += 1
        except Exception as error:
            with contextlib.suppress(OSError):  # of a full disk
                name, attempt = next(iter(held.items()))
                folder.fail(name, attempt, one_line(error, 200))
                del held[name]
            _release(folder, held)
            raise
        except BaseException:
            _release(folder, held)
            raise
        return number

    def _open(self, job: Job) -> Kind | Together:
        """The kind of a job with its model in memory, loaded when the first unit of the job comes."""
        if self._job != job.id or self._kind is None:
            self.put_down()
            self._kind, self._job = open_kind(job), job.id
        return self._kind

    def put_down(self) -> None:
        """Free the model of the last job."""
        if isinstance(self._kind, Together):
            self._kind.close()
        self._kind = self._job = None

    def has(self, job: Job) -> bool:
        """Does this worker hold the model of a job?"""
        return self._job == job.id


def _written(write: Any) -> Counts:
    try:
        return write()
    except FileNotFoundError:
        return write()  # a command that was started again removes the temporary files of its folder


def _release(folder: JobFolder, held: dict[str, int]) -> None:
    for name, attempt in held.items():
        with contextlib.suppress(OSError):
            folder.release(name, attempt)


class Files:
    """The engine.

    Args:
        place: a folder for the jobs; "" for that of the command.
        folder: where the command writes.
        processes: how many do a unit of a pass together; default: those of this launch, if it shards the model.
    """

    beat, patience = BEAT, PATIENCE

    def __init__(self, place: str, folder: Path, processes: int | None = None):
        self._together = processes
        self.folder = Path(os.path.abspath(expand_home(place) if place else folder)) / FOLDER
        self.folder.mkdir(parents=True, exist_ok=True)
        self._closed, self._ends = _content(self.folder / CLOSED), reasons_of_ends(self.folder)
        self._worker: Worker | None = None
        self._done: list[JobFolder] = []

    @property
    def worker(self) -> Worker:
        if self._worker is None:
            self._worker = Worker(self.folder, self.beat, self.patience).__enter__()
        return self._worker

    def do(self, job: Job, progress: Progress) -> dict[str, Counts]:
        if not is_shared(job):
            return self._do(job, progress)  # only the main process of a launch is here
        number = self._together or (processes.size() if processes.read_sharded() else 1)
        return processes.on_main(lambda: self._do(replace(job, processes=number), progress))

    def _do(self, job: Job, progress: Progress) -> dict[str, Counts]:
        folder = JobFolder.publish(self.folder, job)
        counts: dict[str, Counts] = {}
        looked = float("-inf")

        def look(done: float = 0.0) -> None:
            nonlocal looked
            if time.monotonic() - looked < POLL:
                return
            for name in sorted(folder.done() - counts.keys()):
                if name in folder.by_name and (found := folder.counts(name)) is not None:
                    counts[name] = found
                    progress(folder.by_name[name].size)
            looked = time.monotonic()

        while True:
            looked = float("-inf")
            look()
            if len(counts) == len(job.units):
                break
            if (reason := folder.ended()) is not None:
                raise UserError(f"{reason}; {len(job.units) - len(counts)} of {len(job.units)} units remain")
            if not suits(job) or not self.worker.turn(folder, look):
                log_once(f"  {job.title}: waiting for units of {self._who(job)}")
                time.sleep(min(POLL, self.patience))
        self.worker.put_down()
        folder.close()
        self._done.append(folder)
        return counts

    def _who(self, job: Job) -> str:
        if suits(job):
            return "other workers"
        number, folder = job.processes, self.folder.parent
        return (
            f"workers of {number} processes (torchrun --standalone --nproc-per-node {number} -m sepo work '{folder}')"
        )

    def help(self) -> bool:
        log_once(f"another process has this folder: doing units of '{self.folder}' for it")
        self.check_wanted()
        if not _do_open(self.worker):
            time.sleep(POLL)
        return True

    def check_wanted(self) -> None:
        """Raises UserError, too, if the job of the process that this one waited for was ended."""
        for end, reason in reasons_of_ends(self.folder).items():
            if end not in self._ends:
                raise UserError(reason)
        if _content(self.folder / CLOSED) != self._closed:
            raise DoneElsewhere("done: another process with this command has finished it")

    def finish(self) -> None:
        if not processes.is_main():
            return
        for folder in self._done:
            folder.remove()
        write_json(self.folder / CLOSED, {"id": os.urandom(8).hex()})

    def close(self) -> None:
        if self._worker is not None:
            self._worker.__exit__()
            self._worker = None


def suits(job: Job, device: str | None = None) -> bool:
    """Can this process, with the others of its launch, do units of a job?

    Args:
        device: kind of device of this machine; None: that of the job.
    """
    return job.processes <= processes.size() and (device is None or job.device in ("cpu", device))


def _content(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def _do_open(worker: Worker, device: str | None = None) -> int:
    """Do units of all open jobs, those whose model is in memory first; returns their number."""
    number = 0
    jobs = open_jobs(worker.folder)
    if not any(worker.has(folder.job) for folder in jobs):
        worker.put_down()
    for folder in sorted(jobs, key=lambda folder: not worker.has(folder.job)):
        if suits(folder.job, device):
            number += worker.turn(folder)
    return number


def serve(place: Path, wait: float, device: str, beat: float = BEAT, patience: float = PATIENCE) -> int:
    """Do units of the jobs of a folder until its command has finished; returns their number.

    Args:
        place: where the command writes, or the folder of `files:FOLDER`.
        wait: seconds without anything to do until this worker ends.
        device: kind of device of this machine.

    Raises:
        UserError: a job was ended meanwhile, and for `patience` seconds there was nothing else to do.
    """
    folder = Path(os.path.abspath(place)) / FOLDER
    closed, last, number = _content(folder / CLOSED), time.monotonic(), 0
    ends = reasons_of_ends(folder)
    with Worker(folder, beat, patience) as worker:
        while True:
            did = _do_open(worker, device)
            number += did
            if did:
                log(f"{number} units done")
                last = time.monotonic()
            elif _content(folder / CLOSED) != closed or time.monotonic() - last > wait:
                return number
            elif time.monotonic() - last > patience and (new := reasons_of_ends(folder).keys() - ends.keys()):
                raise UserError(reasons_of_ends(folder)[min(new)])
            else:
                time.sleep(min(POLL, max(wait, 0.01)))
