"""Bars of progress: drawn in a terminal and a notebook, written line by line into a log, or told to a run's one line.

In a log file a bar that redraws itself is a single line of a hundred kilobytes; here it is a line now and then. Within
a run the bars of its parts are not drawn: they report to the line that the run shows (`show_in`).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol
from weakref import WeakSet

from tqdm import tqdm

from sepo.numbers import duration as duration  # planning/eta.py and report/run_summary.py read it from here

# Seconds between two drawings, and between two lines of a log.
_DRAWN, _LOGGED = 0.2, 30.0
_bars: WeakSet[tqdm] = WeakSet()
_shower: Shower | None = None


class Shower(Protocol):
    """What shows the progress of parts as its own."""

    def show(self, text: str, share: float) -> None:
        """The part at hand in words, and how much of it is done, from 0 to 1."""


class Bar(Protocol):
    """What a piece of work needs of its bar."""

    n: float

    def update(self, n: float = 1) -> Any: ...
    def set_postfix(self, shown: Mapping[str, Any]) -> Any: ...
    def close(self) -> Any: ...
    def __enter__(self) -> Any: ...
    def __exit__(self, *error: Any) -> Any: ...


def redraws(stream: Any = None) -> bool:
    """Can a line be drawn again where progress is shown: in a terminal, or in a notebook?"""
    stream = sys.stderr if stream is None else stream
    return stream.isatty() or _in_notebook()


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")  # where it runs, it is imported
    shell = ipython.get_ipython() if ipython is not None else None
    return hasattr(shell, "kernel")


class _Lines(tqdm):
    """A bar for a log: what it would draw stands on a line of its own, every half minute."""

    @staticmethod
    def status_printer(file: Any) -> Any:
        def write(text: str) -> None:
            if text.strip():
                file.write(f"{text.rstrip()}\n")
                file.flush()

        return write

    def close(self) -> None:
        # tqdm ends a bar that stays with an empty line, for one that is being drawn.
        if not self.disable:  # type: ignore[has-type]
            if self.leave and self.n:
                self.display()
            self.disable = True
            self._decr_instances(self)


class _Part:
    """A bar that is shown in another's line."""

    def __init__(self, shower: Shower, total: float, desc: str = "", initial: float = 0, unit: str = "it", **_: Any):
        self.n, self.total = initial, max(total, 1)
        self._shower, self._what, self._unit, self._shown = shower, desc.strip(), unit, ""
        self._tell()

    def update(self, n: float = 1) -> None:
        self.n += n
        self._tell()

    def set_postfix(self, shown: Mapping[str, Any]) -> None:
        self._shown = "".join(f", {name} {value}" for name, value in shown.items())
        self._tell()

    def close(self) -> None:
        pass

    def __enter__(self) -> _Part:
        return self

    def __exit__(self, *error: Any) -> None:
        pass

    def _tell(self) -> None:
        text = f"{self._what}, {self._unit} {self.n:.0f} of {self.total:.0f}{self._shown}"
        self._shower.show(text, min(self.n / self.total, 1.0))


def progress_bar(shown: bool, **settings: Any) -> Bar:
    """A bar of tqdm, or one that a run shows as its own; where it is drawn, tqdm's variables (TQDM_DISABLE) are heeded.

    Args:
        shown: False makes a bar that is never seen.
        settings: of tqdm: total, desc, initial, unit...
    """
    if shown and _shower is not None:
        return _Part(_shower, **settings)
    return new_bar(**settings) if shown else tqdm(**settings, disable=True)


def new_bar(**settings: Any) -> tqdm:
    """A bar of tqdm, as this place can show it."""
    if redraws():
        bar = tqdm(**{"mininterval": _DRAWN} | settings)
    else:
        # With a delay nothing is written before something was done.
        bar = _Lines(**{"mininterval": _LOGGED, "miniters": 1, "delay": 1e-3} | settings)
    bar.drawn_at = time.monotonic() if redraws() else float("-inf")
    _bars.add(bar)
    return bar


def draw(bar: tqdm, force: bool = False) -> None:
    """Draw a bar again, at most as often as its place allows."""
    if bar.disable:
        return
    now = time.monotonic()
    if now - bar.drawn_at >= bar.mininterval or (force and redraws()):
        bar.drawn_at = now
        bar.refresh()


@contextmanager
def show_in(shower: Shower) -> Iterator[None]:
    """Let `shower` show the progress of all bars that are made meanwhile."""
    global _shower
    before, _shower = _shower, shower
    try:
        yield
    finally:
        _shower = before


def end_bars() -> None:
    """Close the bars that an error left open, so that the next line does not stand behind one."""
    for bar in list(_bars):
        bar.close()
