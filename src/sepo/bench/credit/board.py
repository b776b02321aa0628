"""The leaderboard: gain of every rule at one KL, and the headroom that it closes, task by task."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes

from sepo.bench.credit.grids import ALL, TRUTH
from sepo.bench.credit.headroom import Headroom, headroom
from sepo.numbers import MISSING
from sepo.report.figures import GREY, make_figure, write_png
from sepo.study.crossed import smallest_difference
from sepo.study.curves import at_kl_by_prompt, reaches

ENDS = (ALL, TRUTH)  # the room lies between them
LOWEST = -7.0  # of the picture


class Row(NamedTuple):
    """One rule on one task.

    Attributes:
        gain: mean gain at the KL; a run that did not get there counts with its end.
        reached: number of seeds at which the run reached the KL.
        closed: headroom closed, over the seeds that the rule, `all` and `truth` share; None with fewer than three.
    """

    seeds: int
    gain: float
    reached: int
    closed: Headroom | None


def rows_of(runs: Iterable[Mapping[str, Any]], kl: float) -> dict[str, Row]:
    """The row of each rule from the runs of one task's comparison (`compare.json`)."""
    gains: dict[str, dict[int, np.ndarray]] = {ALL: {}, TRUTH: {}}
    reached: Counter[str] = Counter()
    for run in runs:
        by_prompt = at_kl_by_prompt(run["points"], kl)
        if by_prompt is not None:
            gains.setdefault(run["variant"], {})[run["seed"]] = by_prompt
            reached[run["variant"]] += reaches(run["points"], kl)
    rows = {}
    for rule, by_seed in gains.items():
        common = sorted(set(by_seed) & set(gains[ALL]) & set(gains[TRUTH]))
        closed = None
        if len(common) >= 3:
            closed = headroom(*(np.stack([gains[name][seed] for seed in common]) for name in (rule, ALL, TRUTH)))
        if by_seed:
            mean = float(np.mean([values.mean() for values in by_seed.values()]))
            rows[rule] = Row(len(by_seed), mean, reached[rule], closed)
    return rows


def page(tasks: Mapping[str, tuple[Sequence[Mapping[str, Any]], float]]) -> str:
    """The leaderboard in Markdown; `tasks` gives the runs and the KL of each."""
    lines = ["# Token credit: headroom closed", ""]
    lines += ["| task | KL | all tokens | truth | room (95 %) | detectable |", "|---|---:|---:|---:|---:|---:|"]
    rows: dict[str, dict[str, Row]] = {}
    for task, (runs, kl) in tasks.items():
        of_task = rows_of(runs, kl)
        room, detectable = _room(of_task.get(TRUTH))
        values = " | ".join(_gain(of_task.get(name)) for name in (ALL, TRUTH))
        lines.append(f"| {task} | {kl:g} | {values} | {room} | {detectable} |")
        for rule, row in of_task.items():
            rows.setdefault(rule, {})[task] = row
    lines += ["", "Headroom closed, with its 95 % interval over seeds and prompts. 0: all tokens, 1: truth.", ""]
    lines += [f"| rule | {' | '.join(tasks)} |", "|---|" + "---:|" * len(tasks)]
    ranked = sorted((rule for rule in rows if rule not in ENDS), key=lambda rule: -_mean_closed(rows[rule]))
    lines += [f"| {rule} | {' | '.join(_closed(rows[rule].get(task)) for task in tasks)} |" for rule in ranked]
    lines += ["", "Gain at the KL; a star: some runs did not get there and count with their end.", ""]
    lines += [f"| rule | {' | '.join(tasks)} |", "|---|" + "---:|" * len(tasks)]
    lines += [
        f"| {rule} | {' | '.join(_gain(rows[rule].get(task)) for task in tasks)} |" for rule in (TRUTH, *ranked, ALL)
    ]
    return "\n".join(lines) + "\n"


def picture(tasks: Mapping[str, tuple[Sequence[Mapping[str, Any]], float]], out: Path) -> None:
    """Draw the headroom closed by each rule on each task into a PNG file."""
    found = {task: {name: row.closed for name, row in rows_of(runs, kl).items()} for task, (runs, kl) in tasks.items()}
    rules = [rule for rule in dict.fromkeys(rule for closed in found.values() for rule in closed) if rule not in ENDS]
    if not rules:
        return

    labelled: set[str] = set()

    def draw(axes: Axes) -> None:
        for column, rule in enumerate(rules):
            for index, task in enumerate(found):
                closed = found[task].get(rule)
                if closed is None or not math.isfinite(closed.low + closed.high):
                    continue
                at = column + (index - (len(found) - 1) / 2) * 0.12
                label = None if task in labelled else task
                labelled.add(task)
                axes.errorbar(
                    at, closed.value, [[closed.value - closed.low], [closed.high - closed.value]],
                    fmt="o", color=f"C{index}", label=label, markersize=4,
                )  # fmt: skip
        for height, name, beside in ((0, "all tokens", "top"), (1, "truth", "bottom")):
            axes.axhline(height, color=GREY, linewidth=1, linestyle=":")
            axes.text(len(rules) - 0.5, height, name, va=beside, ha="right", color=GREY, fontsize=8)
        # A rule that moves against the reward, on a task with little room, would press the others together.
        axes.set_ylim(bottom=max(axes.get_ylim()[0], LOWEST), top=max(axes.get_ylim()[1], 2.0))
        axes.set_xticks(range(len(rules)), rules)
        axes.set_ylabel("headroom closed")

    write_png(make_figure(draw, "Headroom closed by each rule", ""), out)


def _room(truth: Row | None) -> tuple[str, str]:
    if truth is None or truth.closed is None:
        return MISSING, MISSING
    room = truth.closed.room
    text = f"{room.mean:+.3f} ({room.low:+.3f} to {room.high:+.3f})"
    return text, f"{smallest_difference(room.error, room.freedom):.3f}" if room.error > 0 else MISSING


def _gain(row: Row | None) -> str:
    return MISSING if row is None else f"{row.gain:+.3f}" + "*" * (row.reached < row.seeds)


def _closed(row: Row | None) -> str:
    if row is None or row.closed is None:
        return MISSING
    closed = row.closed
    if not math.isfinite(closed.low + closed.high):
        return f"{closed.value:.2f} (room not found)"
    return f"{closed.value:.2f} ({closed.low:.2f} to {closed.high:.2f})"


def _mean_closed(rows: Mapping[str, Row]) -> float:
    values = [row.closed.value for row in rows.values() if row.closed is not None and math.isfinite(row.closed.value)]
    return float(np.mean(values)) if values else -math.inf
