"""Progress bars: redrawn in a terminal or notebook, written as lines into a log, or shown in the bar of a run.

A redrawn bar would fill a log file with one line of a hundred kilobytes, so a log gets a new line every half minute.
Within a run the bars of its parts are not drawn: they report to the bar of the run (`show_in`).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol
from weakref import WeakSet

from tqdm import tqdm

# Seconds between two drawings of a bar, and between two lines of a log.
_DRAWN, _LOGGED = 0.2, 30.0
_bars: WeakSet[tqdm] = WeakSet()
_shower: Shower | None = None


class Shower(Protocol):
    """Shows the progress of the current part of a run."""

    def show(self, text: str, share: float) -> None:
        """Show a description of the current part and its progress, 0 to 1."""


class Bar(Protocol):
    """The methods of tqdm that callers use."""

    n: float

    def update(self, n: float = 1) -> Any: ...
    def set_postfix(self, shown: Mapping[str, Any]) -> Any: ...
    def close(self) -> Any: ...
    def __enter__(self) -> Any: ...
    def __exit__(self, *error: Any) -> Any: ...


def redraws() -> bool:
    """Is progress shown in a terminal or a notebook, where a line can be redrawn?"""
    return sys.stderr.isatty() or _in_notebook()


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")  # a running IPython is imported
    shell = ipython.get_ipython() if ipython is not None else None
    return hasattr(shell, "kernel")


class _Lines(tqdm):
    """A bar for a log: it writes its state as a new line every half minute, whoever asks for a refresh.

    Otherwise every optimizer step, and every message beside the bar (`tqdm.write`), would write the bar again.
    """

    def __init__(self, *args: Any, **settings: Any):
        self.written_at, self.written = time.monotonic(), -1.0
        super().__init__(*args, **settings)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        now = time.monotonic()
        if now - self.written_at >= self.mininterval:
            self.written_at, self.written = now, self.n
            self.sp(str(self) if msg is None else msg)  # without moving the cursor to the bar's own line

    def clear(self, *args: Any, **settings: Any) -> None:
        """Lines that are written stay."""

    def set_postfix(self, ordered_dict: Any = None, refresh: bool = False, **more: Any) -> None:
        super().set_postfix(ordered_dict, refresh=False, **more)

    @staticmethod
    def status_printer(file: Any) -> Any:
        def write(text: str) -> None:
            if text.strip():
                file.write(f"{text.rstrip()}\n")
                file.flush()

        return write

    def close(self) -> None:
        # tqdm would end the bar with an empty line.
        if not self.disable:  # type: ignore[has-type]
            if self.leave and self.n and self.n != self.written:
                self.written_at = float("-inf")
                self.display()
            self.disable = True
            self._decr_instances(self)


class _Part:
    """A bar that reports to the bar of a run."""

    def __init__(self, shower: Shower, total: float, desc: str = "", initial: float = 0, unit: str = "it", **_: Any):
        self.n, self.total = initial, max(total, 1)
        self._shower, self._what, self._unit, self._postfix = shower, desc.strip(), unit, ""
        self._show()

    def update(self, n: float = 1) -> None:
        self.n += n
        self._show()

    def set_postfix(self, shown: Mapping[str, Any]) -> None:
        self._postfix = "".join(f", {name} {value}" for name, value in shown.items())
        self._show()

    def close(self) -> None:
        pass

    def __enter__(self) -> _Part:
        return self

    def __exit__(self, *error: Any) -> None:
        pass

    def _show(self) -> None:
        text = f"{self._what}, {self._unit} {self.n:.0f} of {self.total:.0f}{self._postfix}"
        self._shower.show(text, min(self.n / self.total, 1.0))


def progress_bar(shown: bool, **settings: Any) -> Bar:
    """A tqdm bar, or within a run a bar that reports to the bar of the run. Drawn bars obey TQDM_DISABLE.

    Args:
        shown: False makes an invisible bar.
        settings: keywords of tqdm: total, desc, initial, unit...
    """
    if shown and _shower is not None:
        return _Part(_shower, **settings)
    return new_bar(**settings) if shown else tqdm(**settings, disable=True)


def new_bar(**settings: Any) -> tqdm:
    """A tqdm bar: redrawn, or as lines of a log."""
    if redraws():
        bar = tqdm(**{"mininterval": _DRAWN} | settings)
    else:
        # The delay avoids a line before any progress.
        bar = _Lines(**{"mininterval": _LOGGED, "miniters": 1, "delay": 1e-3} | settings)
    bar.drawn_at = time.monotonic() if redraws() else float("-inf")
    _bars.add(bar)
    return bar


def draw(bar: tqdm, force: bool = False) -> None:
    """Redraw a bar, no more often than its `mininterval`."""
    if bar.disable:
        return
    now = time.monotonic()
    if now - bar.drawn_at >= bar.mininterval or (force and redraws()):
        bar.drawn_at = now
        if hasattr(bar, "written_at"):  # a bar of lines
            bar.written_at = float("-inf")
        bar.refresh()


@contextmanager
def show_in(shower: Shower) -> Iterator[None]:
    """Let `shower` show the progress of all bars that are created in this context."""
    global _shower
    previous, _shower = _shower, shower
    try:
        yield
    finally:
        _shower = previous


def end_bars() -> None:
    """Close the bars that an error left open, so that the next output starts on a new line."""
    for bar in list(_bars):
        bar.close()
