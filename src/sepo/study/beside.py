"""Trained methods beside baselines without training: at a baseline's KL, does a trained method gain more?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from sepo.numbers import MISSING, with_error
from sepo.report.figures import GREY
from sepo.report.statistics import over_seeds
from sepo.study.crossed import paired_difference
from sepo.study.curves import at_kl, at_kl_by_prompt, quality, reaches

_MARKS = {"best_of": "*", "steer": "X"}

Point = Mapping[str, Any]


def against_baselines(
    curves: Mapping[str, Mapping[int, Sequence[Point]]], baselines: Sequence[Point]
) -> list[dict[str, Any]]:
    """For each baseline the trained method that gains most at the baseline's KL, and their difference.

    Args:
        curves: method → seed → checkpoints.
        baselines: points of `baselines.measure`, each with its seed.

    Returns:
        Rows with name, kind, seeds, kl and gain (means over seeds) with `_se`, method, value (its gain at the KL),
        reached (number of seeds at which it reached the KL), and the keys of `crossed.paired_difference` for method
        minus baseline. Without a method at the same seeds, method is None.
    """
    names = dict.fromkeys(point["name"] for point in baselines)
    return [_row([point for point in baselines if point["name"] == name], curves) for name in names]


def _row(points: Sequence[Point], curves: Mapping[str, Mapping[int, Sequence[Point]]]) -> dict[str, Any]:
    """The row of one baseline, from its point at each seed."""
    row: dict[str, Any] = {"name": points[0]["name"], "kind": points[0]["kind"], "seeds": len(points), "method": None}
    row["kl"], row["kl_se"] = over_seeds([point["kl"] for point in points])
    row["gain"], row["gain_se"] = over_seeds([quality(point) for point in points])
    by_method = {
        name: [(point, runs[point["seed"]]) for point in points if point["seed"] in runs]
        for name, runs in curves.items()
    }
    values = {
        name: float(np.mean([at_kl(run, _kl(point))[0] for point, run in pairs]))
        for name, pairs in by_method.items()
        if len(pairs) == len(points)
    }
    if not values:
        return row
    best = max(values, key=lambda name: values[name])
    pairs = by_method[best]
    row |= {"method": best, "value": values[best]}
    row["reached"] = sum(reaches(run, _kl(point)) for point, run in pairs)
    gaps = [_gap(point, run) for point, run in pairs]
    return row | paired_difference(gaps, [at_kl(run, _kl(point))[0] - quality(point) for point, run in pairs])


def _kl(point: Point) -> float:
    """The KL of a baseline; an estimate below 0 counts as 0."""
    return max(point["kl"], 0.0)


def _gap(point: Point, run: Sequence[Point]) -> np.ndarray | None:
    """Gain of a run at a baseline's KL minus the baseline's, `[prompts]`; None without values by prompt."""
    trained, untrained = at_kl_by_prompt(run, _kl(point)), point.get("by_prompt")
    if trained is None or untrained is None or len(trained) != len(untrained):
        return None
    return trained - np.array(untrained)


def above(row: Mapping[str, Any]) -> str:
    """Is the trained method above the baseline: yes, no, inconclusive, or not known (no interval)?"""
    if row["method"] is None or row["low"] is None:
        return "not known"
    return "yes" if row["low"] > 0 else "no" if row["high"] < 0 else "inconclusive"


def baselines_section(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table of `against_baselines` as lines of Markdown, below one sentence."""
    lines = ["", "## Baselines without training", "", in_a_sentence(rows), ""]
    lines += [
        "Each baseline is one point. *Trained* is the method that gains most at that KL, which favours training. Best "
        "of n: the KL is its upper bound, and the choice by the gold reward knows what is measured.",
        "",
        "| baseline | KL | gain | trained | its gain at this KL | difference | 95 % interval | detectable | above |",
        "|---|---:|---:|---|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        bound = "≤ " if row["kind"] == "best_of" else ""
        cells = [row["name"], f"{bound}{row['kl']:.2f}", with_error(row["gain"], row["gain_se"], "+.3f")]
        if row["method"] is None:
            cells += [MISSING] * 5
        else:
            star = "*" if row["reached"] < row["seeds"] else ""
            span = MISSING if row["low"] is None else f"{row['low']:+.3f} to {row['high']:+.3f}"
            difference = MISSING if row["difference"] is None else f"{row['difference']:+.3f}"
            detectable = MISSING if row["detectable"] is None else f"{row['detectable']:.3f}"
            cells += [row["method"], f"{row['value']:+.3f}{star}", difference, span, detectable]
        lines.append(f"| {' | '.join([*cells, above(row)])} |")
    return lines


def in_a_sentence(rows: Sequence[Mapping[str, Any]]) -> str:
    """Whether a trained method lies above the baselines at their KL."""
    groups: dict[str, list[str]] = {}
    for row in rows:
        groups.setdefault(above(row), []).append(row["name"])
    if set(groups) == {"yes"}:
        return "A trained method gains more than every baseline at the baseline's KL."
    words = {
        "yes": "a trained method gains more at its KL",
        "no": "no trained method gains as much at its KL, so training was not worth it here",
        "inconclusive": "inconclusive",
        "not known": "not known; set three seeds or more",
    }
    return (
        "; ".join(f"{', '.join(groups[verdict])}: {text}" for verdict, text in words.items() if verdict in groups) + "."
    )


def draw_baselines(axes: Axes, baselines: Sequence[Point]) -> None:
    """Draw the baselines into the plane of gain and KL: a mark at the means over seeds, with its errors."""
    for name in dict.fromkeys(point["name"] for point in baselines):
        points = [point for point in baselines if point["name"] == name]
        (kl, _), (gain, error) = (over_seeds(of) for of in zip(*((p["kl"], quality(p)) for p in points), strict=True))
        several = len(points) > 1
        axes.errorbar(
            kl, gain, yerr=error if several else None, fmt=_MARKS[points[0]["kind"]], color=GREY, markersize=7, zorder=3
        )
        axes.annotate(_short(name), (kl, gain), textcoords="offset points", xytext=(6, -9), fontsize=7, color=GREY)


def _short(name: str) -> str:
    """The label of a mark.

    >>> _short("best of 8 by the oracle"), _short("steering by 0.5 of the oracle")
    ('best of 8, oracle', 'steering 0.5')
    """
    if name.startswith("steering"):
        return f"steering {name.split()[2]}"
    return name.replace(" by the ", ", ")
