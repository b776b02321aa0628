"""Engine "ray": each unit is a task of a Ray cluster, which may grow and shrink meanwhile.

Tasks keep nothing but the model of the last job, in the memory of their process. Results, and a record of each, are
files in a folder that all nodes see (`jobs`), so a cluster that was lost with its driver costs the units in flight. Ray
tells at once that a worker died; a unit that took three workers down ends the job.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from sepo.engines.files import FOLDER
from sepo.engines.jobs import ATTEMPTS, JobFolder
from sepo.errors import UserError, one_line
from sepo.work import Counts, Job, Kind, Progress, Unit

# Tasks that wait for a worker at a time.
_IN_FLIGHT = 1000
_folder: JobFolder | None = None
_kind: Kind | None = None


class OnRay:
    """The engine.

    Args:
        address: of the cluster, as for `ray.init`; "" for that of RAY_ADDRESS, or a cluster of this machine alone.
        folder: where the command writes; all nodes must see it under this name.
    """

    def __init__(self, address: str, folder: Path):
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ImportError:
            raise UserError("engine ray needs the package ray: run `pip install 'sepo[ray]'`") from None
        self._ray, self.folder = ray, Path(os.path.abspath(folder)) / FOLDER
        self._started = not ray.is_initialized()
        if self._started:
            try:
                ray.init(address=address or None, log_to_driver=False, logging_level="ERROR")
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise UserError(f"engine ray:{address}: no cluster answers ({one_line(error, 200)})") from None

    def do(self, job: Job, progress: Progress) -> dict[str, Counts]:
        folder = JobFolder.publish(self.folder, job)
        counts = {name: found for name in sorted(folder.done()) if (found := folder.counts(name)) is not None}
        progress(sum(folder.by_name[name].size for name in counts))
        waiting = [unit for unit in job.units if unit.name not in counts]
        task = self._ray.remote(
            num_cpus=1,
            num_gpus=int(job.device == "cuda"),
            max_retries=0,  # counted here
            max_calls=0,  # the process, and the model in its memory, serve the next unit, also on a GPU
            scheduling_strategy="SPREAD",
        )(do_unit)
        attempts: dict[str, int] = {}
        running: dict[Any, Unit] = {}
        while waiting or running:
            while waiting and len(running) < _IN_FLIGHT:
                unit = waiting.pop(0)
                running[task.remote(str(folder.path), unit.name)] = unit
            ready, _ = self._ray.wait(list(running), num_returns=1)
            unit = running.pop(ready[0])
            try:
                counts[unit.name] = self._ray.get(ready[0])
                progress(unit.size)
            except self._ray.exceptions.RayError as error:
                attempts[unit.name] = attempts.get(unit.name, 0) + 1
                if attempts[unit.name] == ATTEMPTS:
                    reason = one_line(getattr(error, "cause", None) or error, 300)
                    remain = f"{len(job.units) - len(counts)} of {len(job.units)} units remain"
                    raise UserError(
                        f"{unit.name} of '{job.title}' took {ATTEMPTS} workers down (the last one: {reason}); {remain}"
                    ) from None
                waiting.insert(0, unit)
        folder.remove()
        return counts

    def help(self) -> bool:
        return False

    def check_wanted(self) -> None:
        pass

    def finish(self) -> None:
        pass

    def close(self) -> None:
        if self._started:
            self._ray.shutdown()


def do_unit(path: str, name: str) -> Counts:
    """Do a unit in a worker of Ray; the model of the last job is kept."""
    global _folder, _kind
    if _folder is None or str(_folder.path) != path or name not in _folder.by_name:
        _folder, _kind = _read(Path(path)), None
    if (found := _folder.counts(name)) is not None:
        return found
    if _kind is None:
        _kind = _folder.job.kind_class()(_folder.job.settings)
    ((unit, write),) = _kind([_folder.by_name[name]], lambda done: None)
    counts = write()
    _folder.finish(unit, counts)
    return counts


def _read(path: Path, wait: float = 10.0) -> JobFolder:
    """The job of a folder; network file systems may show a new file after some seconds."""
    deadline = time.monotonic() + wait
    while (folder := JobFolder.read(path)) is None:
        if time.monotonic() > deadline:
            raise UserError(f"'{path}' is not seen on this node: all nodes need the folder of the command")
        time.sleep(0.2)
    return folder
