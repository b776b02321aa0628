"""The time that a run has left, in one line: the current stage, its progress, and the seconds to the end.

Seconds come from this run alone: the progress of the current stage, and finished stages that did the same work on
another model or other pairs. A stage like no other so far is named as not counted, because FLOPs alone were off by a
factor of two and more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from sepo import bars, processes
from sepo.models.devices import choose_device
from sepo.numbers import duration
from sepo.planning.cost import Cost, Estimate
from sepo.planning.plan import SHARED, Planner, plan_stages
from sepo.planning.sizes import method_sizes
from sepo.planning.stages import cost_of
from sepo.runs.method import NOTHING, Extension, Method

# Seconds of progress, and share of the stage, before its speed is used.
_SECONDS, _SHARE = 2.0, 0.1


class Eta:
    """Work and seconds of the stages of a run.

    The first bit of progress is not measured: it contains the loading of a model and first-time costs.

    Attributes:
        work: FLOPs of each bar of each stage, in order; stages without any take no time.
    """

    def __init__(self, estimates: Mapping[str, Sequence[Estimate]], clock: Callable[[], float] = time.monotonic):
        self.work: dict[str, list[float]] = {}
        self._like: dict[str, tuple] = {}  # stages with equal values take equally long for a FLOP
        self._clock = clock
        self._spent: dict[str, float] = {}  # of stages that ran, not of reused ones
        self._left = list(estimates)
        for name, parts in estimates.items():
            kinds = {part.kind for part in parts if part.flops}
            kind = next((kind for kind in ("generate", "train", "score") if kind in kinds), "")
            main = [part for part in parts if part.kind == kind and part.flops]
            self.work[name] = [part.flops for part in main]
            self._like[name] = _like(main[0]) if main else ()
        self._reset(None)

    def _reset(self, name: str | None) -> None:
        self._name, self._began = name, self._clock()
        self._bar, self._share = -1, 1.0
        self._events: list[tuple[float, float]] = []  # the first and the last progress: seconds, finished FLOPs

    def begin(self, name: str) -> None:
        """A stage begins; earlier stages are over."""
        self._reset(name)
        if name in self._left:
            del self._left[: self._left.index(name) + 1]

    def end(self, name: str, done: bool) -> None:
        """A stage is over; `done`: it ran, its result was not reused."""
        if self._name is not None and done:
            self._spent[name] = self._clock() - self._began
        self._reset(None)

    def part(self, share: float) -> None:
        """Progress of a bar of the current stage, from 0 to 1; a smaller share than before begins the next bar."""
        begins = share < self._share or self._bar < 0
        self._bar, self._share = self._bar + begins, share
        if not begins:
            self._events = [*self._events[:1], (self._clock(), self._finished())]

    def remaining(self) -> tuple[float, list[str]]:
        """Seconds left of the run, and the stages that they do not count: those that nothing was measured for."""
        rests = {name: self._expected(name) for name in self._left}
        if self._name is not None:
            rests = {self._name: self._rest_of_stage(), **rests}
        return sum(rest for rest in rests.values() if rest), [name for name, rest in rests.items() if rest is None]

    def share(self) -> float:
        """Finished share of the run's FLOPs, from 0 to 1."""
        left = sum(sum(self.work[name]) for name in self._left)
        if self._name is not None:
            left += sum(self.work.get(self._name, [])) - self._finished()
        whole = sum(map(sum, self.work.values()))
        return 1 - left / whole if whole else 1.0

    def _finished(self) -> float:
        bars_of = self.work.get(self._name or "", [])
        if self._bar < 0:
            return 0.0
        return sum(bars_of[: self._bar]) + self._share * sum(bars_of[self._bar : self._bar + 1])

    def _expected(self, name: str) -> float | None:
        """Seconds of a stage, by finished stages like it."""
        if not self.work.get(name):
            return 0.0
        alike = [other for other in self._spent if self._like.get(other) == self._like[name]]
        known = sum(sum(self.work[other]) for other in alike)
        return sum(self.work[name]) * sum(self._spent[other] for other in alike) / known if known else None

    def _rest_of_stage(self) -> float | None:
        now, name = self._clock(), self._name or ""
        if len(self._events) == 2:
            (started, before), (at, finished) = self._events
            whole = sum(self.work.get(name, []))
            if at - started >= _SECONDS and finished - before >= _SHARE * whole > 0:
                return max((whole - finished) * (at - started) / (finished - before) - (now - at), 0.0)
        expected, spent = self._expected(name), now - self._began
        # Later an error of the expected seconds would be a large share of what remains.
        return None if expected is None or spent > 0.2 * expected > 0 else expected - spent


def _like(part: Estimate) -> tuple:
    targets = round(part.targets / part.tokens, 2) if part.tokens else 0
    return part.kind, part.model.name, part.dtype, str(part.lora), part.quantization, part.width, targets


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
        self.bar.n = min(self.eta.share(), 1.0)
        self.bar.set_description_str(
            f"{self.stage}{of}{': ' if text else ''}{text}; {_left(*self.eta.remaining())}", refresh=False
        )
        bars.draw(self.bar, force)

    def close(self) -> None:
        self.bar.close()


def _left(seconds: float, unknown: list[str]) -> str:
    if not seconds and unknown:
        return "measuring"
    return f"{duration(seconds)} left{', without ' if unknown else ''}{', '.join(unknown)}"


def eta_of(method: Method, extension: Extension = NOTHING, until: str | None = None) -> Eta:
    """The stages of a run whose pairs are there."""
    planner = Planner(done={"data": method.pairs, "policy_pairs": method.policy_pairs})
    planned = Method(method.recipe, planner, extension=extension)
    plan_stages(planned, extension, until)
    kind, devices = choose_device(method.recipe.device).type, processes.size()
    estimates = {
        role: estimates_of_process(cost_of(stage, sizes), devices)
        for sizes in [method_sizes(method, kind, devices)]
        for role, stage in planner.stages.items()
        if role not in planner.done
    }
    return Eta(estimates)


def estimates_of_process(cost: Cost, devices: int) -> list[Estimate]:
    """The compute of one process; the processes of a launch share scoring and training."""
    return [part.times(1 / devices) if part.kind in SHARED else part for part in cost.estimates or ()]


@contextmanager
def one_line(eta: Eta | None) -> Iterator[RunLine | None]:
    """Show the time left of a run in one line, in the main process."""
    if eta is None or not processes.is_main():
        yield None
        return
    line = RunLine(eta, list(eta.work))
    try:
        with bars.show_in(line):
            yield line
    finally:
        line.close()
