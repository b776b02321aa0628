"""The results of a comparison as JSON, Markdown, HTML and two figures: verdict, gain, KL and cost of each method."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from sepo.files import write_json, write_text
from sepo.numbers import MISSING, NO_SPREAD, number, with_error
from sepo.report.build import page_style
from sepo.report.documents import html_document
from sepo.report.figures import GREY, MARKERS, SERIES, make_figure, write_png
from sepo.report.statistics import over_seeds, spread_seen
from sepo.study.beside import against_baselines, baselines_section, draw_baselines
from sepo.study.crossed import StdComponents, paired_difference, smallest_difference
from sepo.study.curves import (
    at_ceiling,
    at_kl,
    at_kl_by_prompt,
    before_first_checkpoint,
    ceiling_at_kl,
    quality,
    reaches,
)

# The sections of a setting: policy.training. of policy.training.learning_rate=3e-05.
_SECTIONS = re.compile(r"^[^=]*\.(?=[^.=]*=)")
# Readable names of shared stages, by the kind at the start of their folder's name.
_STAGES = {
    "data": "pairs", "reference": "reference", "oracle": "oracle", "score": "token rewards", "select": "selection",
    "logps": "log-probabilities", "start": "samples of the start", "transfer": "transferred rewards",
    "baselines": "baselines",
}  # fmt: skip


def summarise_runs(runs: Sequence[Mapping[str, Any]], kl: float | None) -> list[dict[str, Any]]:
    """One row per setting: means and standard errors over its seeds, in the order of the runs.

    Args:
        runs: each with variant, label, seed, reported, points and costs, as in `compare.json`.
        kl: where curves are compared; None for the end of the runs.

    Returns:
        Rows with variant, label, reported, seeds, reached (number of runs that reached `kl`), unmeasured (number of
        runs whose checkpoints are all beyond `kl`), ceiling (number of runs that end at the highest gain there is), and
        `X` and `X_se` for value (at `kl`, see `curves.at_kl`), final, final_kl, win_rate, length, train_seconds,
        memory_gb (peak of the training without measurements), target_tokens, read_tokens and pairs_seen.
    """
    groups: dict[tuple[str, str, bool], list[Mapping[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["variant"], run["label"], run["reported"]), []).append(run)
    rows = []
    for (variant, label, reported), members in groups.items():
        row: dict[str, Any] = {"variant": variant, "label": label, "reported": reported, "seeds": len(members)}
        values = [at_kl(run["points"], kl) for run in members]
        row["reached"] = sum(reached for _, reached in values)
        row["unmeasured"] = sum(before_first_checkpoint(run["points"], kl) for run in members)
        last = [run["points"][-1] for run in members]
        row["ceiling"] = sum(map(at_ceiling, last))
        columns: dict[str, list[float]] = {"value": [value for value, _ in values]}
        columns["final"] = [quality(point) for point in last]
        columns["final_kl"] = [point["kl"] for point in last]
        columns["win_rate"] = [rate for point in last if (rate := _win_rate(point)) is not None]
        columns["length"] = [point["length"] for point in last if "length" in point]
        columns["memory_gb"] = [peak for point in last if (peak := point.get("memory_gb")) is not None]
        for name in ("train_seconds", "pairs_seen"):
            columns[name] = [point[name] for point in last]
        for name in ("target_tokens", "read_tokens"):
            columns[name] = [run[name] for run in members]
        for name, column in columns.items():
            row[name], row[f"{name}_se"] = over_seeds(column)
        rows.append(row)
    return rows


def differences(runs: Sequence[Mapping[str, Any]], kl: float | None) -> list[dict[str, Any]]:
    """Paired differences of every reported setting to the first, over the seeds and prompts that both have.

    With three seeds or more and values by prompt, the interval covers other seeds and other prompts
    (`statistics.crossed_mean`). Otherwise it covers other seeds, on these prompts.

    Args:
        runs, kl: as for `summarise_runs`.

    Returns:
        Rows with name, against, seeds (at least 2), prompts (0 if only seeds are counted), reached (number of seeds at
        which both runs reached `kl`), ceiling (whether all these runs have the highest gain there is), difference of
        the values at `kl`, low and high (95 % interval), detectable (the minimum detectable difference at 80 % power),
        and std, the standard deviations by seed, prompt and rest (None without prompts). Where no run reached `kl`,
        difference, interval and detectable are None; without spread, interval and detectable are.
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
    """Win rate against the start, by the judge, else by the gold reward."""
    return point.get("judge_win_rate", point.get("win_rate"))


def _gain(comparison: Mapping[str, Any]) -> tuple[str, str]:
    """The gain (`curves.quality`) in short and in full."""
    if judge := comparison.get("judge"):
        return "gain of the judge's win rate", f"win rate against the start minus one half, by the judge {judge}"
    if comparison["gold"]:
        return "gold gain", "mean gold reward minus that of the start"
    return "accuracy gain", "held-out accuracy minus one half, every prompt with the same weight"


def _difference(
    both: Sequence[tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]]], kl: float | None
) -> dict[str, Any]:
    """The difference of two settings, from their checkpoints at each seed."""
    runs = [points for pair in both for points in pair]
    row: dict[str, Any] = {
        "prompts": 0, "reached": sum(reaches(points, kl) and reaches(against, kl) for points, against in both),
        "ceiling": False, "difference": None, "low": None, "high": None, "detectable": None, "std": None,
    }  # fmt: skip
    if not any(reaches(points, kl) for points in runs):
        return row
    row["ceiling"] = all(ceiling_at_kl(points, kl) for points in runs)
    by_prompt = [(at_kl_by_prompt(points, kl), at_kl_by_prompt(against, kl)) for points, against in both]
    gaps = [a - b if a is not None and b is not None and a.shape == b.shape else None for a, b in by_prompt]
    values = [at_kl(points, kl)[0] - at_kl(against, kl)[0] for points, against in both]
    return {**row, **paired_difference(gaps, values)}


def _reported(runs: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The reported runs of each setting, by its name."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        if run["reported"]:
            groups.setdefault(_name(run), []).append(run)
    return groups


def typical_std(differences: Iterable[Mapping[str, Any]]) -> StdComponents | None:
    """Root mean squares of the standard deviations of several differences; None if no row has them.

    Few seeds hardly show how much seeds differ: their component is often estimated at 0 or below. So the rest's share
    in a seed's mean is not subtracted from it. A comparison planned by these numbers then has at least the power that
    it claims.
    """
    rows = [(row["std"], row["prompts"]) for row in differences if row.get("std") and any(row["std"].values())]
    if not rows:
        return None
    seed = [std["seed"] ** 2 + std["rest"] ** 2 / prompts for std, prompts in rows]
    others = ([std[name] ** 2 for std, _ in rows] for name in ("prompt", "rest"))
    return StdComponents(*(math.sqrt(float(np.mean(squares))) for squares in (seed, *others)))


def power_line(seeds: int, prompts: int, std: StdComponents, source: str) -> str:
    """The minimum detectable difference of a grid, in one line.

    >>> print(power_line(3, 84, StdComponents(0.03, 0.1, 0.3), "assumed").replace("; ", ";\\n"))
    minimum detectable difference: 0.13 (80 % power, 3 seeds x 84 prompts;
    standard deviations assumed: seed 0.03, prompt 0.1, rest 0.3)
    """
    if seeds < 3:
        return f"minimum detectable difference: not known with {seeds} seed{'s' * (seeds > 1)}; set three or more"
    if prompts < 2:
        return "minimum detectable difference: not known with one prompt; set eval.prompts to two or more"
    detectable = smallest_difference(*std.error(seeds, prompts))
    parts = f"seed {std.seed:.2g}, prompt {std.prompt:.2g}, rest {std.rest:.2g}"
    design = f"80 % power, {seeds} seeds x {prompts} prompts"
    return f"minimum detectable difference: {detectable:.2g} ({design}; standard deviations {source}: {parts})"


def best_setting(rows: Sequence[Mapping[str, Any]], variant: str) -> str:
    """Label of the variant's setting with the highest value at the comparison's KL, the first among equals.

    A value that is not a number is the lowest.
    """
    of_variant = [row for row in rows if row["variant"] == variant]
    return max(of_variant, key=lambda row: -math.inf if math.isnan(row["value"]) else row["value"])["label"]


def write_comparison(
    head: Mapping[str, Any],
    runs: Sequence[Mapping[str, Any]],
    shared: Sequence[Mapping[str, Any]],
    folder: Path,
    figures: bool = True,
) -> dict[str, Any]:
    """Write `compare.md`, the figures, `compare.html` and `compare.json` into a folder; returns the JSON's content.

    Args:
        head: name, kl, also_at, gold, judge (if there is one), environment, failed (runs that diverged), and baselines
            (points of `baselines.measure` with their seeds), if the grid has any.
        runs: as for `summarise_runs`.
        shared: stages that the runs share, each with stage, seconds and what.
        figures: False leaves the figures as they are.
    """
    kl = head["kl"]
    tables = {"rows": summarise_runs(runs, kl), "differences": differences(runs, kl)}
    if baselines := head.get("baselines"):
        curves = {name: {run["seed"]: run["points"] for run in of} for name, of in _reported(runs).items()}
        tables["against_baselines"] = against_baselines(curves, baselines)
    comparison = {**head, **tables, "runs": list(runs), "shared": list(shared)}
    text = comparison_markdown(comparison)
    write_text(folder / "compare.md", text)
    if figures and runs:
        save_comparison_figures(comparison, folder)
    pictures = "\n## Curves\n\n![curves](frontier.png)\n\n![win rates](win-rate.png)\n"
    page = text.replace("\n## Reported", f"{pictures}\n## Reported", 1)
    write_text(folder / "compare.html", html_document(page, folder, page_style()))
    write_json(folder / "compare.json", comparison, indent=1)
    return comparison


def comparison_markdown(comparison: Mapping[str, Any]) -> str:
    """The results as a Markdown page: reported settings, sweep, differences, cost of the shared stages."""
    kl, (short, full) = comparison["kl"], _gain(comparison)
    value = f"{short} at KL {kl:g}" if kl else "gain at the end"
    intro = f"Gain: {full}; KL in nats per response; ± standard error over seeds (none for one seed)."
    if kl:
        intro += (
            " Curves are interpolated linearly in sqrt(KL). * marks values with runs that did not reach the KL of the "
            "comparison and count with their furthest point; † marks values with runs whose first checkpoint is beyond "
            "it."
        )
    lines = [f"# {comparison['name']}", "", *verdicts(comparison), intro]
    reported = [row for row in comparison["rows"] if row["reported"]]
    swept = [row for row in comparison["rows"] if not row["reported"]]
    for title, rows in (("Reported", reported), ("Sweep (one seed, used to choose)", swept)):
        if rows:
            lines += ["", f"## {title}", "", *_settings_table(rows, value if kl else None)]
    if failed := comparison.get("failed"):
        lines += ["", "## Failed", "", "| method | setting | seed | why |", "|---|---|---:|---|"]
        lines += [f"| {run['variant']} | {run['label'] or '–'} | {run['seed']} | {run['error']} |" for run in failed]
    if comparison["differences"]:
        lines += _differences_section(comparison, value)
    if beside := comparison.get("against_baselines"):
        lines += baselines_section(beside)
    if comparison["shared"]:
        lines += ["", "## Shared stages", "", "| stage | seconds | peak, GB | content | folder |"]
        lines += ["|---|---:|---:|---|---|"]
        for item in comparison["shared"]:
            peak, name = number(item.get("memory_gb"), ".2f"), item["stage"]
            kind = _STAGES.get(name.split("-")[0], name.split("-")[0])
            lines.append(f"| {kind} | {item['seconds']:,.0f} | {peak} | {item['what']} | shared/{name} |")
    environment = comparison["environment"]
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items())
    lines += ["", f"{environment['device']}; {packages}.", ""]
    return "\n".join(lines)


def _settings_table(rows: Sequence[Mapping[str, Any]], value: str | None) -> list[str]:
    """The rows of `summarise_runs`, best first; `value` heads the column of the values at the comparison's KL."""
    compared = f" {value} |" if value else ""
    lines = [
        f"| method | setting | seeds |{compared} gain at the end | KL at the end | win rate | tokens per response "
        "| pairs seen | target tokens | tokens read | training, s | peak, GB |",
        "|---|---|" + "---:|" * (11 if value else 10),
    ]
    for row in sorted(rows, key=lambda row: math.inf if math.isnan(row["value"]) else -row["value"]):
        marks = ("*" if row["reached"] < row["seeds"] else "") + ("†" if row["unmeasured"] else "")
        cells = [
            row["variant"],
            row["label"] or "–",
            str(row["seeds"]),
            *([with_error(row["value"], row["value_se"], "+.3f") + marks] if value else []),
            with_error(row["final"], row["final_se"], "+.3f"),
            *(
                with_error(row[name], row[f"{name}_se"] if spread_seen(row[f"{name}_se"]) else None, form)
                for name, form in (("final_kl", ".2f"), ("win_rate", ".3f"), ("length", ".1f"))
            ),
            *(f"{row[name]:,.0f}" for name in ("pairs_seen", "target_tokens", "read_tokens", "train_seconds")),
            number(row["memory_gb"], ".2f"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _differences_section(comparison: Mapping[str, Any], value: str) -> list[str]:
    """Differences to the first setting at the comparison's KL, at those of `also_at`, and at the end."""
    rows, runs = comparison["differences"], comparison["runs"]
    tables = {value: rows}
    tables |= {f"gain at KL {kl:g}": differences(runs, kl) for kl in comparison.get("also_at", [])}
    if comparison["kl"]:
        tables["gain at the end"] = differences(runs, None)
    covers = (
        f"other seeds and prompts ({rows[0]['prompts']} prompts)"
        if rows[0]["prompts"]
        else "other seeds, on these prompts"
    )
    lines = ["", f"## Against {rows[0]['against']}, paired by seed", ""]
    inconclusive = "A difference is *inconclusive* if its interval contains 0."
    detectable = "*Detectable* is the minimum detectable difference at 80 % power."
    lines += [f"Intervals cover {covers}. {inconclusive} {detectable}", ""]
    headers = [f"difference of {name} | 95 % interval | detectable" for name in tables]
    lines += [f"| method | seeds | {' | '.join(headers)} |", "|---|---:|" + "---:|---:|---:|" * len(tables)]
    for method in zip(*tables.values(), strict=True):
        cells = [_difference_cells(row) for row in method]
        lines.append(f"| {method[0]['name']} | {method[0]['seeds']} | {' | '.join(cells)} |")
    return lines


def _difference_cells(row: Mapping[str, Any]) -> str:
    """Difference, interval and minimum detectable difference of a row of `differences`, as cells of a table."""
    if row["difference"] is None:
        return f"{difference_text(row)} | {MISSING} | {MISSING}"
    difference = f"{row['difference']:+.3f}{_star(row)}"
    if row["low"] is None:
        return f"{difference} | {_without_spread(row)} | {MISSING}"
    return f"{difference} | {row['low']:+.3f} to {row['high']:+.3f} | {row['detectable']:.3f}"


def difference_text(row: Mapping[str, Any]) -> str:
    """A row of `differences` in short."""
    if row["difference"] is None:
        return "not measured" if row["reached"] else "not reached"
    if row["low"] is None:
        return f"{row['difference']:+.3f}, {_without_spread(row)}"
    return f"{row['difference']:+.3f}, 95 % interval {row['low']:+.3f} to {row['high']:+.3f}"


def _star(row: Mapping[str, Any]) -> str:
    """The mark of a difference in which a run did not reach the KL."""
    return "*" if row["reached"] < row["seeds"] else ""


def _without_spread(row: Mapping[str, Any]) -> str:
    return f"{NO_SPREAD}, all runs at the ceiling" if row["ceiling"] else NO_SPREAD


def verdicts(comparison: Mapping[str, Any]) -> list[str]:
    """The section of the page that says in words which methods differ."""
    at = f"KL {comparison['kl']:g}" if comparison["kl"] else "the end of the runs"
    lines = [_verdict(row, at) for row in comparison["differences"]]
    if not lines:
        reported = {_name(row) for row in comparison["rows"] if row["reported"]}
        if len(reported) < 2:
            return []
        lines = ["No verdict: no two methods have two seeds in common. Set three seeds or more."]
    return ["## Verdict", "", *(f"- {line}" for line in lines), ""]


def _verdict(row: Mapping[str, Any], at: str) -> str:
    """A row of `differences` in words."""
    name, against = row["name"], row["against"]
    if row["difference"] is None:
        why = "a gain is not a number" if row["reached"] else f"no run of it or of {against} got there"
        return f"{name}: no verdict at {at}; {why}."
    if row["low"] is None:
        why = "all runs are at the ceiling" if row["ceiling"] else NO_SPREAD
        return f"{name}: no verdict at {at}; {why} in {row['seeds']} seeds."
    span = difference_text(row)
    reach = " Not every run reached this KL." if _star(row) else ""
    if row["low"] <= 0 <= row["high"]:
        return (
            f"{name}: inconclusive against {against} at {at} ({span}); the minimum detectable difference is "
            f"{row['detectable']:.3f}.{reach}"
        )
    word = "more" if row["difference"] > 0 else "less"
    return f"{name} gains {word} than {against} at {at} ({span}).{reach}"


def reading_notes(rows: Sequence[Mapping[str, Any]], kl: float | None) -> list[str]:
    """Limitations of the reported settings' values at `kl`, a line each."""

    def settings(counts: Iterable[int]) -> str:
        named = zip(reported, counts, strict=True)
        return ", ".join(f"{count} of {row['variant']} {row['label']}".strip() for row, count in named if count)

    reported = [row for row in rows if row["reported"]]
    notes = []
    if early := settings(row["unmeasured"] for row in reported):
        notes.append(f"not measured below KL {kl:g}, so interpolated from the start: {early}; add earlier checkpoints")
    if kl is not None and (short := settings(row["seeds"] - row["reached"] for row in reported)):
        notes.append(f"did not reach KL {kl:g} and count with their furthest point: {short}")
    if full := settings(row["ceiling"] for row in reported):
        notes.append(f"end at the highest gain there is, so they can show no difference to a better method: {full}")
    return notes


def mean_curve(runs: Sequence[Mapping[str, Any]], steps: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """KLs up to the highest KL that all runs reached, and the mean gain of the runs at these KLs (`at_kl`)."""
    reached = max(min(max(point["kl"] for point in run["points"]) for run in runs), 0.0)
    kls = np.linspace(0, math.sqrt(reached), steps) ** 2
    return kls, np.array([np.mean([at_kl(run["points"], kl)[0] for run in runs]) for kl in kls])


def save_comparison_figures(comparison: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw `frontier.png`, gain against KL of every reported run, and `win-rate.png` (with a judge or gold reward)."""
    runs = [run for run in comparison["runs"] if run["reported"]] or list(comparison["runs"])
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        groups.setdefault(_name(run), []).append(run)
    styles: dict[str, dict[str, Any]] = {
        name: {"color": SERIES[i % len(SERIES)], "marker": MARKERS[i % len(MARKERS)]} for i, name in enumerate(groups)
    }

    def frontier(axes: Axes) -> None:
        for name, members in groups.items():
            _draw_curves(axes, name, members, styles[name])
        draw_baselines(axes, comparison.get("baselines", ()))
        if kl := comparison["kl"]:
            axes.axvline(kl, color=GREY, linewidth=0.8, linestyle=":", label=f"KL {kl:g}, where methods are compared")
        axes.axhline(0, color=GREY, linewidth=0.8)
        # `at_kl` interpolates linearly in sqrt(KL), so its lines are straight on this axis. Its sign is kept: an
        # estimate of a KL near 0 may be below 0.
        axes.set_xscale("function", functions=(lambda x: np.sign(x) * np.sqrt(np.abs(x)), lambda x: np.sign(x) * x**2))
        axes.set_xlim(left=min(0.0, *(1.1 * point["kl"] for run in runs for point in run["points"])))

    def win_rates(axes: Axes) -> None:
        for place, (name, members) in enumerate(groups.items()):
            values = [rate for run in members if (rate := _win_rate(run["points"][-1])) is not None]
            mean, error = over_seeds(values)
            axes.errorbar(
                mean, place, xerr=error if spread_seen(error) else None, fmt=styles[name]["marker"],
                color=styles[name]["color"], capsize=3,
            )  # fmt: skip
            axes.plot(values, [place] * len(values), "|", color=styles[name]["color"], alpha=0.6)
        axes.axvline(0.5, color=GREY, linewidth=0.8, linestyle=":")
        axes.set_yticks(range(len(groups)), list(groups))
        axes.invert_yaxis()

    gain = "Gold reward above the start" if comparison["gold"] else "Held-out accuracy above one half"
    if comparison.get("judge"):
        gain = "Judge's win rate above one half"
    figures = {"frontier": make_figure(frontier, "KL from the start, nats per response", gain, legend_beside=True)}
    if comparison["gold"] or comparison.get("judge"):
        figures["win-rate"] = make_figure(win_rates, "Win rate against the start", "")
    for stem, figure in figures.items():
        width, height = (8.0, 4.0) if stem == "frontier" else (6.4, 3.0)
        figure.set_size_inches(width, max(0.28 * len(groups) + 1, height))
    return [write_png(figure, folder / f"{stem}.png") for stem, figure in figures.items()]


def _draw_curves(axes: Axes, name: str, runs: Sequence[Mapping[str, Any]], style: Mapping[str, Any]) -> None:
    """Draw the curves of a setting's runs. From three runs on the runs are faint, and their mean curve is bold, up to
    the KL that all reached, with their mean end and its standard errors.
    """
    several = len(runs) > 2
    alpha, width, size = (0.25, 0.7, 2.5) if several else (0.8, 1, 4)
    for index, run in enumerate(runs):
        kls = [0.0, *(point["kl"] for point in run["points"])]
        gains = [0.0, *(quality(point) for point in run["points"])]
        label = name if index == 0 and not several else None
        axes.plot(kls, gains, **style, label=label, alpha=alpha, linewidth=width, markersize=size)
    if several:
        axes.plot(*mean_curve(runs), color=style["color"], linewidth=2)
        ends = [(run["points"][-1]["kl"], quality(run["points"][-1])) for run in runs]
        (kl, kl_error), (gain, gain_error) = (over_seeds(values) for values in zip(*ends, strict=True))
        axes.errorbar(
            kl, gain, xerr=kl_error, yerr=gain_error, fmt=style["marker"], color=style["color"], label=name,
            markersize=6, elinewidth=1,
        )  # fmt: skip


def _name(run: Mapping[str, Any]) -> str:
    """A setting's name in tables and figures: the variant, and its swept settings without their sections."""
    short = " ".join(_SECTIONS.sub("", part) for part in run["label"].split(" "))
    return f"{run['variant']} {short}".strip()
