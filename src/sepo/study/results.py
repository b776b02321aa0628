"""A comparison as a table and two pictures: what each method gained, at which KL, at what cost."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from sepo.evaluate.statistics import StdComponents, crossed_mean, interval, over_seeds, smallest_difference
from sepo.files import write_json, write_text
from sepo.report.figures import make_figure, write_png
from sepo.report.style import GREY, MARKERS, SERIES
from sepo.study.policy_evaluator import at_kl, at_kl_by_prompt, before_first_checkpoint, quality

_LEADING = re.compile(r"^[^=]*\.(?=[^.=]*=)")  # of policy.training.learning_rate=3e-05, all before learning_rate


def summarise_runs(runs: Sequence[Mapping[str, Any]], kl: float | None) -> list[dict[str, Any]]:
    """One row a setting: means and standard errors over its seeds, in the order of the runs.

    Args:
        runs: each with variant, label, seed, reported, points and costs, as `compare.json` holds them.
        kl: where curves are compared; None for the end of the runs.

    Returns:
        rows with variant, label, reported, seeds, and `X` and `X_se` for value (at `kl`, see `frontier.at_kl`), reached
        (number of runs that got as far as `kl`), unmeasured (number of runs whose checkpoints all lie beyond `kl`),
        final, final_kl, win_rate, length, train_seconds, memory_gb (the training's most, measurements apart),
        target_tokens, read_tokens, pairs_seen.
    """
    groups: dict[tuple[str, str, bool], list[Mapping[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["variant"], run["label"], run["reported"]), []).append(run)
    rows = []
    for (variant, label, reported), members in groups.items():
        row: dict[str, Any] = {"variant": variant, "label": label, "reported": reported, "seeds": len(members)}
        found = [at_kl(run["points"], kl) for run in members]
        row["reached"] = sum(reached for _, reached in found)
        row["unmeasured"] = sum(before_first_checkpoint(run["points"], kl) for run in members)
        columns: dict[str, list[float]] = {"value": [value for value, _ in found]}
        columns["final"] = [quality(run["points"][-1]) for run in members]
        columns["final_kl"] = [run["points"][-1]["kl"] for run in members]
        columns["win_rate"] = [rate for run in members if (rate := _win_rate(run["points"][-1])) is not None]
        columns["length"] = [run["points"][-1]["length"] for run in members if "length" in run["points"][-1]]
        columns["memory_gb"] = [most for run in members if (most := run["points"][-1].get("memory_gb")) is not None]
        for name in ("train_seconds", "pairs_seen"):
            columns[name] = [run["points"][-1][name] for run in members]
        for name in ("target_tokens", "read_tokens"):
            columns[name] = [run[name] for run in members]
        for name, values in columns.items():
            row[name], row[f"{name}_se"] = over_seeds(values)
        rows.append(row)
    return rows


def differences(runs: Sequence[Mapping[str, Any]], kl: float | None) -> list[dict[str, Any]]:
    """Every reported setting against the first, by the seeds and prompts that both have: they share random states.

    With three seeds or more and the values of every prompt, over seeds x prompts (`statistics.crossed_mean`): the
    interval is of other seeds and other prompts. Otherwise over the seeds' means, on these prompts.

    Args:
        runs, kl: as for `summarise_runs`.

    Returns:
        rows with name, against, seeds (at least 2), prompts (0 where only seeds are counted), difference of the values
        at `kl`, low and high (the 95 % interval), detectable (the minimum detectable difference at 80 % power), and
        with prompts spread, the fields of `StdComponents`.
    """
    points: dict[str, dict[int, Sequence[Mapping[str, Any]]]] = {}
    for run in runs:
        if run["reported"]:
            points.setdefault(_name(run), {})[run["seed"]] = run["points"]
    rows = []
    for name in list(points)[1:]:
        first = next(iter(points))
        both = [(points[name][seed], points[first][seed]) for seed in points[name] if seed in points[first]]
        if len(both) < 2:
            continue
        row = {"name": name, "against": first, "seeds": len(both)}
        rows.append({**row, **_difference(both, kl)})
    return rows


def _win_rate(point: Mapping[str, Any]) -> float | None:
    """How often the policy's answer is better than the start's: by the judge, else by the gold reward."""
    return point.get("judge_win_rate", point.get("win_rate"))


def _gain(comparison: Mapping[str, Any]) -> tuple[str, str]:
    """What curves show (`frontier.quality`), in short and in full."""
    if judge := comparison.get("judge"):
        return "gain of the judge's win rate", f"win rate against the start above one half, by the judge {judge}"
    if comparison["gold"]:
        return "gold gain", "mean gold reward above the start"
    return "accuracy gain", "held-out accuracy above one half"


def _difference(
    both: Sequence[tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]]], kl: float | None
) -> dict[str, Any]:
    """The difference of two settings from their checkpoints at each seed."""
    pairs = [(at_kl_by_prompt(one, kl), at_kl_by_prompt(other, kl)) for one, other in both]
    apart = [one - other for one, other in pairs if one is not None and other is not None and one.shape == other.shape]
    if len(apart) == len(both) >= 3 and len({len(one) for one in apart}) == 1 and len(apart[0]) > 1:
        found = crossed_mean(apart)
        figures: dict[str, Any] = {
            "prompts": len(apart[0]),
            "difference": found.mean,
            "low": found.low,
            "high": found.high,
        }
        figures |= {"spread": asdict(found.std)}
        error, freedom = found.error, found.freedom
    else:
        values = [at_kl(one, kl)[0] - at_kl(other, kl)[0] for one, other in both]
        mean, error = over_seeds(values)
        low, high = interval(mean, error, len(values))
        freedom = len(values) - 1
        figures = {"prompts": 0, "difference": mean, "low": low, "high": high, "spread": None}
    return {**figures, "detectable": smallest_difference(error, freedom) if error > 0 else 0.0}


def typical_std(differences: Iterable[Mapping[str, Any]]) -> StdComponents | None:
    """Root mean squares of the standard deviations in some differences; None if no row has any."""
    found = [row["spread"] for row in differences if row.get("spread")]
    if not found:
        return None
    return StdComponents(
        *(math.sqrt(float(np.mean([one[name] ** 2 for one in found]))) for name in ("seed", "prompt", "rest"))
    )


def power_line(seeds: int, prompts: int, std: StdComponents, source: str) -> str:
    """One line on the minimum detectable difference of a grid with these numbers of seeds and prompts.

    >>> print(power_line(3, 84, StdComponents(0.03, 0.1, 0.3), "assumed"))
    minimum detectable difference: 0.12 (80 % power, 3 seeds x 84 prompts; std assumed: seed 0.03, prompt 0.1, rest 0.3)
    """
    parts = f"std {source}: seed {std.seed:.2g}, prompt {std.prompt:.2g}, rest {std.rest:.2g}"
    if seeds < 3:
        return f"{seeds} seed{'s' * (seeds > 1)} cannot tell how seeds differ: for a comparison set three or more"
    smallest = smallest_difference(*std.error(seeds, prompts))
    return f"minimum detectable difference: {smallest:.2g} (80 % power, {seeds} seeds x {prompts} prompts; {parts})"


def best_setting(rows: Sequence[Mapping[str, Any]], variant: str) -> str:
    """Label of the variant's setting with the highest value at the comparison's KL; the first of equals."""
    return max((row for row in rows if row["variant"] == variant), key=lambda row: row["value"])["label"]


def write_comparison(
    head: Mapping[str, Any], runs: Sequence[Mapping[str, Any]], shared: Sequence[Mapping[str, Any]], folder: Path
) -> dict[str, Any]:
    """Write `compare.md`, the pictures and `compare.json` of some runs into a folder; returns the JSON's content.

    Args:
        head: name, kl, also_at, gold, judge (if there is one) and environment.
        runs: as for `summarise_runs`.
        shared: passes that runs have in common, each with stage, seconds and what.
    """
    kl = head["kl"]
    tables = {"rows": summarise_runs(runs, kl), "differences": differences(runs, kl)}
    comparison = {**head, **tables, "runs": list(runs), "shared": list(shared)}
    write_text(folder / "compare.md", comparison_markdown(comparison))
    save_comparison_figures(comparison, folder)
    write_json(folder / "compare.json", comparison, indent=1)
    return comparison


def comparison_markdown(comparison: Mapping[str, Any]) -> str:
    """The results as a Markdown page: reported settings, the sweep, what the shared passes cost."""
    kl, (short, full) = comparison["kl"], _gain(comparison)
    value = f"{short} at KL {kl:g}" if kl else "gain at the end"
    lines = [f"# {comparison['name']}", ""]
    lines.append(
        f"Gain: {full}; KL in nats a response; ± standard error over seeds (– for one seed)."
        + (
            " Curves are straight in the root of the KL. A value marked * has runs that did not get as far as the "
            "comparison's KL and count with their furthest point; one marked † has runs whose first checkpoint lies "
            "beyond it and which were not measured below."
            if kl
            else ""
        )
    )
    reported = [row for row in comparison["rows"] if row["reported"]]
    swept = [row for row in comparison["rows"] if not row["reported"]]
    for title, rows in (("Reported", reported), ("Sweep (one seed, used to choose)", swept)):
        if not rows:
            continue
        lines += ["", f"## {title}", ""]
        compared = f" {value} |" if kl else ""
        lines.append(
            f"| method | setting | seeds |{compared} gain at the end | KL at the end | win rate | tokens a response "
            "| pairs seen | target tokens | tokens read | training, s | peak, GB |"
        )
        lines.append("|---|---|" + "---:|" * (11 if kl else 10))
        for row in sorted(rows, key=lambda row: -row["value"]):
            marks = ("*" if row["reached"] < row["seeds"] else "") + ("†" if row["unmeasured"] else "")
            cells = [
                row["variant"],
                row["label"] or "–",
                str(row["seeds"]),
                *([_pm(row, "value", "+.3f") + marks] if kl else []),
                _pm(row, "final", "+.3f"),
                _pm(row, "final_kl", ".2f"),
                _pm(row, "win_rate", ".3f"),
                _pm(row, "length", ".1f"),
                *(f"{row[name]:,.0f}" for name in ("pairs_seen", "target_tokens", "read_tokens", "train_seconds")),
                "–" if math.isnan(row["memory_gb"]) else f"{row['memory_gb']:.2f}",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    if found := comparison["differences"]:
        more = {f"gain at KL {one:g}": differences(comparison["runs"], one) for one in comparison.get("also_at", [])}
        tables = {value: found} | more | ({"gain at the end": differences(comparison["runs"], None)} if kl else {})
        lines += ["", f"## Against {found[0]['against']}, seed by seed", ""]
        counted = (
            f"over seeds and {found[0]['prompts']} prompts" if found[0]["prompts"] else "over seeds, on these prompts"
        )
        lines += [f"Intervals are {counted}; *told* is what this design tells from 0 in four of five cases.", ""]
        headers = [f"difference of {name} | 95 % interval | told" for name in tables]
        lines += [f"| method | seeds | {' | '.join(headers)} |", "|---|---:|" + "---:|---:|---:|" * len(tables)]
        for method in zip(*tables.values(), strict=True):
            cells = [
                f"{row['difference']:+.3f} | {row['low']:+.3f} to {row['high']:+.3f} | {row['detectable']:.3f}"
                for row in method
            ]
            lines.append(f"| {method[0]['name']} | {method[0]['seeds']} | {' | '.join(cells)} |")
    if comparison["shared"]:
        lines += ["", "## Shared passes", "", "| pass | seconds | peak, GB | what |", "|---|---:|---:|---|"]
        for item in comparison["shared"]:
            held = "–" if item.get("memory_gb") is None else f"{item['memory_gb']:.2f}"
            lines.append(f"| {item['stage']} | {item['seconds']:,.0f} | {held} | {item['what']} |")
    environment = comparison["environment"]
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items())
    lines += ["", f"{environment['device']}; {packages}.", ""]
    return "\n".join(lines)


def reading_notes(rows: Sequence[Mapping[str, Any]], kl: float | None) -> list[str]:
    """What weakens the values at `kl` of the reported settings, a line each; none without a KL to compare at."""

    def settings(counts: Iterable[int]) -> str:
        named = zip(reported, counts, strict=True)
        return ", ".join(f"{count} of {row['variant']} {row['label']}".strip() for row, count in named if count)

    reported = [row for row in rows if row["reported"]]
    notes = []
    if early := settings(row["unmeasured"] for row in reported):
        notes.append(
            f"not measured below KL {kl:g}, so read off the shape of the curve: {early}; add earlier checkpoints"
        )
    if kl is not None and (short := settings(row["seeds"] - row["reached"] for row in reported)):
        notes.append(f"did not get as far as KL {kl:g} and count with their furthest point: {short}")
    return notes


def _pm(row: Mapping[str, Any], name: str, form: str) -> str:
    if math.isnan(row[name]):
        return "–"
    error = row[f"{name}_se"]
    return f"{row[name]:{form}}" + ("" if math.isnan(error) else f" ± {error:{form.lstrip('+')}}")


def mean_curve(runs: Sequence[Mapping[str, Any]], steps: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """KLs up to the one that all runs got to, and the mean of their gains there, as tables read them (`at_kl`)."""
    reached = max(min(max(point["kl"] for point in run["points"]) for run in runs), 0.0)
    kls = np.linspace(0, math.sqrt(reached), steps) ** 2
    return kls, np.array([np.mean([at_kl(run["points"], kl)[0] for run in runs]) for kl in kls])


def save_comparison_figures(comparison: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw `frontier.png`, gain against KL of every reported run, and `win-rate.png` (with a judge or gold reward).

    Of three runs of a setting and more the mean is drawn bold, up to the KL that all got to, and their mean end with
    its standard errors; the runs themselves stay behind it, faint.
    """
    runs = [run for run in comparison["runs"] if run["reported"]] or list(comparison["runs"])
    names = list(dict.fromkeys(_name(run) for run in runs))
    style: dict[str, dict[str, Any]] = {
        name: {"color": SERIES[i % len(SERIES)], "marker": MARKERS[i % len(MARKERS)]} for i, name in enumerate(names)
    }

    def frontier(axes: Axes) -> None:
        for name in names:
            members = [run for run in runs if _name(run) == name]
            several = len(members) > 2
            for index, run in enumerate(members):
                at = [0.0, *(max(point["kl"], 0.0) for point in run["points"])]
                gained = [0.0, *(quality(point) for point in run["points"])]
                label = name if index == 0 and not several else None
                alpha, width, size = (0.25, 0.7, 2.5) if several else (0.8, 1, 4)
                axes.plot(at, gained, **style[name], label=label, alpha=alpha, linewidth=width, markersize=size)
            if several:
                axes.plot(*mean_curve(members), color=style[name]["color"], linewidth=2)
                ends = [(max(run["points"][-1]["kl"], 0.0), quality(run["points"][-1])) for run in members]
                (kl, kl_error), (gain, gain_error) = (over_seeds(values) for values in zip(*ends, strict=True))
                axes.errorbar(
                    kl, gain, xerr=kl_error, yerr=gain_error, fmt=style[name]["marker"], color=style[name]["color"],
                    label=name, markersize=6, elinewidth=1,
                )  # fmt: skip
        if comparison["kl"]:
            axes.axvline(comparison["kl"], color=GREY, linewidth=0.8, linestyle=":")
        axes.axhline(0, color=GREY, linewidth=0.8)
        # As curves are read (`at_kl`): what is straight between two checkpoints is what is read between them.
        axes.set_xscale("function", functions=(lambda kl: np.sqrt(np.maximum(kl, 0)), np.square))
        axes.set_xlim(left=0)

    def win_rates(axes: Axes) -> None:
        for place, name in enumerate(names):
            last = [run["points"][-1] for run in runs if _name(run) == name]
            values = [rate for point in last if (rate := _win_rate(point)) is not None]
            mean, error = over_seeds(values)
            axes.errorbar(
                mean, place, xerr=None if math.isnan(error) else error, fmt=style[name]["marker"],
                color=style[name]["color"], capsize=3,
            )  # fmt: skip
            axes.plot(values, [place] * len(values), "|", color=style[name]["color"], alpha=0.6)
        axes.axvline(0.5, color=GREY, linewidth=0.8, linestyle=":")
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()

    gain = "Gold reward above the start" if comparison["gold"] else "Held-out accuracy above one half"
    if comparison.get("judge"):
        gain = "The judge's win rate above one half"
    figures = {"frontier": make_figure(frontier, "KL from the start, nats a response", gain, legend_beside=True)}
    if comparison["gold"] or comparison.get("judge"):
        figures["win-rate"] = make_figure(win_rates, "Win rate against the start", "")
    for stem, figure in figures.items():
        width, height = (8.0, 4.0) if stem == "frontier" else (6.4, 3.0)
        figure.set_size_inches(width, max(0.28 * len(names) + 1, height))
    return [write_png(figure, folder / f"{stem}.png") for stem, figure in figures.items()]


def _name(run: Mapping[str, Any]) -> str:
    short = " ".join(_LEADING.sub("", part) for part in run["label"].split(" "))
    return f"{run['variant']} {short}".strip()
