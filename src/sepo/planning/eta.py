"""The time that a run has left, in one line: the current stage, its progress, and the seconds to the end.

Seconds are estimated from the FLOPs of every stage and corrected by what finished stages took, so a busy machine shows
within the first scoring pass.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from sepo import bars, processes
from sepo.models.devices import choose_device
from sepo.numbers import duration
from sepo.planning.plan import SHARED, Planner, plan_stages
from sepo.planning.sizes import method_sizes
from sepo.planning.throughput import estimated, stage_rate
from sepo.processes import log
from sepo.runs.method import Method
from sepo.runs.pipeline import Extension
from sepo.stages.cost import Cost, Estimate

# Seconds of a stage's progress before its own speed is used.
_ENOUGH = 2.0


class Eta:
    """Expected and spent seconds of the stages of a run.

    Attributes:
        expected: estimated seconds of each stage, in order.
        kinds: the main kind of compute of each stage ("train", "score", "generate", ...); estimates of one kind share
            their error.
    """

    def __init__(
        self, estimates: Mapping[str, Sequence[Estimate]], rate: float, clock: Callable[[], float] = time.monotonic
    ):
        self.expected: dict[str, float] = {}
        self.kinds: dict[str, str] = {}
        self._clock = clock
        self._spent: dict[str, float] = {}  # of stages that ran, not of reused ones
        self._left = list(estimates)
        self._now: tuple[str, float] | None = None
        self._part: tuple[float, float] | None = None  # start and finished share of the current part
        for name, parts in estimates.items():
            seconds = {part.kind: 0.0 for part in parts}
            for part in parts:
                seconds[part.kind] += estimated(part, rate).seconds(part)
            self.expected[name] = sum(seconds.values())
            self.kinds[name] = max(seconds, key=seconds.__getitem__, default="")

    def __str__(self) -> str:
        parts = [f"{name} {duration(seconds)}" for name, seconds in self.expected.items() if seconds >= 1]
        return f"about {duration(sum(self.expected.values()))}: {', '.join(parts)}"

    def begin(self, name: str) -> None:
        """A stage begins; earlier stages are over."""
        self._now, self._part = (name, self._clock()), None
        if name in self._left:
            del self._left[: self._left.index(name) + 1]

    def end(self, name: str, done: bool) -> None:
        """A stage is over; `done`: it ran, its result was not reused."""
        if self._now is not None and done:
            self._spent[name] = self._clock() - self._now[1]
        self._now = self._part = None

    def part(self, share: float) -> None:
        """Progress of a part of the current stage, from 0 to 1; 0 begins a part."""
        began = self._clock() if self._part is None or share < self._part[1] else self._part[0]
        self._part = began, share

    def remaining(self) -> float:
        """Seconds left of the run."""
        return self._rest_of_stage() + sum(self._corrected(name) for name in self._left)

    def share(self) -> float:
        """Finished share of the run by time, from 0 to 1; reused stages do not count."""
        spent = sum(self._spent.values()) + (self._clock() - self._now[1] if self._now else 0.0)
        whole = spent + self.remaining()
        return spent / whole if whole else 1.0

    def _corrected(self, name: str) -> float:
        """Estimated seconds of a stage, times the error of its kind so far, or of all stages."""
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
        # Scoring and training have one part; an evaluation has several.
        return max(rest, of_part) if self.kinds.get(name) == "generate" else of_part


class RunLine:
    """The line of a run. Bars of its parts report to it instead of being drawn (`bars.show_in`)."""

    def __init__(self, eta: Eta, names: list[str]):
        self.eta, self.names = eta, names
        self.stage = ""
        self.bar = bars.new_bar(
            total=1.0, bar_format="{percentage:3.0f}%|{bar:20}| {desc}", leave=False, desc="starting"
        )

    @contextmanager
    def during(self, name: str) -> Iterator[None]:
        """While a stage runs."""
        self.stage = name
        self.eta.begin(name)
        self._draw("", force=True)
        done = False
        try:
            yield
            done = True
        finally:
            self.eta.end(name, done)

    def passed(self, name: str) -> None:
        """The result of a stage was reused."""
        self.eta.begin(name)
        self.eta.end(name, done=False)

    def show(self, text: str, share: float) -> None:
        """Show the text and finished share (0 to 1) of a part of the stage."""
        self.eta.part(share)
        self._draw(text)

    def _draw(self, text: str, force: bool = False) -> None:
        at = self.names.index(self.stage) + 1 if self.stage in self.names else 0
        of = f" ({at} of {len(self.names)})" if at else ""
        left = duration(self.eta.remaining())
        self.bar.n = min(self.eta.share(), 1.0)
        self.bar.set_description_str(f"{self.stage}{of}{': ' if text else ''}{text}; {left} left", refresh=False)
        bars.draw(self.bar, force)

    def close(self) -> None:
        self.bar.close()


# Shorter runs are not announced.
_ANNOUNCED_SECONDS = 10.0


def eta_of(method: Method, extension: Extension | None = None, until: str | None = None) -> Eta:
    """Estimate the stages of a run whose pairs are there, and announce them."""
    planner = Planner(done={"data": method.pairs, "policy_pairs": method.policy_pairs})
    planned = Method(method.recipe, planner, judge=method.judge)
    plan_stages(planned, extension, until)
    kind, devices = choose_device(method.recipe.device).type, processes.size()
    estimates = {
        role: estimates_of_process(stage.cost(sizes), devices)
        for sizes in [method_sizes(method, kind, devices)]
        for role, stage in planner.stages.items()
        if role not in planner.done
    }
    eta = Eta(estimates, stage_rate(kind))
    if sum(eta.expected.values()) > _ANNOUNCED_SECONDS:
        log(f"{len(eta.expected)} stages, {eta}")
    return eta


def estimates_of_process(cost: Cost | None, devices: int) -> list[Estimate]:
    """The compute of one process; the processes of a launch share scoring and training."""
    parts = () if cost is None else cost.estimates or ()
    return [part.times(1 / devices) if part.kind in SHARED else part for part in parts]


@contextmanager
def one_line(eta: Eta | None) -> Iterator[RunLine | None]:
    """Show the time left of a run in one line, in the main process."""
    if eta is None or not processes.is_main():
        yield None
        return
    line = RunLine(eta, list(eta.expected))
    try:
        with bars.show_in(line):
            yield line
    finally:
        line.close()
