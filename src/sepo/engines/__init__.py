"""Engines: who does the units of work of a run (wing).

    local            this process, or the processes of a launch (`sepo.work.Local`)
    files[:FOLDER]   any number of processes that see one folder, through files in it (`files`)
    files@N[:FOLDER] the same; N processes do a unit of a pass together, for a model that no device holds (`groups`)
    ray[:ADDRESS]    tasks on a Ray cluster (`on_ray`)

Another engine is a module with a class (`sepo.work.Engine`, and `close`), and a line in `ENGINES`.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path

from sepo import processes, work
from sepo.errors import UserError, nearest

# Module and class of each engine; the class is called with the text after the colon and the command's folder.
ENGINES = {"files": "sepo.engines.files:Files", "ray": "sepo.engines.on_ray:OnRay"}
EXPECTED = "local, files[:FOLDER], files@PROCESSES[:FOLDER] or ray[:ADDRESS]"
HELP = f"who does the work: {EXPECTED} (docs/how-to/many-workers.md)"


def check_engine(text: str) -> None:
    """Raise a UserError for an unknown engine."""
    name, number, _ = _parts(text)
    if name not in ("local", *ENGINES) or text == "local:":
        raise UserError(f"engine is '{text}'{nearest(name, ['local', *ENGINES])}: expected {EXPECTED}")
    if number and name != "files":
        raise UserError(f"engine is '{text}': only files does a unit in several processes, as in files@4")
    if number and not (number.isdecimal() and int(number) > 0):
        raise UserError(f"engine is '{text}': expected a number of processes after the @, as in files@4")


def _parts(text: str) -> tuple[str, str, str]:
    """The name of an engine, the number of processes for a unit, and the place: FILES@NUMBER:PLACE."""
    first, _, place = text.partition(":")
    name, _, number = first.partition("@")
    return name, number, place


@contextlib.contextmanager
def use(text: str, folder: Path, passes: bool = False) -> Iterator[None]:
    """Let an engine do the units of the stages in this context.

    Args:
        text: "local", "files:FOLDER", ...
        folder: where the command writes.
        passes: the units are passes of models, which groups of processes may do (engine files).

    Raises:
        UserError: no such engine, or it cannot start; a launch of several processes where it may not be.
    """
    check_engine(text)
    name, number, place = _parts(text)
    if name == "local":
        yield
        return
    if number and not passes:
        raise UserError(f"engine is '{text}': one process does a unit of this command; leave @{number} out")
    if processes.launched() > 1 and not (passes and name == "files"):
        raise UserError(f"engine {name} and a launch of several processes share work in two ways: start one process")
    module, _, class_name = ENGINES[name].partition(":")
    more = {"processes": int(number)} if number else {}
    engine = getattr(importlib.import_module(module), class_name)(place, folder, **more)
    from sepo.engines.groups import helping

    with contextlib.closing(engine), work.using(engine), helping():
        yield
