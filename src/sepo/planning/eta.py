"""What remains of a run, in one line: the stage at hand, its own progress, and the time that is left.

Times are expected from the FLOPs of every stage (`costs.py`), and corrected by what the stages so far took: a machine
that is busy, or slower than its matmul says, shows within the first pass.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from sepo import bars, processes
from sepo.planning.throughput import estimated
from sepo.stages.stage import Work

# Seconds of a stage's own progress before its speed is believed.
_ENOUGH = 2.0


class Eta:
    """Expected and spent seconds of the stages of a run.

    Attributes:
        expected: seconds of each stage before any was measured, by name, in their order.
        kinds: what most of a stage is ("train", "score", "generate", ...): the same kind has the same error.
    """

    def __init__(self, works: Mapping[str, Sequence[Work]], rate: float, clock: Callable[[], float] = time.monotonic):
        self.expected: dict[str, float] = {}
        self.kinds: dict[str, str] = {}
        self._clock = clock
        self._spent: dict[str, float] = {}  # of stages that were done now, not of those that stood
        self._left = list(works)
        self._now: tuple[str, float] | None = None
        self._part: tuple[float, float] | None = None  # when the part at hand began, and how much of it is done
        for name, parts in works.items():
            seconds = {work.kind: 0.0 for work in parts}
            for work in parts:
                seconds[work.kind] += estimated(work, rate).seconds(work)
            self.expected[name] = sum(seconds.values())
            self.kinds[name] = max(seconds, key=seconds.__getitem__, default="")

    def __str__(self) -> str:
        parts = [f"{name} {bars.duration(seconds)}" for name, seconds in self.expected.items() if seconds >= 1]
        return f"about {bars.duration(sum(self.expected.values()))}: {', '.join(parts)}"

    def begin(self, name: str) -> None:
        """A stage is looked at: those before it are over."""
        self._now, self._part = (name, self._clock()), None
        if name in self._left:
            del self._left[: self._left.index(name) + 1]

    def end(self, name: str, done: bool) -> None:
        """A stage is over; `done` says whether it had to be done."""
        if self._now is not None and done:
            self._spent[name] = self._clock() - self._now[1]
        self._now = self._part = None

    def part(self, share: float) -> None:
        """A part of the stage at hand that shows its progress has come so far, from 0 to 1; 0 begins a part."""
        began = self._clock() if self._part is None or share < self._part[1] else self._part[0]
        self._part = began, share

    def remaining(self) -> float:
        """Seconds until the run is done."""
        return self._rest_of_stage() + sum(self._corrected(name) for name in self._left)

    def share(self) -> float:
        """How much of the run is done, from 0 to 1, by time; of stages that stood already nothing is counted."""
        spent = sum(self._spent.values()) + (self._clock() - self._now[1] if self._now else 0.0)
        whole = spent + self.remaining()
        return spent / whole if whole else 1.0

    def _corrected(self, name: str) -> float:
        """Expected seconds of a stage, times the error of its kind so far, or of all stages."""
        alike = [other for other in self._spent if self.kinds.get(other) == self.kinds.get(name)]
        for others in (alike, list(self._spent)):
            expected = sum(self.expected.get(other, 0.0) for other in others)
            if expected > 0.5:
                return self.expected.get(name, 0.0) * sum(self._spent[other] for other in others) / expected
        return self.expected.get(name, 0.0)

    def _rest_of_stage(self) -> float:
        if self._now is None:
            return 0.0
        name, began = self._now
        now = self._clock()
        rest = max(self._corrected(name) - (now - began), 0.0)
        if self._part is None:
            return rest
        started, share = self._part
        if share <= 0 or now - started < _ENOUGH:
            return rest
        of_part = (now - started) * (1 - share) / share
        # Reading and training are one part; measuring has several, of which this is one.
        return max(rest, of_part) if self.kinds.get(name) == "generate" else of_part


class RunLine:
    """The one line of a run. Bars of its parts report to it instead of being drawn (`bars.show_in`)."""

    def __init__(self, outlook: Eta, names: list[str]):
        self.outlook, self.names = outlook, names
        self.stage = ""
        self.bar = bars.new_bar(
            total=1.0, bar_format="{percentage:3.0f}%|{bar:20}| {desc}", leave=False, desc="starting"
        )

    @contextmanager
    def during(self, name: str) -> Iterator[None]:
        """While a stage is being done."""
        self.stage = name
        self.outlook.begin(name)
        self._draw("", force=True)
        done = False
        try:
            yield
            done = True
        finally:
            self.outlook.end(name, done)

    def passed(self, name: str) -> None:
        """A stage stood already."""
        self.outlook.begin(name)
        self.outlook.end(name, done=False)

    def show(self, text: str, share: float) -> None:
        """Progress of a part of the stage: its text, and how much of it is done, from 0 to 1."""
        self.outlook.part(share)
        self._draw(text)

    def _draw(self, text: str, force: bool = False) -> None:
        at = self.names.index(self.stage) + 1 if self.stage in self.names else 0
        of = f" ({at} of {len(self.names)})" if at else ""
        left = bars.duration(self.outlook.remaining())
        self.bar.n = min(self.outlook.share(), 1.0)
        self.bar.set_description_str(f"{self.stage}{of}{': ' if text else ''}{text}; {left} left", refresh=False)
        bars.draw(self.bar, force)

    def close(self) -> None:
        self.bar.close()


@contextmanager
def one_line(outlook: Eta | None) -> Iterator[RunLine | None]:
    """Show what remains of a run in one line, in the main process."""
    if outlook is None or not processes.is_main():
        yield None
        return
    line = RunLine(outlook, list(outlook.expected))
    try:
        with bars.show_in(line):
            yield line
    finally:
        line.close()
