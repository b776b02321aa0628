"""Units that the processes of a launch do together, because no device holds the model.

The main process of a launch is the worker: it claims units, and writes and records results. The others wait in
`processes.on_main`. For each unit the main process asks them to take part (`processes.ask`), and all run the kind of
work on this unit, which shares its rows. Each process keeps one shard of the weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from sepo import processes
from sepo.work import Job, Kind, Progress, Unit


def is_shared(job: Job) -> bool:
    """Can several processes do a unit of this kind together?"""
    return getattr(job.kind_class(), "together", False)


def open_kind(job: Job) -> Kind | Together:
    """The kind of a job with its model in memory: in this process, or one shard in each of the launch."""
    if processes.size() > 1 and is_shared(job):
        return Together(job)
    return job.kind_class()(job.settings)


@contextlib.contextmanager
def _sharing(asked: bool) -> Iterator[None]:
    """Inside this context, frozen models are sharded if it is asked for, whatever the launcher does."""
    before, processes.share_unit = processes.share_unit, asked
    try:
        yield
    finally:
        processes.share_unit = before


class Together:
    """A kind of work in the main process of a launch; the others take part. All of them yield what the main process has
    to write, and nothing else, if they are given one unit at a time.
    """

    def __init__(self, job: Job):
        self._sharded = job.processes > 1
        processes.ask({"job": job.kind, "settings": job.settings, "sharded": self._sharded})
        with _sharing(self._sharded):
            self._kind = job.kind_class()(job.settings)

    def __call__(self, units: Iterable[Unit], progress: Progress) -> Iterator[tuple[Unit, Any]]:
        for unit in units:
            processes.ask({"unit": unit})
            with _sharing(self._sharded):
                results = list(self._kind([unit], progress))
            yield from results

    def close(self) -> None:
        """Free the memory of the other processes."""
        processes.ask({})


class Helper:
    """What the other processes of a launch do when they are asked: `processes.helper`."""

    def __init__(self) -> None:
        self._kind: Kind | None = None
        self._sharded = False

    def __call__(self, message: dict[str, Any]) -> None:
        if "unit" not in message:
            self._kind = None
        with _sharing(message.get("sharded", self._sharded)):
            if "job" in message:
                self._sharded = message["sharded"]
                job = Job(message["job"], "", message["settings"], ())
                self._kind = job.kind_class()(job.settings)
            elif "unit" in message:
                assert self._kind is not None
                for _ in self._kind([Unit(*message["unit"])], lambda done: None):
                    raise AssertionError("only the main process of a group writes")


@contextlib.contextmanager
def helping() -> Iterator[None]:
    """Inside this context, the other processes of this launch take part in units when the main process asks them."""
    previous, processes.helper = processes.helper, Helper()
    try:
        yield
    finally:
        processes.helper = previous
