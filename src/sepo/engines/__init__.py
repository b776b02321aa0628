"""Engines: who does the units of work of a run (wing).

    local            this process, or the processes of a launch (`sepo.work.Local`)
    files[:FOLDER]   any number of processes that see one folder, through files in it (`files`)
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
HELP = "who does the work: local, files[:FOLDER] or ray[:ADDRESS] (docs/how-to/many-workers.md)"


def check_engine(text: str) -> None:
    """Raise a UserError for an unknown engine."""
    name = text.partition(":")[0]
    if name not in ("local", *ENGINES) or text == "local:":
        raise UserError(
            f"engine is '{text}'{nearest(name, ['local', *ENGINES])}: expected local, files[:FOLDER] or ray[:ADDRESS]"
        )


@contextlib.contextmanager
def use(text: str, folder: Path) -> Iterator[None]:
    """Let an engine do the units of the stages in this context.

    Args:
        text: "local", "files:FOLDER", ...
        folder: where the command writes.

    Raises:
        UserError: no such engine, or it cannot start; a launch of several processes with another engine than local.
    """
    check_engine(text)
    name, _, place = text.partition(":")
    if name == "local":
        yield
        return
    if processes.launched() > 1:
        raise UserError(f"engine {name} and a launch of several processes share work in two ways: start one process")
    module, _, class_name = ENGINES[name].partition(":")
    engine = getattr(importlib.import_module(module), class_name)(place, folder)
    with contextlib.closing(engine), work.using(engine):
        yield
