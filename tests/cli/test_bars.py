"""Progress in a log file: a line every half minute at most, however often a bar is told something."""

from __future__ import annotations

import io
import sys
from functools import partial

import pytest
from tqdm import tqdm

from sepo import bars


@pytest.fixture
def clock(monkeypatch):
    """A log that is no terminal, and a clock that the test moves."""
    now = [1000.0]
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    monkeypatch.setattr(bars.time, "monotonic", lambda: now[0])
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    monkeypatch.setattr(bars, "_Lines", partial(bars._Lines, disable=False))  # TQDM_DISABLE=1 holds in tests
    return now, log


@pytest.mark.parametrize("told", ["postfix", "message", "refresh", "both"])
def test_a_log_gets_a_line_every_half_minute_at_most(clock, told):
    now, log = clock
    bar = bars.progress_bar(True, total=200, desc="training", unit="step", file=log)
    for step in range(100):
        now[0] += 1.0
        bar.update(1)
        if told in ("postfix", "both"):
            bar.set_postfix({"loss": f"{step}"})
        if told in ("message", "both"):
            tqdm.write("a message", file=log)
        if told == "refresh":
            bar.refresh()
    lines = [line for line in log.getvalue().splitlines() if "training" in line]
    assert 2 <= len(lines) <= 4
    if told == "postfix":
        assert "loss=" in lines[-1]
    bar.close()
    assert len([line for line in log.getvalue().splitlines() if "training" in line]) <= len(lines) + 1
    assert "\r" not in log.getvalue()


def test_a_bar_that_ends_where_its_last_line_was_written_does_not_repeat_it(clock):
    now, log = clock
    bar = bars.progress_bar(True, total=2, desc="reading", file=log)
    now[0] += 40
    bar.update(2)
    bar.close()
    assert log.getvalue().count("reading") == 1
