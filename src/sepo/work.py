"""Units of work, and the engine that gets them done.

A *unit* is one shard of a table in, one shard of the result out. It has a name and can be done twice without harm:
both times the same bytes are written, by a rename. A *job* is a list of units of one kind with common settings, all of
them JSON, so that it can be written to a file and sent to another machine. A *kind* is a class that does units:

    class Passes:
        def __init__(self, settings):                      # once a worker: loads the model
        def __call__(self, units, progress):               # yields (unit, write) as results are ready
        def result(settings, unit):                        # static: digest of a stored result; None without a whole one
        together = True                                    # a launch may do a unit together; the main process yields it

`write()` writes the shard and returns counts. The engine calls it, because a worker that was thought dead must not
write over the results of another job. No table leaves the worker.

A stage calls `do`. The engine is `local` unless `using` sets another (`sepo.engines`).
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from sepo import processes
from sepo.errors import UserError
from sepo.files import digest

Counts = dict[str, Any]
Progress = Callable[[float], object]
# Top-level packages whose classes may be kinds, with those of SEPO_KINDS. A job's file names its kind, and importing
# runs code.
PACKAGES = {"sepo", *os.environ.get("SEPO_KINDS", "").split(",")}


class Unit(NamedTuple):
    """A unit of a job.

    Attributes:
        name: unlike that of any other unit of the job; part of file names.
        size: for progress, such as a number of pairs.
        details: what the kind needs to know about it; JSON.
    """

    name: str
    size: float
    details: dict[str, Any]


class Kind(Protocol):
    """Does units of one kind; see the module's text."""

    def __init__(self, settings: Mapping[str, Any]): ...

    def __call__(self, units: Iterable[Unit], progress: Progress) -> Iterator[tuple[Unit, Callable[[], Counts]]]: ...

    @staticmethod
    def result(settings: Mapping[str, Any], unit: Unit) -> str | None: ...


@dataclass(frozen=True)
class Job:
    """Units of one kind.

    Attributes:
        kind: MODULE:CLASS.
        title: for people.
        settings: JSON: everything that a worker needs, paths in full, and the digests of the inputs. `out`, the folder
            that the units write to, is one of them.
        units: those that are to be done.
        device: kind of device that a worker needs ("cuda"); "cpu" for any machine.
        processes: how many processes do a unit together, because no device holds the model.
    """

    kind: str
    title: str
    settings: dict[str, Any]
    units: tuple[Unit, ...] = field(repr=False)
    device: str = "cpu"
    processes: int = 1

    @property
    def id(self) -> str:
        """Equal for jobs that write the same results."""
        return digest([self.kind, self.settings])

    def kind_class(self) -> type[Kind]:
        """The class that does the units. Raises UserError."""
        module, _, name = self.kind.partition(":")
        if module.partition(".")[0] not in PACKAGES:
            raise UserError(f"the kind of work '{self.kind}' is none of this package: the file of the job was altered")
        return getattr(importlib.import_module(module), name)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Job:
        units = tuple(Unit(*unit) for unit in value["units"])
        return cls(value["kind"], value["title"], value["settings"], units, value["device"], value["processes"])


class Engine(Protocol):
    """Decides who does which unit.

    Attributes:
        folder: all workers see it.
    """

    folder: Path

    def do(self, job: Job, progress: Progress) -> dict[str, Counts]:
        """Do all units; returns the counts by the name of the unit.

        Args:
            progress: called with the size of what was finished since the last call.
        """

    def help(self) -> bool:
        """Another process holds the output folder: do some of its units, if there are any; returns whether to wait."""

    def check_wanted(self) -> None:
        """Raise DoneElsewhere if a process that this one waited for has finished their command."""

    def finish(self) -> None:
        """The command has finished and still holds its output folder."""


class Local:
    """This process does the units one after the other, or the processes of a launch do."""

    folder = Path(".")

    def do(self, job: Job, progress: Progress) -> dict[str, Counts]:
        work = job.kind_class()(job.settings)
        return {unit.name: write() for unit, write in work(job.units, progress)}

    def help(self) -> bool:
        return False

    def check_wanted(self) -> None:
        pass

    def finish(self) -> None:
        pass


_engine: Engine = Local()


def do(job: Job, progress: Progress = lambda done: None) -> dict[str, Counts]:
    """Do the units of a job with the present engine; arguments and result as in `Engine.do`."""
    return _engine.do(job, progress) if job.units else {}


def shared_folder() -> Path:
    """A folder for results of units that the stage joins and removes; all workers of the engine see it."""
    return _engine.folder


def is_local() -> bool:
    """Does this launch do its units itself?"""
    return isinstance(_engine, Local)


@contextlib.contextmanager
def using(engine: Engine) -> Iterator[None]:
    """Let `engine` do the units of the stages in this context."""
    global _engine
    previous, _engine, processes.waiter = _engine, engine, engine
    try:
        yield
    finally:
        _engine = processes.waiter = previous


def absolute(path: str | Path) -> str:
    """The full path of what exists here; a name of another kind, such as a hub id, as it is."""
    return str(Path(path).resolve()) if Path(path).exists() else str(path)
