"""A job in a folder that all workers see: its units, which of them are done, and which worker has which.

    FOLDER/ID/job.json              the job
    FOLDER/ID/done/UNIT.json        counts of a finished unit, and the digest of its result
    FOLDER/ID/claims/UNIT.N         the worker of attempt N
    FOLDER/ID/failures/UNIT.N       why attempt N failed
    FOLDER/ID/ended.json            why the job ended before all units were done
    FOLDER/workers/WORKER           a number that a living worker changes every `BEAT` seconds

No clock of one machine is compared with that of another: a worker is dead if its number stays the same for `PATIENCE`
seconds of the observer. A claim is taken over by making the file of the next attempt. Making a file that must not exist
is atomic on local disks, NFS and Lustre, so that one observer wins. Nothing that a dead worker left is removed or
changed, so a worker that was only slow can go on: it finds the unit done, or writes the same bytes.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sepo.files import write_json
from sepo.work import Counts, Job, Kind, Unit

# Seconds between two beats of a worker, and without one until its units go to others.
BEAT, PATIENCE = 5.0, 60.0
# A unit that killed or failed this many workers ends the job.
ATTEMPTS = 3


class JobFolder:
    """A job on disk.

    Attributes:
        path: of its folder.
        job: the job.
    """

    def __init__(self, path: Path, job: Job):
        self.path, self.job = path, job
        self.by_name = {unit.name: unit for unit in job.units}

    @classmethod
    def publish(cls, folder: Path, job: Job) -> JobFolder:
        """Write a job for the workers of `folder`, or go on with the same one; unlike jobs with its `out` are ended."""
        for other in open_jobs(folder):
            if other.job.settings.get("out") == job.settings.get("out") and other.job.id != job.id:
                other.remove()
        found = cls(folder / job.id, job)
        for name in ("done", "claims", "failures"):
            (found.path / name).mkdir(parents=True, exist_ok=True)
        found.forget_failures()
        write_json(found.path / "job.json", job.to_json(), indent=None)
        return found

    @classmethod
    def read(cls, path: Path) -> JobFolder | None:
        """The job of a folder; None if it is finished or not whole."""
        try:
            return cls(path, Job.from_json(json.loads((path / "job.json").read_text(encoding="utf-8"))))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def forget_failures(self) -> None:
        """A command that is given again gives the units that failed or ended the job all attempts again."""
        ended = (self.path / "ended.json").is_file()
        failed = {name.rpartition(".")[0] for name in self._names("failures")}
        spent = {unit for unit, number in self.attempts().items() if ended and number >= ATTEMPTS}
        for unit in failed | spent:
            self._forget(unit)
        (self.path / "ended.json").unlink(missing_ok=True)

    def _forget(self, unit: str) -> None:
        for folder in ("done", "claims", "failures"):
            for path in (self.path / folder).glob(f"{glob.escape(unit)}.*"):
                path.unlink(missing_ok=True)

    def is_open(self) -> bool:
        """Are its results still wanted?"""
        return (self.path / "job.json").is_file() and not (self.path / "ended.json").is_file()

    def end(self, reason: str) -> None:
        """End the job before all units are done, for all workers."""
        write_json(self.path / "ended.json", {"reason": reason})

    def ended(self) -> str | None:
        """Why the job was ended; None for a job that was not."""
        value = _json(self.path / "ended.json")
        return None if value is None else str(value.get("reason"))

    def remove(self) -> None:
        """The job is finished, or nobody wants it: workers find no job.json and leave it."""
        (self.path / "job.json").unlink(missing_ok=True)
        shutil.rmtree(self.path, ignore_errors=True)

    # --- results ----------------------------------------------------------------------------------------------------

    def done(self) -> set[str]:
        """Names of the finished units."""
        return {name.removesuffix(".json") for name in self._names("done") if name.endswith(".json")}

    def is_done(self, unit: str) -> bool:
        return (self.path / "done" / f"{unit}.json").is_file()

    def counts(self, unit: str) -> Counts | None:
        """Counts of a finished unit whose result is on disk and of this job; otherwise None, and it is to be done."""
        record = _json(self.path / "done" / f"{unit}.json")
        if record is None:
            return None
        kind: type[Kind] = self.job.kind_class()
        if record.get("digest") != kind.result(self.job.settings, self.by_name[unit]):
            self._forget(unit)
            return None
        return record["counts"]

    def finish(self, unit: Unit, counts: Counts) -> None:
        """Record a result that was just written. Does nothing if the job is finished meanwhile."""
        digest = self.job.kind_class().result(self.job.settings, unit)
        with contextlib.suppress(FileNotFoundError):
            if self.is_open() and digest is not None:
                _write_new(self.path / "done" / f"{unit.name}.json", {"digest": digest, "counts": counts})

    # --- claims -----------------------------------------------------------------------------------------------------

    def attempts(self) -> dict[str, int]:
        """The number of the last attempt at each claimed unit."""
        numbers: dict[str, int] = {}
        for name in self._names("claims"):
            unit, _, number = name.rpartition(".")
            if number.isdigit():
                numbers[unit] = max(numbers.get(unit, 0), int(number))
        return numbers

    def claim(self, unit: str, attempt: int, worker: str) -> bool:
        """Try to be the worker of an attempt at a unit; False if another one is."""
        path = self.path / "claims" / f"{unit}.{attempt}"
        try:
            with open(path, "x", encoding="utf-8") as file:
                file.write(worker)
        except (FileExistsError, FileNotFoundError):
            return False
        return True

    def holder(self, unit: str, attempt: int) -> str:
        """The worker of an attempt."""
        with contextlib.suppress(OSError):
            return (self.path / "claims" / f"{unit}.{attempt}").read_text(encoding="utf-8")
        return ""

    def release(self, unit: str, attempt: int) -> None:
        """Give a unit back that was not worked at, or whose worker was asked to stop."""
        (self.path / "claims" / f"{unit}.{attempt}").unlink(missing_ok=True)

    def fail(self, unit: str, attempt: int, reason: str) -> None:
        """Record that an attempt failed: others may try at once."""
        with contextlib.suppress(FileNotFoundError):
            write_json(self.path / "failures" / f"{unit}.{attempt}", {"reason": reason})

    def failure(self, unit: str, attempt: int) -> str | None:
        """Why an attempt failed; None if it did not."""
        value = _json(self.path / "failures" / f"{unit}.{attempt}")
        return None if value is None else str(value.get("reason"))

    def _names(self, folder: str) -> list[str]:
        try:
            return os.listdir(self.path / folder)
        except FileNotFoundError:
            return []


def open_jobs(folder: Path) -> list[JobFolder]:
    """The jobs of a folder whose results are wanted."""
    found = [JobFolder.read(path.parent) for path in sorted(folder.glob("*/job.json"))]
    return [job for job in found if job is not None and job.is_open()]


def _json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _write_new(path: Path, value: Any) -> None:
    """`write_json` into a folder that must exist: that of a finished job is not made again."""
    if not path.parent.is_dir():
        raise FileNotFoundError(path.parent)
    write_json(path, value)


class Heart:
    """The beats of this worker, in a thread, as long as the context lasts.

    A process that hangs in a computation without end keeps beating, like one that computes for long: Slurm's time limit
    ends it.
    """

    def __init__(self, folder: Path, beat: float = BEAT):
        self.name = f"{socket.gethostname()}-{os.getpid()}-{os.urandom(4).hex()}"
        self._path, self._beat, self._stop = folder / "workers" / self.name, beat, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._number = 0

    def __enter__(self) -> Heart:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._write()
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stop.set()
        self._thread.join()
        self._path.unlink(missing_ok=True)

    def _run(self) -> None:
        while not self._stop.wait(self._beat):
            with contextlib.suppress(OSError):  # a full disk stops no worker that may yet finish its unit
                self._write()

    def _write(self) -> None:
        self._number += 1
        self._path.write_text(str(self._number), encoding="utf-8")


class Watch:
    """Which workers are alive, as seen from here.

    Args:
        patience: seconds, of this process, without a beat until a worker is dead.
    """

    def __init__(self, folder: Path, patience: float = PATIENCE):
        self._folder, self._patience = folder / "workers", patience
        self._seen: dict[str, tuple[str, float]] = {}

    def is_dead(self, worker: str) -> bool:
        """Has a worker not beaten for long?"""
        now = time.monotonic()
        try:
            number = (self._folder / worker).read_text(encoding="utf-8") if worker else ""
        except OSError:
            number = ""
        before, since = self._seen.setdefault(worker, (number, now))
        if number != before:
            self._seen[worker] = (number, now)
            return False
        return now - since >= self._patience


def claims(folder: JobFolder, worker: str, watch: Watch, held: dict[str, int], start: int = 0) -> Iterator[Unit]:
    """Claim units for a worker, one whenever the next is asked for, until none is to be had at present.

    A unit that was tried before is done alone: units that are prepared meanwhile would be blamed for its end.

    Args:
        held: gets the attempt of each claimed unit, by name.
        start: place in the list of units to start at, so that workers do not meet at each unit.
    """
    units = folder.job.units[start % len(folder.job.units) :] + folder.job.units[: start % len(folder.job.units)]
    done, attempts = folder.done(), folder.attempts()
    for unit in units:  # new units first: the workers of the others may be alive
        new = unit.name not in done and unit.name not in attempts and folder.is_open()
        if new and folder.claim(unit.name, 1, worker):
            held[unit.name] = 1
            yield unit
    if held:
        return
    done, attempts = folder.done(), folder.attempts()
    for unit in units:
        attempt = attempts.get(unit.name, 0)
        if unit.name in done or not folder.is_open():
            continue
        failure = folder.failure(unit.name, attempt) if attempt else None
        if attempt and failure is None and not watch.is_dead(folder.holder(unit.name, attempt)):
            continue
        if attempt >= ATTEMPTS:
            why = f"the last one failed: {failure}" if failure else "the last one died without a word"
            folder.end(f"{unit.name} of '{folder.job.title}' took {attempt} workers down ({why})")
            return
        if folder.claim(unit.name, attempt + 1, worker):
            held[unit.name] = attempt + 1
            yield unit
            return
